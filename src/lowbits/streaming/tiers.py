"""Where masters lie: in host memory, in page-locked host memory, or in a file."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.core.memory import available_host_bytes
from lowbits.core.report import format_bytes
from lowbits.errors import InsufficientMemoryError
from lowbits.streaming.host import (
    Reader,
    file_is_larger_than_memory,
    pinned_empty,
)
from lowbits.streaming.masters import FileMaster, HostMaster, Master
from lowbits.streaming.scratch import ScratchFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from lowbits.core.source import Extent
    from lowbits.streaming.device_ops import DeviceOps
    from lowbits.streaming.layout import Place, Unit

    #: Says where the tensor of a dotted name lies in a file, bit for bit; None: in none.
    Locate = Callable[[str, Tensor], Extent | None]

logger = logging.getLogger("lowbits.streaming")

#: What people call places elsewhere.
_ALIASES: Final = {"pageable": "cpu", "pinned": "shared"}

#: What page-locked memory may take of the host's: the system cannot swap it out.
_PINNED_SHARE: Final = 0.4


@final
class Tier:
    """The place of one model's masters, and what it costs there.

    Attributes:
        name: ``"cpu"``, ``"shared"`` or ``"disk"``.
        notes: why it is another place than the one that was asked for.
    """

    def __init__(
        self, location: str, nbytes: int, ops: DeviceOps, locate: Locate | None = None
    ) -> None:
        """Choose the place.

        Args:
            location: one of `lowbits.config.LOCATIONS`.
            nbytes: that masters will take.
            ops: the device that they will be copied to.
            locate: says which file a tensor is proven to come from; it is read there, not copied.
        """
        self.notes: list[str] = []
        self.name = self._choose(_ALIASES.get(location, location), nbytes, ops)
        # One, and in a forked child that writes, one of its own.
        self._scratch_files: list[ScratchFile] = []
        self._locate, self._settle = locate, ops.finish_copies
        logger.info("%s of weights will wait in %r", format_bytes(nbytes), self.name)
        is_direct = file_is_larger_than_memory(nbytes)
        # Units are appended to the scratch file while it is read; others' files must stay as is.
        self._scratch_reader = Reader(direct=is_direct, immutable=False)
        self._source_reader = Reader(direct=is_direct)

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
        """Bytes of scratch files."""
        return sum(file.nbytes for file in self._scratch_files)

    def store(self, unit: Unit) -> Master:
        """Copy a unit's tensors to where they stay; the unit is not changed."""
        if self.name == "disk":
            return self._store_in_files(unit)
        if self.name == "shared":
            try:
                slab = pinned_empty(unit.nbytes, self._settle)
            except InsufficientMemoryError as error:
                self._note(str(error))
                self.name = "cpu"
            else:
                return HostMaster(unit, slab.tensor, slab)
        with torch.inference_mode(mode=False):
            return HostMaster(unit, torch.empty(unit.nbytes, dtype=torch.uint8, device="cpu"))

    def _store_in_files(self, unit: Unit) -> FileMaster:
        """Write to the scratch file what is in no other one: mostly all, or nothing."""
        found = {n: self._located(place) for n, place in enumerate(unit.places)}
        pieces = [
            (unit.places[n].offset, extent) for n, extent in found.items() if extent is not None
        ]
        rest = [unit.places[n] for n, extent in found.items() if extent is None]
        if rest:
            # From the first to the last one: a unit without a file is one run of bytes.
            start = rest[0].offset
            stop = rest[-1].offset + rest[-1].nbytes if pieces else unit.nbytes
            parts = ((p.offset - start, p.run_of(p.original.detach())) for p in rest)
            pieces.insert(0, (start, self.append(parts, stop - start)))
        return FileMaster(pieces, self)

    def _located(self, place: Place) -> Extent | None:
        if self._locate is None:
            return None
        found = (self._locate(holder.fqn, place.original) for holder in place.holders)
        return next((extent for extent in found if extent is not None), None)

    def read(self, extent: Extent, out: Tensor, should_stop: Callable[[], bool] | None) -> None:
        """Read a part of a file."""
        is_scratch = any(extent.path == file.path for file in self._scratch_files)
        reader = self._scratch_reader if is_scratch else self._source_reader
        reader.read(extent, out, should_stop)

    def append(self, parts: Iterable[tuple[int, Tensor]], nbytes: int) -> Extent:
        """Write to this process's scratch file."""
        if not self._scratch_files or not self._scratch_files[-1].is_own:
            self._scratch_files.append(ScratchFile())
        return self._scratch_files[-1].append(parts, nbytes)

    def rewrite(self, extent: Extent, run: Tensor) -> Extent:
        """Write over a part of the scratch file; not of one that a parent process reads."""
        file = self._scratch_files[-1]
        if not file.is_own or extent.path != file.path:
            return self.append([(0, run)], extent.nbytes)
        file.overwrite(extent, run)
        return extent

    def close(self) -> None:
        """Close files, and remove the scratch file."""
        self._scratch_reader.close()
        self._source_reader.close()
        for file in self._scratch_files:
            file.close()
