"""Weights that have no file of their own: a scratch file, where there is room, gone at the end."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import re
import shutil
import tempfile
import weakref
from io import FileIO
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from lowbits.core.memory import bytes_of
from lowbits.core.source import Extent
from lowbits.errors import ConfigError, InsufficientMemoryError, LowbitsError
from lowbits.streaming.host import rounded_up

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

logger = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 16 << 20

_MOUNTS: Final = Path("/proc/mounts")
_MEMORY_FILE_SYSTEMS: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})
# Kept across reboots, hence on a disk where /tmp is not.
_DISK_TEMP: Final = Path("/var/tmp")  # noqa: S108 - only names the place: mkdtemp makes the file's


@final
class ScratchFile:
    """Tensors' bytes in a file that is gone at the end: a place for weights that have no other.

    Costs `nbytes` of disk space. Removed by `close`, when the object is collected, and when the
    interpreter exits; not by a forked child, which may exit first. What a killed process leaves is
    a folder ``lowbits-*``. One thread at a time may append; readers read whenever they want, and
    on Windows are closed first.

    Args:
        directory: where to put it; by default what `scratch_directory` returns.

    Raises:
        ConfigError: no file can be made there.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        parent = scratch_directory() if directory is None else Path(directory)
        try:
            folder = Path(tempfile.mkdtemp(prefix="lowbits-", dir=parent))
            self.path = folder / "units"
            self._raw = FileIO(self.path, "x")
        except OSError as error:
            raise ConfigError(f"cannot make a file in {parent}: {error}; set TMPDIR") from error
        self.nbytes = 0
        self._owner = os.getpid()
        self._remove = weakref.finalize(self, _remove_scratch, self._raw, self.path, self._owner)
        if multiprocessing.parent_process() is not None:
            # Children of multiprocessing that were forked end without the interpreter's exit.
            Finalize(None, self._remove, exitpriority=0)

    @property
    def is_own(self) -> bool:
        """Whether this process made it: a forked child must not write where its parent does."""
        return os.getpid() == self._owner

    def append(self, parts: Iterable[tuple[int, Tensor]], nbytes: int) -> Extent:
        """Write one unit, from the next multiple of `ALIGNMENT` on, without a copy of the data.

        Args:
            parts: for each tensor its offset in the unit; contiguous, on the CPU, of any dtype.
                What lies between them reads as zeros, and so does the file up to the next multiple
                of `ALIGNMENT` after the unit, so that whole blocks can be read.
            nbytes: size of the unit.

        Raises:
            InsufficientMemoryError: the disk has too little space, or refused a write. The file is
                as it was before the call.
            ConfigError: a part is not such a tensor, or does not lie in the unit.
        """
        if not self._remove.alive:
            raise LowbitsError(f"cannot write to {self.path}: it was closed")
        end = self.nbytes + rounded_up(nbytes)
        require_space(self.path.parent, end - self.nbytes)
        try:
            for offset, tensor in parts:
                self._write(tensor, offset, Extent(self.path, self.nbytes, nbytes))
            self._raw.truncate(end)
        except BaseException as error:
            self._raw.truncate(self.nbytes)
            if isinstance(error, OSError):
                raise self._refused(nbytes, error) from error
            raise
        extent = Extent(self.path, self.nbytes, nbytes)
        self.nbytes = end
        return extent

    def overwrite(self, extent: Extent, tensor: Tensor) -> None:
        """Write a tensor, contiguous on the CPU, over an extent of its size that nobody reads now.

        Raises:
            InsufficientMemoryError: the disk refused the write; the extent holds anything.
        """
        try:
            self._write(tensor, 0, extent)
        except OSError as error:
            raise self._refused(extent.nbytes, error) from error

    def close(self) -> None:
        """Remove the file and its folder."""
        self._remove()

    def _refused(self, nbytes: int, error: OSError) -> InsufficientMemoryError:
        return InsufficientMemoryError(
            f"cannot write {nbytes} bytes to {self.path}: {error}; set TMPDIR to a folder on a "
            "larger disk"
        )

    def _write(self, tensor: Tensor, offset: int, extent: Extent) -> None:
        view, done = bytes_of(tensor), 0
        if not 0 <= offset <= extent.nbytes - len(view):
            raise ConfigError(
                f"{len(view)} bytes at offset {offset} exceed a unit of {extent.nbytes}"
            )
        self._raw.seek(extent.offset + offset)
        while done < len(view):
            done += self._raw.write(view[done : done + _CHUNK_BYTES])


def _remove_scratch(raw: FileIO, path: Path, owner: int, *, is_last: bool = False) -> None:
    raw.close()
    if os.getpid() != owner:
        return
    try:
        path.unlink(missing_ok=True)
        path.parent.rmdir()
    except PermissionError as error:
        if is_last:
            logger.warning("cannot remove %s: %s", path.parent, error)
        else:  # Windows, while a reader is open that is collected together with this
            atexit.register(_remove_scratch, raw, path, owner, is_last=True)
    except OSError as error:
        logger.warning("cannot remove %s: %s", path.parent, error)


def scratch_directory() -> Path:
    """Return where large temporary files go: ``TMPDIR`` if set, else a usual place on a disk.

    Many systems keep ``/tmp`` in memory, where a file would take what it is to save.
    """
    named = os.environ.get("TMPDIR")
    if named:
        return Path(named).absolute()  # the process may go elsewhere
    usual = Path(tempfile.gettempdir())
    for place in (usual, _DISK_TEMP):
        if place.is_dir() and not is_in_memory(place):
            return place
    logger.warning("%s is kept in memory: set TMPDIR to a folder on a disk", usual)
    return usual


def is_in_memory(path: Path) -> bool:
    """Return whether Linux keeps the files of a folder in memory; elsewhere, and in doubt, False.

    Source: ``/proc/mounts``, proc(5); blanks in its names are octal escapes, fstab(5).
    """
    if not _MOUNTS.exists():
        return False
    path, depth, kind = path.resolve(), 0, ""
    for line in _MOUNTS.read_text(errors="surrogateescape").splitlines():
        escaped, file_system = line.split(" ")[1:3]
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), escaped))
        # The last of several at one point hides the others.
        if path.is_relative_to(point) and len(point.parts) >= depth:
            depth, kind = len(point.parts), file_system
    return kind in _MEMORY_FILE_SYSTEMS


def require_space(directory: Path, nbytes: int) -> None:
    """Raise `InsufficientMemoryError` where a disk has less free space than `nbytes`."""
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise InsufficientMemoryError(
            f"{directory} has {free / 2**30:.2f} GiB of free space, and {nbytes / 2**30:.2f} GiB "
            "are needed: set TMPDIR to a folder on a larger disk"
        )
