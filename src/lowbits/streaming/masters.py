"""The bytes of a unit as they are kept for good, on the host or in a file.

Masters are only read while a model runs: what the device holds is a copy, of which only what was
written there is copied back: by a forward into buffers, by others into what no unit holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol, final

import torch

from lowbits.core.source import Extent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from lowbits.streaming.host import PinnedSlab
    from lowbits.streaming.layout import Place, Unit


class Master(ABC):
    """The bytes of one unit.

    Attributes:
        host_bytes: of host memory that it takes.
        is_pinned: whether that memory is page-locked.
    """

    host_bytes: int = 0
    is_pinned: bool = False
    _writes: int = 0

    @property
    def version(self) -> int:
        """Changes with every write: copies of another version are stale."""
        return self._writes

    @abstractmethod
    def read(self, start: int, out: Tensor, should_stop: Callable[[], bool] | None = None) -> None:
        """Fill a 1-D uint8 CPU tensor with the unit's bytes from ``start`` on."""

    @abstractmethod
    def tensor(self, place: Place) -> Tensor:
        """Return one tensor, on the CPU; it may share the master's memory."""

    @abstractmethod
    def copy(self, place: Place) -> Tensor:
        """Return one tensor in memory of its own, on the CPU."""

    @abstractmethod
    def write(self, place: Place, value: Tensor) -> None:
        """Replace one tensor, given in its shape and dtype."""


@final
class HostMaster(Master):
    """A unit's bytes in host memory: costs them."""

    def __init__(self, unit: Unit, flat: Tensor, slab: PinnedSlab | None = None) -> None:
        """Copy a unit's tensors.

        Args:
            unit: its originals are read.
            flat: 1-D uint8 CPU tensor of its size; kept, written.
            slab: locks that memory for as long as it lives; None: it is pageable.
        """
        self.flat, self._slab = flat, slab
        self.host_bytes, self.is_pinned = flat.nbytes, slab is not None
        self._tensors: dict[int, Tensor] = {}
        for place in unit.places:
            place.write(place.bytes_in(flat), place.original.detach())

    @property
    def version(self) -> int:
        """Count writes: those of `write`, and those into tensors that were handed out."""
        if not self._tensors:
            return self._writes
        return self._writes + sum(tensor._version for tensor in self._tensors.values())

    def read(self, start: int, out: Tensor, should_stop: Callable[[], bool] | None = None) -> None:  # noqa: ARG002 - part of the interface
        """Copy."""
        out.copy_(self.flat[start : start + out.numel()])

    def tensor(self, place: Place) -> Tensor:
        """Return the tensor itself, the same object each time: writes into it count.

        Its storage is its own, although the memory is not: savers refuse tensors that share one.
        """
        if place.offset not in self._tensors:
            begin = self.flat.storage_offset() + place.offset
            storage = self.flat.untyped_storage()[begin : begin + place.nbytes]
            with torch.inference_mode(mode=False):
                tensor = torch.empty(0, dtype=place.dtype)
                tensor.set_(storage, 0, place.shape, place.stride)
            self._tensors[place.offset] = tensor
        return self._tensors[place.offset]

    def copy(self, place: Place) -> Tensor:
        """Return a clone of its bytes, holes included."""
        return place.tensor_of(place.bytes_in(self.flat).clone())

    def write(self, place: Place, value: Tensor) -> None:
        """Copy a value in."""
        place.write(place.bytes_in(self.flat), value)
        self._writes += 1


class Files(Protocol):
    """What masters in files read from, and write to."""

    def read(self, extent: Extent, out: Tensor, should_stop: Callable[[], bool] | None) -> None:
        """Fill a 1-D uint8 CPU tensor."""

    def append(self, parts: Iterable[tuple[int, Tensor]], nbytes: int) -> Extent:
        """Write bytes that were not there before."""


@final
class FileMaster(Master):
    """A unit's bytes in files: costs no memory."""

    def __init__(
        self,
        pieces: Sequence[tuple[int, Extent]],
        files: Files,
    ) -> None:
        """Keep where the bytes are.

        Args:
            pieces: where each run of the unit's bytes begins in the unit, and lies in a file.
            files: reads them, and takes what is written.
        """
        self._pieces, self._files = list(pieces), files

    def read(self, start: int, out: Tensor, should_stop: Callable[[], bool] | None = None) -> None:
        """Read the runs of bytes that the asked one touches."""
        stop = start + out.numel()
        for offset, extent in self._pieces:
            first, last = max(start, offset), min(stop, offset + extent.nbytes)
            if first < last:
                part = Extent(extent.path, extent.offset + first - offset, last - first)
                self._files.read(part, out[first - start : last - start], should_stop)

    def tensor(self, place: Place) -> Tensor:
        """Read one tensor into new memory."""
        with torch.inference_mode(mode=False):
            run = torch.empty(place.nbytes, dtype=torch.uint8)
        self.read(place.offset, run)
        return place.tensor_of(run)

    def copy(self, place: Place) -> Tensor:
        """Read one tensor into new memory."""
        return self.tensor(place)

    def write(self, place: Place, value: Tensor) -> None:
        """Write one tensor to the scratch file; what it was read from stays as it is."""
        extent = self._files.append([(0, place.run_of(value))], place.nbytes)
        # Later pieces are read over earlier ones.
        self._pieces.append((place.offset, extent))
        self._writes += 1
