"""Devices with streams, for tests without a GPU: real threads, or a clock that is only counted.

`ThreadedOps` finds races: copies run when a GPU's would, late and in a thread of their own.
`VirtualOps` finds stalls: the same calls, on a clock that no other process can disturb.
"""

from __future__ import annotations

import queue
import random
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, final

import torch

from lowbits.streaming.device_ops import DeviceOps

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_CPU: Final = torch.device("cpu")
_POISON: Final = 0xFF
#: A copy that has not run by then never will: a test should fail, not hang.
_PATIENCE_S: Final = 60.0


class _CountedOps(DeviceOps):
    """Device memory that is counted to the byte: what `empty` made, until its storage is gone.

    Attributes:
        capacity_bytes: what the device has; None: no limit, and `free_bytes` does not know.
        peak_bytes: the most that was allocated at once.
    """

    has_streams: ClassVar[bool] = True

    def __init__(self, device: torch.device, capacity_bytes: int | None) -> None:
        super().__init__(device)
        self.capacity_bytes, self.peak_bytes = capacity_bytes, 0
        self._made = self._most_used = 0
        self._lock = threading.Lock()
        # A finalizer may run in any thread, between any two instructions: it only appends.
        self._freed: deque[int] = deque()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors of `empty` whose storage exists, views included."""
        with self._lock:
            return self._alive()

    def _alive(self) -> int:
        while self._freed:
            self._made -= self._freed.popleft()
        return self._made

    def empty(self, nbytes: int) -> Tensor:
        """Return a new 1-D uint8 tensor, and count it.

        Raises:
            torch.OutOfMemoryError: the capacity does not hold it.
        """
        with self._lock:
            allocated = self._alive()
            if self.capacity_bytes is not None and allocated + nbytes > self.capacity_bytes:
                raise torch.OutOfMemoryError(
                    f"{self.device}: tried to allocate {nbytes} bytes, {allocated} of "
                    f"{self.capacity_bytes} are in use"
                )
            tensor = super().empty(nbytes)
            # Python's part of a storage lives exactly as long as the storage does.
            weakref.finalize(tensor.untyped_storage(), self._freed.append, nbytes).atexit = False
            self._made += nbytes
            self.peak_bytes = max(self.peak_bytes, self._made)
        return tensor

    def use(self, nbytes: int) -> None:
        """Take memory for a moment, beside what `empty` made, as activations do."""
        self._most_used = max(self._most_used, self.allocated_bytes + nbytes)

    def used_bytes(self) -> tuple[int, int]:
        """Return what is allocated, and the most that was, or was in use."""
        return self.allocated_bytes, max(self.peak_bytes, self._most_used)

    def free_bytes(self) -> int | None:
        """Return what is left of the capacity."""
        return None if self.capacity_bytes is None else self.capacity_bytes - self.allocated_bytes


class Step(NamedTuple):
    """One entry of `ThreadedOps.log`: a method of `DeviceOps`, and the bytes it was for."""

    what: str
    nbytes: int = 0


class StreamEvent:
    """A point in a stream of `ThreadedOps`.

    Attributes:
        at_s: when it happened, on the clock of `time.perf_counter`.
    """

    def __init__(self) -> None:
        self._happened = threading.Event()
        self._error: BaseException | None = None
        self.at_s = 0.0

    def happen(self, error: BaseException | None = None) -> None:
        """Let those who wait go on, or fail."""
        self._error, self.at_s = error, time.perf_counter()
        self._happened.set()

    def has_happened(self) -> bool:
        """Say whether `wait` would return, or raise, at once."""
        return self._happened.is_set()

    def has_failed(self) -> bool:
        """Say whether `wait` would raise at once."""
        return self._happened.is_set() and self._error is not None

    def wait(self) -> None:
        """Block until the stream is past this point.

        Raises:
            BaseException: what the stream's work before this point raised.
            TimeoutError: nothing happened for a minute.
        """
        if not self._happened.wait(_PATIENCE_S):
            raise TimeoutError(f"a stream of ThreadedOps did not get on for {_PATIENCE_S} s")
        if self._error is not None:
            raise self._error


@final
class _Stream:
    """A thread that does one thing after the other.

    What a task raises goes to the next event recorded behind it, and to no other: as if the stream
    had been repaired.
    """

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | StreamEvent | None] = (
            queue.SimpleQueue()
        )
        self.thread = threading.Thread(
            target=_work, args=(self._tasks,), name=f"lowbits-{name}", daemon=True
        )
        self.thread.start()
        # A stream that nobody holds stops; the thread itself must not hold it.
        self.stop = weakref.finalize(self, self._tasks.put, None)

    def submit(self, task: Callable[[], None]) -> None:
        if not self.stop.alive:
            raise RuntimeError("these ThreadedOps are closed")
        self._tasks.put(task)

    def record(self) -> StreamEvent:
        event = StreamEvent()
        if self.stop.alive:
            self._tasks.put(event)
        else:
            event.happen()
        return event


def _work(tasks: queue.SimpleQueue[Callable[[], None] | StreamEvent | None]) -> None:
    error: BaseException | None = None
    with torch.no_grad():
        while (task := tasks.get()) is not None:
            if isinstance(task, StreamEvent):
                task.happen(error)
                error = None
                continue
            try:
                task()
            except BaseException as raised:  # noqa: BLE001 - raised again by whoever waits
                error = error or raised
            del task  # or the last copy's tensors would live until the next one


@final
class ThreadedOps(_CountedOps):
    """A device whose copies run late, in a thread: what forgets to wait reads wrong bytes.

    Compute is done when torch returns; the device's waiting for a copy blocks the host. Threads:
    one for copies, in order; one for the delays of `mark_computed`. All methods but `close` may be
    called from any thread.

    Attributes:
        log: what was asked for, in order.
    """

    def __init__(
        self,
        device: torch.device = _CPU,
        *,
        bandwidth: float | None = None,
        delay: Callable[[int], float] | None = None,
        compute_delay: Callable[[], float] | None = None,
        capacity_bytes: int | None = None,
        poison: bool = False,
    ) -> None:
        """Start the threads.

        Args:
            device: where tensors are; the fake accelerator tells the device's from the host's.
            bandwidth: of copies, in bytes per second; None: as fast as they are.
            delay: seconds by which a copy of so many bytes is late, in addition.
            compute_delay: seconds by which an event of `mark_computed` comes later than the host
                thinks, as on a device that the host runs ahead of; None: it has happened already.
            capacity_bytes: what the device has; None: no limit.
            poison: fill a target with 0xFF, which is NaN in floats, as soon as it may be written,
                before the copy's delay: bytes of before cannot pass for the right ones.
        """
        super().__init__(device, capacity_bytes)
        self.log: list[Step] = []
        self._bandwidth, self._delay, self._compute_delay = bandwidth, delay, compute_delay
        self._poisons = poison
        self._failing: set[int] = set()
        self._copies = 0
        self._copy_stream, self._compute_stream = _Stream("copy"), _Stream("compute")

    def fail_on(self, number: int) -> None:
        """Let a later `copy` raise in the stream, with nothing copied: number 0 is the next one."""
        self._failing.add(self._copies + number)

    def empty(self, nbytes: int) -> Tensor:
        """Return a new tensor, poisoned if asked for, and count it."""
        self.log.append(Step("empty", nbytes))
        tensor = super().empty(nbytes)
        return tensor.fill_(_POISON) if self._poisons else tensor

    def poison(self, tensor: Tensor) -> None:
        """Fill a slot with 0xFF, behind the copies asked for: it was given up."""
        self.log.append(Step("poison", tensor.nbytes))
        self._copy_stream.submit(lambda: _fill(tensor))

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy behind the copies asked for before; source is read then, and not now."""

        def run() -> None:
            if is_failing:
                raise RuntimeError(f"copy {number} failed, as the test asked")
            if self._poisons:
                _fill(target)
            time.sleep(self._seconds(source.nbytes))
            target.copy_(source)

        with self._lock:
            number, self._copies = self._copies, self._copies + 1
            is_failing = number in self._failing
            self.log.append(Step("copy", source.nbytes))
            self._copy_stream.submit(run)

    def _seconds(self, nbytes: int) -> float:
        late = self._delay(nbytes) if self._delay else 0.0
        return late + (nbytes / self._bandwidth if self._bandwidth else 0.0)

    def mark_computed(self, *, is_timed: bool = True) -> StreamEvent:  # noqa: ARG002 - all are
        """Return an event that happens after the compute delay, and after those before it."""
        self.log.append(Step("mark_computed"))
        if self._compute_delay is not None:
            seconds = self._compute_delay()
            self._compute_stream.submit(lambda: time.sleep(seconds))
        return self._compute_stream.record()

    def mark_copied(self, *, is_timed: bool = True) -> StreamEvent:  # noqa: ARG002 - all are
        """Return an event behind every copy so far; it carries the error of one that failed."""
        self.log.append(Step("mark_copied"))
        return self._copy_stream.record()

    def copy_after(self, event: StreamEvent | None) -> None:
        """Let the copy stream wait, and not the host."""
        self.log.append(Step("copy_after"))
        if event is not None:
            self._copy_stream.submit(event.wait)

    def compute_after(self, event: StreamEvent | None) -> None:
        """Block: compute runs on the host."""
        self._wait("compute_after", event)

    def host_after(self, event: StreamEvent | None) -> None:
        """Block."""
        self._wait("host_after", event)

    def _wait(self, what: str, event: StreamEvent | None) -> None:
        self.log.append(Step(what))
        if event is not None:
            event.wait()

    def has_happened(self, event: StreamEvent | None) -> bool:
        """Say whether `host_after` would return at once, without an error."""
        self.log.append(Step("has_happened"))
        return event is None or (event.has_happened() and not event.has_failed())

    def seconds(self, start: StreamEvent, end: StreamEvent) -> float | None:
        """Return the difference, if both have happened."""
        return end.at_s - start.at_s if start.has_happened() and end.has_happened() else None

    def release_cached(self) -> None:
        """Only log it: nothing is cached."""
        self.log.append(Step("release_cached"))

    def close(self) -> None:
        """Finish what was asked for, and end the threads; later copies raise. Idempotent."""
        for stream in (self._copy_stream, self._compute_stream):
            stream.stop()
            stream.thread.join(_PATIENCE_S)

    def __enter__(self) -> ThreadedOps:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fill(tensor: Tensor) -> None:
    tensor.view(torch.uint8).fill_(_POISON)


