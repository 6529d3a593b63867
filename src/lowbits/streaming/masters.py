"""The bytes of a unit as they are kept for good, on the host or in a file.

Masters are only read while a model runs: what the device holds is a copy, of which only what was
written there is copied back: by a forward into buffers, by others into what no unit holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from lowbits.core.source import Extent
    from lowbits.streaming.host import PinnedSlab
    from lowbits.streaming.layout import Place, Unit


class Master(ABC):
    """The bytes of one unit.

    Attributes:
        host_bytes: of host memory that it takes.
        is_pinned: whether that memory is page-locked.
        flag_changes: how often somebody has chosen what of it wants gradients.
    """

    host_bytes: int = 0
    is_pinned: bool = False

    def __init__(self) -> None:
        self.flag_changes = 0
        self._writes = 0
        self._writes_of: dict[int, int] = {}

    @property
    def version(self) -> int:
        """Changes with every write: copies of another version are stale."""
        return self._writes

    def version_of(self, place: Place) -> int:
        """Changes with every write to one tensor that torch would count, too."""
        return self._writes_of.get(place.offset, 0)

    def write(self, place: Place, value: Tensor, *, is_counted: bool = True) -> None:
        """Replace one tensor, given in its shape and dtype.

        Args:
            place: of the tensor.
            value: its new value.
            is_counted: whether `version_of` changes.
        """
        self._put(place, value)
        self._count(place, 1, is_counted)

    def _count(self, place: Place, writes: int, seen: int) -> None:
        self._writes += writes
        self._writes_of[place.offset] = self._writes_of.get(place.offset, 0) + seen

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
    def _put(self, place: Place, value: Tensor) -> None:
        """Do what `write` says."""


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
        super().__init__()
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

    def version_of(self, place: Place) -> int:
        """Count writes to one tensor, those into it where it was handed out, too."""
        handed = self._tensors.get(place.offset)
        return super().version_of(place) + (handed._version if handed is not None else 0)

    def read(self, start: int, out: Tensor, should_stop: Callable[[], bool] | None = None) -> None:  # noqa: ARG002 - part of the interface
        """Copy."""
        out.copy_(self.flat[start : start + out.numel()])

    def tensor(self, place: Place) -> Tensor:
        """Return the tensor itself, the same object each time: writes into it count.

        Its storage is its own, although the memory is not: savers refuse tensors that share one.
        """
        handed = self._tensors.get(place.offset)
        address = self.flat.data_ptr() + place.offset
        if handed is not None and place.nbytes and handed.data_ptr() != address:
            # It was sent to another process: torch has moved its storage to where both read it.
            self._count(place, handed._version, handed._version)
            del self._tensors[place.offset]
        if place.offset not in self._tensors:
            begin = self.flat.storage_offset() + place.offset
            storage = self.flat.untyped_storage()[begin : begin + place.nbytes]
            with torch.inference_mode(mode=False):
                tensor = torch.empty(0, dtype=place.dtype, device="cpu")
                tensor.set_(storage, 0, place.shape, place.stride)
                tensor = tensor.data  # whose count of writes begins: that was one
            self._tensors[place.offset] = tensor
        return self._tensors[place.offset]

    def copy(self, place: Place) -> Tensor:
        """Return a clone of its bytes, holes included."""
        return place.tensor_of(place.bytes_in(self.flat).clone())

    def _put(self, place: Place, value: Tensor) -> None:
        """Copy a value in."""
        place.write(place.bytes_in(self.flat), value)


class Files(Protocol):
    """What masters in files read from, and write to."""

    def read(self, extent: Extent, out: Tensor, should_stop: Callable[[], bool] | None) -> None:
        """Fill a 1-D uint8 CPU tensor."""

    def append(self, parts: Iterable[tuple[int, Tensor]], nbytes: int) -> Extent:
        """Write bytes that were not there before."""

    def rewrite(self, extent: Extent, run: Tensor) -> Extent:
        """Write bytes over those of an extent that was made by writing, or elsewhere; say where."""


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
        super().__init__()
        self._pieces, self._files = list(pieces), files
        # By offset: what was written since, and where that lay before.
        self._newest: dict[int, Extent] = {}
        self._spare: dict[int, Extent] = {}

    def read(self, start: int, out: Tensor, should_stop: Callable[[], bool] | None = None) -> None:
        """Read the runs of bytes that the asked one touches."""
        stop = start + out.numel()
        for offset, extent in (*self._pieces, *self._newest.items()):  # the later ones count
            first, last = max(start, offset), min(stop, offset + extent.nbytes)
            if first < last:
                part = replace(extent, offset=extent.offset + first - offset, nbytes=last - first)
                self._files.read(part, out[first - start : last - start], should_stop)

    def tensor(self, place: Place) -> Tensor:
        """Read one tensor into new memory."""
        with torch.inference_mode(mode=False):
            run = torch.empty(place.nbytes, dtype=torch.uint8, device="cpu")
        self.read(place.offset, run)
        return place.tensor_of(run)

    def copy(self, place: Place) -> Tensor:
        """Read one tensor into new memory."""
        return self.tensor(place)

    def _put(self, place: Place, value: Tensor) -> None:
        """Write one tensor to the scratch file; what it was read from stays as it is.

        From the third time on over what was written the time before the last: some value is whole
        at any time, and the file does not grow.
        """
        run, spare = place.run_of(value), self._spare.pop(place.offset, None)
        if spare is None:
            extent = self._files.append([(0, run)], place.nbytes)
        else:
            extent = self._files.rewrite(spare, run)
        if place.offset in self._newest:
            self._spare[place.offset] = self._newest[place.offset]
        self._newest[place.offset] = extent
