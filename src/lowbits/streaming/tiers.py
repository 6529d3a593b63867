"""Where masters lie: in host memory, in page-locked host memory, or in a file."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.core.memory import available_host_bytes
from lowbits.core.report import format_bytes
from lowbits.errors import ConfigError, InsufficientMemoryError, suggestion
from lowbits.streaming.host import (
    PinnedSlab,
    Reader,
    ScratchFile,
    file_is_larger_than_memory,
    pinned_empty,
)
from lowbits.streaming.layout import is_dense
from lowbits.streaming.masters import FileMaster, HostMaster, Master

if TYPE_CHECKING:
    from lowbits.streaming.device_ops import DeviceOps
    from lowbits.streaming.layout import Unit

logger = logging.getLogger("lowbits.streaming")

#: Names of places, and what people call them elsewhere.
_LOCATIONS: Final = {
    "auto": "auto",
    "cpu": "cpu",
    "pageable": "cpu",
    "shared": "shared",
    "pinned": "shared",
    "disk": "disk",
}
LOCATIONS: Final = tuple(_LOCATIONS)

#: What page-locked memory may take of the host's: the system cannot swap it out.
_PINNED_SHARE: Final = 0.4


@final
class Tier:
    """The place of one model's masters, and what it costs there.

    Attributes:
        name: ``"cpu"``, ``"shared"`` or ``"disk"``.
        notes: why it is another place than the one that was asked for.
        host_bytes: of host memory that masters take, page-locked or not.
        pinned_bytes: of those, page-locked.
        disk_bytes: of the scratch file.
    """

    def __init__(self, location: str, nbytes: int, ops: DeviceOps) -> None:
        """Choose the place.

        Args:
            location: one of `LOCATIONS`.
            nbytes: that masters will take.
            ops: the device that they will be copied to.
        """
        if location not in _LOCATIONS:
            raise ConfigError(
                f"location: got {location!r}, expected one of {', '.join(LOCATIONS)}"
                f"{suggestion(str(location), LOCATIONS)}"
            )
        self.notes: list[str] = []
        self.name = self._choose(_LOCATIONS[location], nbytes, ops)
        self.host_bytes = self.pinned_bytes = 0
        self._slabs: list[PinnedSlab] = []
        self._scratch_file: ScratchFile | None = None
        self._reader: Reader | None = None
        if self.name == "disk":
            self._reader = Reader(direct=file_is_larger_than_memory(nbytes), immutable=False)

    def _choose(self, wanted: str, nbytes: int, ops: DeviceOps) -> str:
        is_host = not ops.has_streams
        if wanted == "auto" and is_host:
            return "disk"  # the device's memory is the host's: a copy in it would save nothing
        if wanted == "shared" and is_host:
            self._note(f"memory of {ops.device} is the host's: there is nothing to page-lock")
            return "cpu"
        available = available_host_bytes()
        if wanted in ("auto", "shared") and not is_host:
            if available is None or nbytes <= _PINNED_SHARE * available:
                return "shared"
            self._note(
                f"{format_bytes(nbytes)} are more than {_PINNED_SHARE:.0%} of the "
                f"{format_bytes(available)} of host memory that are free: not page-locked"
            )
            return "disk" if wanted == "auto" and nbytes > available else "cpu"
        return wanted

    def _note(self, text: str) -> None:
        self.notes.append(text)
        logger.info("location: %s", text)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the scratch file."""
        return self._scratch_file.nbytes if self._scratch_file else 0

    def store(self, unit: Unit) -> Master:
        """Copy a unit's tensors to where they stay; the unit is not changed."""
        if self.name == "disk":
            assert self._reader
            parts = ((place.offset, _in_memory_order(place.original)) for place in unit.places)
            extent = self._scratch().append(parts, unit.nbytes)
            return FileMaster([(0, extent)], self._reader, self._scratch)
        self.host_bytes += unit.nbytes
        if self.name == "shared":
            try:
                slab = pinned_empty(unit.nbytes)
            except InsufficientMemoryError as error:
                self._note(str(error))
                self.name = "cpu"
            else:
                self.pinned_bytes += unit.nbytes
                self._slabs.append(slab)
                return HostMaster(unit, slab.tensor, is_pinned=True)
        with torch.inference_mode(mode=False):
            return HostMaster(unit, torch.empty(unit.nbytes, dtype=torch.uint8))

    def _scratch(self) -> ScratchFile:
        if self._scratch_file is None:
            self._scratch_file = ScratchFile()
        return self._scratch_file

    def close(self) -> None:
        """Close files, remove the scratch file, give page-locked memory back."""
        for slab in self._slabs:
            slab.release()
        self._slabs.clear()
        if self._reader:
            self._reader.close()
        if self._scratch_file:
            self._scratch_file.close()


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements as they lie in memory, 1-D, on the CPU."""
    tensor = tensor.detach()
    if not is_dense(tensor):
        tensor = tensor.contiguous()
    return tensor.as_strided((tensor.numel(),), (1,)).cpu()
