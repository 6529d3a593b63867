"""What a streamer asks of a device: memory, copies, and the order between copies and compute.

[Note: stream order]
Copies run on one stream of their own, in the order in which they were asked for. A slot is written
only after an event that was recorded on the compute stream behind its last use (`copy_after`), and
read only after an event that was recorded behind the copy (`compute_after`), or once the host has
seen that one happen (`has_happened`). The first copy into a new buffer waits for whatever the
compute stream was given before. A streamer waits for copies before it lets their buffers go; one
that is dropped does not, so the allocator knows about the second stream too: told once for each
buffer, not at each use.

The uses of what stays on the device are not marked one by one: when it is copied anew, because
somebody wrote to it, an event on the stream that is current then stands for them. Who writes to a
weight that another stream is still reading has to order the two, as for any tensor.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch

from lowbits.core.device import numbered_device
from lowbits.core.memory import available_host_bytes
from lowbits.streaming.host import aligned_empty

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


class DeviceOps(ABC):
    """A device as the streamer sees it.

    Events are whatever `mark_computed` and `mark_copied` return; None stands for one that has
    happened already.
    """

    #: Whether copies run beside compute on the device itself, ordered by events, so that the host
    #: never waits for them. Where they do not, whoever calls `copy` waits until it is done.
    has_streams: ClassVar[bool]
    #: Whether a thread of its own may copy to the device while another one computes on it.
    copies_in_threads: ClassVar[bool] = True

    @property
    def is_capturing(self) -> bool:
        """Whether what the compute stream is given now goes into a graph, and is not run."""
        return False

    def __init__(self, device: torch.device) -> None:
        # As tensors name it: what has no number would equal none of theirs.
        self.device = numbered_device(device)

    def empty(self, nbytes: int) -> Tensor:
        """Return a new 1-D uint8 tensor on the device, from the stream current now.

        An ordinary tensor under ``torch.inference_mode`` too, which it outlives.
        """
        with torch.inference_mode(mode=False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    @abstractmethod
    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy bytes from the host to the device, behind the copies asked for before."""

    def copy_parts(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Do what `copy` does, for several targets and sources."""
        for target, source in parts:
            self.copy(target, source)

    @abstractmethod
    def mark_computed(self, *, is_timed: bool = True) -> Any:
        """Return an event behind everything that the current compute stream was given.

        Args:
            is_timed: whether `seconds` will be asked about it, which costs the device time.
        """

    @abstractmethod
    def mark_copied(self, *, is_timed: bool = True) -> Any:
        """Return an event behind every copy so far; as `mark_computed`."""

    @abstractmethod
    def copy_after(self, event: Any) -> None:
        """Make later copies wait for an event of `mark_computed`."""

    @abstractmethod
    def compute_after(self, event: Any) -> None:
        """Make what the current compute stream is given from now on wait for a copy."""

    @abstractmethod
    def host_after(self, event: Any) -> None:
        """Wait, on the host, for an event."""

    def finish_copies(self) -> None:
        """Wait, on the host, until every copy so far is over."""
        self.host_after(self.mark_copied(is_timed=False))

    @abstractmethod
    def has_happened(self, event: Any) -> bool:
        """Say whether an event has happened, so that nobody has to wait for it.

        Where something went wrong before it, False, and waiting raises that, or it is raised here.
        """

    @abstractmethod
    def seconds(self, start: Any, end: Any) -> float | None:
        """Return the seconds between two events of `mark_computed`, or of `mark_copied`.

        None where they have not happened yet.
        """

    def free_bytes(self) -> int | None:
        """Return the bytes of device memory that are free now; None if unknown."""
        return free_bytes(self.device)

    def total_bytes(self) -> int | None:
        """Return the bytes of device memory that there are; None if unknown."""
        return None

    def used_bytes(self) -> tuple[int, int] | None:
        """Return the bytes that all tensors take now, and took at most; None if nobody counts."""
        return None

    @abstractmethod
    def release_cached(self) -> None:
        """Give memory that an allocator keeps for later back to the device."""


class SynchronousOps(DeviceOps):
    """A device without streams: whoever copies waits, so that every event is a time gone by."""

    has_streams = False

    def has_happened(self, event: Any) -> bool:  # noqa: ARG002 - all have
        """Say yes."""
        return True

    def seconds(self, start: float, end: float) -> float:
        """Return the difference."""
        return end - start

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy, and return when it is done."""
        target.copy_(source)

    def mark_computed(self, *, is_timed: bool = True) -> float:  # noqa: ARG002 - it costs nothing
        """Return the time."""
        return time.perf_counter()

    def mark_copied(self, *, is_timed: bool = True) -> float:  # noqa: ARG002 - it costs nothing
        """Return the time."""
        return time.perf_counter()

    def copy_after(self, event: Any) -> None:
        """Nothing is pending."""

    def compute_after(self, event: Any) -> None:
        """Nothing is pending."""

    def host_after(self, event: Any) -> None:
        """Nothing is pending."""


@final
class CpuOps(SynchronousOps):
    """The CPU: its memory is the host's, and a thread copies, or reads, beside compute."""

    def empty(self, nbytes: int) -> Tensor:
        """Return memory that files can be read into without a detour."""
        return aligned_empty(nbytes)

    def release_cached(self) -> None:
        """Nothing is cached."""


@final
class UnifiedOps(SynchronousOps):
    """An accelerator without streams of its own (MPS): copies wait, in the thread that computes."""

    copies_in_threads = False

    def release_cached(self) -> None:
        """Give cached memory back."""
        # torch.accelerator does it for MPS from torch 2.13 on.
        torch.get_device_module(self.device).empty_cache()


@final
class AcceleratorOps(DeviceOps):
    """A device with streams, by torch's device-agnostic interface: CUDA, ROCm, XPU.

    See [Note: stream order].
    """

    has_streams = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # One stream for all copies of this streamer: a second one would fight for the same link.
        self._stream = torch.Stream(self.device)
        # By number: torch asks a device which accelerator there is, each time.
        self._index = self._stream.device.index

    @property
    def is_capturing(self) -> bool:
        """Ask the device."""
        return is_capturing(self.device)

    def empty(self, nbytes: int) -> Tensor:
        """Return memory that nobody else is given before the copies to it are over."""
        buffer = super().empty(nbytes)
        with suppress(NotImplementedError):  # a backend of others, whose allocator has no streams
            buffer.record_stream(self._stream)
        return buffer

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy on the copy stream.

        Source has to be page-locked to run beside compute, and stay as it is until the event of
        the next `mark_copied`.
        """
        self.copy_parts([(target, source)])

    def copy_parts(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy as `copy` does; changing the stream once: each time costs as much as a copy does."""
        # A name of its own for the stream: the object remembers which one was current before, and
        # threads of several models would each find the other's.
        with torch.Stream(
            stream_id=self._stream.stream_id,
            device_index=self._stream.device_index,
            device_type=self._stream.device_type,
        ):
            for target, source in parts:
                # Else the host would wait; `mark_copied` orders the readers instead.
                target.copy_(source, non_blocking=True)

    def mark_computed(self, *, is_timed: bool = True) -> torch.Event:
        """Record an event on the compute stream."""
        return self._record(torch.accelerator.current_stream(self._index), is_timed=is_timed)

    def mark_copied(self, *, is_timed: bool = True) -> torch.Event:
        """Record an event on the copy stream."""
        return self._record(self._stream, is_timed=is_timed)

    def _record(self, stream: torch.Stream, *, is_timed: bool) -> torch.Event:
        event = torch.Event(self.device, enable_timing=is_timed)
        event.record(stream)
        return event

    def has_happened(self, event: torch.Event | None) -> bool:
        """Ask the device."""
        return event is None or event.query()

    def seconds(self, start: torch.Event, end: torch.Event) -> float | None:
        """Ask the device, if it has come past both."""
        if not (start.query() and end.query()):
            return None
        return start.elapsed_time(end) / 1000

    def copy_after(self, event: torch.Event | None) -> None:
        """Make the copy stream wait: without it, a slot would be overwritten in use."""
        if event is not None:
            self._stream.wait_event(event)

    def compute_after(self, event: torch.Event | None) -> None:
        """Make the compute stream wait: without it, a slot would be read half written."""
        if event is not None:
            torch.accelerator.current_stream(self._index).wait_event(event)

    def host_after(self, event: torch.Event | None) -> None:
        """Block until an event has happened: before staging memory is written again."""
        if event is not None:
            event.synchronize()

    def total_bytes(self) -> int:
        """Return the memory of the device."""
        return int(torch.accelerator.get_memory_info(self.device)[1])

    def used_bytes(self) -> tuple[int, int] | None:
        """Ask torch's allocator, if the device has one."""
        try:
            stats = torch.accelerator.memory_stats(self.device)
        except RuntimeError:
            return None
        now, peak = (stats.get(f"allocated_bytes.all.{what}") for what in ("current", "peak"))
        return None if now is None or peak is None else (now, peak)

    def release_cached(self) -> None:
        """Give cached memory back to the device."""
        torch.accelerator.empty_cache()


def device_ops(device: torch.device) -> DeviceOps:
    """Return the operations of a device: the only place that chooses by its type."""
    if device.type == "cpu":
        return CpuOps(device)
    if device.type == "mps":
        return UnifiedOps(device)
    return AcceleratorOps(device)


def is_capturing(device: torch.device) -> bool:
    """Say whether what a device is given now goes into a graph, and is not run.

    CUDA, or ROCm: others have no graphs.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_unified(device: torch.device) -> bool:
    """Say whether a device's memory is the host's."""
    return device.type in ("cpu", "mps")


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device, what torch keeps unused included; None if not known."""
    if is_unified(device):
        return available_host_bytes()
    try:
        free, _ = torch.accelerator.get_memory_info(device)
    except RuntimeError:
        return None  # a backend without an allocator of torch's does not say
    cached = torch.accelerator.memory_reserved(device)
    return int(free + cached - torch.accelerator.memory_allocated(device))
