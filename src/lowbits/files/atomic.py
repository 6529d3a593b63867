"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import contextmanager, suppress
from errno import EEXIST
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, final

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` once it is written and on the disk.

    Until then what was there stays, also where it is read meanwhile. Whatever is raised, nothing is
    left of the new file but what a killed process leaves: ``.<name>.*.tmp`` beside it, which may be
    deleted. Like ``open(path, "wb")`` it writes to where a symbolic link points, keeps the mode of
    a file that is there, and gives a new one the mode that the umask leaves.

    Raises:
        OSError: the folder cannot be written to, the disk is full, or `path` is no regular file.
    """
    with atomic_files() as files, files.open(path) as file:
        yield file


@contextmanager
def atomic_files() -> Iterator[AtomicFiles]:
    """Write several files that take their places once all of them are written, in their order.

    Whatever is raised until then, what was there stays. No system replaces several files at once: a
    process that is killed while they take their places leaves some of them.
    """
    files = AtomicFiles()
    try:
        yield files
        files._take_places()
    finally:
        files._clean_up()


@final
class AtomicFiles:
    """Files that are written, but do not stand where they belong yet; one is open at a time."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Path, Path]] = []
        self._hidden: tuple[Path, Path] | None = None
        self._placed: list[Path] = []

    @contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """Open a file under another name; once it is written, it waits for the others."""
        target = Path(os.path.realpath(path))
        mode = _mode(target)
        temporary = temporary_of(target)
        try:
            with temporary.open("xb") as file:
                if mode is not None:
                    temporary.chmod(mode)
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename == str(temporary):
                error.filename = str(target)  # the name that the caller knows
            raise
        self._waiting.append((temporary, target))

    def hide(self, path: Path) -> None:
        """Take a file away that must not be read with only some of the others in their places.

        It comes back where none of them could take its own, and is gone for good else.
        """
        target = Path(os.path.realpath(path))
        if target.exists():
            aside = temporary_of(target)
            target.replace(aside)
            self._hidden = (aside, target)

    def _take_places(self) -> None:
        while self._waiting:
            temporary, target = self._waiting[0]
            temporary.replace(target)
            del self._waiting[0]
            self._placed.append(target)
        for folder in {target.parent for target in self._placed}:
            _sync_folder(folder)

    def _clean_up(self) -> None:
        for temporary, _ in self._waiting:
            temporary.unlink(missing_ok=True)
        if self._hidden:
            aside, path = self._hidden
            if self._placed:
                aside.unlink()
            else:
                aside.replace(path)


def temporary_of(target: Path) -> Path:
    """Return a name beside a target's that nothing has yet."""
    # Cut: a name may be as long as the file system admits.
    return target.with_name(f".{target.name[:32]}.{secrets.token_hex(6)}.tmp")


def _mode(target: Path) -> int | None:
    """Return the permissions of a file that is there, None where none is."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        # A rename would put a file in the place of a device, say of /dev/null.
        raise FileExistsError(EEXIST, "not a regular file", str(target))
    return stat.S_IMODE(mode)


def _sync_folder(folder: Path) -> None:
    """Have the system write down the new names, so that they outlive a loss of power."""
    if os.name != "posix":
        return
    # Some file systems (SMB, FUSE) refuse to; the files themselves are on the disk.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
