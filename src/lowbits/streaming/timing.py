"""What was measured: how long units compute, wait, and take to copy."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

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

#: Passes that are measured unit by unit on a device with streams: the first ones, those of a trial
#: alike, and every so many later on; an odd number, since guidance calls a model twice a step. An
#: event costs the host, and the device, microseconds: too much where a unit takes hundreds.
_MEASURED_FIRST: Final = len(_TRIAL)
_MEASURED_EVERY: Final = 7

#: Measured passes after which times are known: the first one is slower than others.
_MEASURED_PASSES: Final = 2

#: Times that are so much longer, or shorter, than before are news.
_NEWS: Final = 0.1


class _Span(NamedTuple):
    """A use of a unit, or a pass: the events that it began with, had its bytes at, and ended with.

    Attributes:
        entry: the unit; None: a pass.
        called: the first event.
        started: the same one where nothing was waited for.
        done: the last one; None where only the wait was measured.
        is_timed: of a pass, whether its units' uses were measured.
    """

    entry: Stored | None
    called: Any
    started: Any
    done: Any
    is_timed: bool = True


@final
class Timing:
    """Running means, from events that may not have happened yet when they are noted.

    Attributes:
        passes: completed ones.
        measured: those whose units' uses were measured, and read.
        slow_passes: those that took more than three times the median.
        walls: seconds of the last passes.
        bandwidth: bytes that were copied per second.
        outside_s: seconds of a pass that are no unit's, a running mean; 0 until a pass was timed.
        times_uses: whether uses of units are to be measured now, and not only waits.
    """

    def __init__(self, ops: DeviceOps) -> None:
        self.passes = self.measured = self.slow_passes = 0
        self.walls: deque[float] = deque(maxlen=_KEPT_PASSES)
        self.bandwidth = _BANDWIDTH
        self._copied_bytes = self._copy_s = 0.0
        self._ops = ops
        self.outside_s = self._inside_s = 0.0
        self._begin: Any = None
        self._has_end = True
        self._last_use: Any = None
        # Uses of units, and passes behind the uses that they are made of.
        self._spans: deque[_Span] = deque()
        self.times_uses = True
        self._known = (0.0, 0.0)

    def begin_pass(self, *, has_end: bool) -> None:
        """Note the beginning of a pass.

        Args:
            has_end: somebody will say when it is over; else its last use tells when it was.
        """
        is_due = self.passes < _MEASURED_FIRST or self.passes % _MEASURED_EVERY == 0
        self.times_uses = is_due or not has_end or not self._ops.has_streams
        self._begin, self._has_end = self._ops.mark_computed(), has_end

    def end_pass(self) -> None:
        """Note the end of a completed pass, and look at what has happened meanwhile."""
        self.passes += 1
        # What was copied long ago counts less and less.
        self._copied_bytes *= 1 - _NEWEST
        self._copy_s *= 1 - _NEWEST
        # What came since the last use is no part of a pass whose end nobody says.
        is_now = self._has_end or self._last_use is None
        end = self._ops.mark_computed() if is_now else self._last_use
        self._spans.append(_Span(None, self._begin, self._begin, end, self.times_uses))
        self.resolve()

    def note(self, entry: Stored, called: Any, started: Any, done: Any) -> None:
        """Note a use of a unit: when it was called, had its bytes, and was done.

        Where it has not waited for them, the first two are one event; where only that is known, the
        last one is None.
        """
        self._last_use = done
        self._spans.append(_Span(entry, called, started, done))

    def note_copy(self, nbytes: int, seconds: float) -> None:
        """Note a copy."""
        self._copied_bytes += nbytes
        self._copy_s += seconds
        if self._copied_bytes and self._copy_s:
            self.bandwidth = self._copied_bytes / self._copy_s

    def has_news(self, compute_s: float) -> bool:
        """Say whether a plan for what is known now may be another one than when this was said last.

        Args:
            compute_s: of a pass.
        """
        now = compute_s, self.bandwidth
        is_new = any(abs(a - b) > _NEWS * b for a, b in zip(now, self._known, strict=True))
        if self.measured < _MEASURED_PASSES or not is_new:
            return False
        self._known = now
        return True

    def forget_marks(self) -> None:
        """Forget events that nobody will look at any more."""
        self.resolve()
        self._spans.clear()

    def resolve(self, *, wait: bool = False) -> None:
        """Read the events that have happened, the oldest first.

        Args:
            wait: for the last pass to end.
        """
        if wait and self._spans:
            self._ops.host_after(self._spans[-1].done)
        while self._spans:
            span = self._spans[0]
            is_waiting = span.started is not span.called
            stall = self._ops.seconds(span.called, span.started) if is_waiting else 0.0
            total = stall if span.done is None else self._ops.seconds(span.called, span.done)
            if total is None or stall is None:
                break
            self._spans.popleft()
            if span.entry is None:
                self._note_pass(total, is_timed=span.is_timed)
                continue
            span.entry.stall_s += stall
            if span.done is not None:
                self._inside_s += total
                span.entry.note_compute(total - stall)

    def _note_pass(self, wall_s: float, *, is_timed: bool) -> None:
        if len(self.walls) > 2 and wall_s > _SPILL_FACTOR * median(self.walls):
            self.slow_passes += 1
        self.walls.append(wall_s)
        if is_timed:
            self.measured += 1
            self.outside_s = running_mean(self.outside_s, max(0.0, wall_s - self._inside_s))
        self._inside_s = 0.0


def running_mean(old: float, new: float) -> float:
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
