"""What was measured: how long units compute, wait, and take to copy."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import TYPE_CHECKING, Any, Final, final

if TYPE_CHECKING:
    from lowbits.streaming.device_ops import DeviceOps
    from lowbits.streaming.stored import Stored

#: Bytes per second that a link is taken to move until copies were timed.
_BANDWIDTH: Final = 8e9

#: Share of the newest measurement in a running mean.
_NEWEST: Final = 0.5

#: A pass of so many times the usual is probably the driver moving device memory to the host.
_SPILL_FACTOR: Final = 3.0

_KEPT_PASSES: Final = 32

#: Methods of the passes of a trial; the first one is traced, and does not count.
_TRIAL: Final = ("async", "async", "async", "queue", "queue")


@final
class Timing:
    """Running means, from events that may not have happened yet when they are noted.

    Attributes:
        passes: completed ones.
        slow_passes: those that took more than three times the median.
        walls: seconds of the last passes.
        bandwidth: bytes that were copied per second.
        outside_s: seconds of a pass that are no unit's, a running mean; 0 until a pass was timed.
    """

    def __init__(self, ops: DeviceOps) -> None:
        self.passes = self.slow_passes = 0
        self.walls: deque[float] = deque(maxlen=_KEPT_PASSES)
        self.bandwidth = _BANDWIDTH
        self._copied_bytes = self._copy_s = 0.0
        self._ops = ops
        self.outside_s = self._inside_s = 0.0
        self._begin: Any = None
        self._last_use: Any = None
        # Uses of units, and passes behind the uses that they are made of.
        self._marks: deque[tuple[Stored | None, Any, Any, Any]] = deque()

    def begin_pass(self) -> None:
        """Note the beginning of a pass."""
        self._begin = self._ops.mark_computed()

    def end_pass(self, *, is_over: bool = False) -> None:
        """Note the end of a completed pass, and look at what has happened meanwhile.

        Args:
            is_over: it ended with the last use of a unit: what came since is no part of it.
        """
        self.passes += 1
        # What was copied long ago counts less and less.
        self._copied_bytes *= 1 - _NEWEST
        self._copy_s *= 1 - _NEWEST
        is_known = is_over and self._last_use is not None
        end = self._last_use if is_known else self._ops.mark_computed()
        self._marks.append((None, self._begin, self._begin, end))
        self.resolve()

    def note(self, entry: Stored, called: Any, started: Any, done: Any) -> None:
        """Note a use of a unit: when it was called, had its bytes, and was done.

        Where it has not waited for them, the first two are one event.
        """
        self._last_use = done
        self._marks.append((entry, called, started, done))

    def note_copy(self, nbytes: int, seconds: float) -> None:
        """Note a copy."""
        self._copied_bytes += nbytes
        self._copy_s += seconds
        if self._copied_bytes and self._copy_s:
            self.bandwidth = self._copied_bytes / self._copy_s

    def forget_marks(self) -> None:
        """Forget events that nobody will look at any more."""
        self.resolve()
        self._marks.clear()

    def resolve(self, *, wait: bool = False) -> None:
        """Read the events that have happened, the oldest first.

        Args:
            wait: for the last pass to end.
        """
        if wait and self._marks:
            self._ops.host_after(self._marks[-1][3])
        while self._marks:
            entry, called, started, done = self._marks[0]
            total = self._ops.seconds(called, done)
            stall = 0.0 if started is called else self._ops.seconds(called, started)
            if total is None or stall is None:
                break
            self._marks.popleft()
            if entry is None:
                self._note_pass(total)
            else:
                self._inside_s += total
                entry.stall_s += stall
                entry.compute_s = _mean(entry.compute_s, total - stall)

    def _note_pass(self, wall_s: float) -> None:
        if len(self.walls) > 2 and wall_s > _SPILL_FACTOR * median(self.walls):
            self.slow_passes += 1
        self.walls.append(wall_s)
        self.outside_s = _mean(self.outside_s, max(0.0, wall_s - self._inside_s))
        self._inside_s = 0.0


def _mean(old: float, new: float) -> float:
    """Return a running mean; one that is 0 has not begun."""
    return old + _NEWEST * (new - old) if old else new


@final
class MethodTrial:
    """Which way of transferring is faster: two passes of each, after the one that is traced.

    The first pass of a way fills its ring, so that the better of two counts.
    """

    def __init__(self) -> None:
        self._walls: list[tuple[str, float]] = []

    @property
    def is_over(self) -> bool:
        """Whether the winner is known."""
        return len(self._walls) == len(_TRIAL)

    def next(self, wall_s: float) -> str:
        """Note the seconds of the pass that was asked for; return the method of the next one."""
        self._walls.append((_TRIAL[len(self._walls)], wall_s))
        if not self.is_over:
            return _TRIAL[len(self._walls)]
        return min(self._walls[1:], key=lambda timed: timed[1])[0]