@final
class VirtualOps(_CountedOps):
    """A device on a clock that only counts: the same calls give the same seconds, always.

    Copies are done at once. Three timelines, in virtual seconds, say when they would have been: a
    stream takes up what the host gives it when both are there, and the host never waits but in
    `host_after`. An event is a time on one of them. For one thread.

    Attributes:
        compute_s: when the compute stream has done what it was given; `mark_computed`.
        copy_s: when the copy stream has; `mark_copied`.
        host_s: what the host's clock says.
        compute_busy_s: seconds of compute, waiting not included.
        copy_busy_s: seconds of copying, jitter included and waiting not.
        stall_s: seconds that the compute stream waited for copies.
    """

    def __init__(
        self,
        device: torch.device = _CPU,
        *,
        bandwidth: float,
        jitter: float = 0.0,
        seed: int = 0,
        capacity_bytes: int | None = None,
    ) -> None:
        """Start all timelines at zero.

        Args:
            device: where tensors are.
            bandwidth: of copies, in bytes per second.
            jitter: a copy takes between ``1 - jitter`` and ``1 + jitter`` times its due.
            seed: of the jitter.
            capacity_bytes: what the device has; None: no limit.
        """
        super().__init__(device, capacity_bytes)
        self._bandwidth, self._jitter = bandwidth, jitter
        self._random = random.Random(seed)  # noqa: S311 - nothing secret
        self.compute_s = self.copy_s = self.host_s = 0.0
        self.compute_busy_s = self.copy_busy_s = self.stall_s = 0.0

    @property
    def wall_s(self) -> float:
        """When the host would have the result of all compute; copies in flight do not count."""
        return max(self.host_s, self.compute_s)

    def compute(self, seconds: float) -> None:
        """Give the compute stream work: what a test's block calls in its forward."""
        self.compute_s = max(self.compute_s, self.host_s) + seconds
        self.compute_busy_s += seconds

    def work(self, seconds: float) -> None:
        """Let the host itself be busy: reading a file, for example."""
        self.host_s += seconds

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy at once, and count the time on the copy stream."""
        target.copy_(source)
        factor = 1.0 + self._random.uniform(-self._jitter, self._jitter)
        seconds = source.nbytes / self._bandwidth * factor
        self.copy_s = max(self.copy_s, self.host_s) + seconds
        self.copy_busy_s += seconds

    def mark_computed(self, *, is_timed: bool = True) -> float:  # noqa: ARG002 - all are
        """Return when compute is done."""
        return max(self.compute_s, self.host_s)

    def mark_copied(self, *, is_timed: bool = True) -> float:  # noqa: ARG002 - all are
        """Return when the copies so far are done."""
        return max(self.copy_s, self.host_s)

    def copy_after(self, event: float | None) -> None:
        """Start later copies no earlier."""
        self.copy_s = max(self.copy_s, event or 0.0)

    def compute_after(self, event: float | None) -> None:
        """Start later compute no earlier."""
        ready = max(self.compute_s, self.host_s)
        self.compute_s = max(ready, event or 0.0)
        self.stall_s += self.compute_s - ready

    def host_after(self, event: float | None) -> None:
        """Advance the host's clock."""
        self.host_s = max(self.host_s, event or 0.0)

    def has_happened(self, event: float | None) -> bool:
        """Say whether the host's clock is past it."""
        return event is None or event <= self.host_s

    def seconds(self, start: float, end: float) -> float:
        """Return the difference: every event knows its time at once."""
        return end - start

    def release_cached(self) -> None:
        """Nothing is cached."""
