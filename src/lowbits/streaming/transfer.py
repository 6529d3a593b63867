"""Copying a unit's bytes into a buffer on the device: beside compute, or before it."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, final

import torch

from lowbits.errors import InsufficientMemoryError, StreamError
from lowbits.streaming.host import PinnedSlab, aligned_empty, pinned_empty

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from lowbits.streaming.device_ops import DeviceOps
    from lowbits.streaming.masters import HostMaster, Master

logger = logging.getLogger("lowbits.streaming")

#: Bytes of one copy: short enough that other copies, and a cancelled pass, do not wait for long.
_CHUNK_BYTES: Final = 32 << 20

#: Page-locked buffers that bytes pass through on their way from pageable memory, or a file.
_STAGING_BUFFERS: Final = 2

#: Seconds between two looks at whether a thread that is waited for is alive.
_PATIENCE_S: Final = 1.0


@final
@dataclass
class Route:
    """From a unit's master to its place on the device: what is the same at each of its copies.

    Attributes:
        unit: its name, for messages.
        master: the bytes.
        target: 1-D uint8 on the device, of the unit's size.
    """

    unit: str
    master: Master
    target: Tensor

    @cached_property
    def parts(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Targets and sources of the copies from host memory: making them takes as long as one."""
        source: HostMaster = self.master  # type: ignore[assignment] # of all that are in memory
        with torch.inference_mode(mode=False):  # which they outlive
            chunks = torch.split(self.target, _CHUNK_BYTES), torch.split(source.flat, _CHUNK_BYTES)
        return tuple(zip(*chunks, strict=True))


@final
@dataclass
class Load:
    """One copy of a unit, under way or done.

    Attributes:
        unit: its name.
        begun: event before the copy, where the device times it.
        ready: events behind the copy, once it was given to the device; one of them may carry what
            went wrong there.
        error: what went wrong.
        seconds: that the thread which copied was busy.
        issued: set once the thread that copies has given it to the device; None: it was at once.
    """

    unit: str
    begun: Any = None
    ready: Sequence[Any] = ()
    error: BaseException | None = None
    seconds: float = 0.0
    issued: threading.Event | None = None

    @property
    def is_issued(self) -> bool:
        """Whether all of it was given to the device, or something went wrong before."""
        return self.issued is None or self.issued.is_set()


class Transfer(ABC):
    """A way of copying units to a device, one after the other."""

    #: Bytes of page-locked memory, and of other host memory, that it takes for itself.
    staging_bytes: int = 0
    #: Whether copies are timed from now on.
    is_timed: bool = True

    def __init__(self, ops: DeviceOps) -> None:
        self._ops = ops

    @abstractmethod
    def start(self, route: Route, freed: Sequence[Any]) -> Load:
        """Ask for a copy.

        Args:
            route: from where to where.
            freed: events behind the last uses of what the target held before.
        """

    def wait(self, load: Load) -> None:
        """Make compute wait for a copy that was given to the device; raise what went wrong."""
        for event in load.ready:
            self._ops.compute_after(event)

    def settle(self, load: Load) -> None:
        """Wait, on the host, until a copy is over; what went wrong is for who uses its bytes."""
        for event in load.ready:
            try:
                self._ops.host_after(event)
            except Exception as error:  # noqa: BLE001 - whatever a device raises
                logger.debug("the copy of %r had failed: %s", load.unit, str(error))

    def is_over(self, load: Load) -> bool:
        """Say whether a copy is done, so that nobody has to wait for it; a failed one never is."""
        return load.is_issued and not load.error and all(map(self._ops.has_happened, load.ready))

    def seconds(self, load: Load) -> float | None:
        """Return what a timed copy took, its slot not waited for; None while it is under way."""
        return load.seconds if load.is_issued and load.error is None else None

    def close(self) -> None:  # noqa: B027 - only a thread has something to stop
        """Stop; copies under way are given up."""


@final
class DirectTransfer(Transfer):
    """From page-locked memory straight to the device: the host only gives orders."""

    def start(self, route: Route, freed: Sequence[Any]) -> Load:
        """Put a copy on the device's copy stream, behind the slot's last use."""
        for event in freed:
            self._ops.copy_after(event)
        begun = self._ops.mark_copied() if self.is_timed else None
        self._ops.copy_parts(route.parts)
        return Load(route.unit, begun, (self._ops.mark_copied(is_timed=self.is_timed),))

    def seconds(self, load: Load) -> float | None:
        """Ask the device."""
        return self._ops.seconds(load.begun, load.ready[-1])


@final
class InlineTransfer(Transfer):
    """In the thread that asks: copy, then compute."""

    def __init__(self, ops: DeviceOps) -> None:
        super().__init__(ops)
        self._filler = _Filler(ops)
        self.staging_bytes = self._filler.staging_bytes

    def start(self, route: Route, freed: Sequence[Any]) -> Load:
        """Copy, and return when all of it was given to the device."""
        load = Load(route.unit)
        begin = time.perf_counter()
        try:
            load.ready = self._filler.fill(route, freed, None)
        except Exception as error:
            raise _failed(load, error) from error
        load.seconds = time.perf_counter() - begin
        return load


@final
class ThreadTransfer(Transfer):
    """In a thread of its own, one unit after the other: reading a file, or copying, blocks it.

    Waiting is bounded: a thread that has died is noticed, and named.
    """

    def __init__(self, ops: DeviceOps) -> None:
        super().__init__(ops)
        self._filler = _Filler(ops)
        self.staging_bytes = self._filler.staging_bytes
        self._work = _Work()
        self._finalizer = weakref.finalize(self, self._work.stop)
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def start(self, route: Route, freed: Sequence[Any]) -> Load:
        """Hand a copy to the thread, behind those that it was handed before."""
        if self._thread is None or not self._thread.is_alive():  # a forked process has none
            self._begin()
        load = Load(route.unit, issued=threading.Event())
        filler, stopped = self._filler, self._work.stopped

        def fill() -> None:
            load.ready = filler.fill(route, freed, stopped.is_set)

        self._work.jobs.put((load, fill))
        return load

    def wait(self, load: Load) -> None:
        """Wait until the copy was given to the device, then make compute wait for it."""
        if not self._is_given(load):
            raise StreamError(
                f"the thread that copies {load.unit!r} has died", load.unit, "loading"
            )
        if load.error is not None:
            raise _failed(load, load.error) from load.error
        super().wait(load)

    def settle(self, load: Load) -> None:
        """Wait until the thread is done with it, and the device too."""
        self._is_given(load)
        super().settle(load)

    def _is_given(self, load: Load) -> bool:
        """Wait until the thread is done with a copy; return False where it never will be."""
        assert load.issued
        while not load.issued.wait(_PATIENCE_S):
            if self._thread is None or not self._thread.is_alive():
                return False
        return True

    def _begin(self) -> None:
        """Start the thread: at the first copy, and where it has died."""
        if self._pid != os.getpid():
            self._work, self._pid = _Work(), os.getpid()
            self._finalizer = weakref.finalize(self, self._work.stop)
        # The thread holds the work, not this object: dropping the streamer ends it.
        self._thread = threading.Thread(target=self._work.run, name="lowbits-stream", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, and wait until it has."""
        self._finalizer()
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join()
        self._thread = None


def make_transfer(ops: DeviceOps, masters: Iterable[Master], *, is_ahead: bool) -> Transfer:
    """Return what copies from some masters to a device best.

    Args:
        ops: of the device.
        masters: all that it is to copy from.
        is_ahead: whether units are copied ahead of their use.
    """
    if ops.has_streams and all(master.is_pinned for master in masters):
        return DirectTransfer(ops)
    if is_ahead and ops.copies_in_threads:
        return ThreadTransfer(ops)
    return InlineTransfer(ops)


def _failed(load: Load, error: BaseException) -> BaseException:
    """Return what a copy's error is for whoever waits for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return error  # which has a way out of its own
    return StreamError(f"cannot copy {load.unit!r} to the device: {error}", load.unit, "loading")


class _Work:
    """What a thread has to do: a queue that ends with None."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[tuple[Load, Callable[[], None]] | None] = queue.SimpleQueue()
        self.stopped = threading.Event()

    def stop(self) -> None:
        """Give up what was not begun, and end the thread."""
        self.stopped.set()
        self.jobs.put(None)

    def run(self) -> None:
        """Do jobs until told to stop; what one raises is kept for whoever waits for it."""
        while (job := self.jobs.get()) is not None:
            load, fill = job
            begin = time.perf_counter()
            try:
                fill()
            except BaseException as error:  # noqa: BLE001 - raised again by `Transfer.wait`
                load.error = error
            load.seconds = time.perf_counter() - begin
            assert load.issued
            load.issued.set()
            del job, fill  # else the last unit's buffers live as long as the thread waits


@final
class _Filler:
    """Brings a master's bytes into a buffer on the device.

    On the CPU they are read where they belong. Elsewhere they pass through page-locked staging
    buffers, each written again only after its last copy has left it.
    """

    def __init__(self, ops: DeviceOps) -> None:
        self.ops = ops
        self._slabs: list[PinnedSlab] = []  # memory is unlocked when its slab goes
        self._staging: list[Tensor] = []
        self._left: list[Any] = []
        self._turn = 0
        if ops.has_streams or ops.device.type != "cpu":
            self._staging = [self._staging_buffer() for _ in range(_STAGING_BUFFERS)]
            self._left = [None] * _STAGING_BUFFERS
        self.staging_bytes = sum(buffer.nbytes for buffer in self._staging)

    def fill(
        self, route: Route, freed: Sequence[Any], should_stop: Callable[[], bool] | None
    ) -> Sequence[Any]:
        """Copy all of a unit; return events behind the copy."""
        master, target = route.master, route.target
        # Else a slot would be overwritten while its last user computes.
        for event in freed:
            self.ops.copy_after(event)
        if not self._staging:
            master.read(0, target, should_stop)
            return ()
        copied: deque[Any] = deque(maxlen=_STAGING_BUFFERS)
        for start in range(0, target.numel(), _CHUNK_BYTES):
            stop = min(start + _CHUNK_BYTES, target.numel())
            which = self._turn
            self._turn = (which + 1) % _STAGING_BUFFERS
            self._reuse(which, is_own=self._left[which] in copied)
            staged = self._staging[which][: stop - start]
            master.read(start, staged, should_stop)
            self.ops.copy(target[start:stop], staged)
            self._left[which] = self.ops.mark_copied(is_timed=False)
            copied.append(self._left[which])
        return tuple(copied)

    def _reuse(self, which: int, *, is_own: bool) -> None:
        """Wait for a staging buffer: it would change under a copy that is still reading it."""
        event, self._left[which] = self._left[which], None
        try:
            self.ops.host_after(event)
        except Exception:
            # What went wrong with another unit's copy is for who uses that one.
            if is_own:
                raise

    def _staging_buffer(self) -> Tensor:
        """Return memory that copies to the device run fastest from; plain where none can be had."""
        if self.ops.has_streams:
            try:
                self._slabs.append(pinned_empty(_CHUNK_BYTES, self.ops.finish_copies))
            except InsufficientMemoryError as error:
                logger.warning("copies to %s will wait: %s", self.ops.device, error)
            else:
                return self._slabs[-1].tensor
        return aligned_empty(_CHUNK_BYTES)
