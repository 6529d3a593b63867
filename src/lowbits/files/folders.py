"""Folders: written whole or not at all, and without weights that stand for others."""

from __future__ import annotations

import logging
import os
import re
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from errno import EACCES, EEXIST, ENOTDIR
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from lowbits.errors import ConfigError
from lowbits.files.atomic import temporary_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

logger = logging.getLogger("lowbits.files")

#: A model's weights, as diffusers, transformers and lowbits call them; variants have names between.
_WEIGHTS: Final = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model|lowbits)(-\d{5,}-of-\d{5,})?"
    r"\.(safetensors|bin)(\.index\.json)?"
)

#: What ``from_pretrained`` looks for.
_OTHERS: Final = ("diffusion_pytorch_model*", "model*.safetensors*", "pytorch_model*")
#: Why packed weights are not written beside those: into a folder, because of a file.
BESIDE_SAVED: Final = (
    "{} holds {}, which from_pretrained would go on reading in place of the packed weights: save "
    "into another folder, or remove it first"
)
#: Why they are not read beside those: which are newer, nothing tells.
BESIDE_LOADED: Final = (
    "{} holds {} beside packed weights, and was saved into twice: remove what is not to be loaded"
)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder whose contents take their places in `path` once they are written.

    Whatever is raised until all of them have, what was there stays. Of a folder that is replaced,
    weights that the new one does not have are gone, and all else stays. A process that is killed
    leaves ``.<name>.*.tmp`` in it, or beside it where it is new, which may be deleted; one that is
    killed while several take their places leaves some of them, and may leave the old one of the
    last under such a name.

    Args:
        path: a folder, which may be there; its parents are made.

    Raises:
        OSError: the system refuses to write.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(ENOTDIR, "not a folder", str(target))
    # In the folder itself, which may be a disk of its own.
    new = temporary_of(target / target.name if target.is_dir() else target)
    new.mkdir(parents=True)
    try:
        yield new
        if target.is_dir():
            _place(new, target)
        else:
            new.replace(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def copy(source: Path, target: Path) -> None:
    """Copy a file, or a folder and what is in it, with the modes that the umask leaves.

    A store may be read-only: what is copied from it must not be.
    """
    if not source.is_dir():
        shutil.copyfile(source, target)
        return
    target.mkdir()
    for entry in source.iterdir():
        copy(entry, target / entry.name)


def _place(new: Path, folder: Path) -> None:
    """Let all that is in a folder take its place in another one, or nothing."""
    # Folders first: the index of a pipeline tells of them.
    entries = sorted(new.iterdir(), key=lambda entry: entry.is_file())
    exchanges = [_exchange(entry, folder) for entry in entries]
    try:
        for each in exchanges:
            each.prepare()
        _do_all(exchanges)
    finally:
        for each in exchanges:
            each.discard()
    with ExitStack() as stack:  # each of them, whatever the others raise
        for each in exchanges:
            stack.callback(each.finish)


def _do_all(exchanges: Sequence[_Exchange]) -> None:
    try:
        for each in exchanges:
            each.do()
    except BaseException:
        with ExitStack() as stack:  # the last one first, each whatever the others raise
            for each in exchanges:
                stack.callback(each.undo)
        raise


@final
@dataclass(frozen=True)
class _Exchange:
    """A file or folder that takes its place, and what was there.

    Attributes:
        new: where it was written.
        target: its place.
        ready: where it waits for the others, beside its place.
        old: where what was there waits until all the others have theirs.
    """

    new: Path
    target: Path
    ready: Path
    old: Path

    def prepare(self) -> None:
        """Bring it to its disk, which may be another one, and full: renames cannot fail there."""
        if self.target.is_dir() and not os.access(self.target, os.W_OK):
            raise PermissionError(EACCES, os.strerror(EACCES), str(self.target))
        if self.target.exists() and self.target.is_dir() != self.new.is_dir():
            raise FileExistsError(EEXIST, "a file is to be where a folder is", str(self.target))
        shutil.move(self.new, self.ready)
        if self.target.is_file():
            shutil.copy2(self.target, self.old)

    def do(self) -> None:
        """Put it in its place."""
        if self.target.is_dir():
            self.target.replace(self.old)
        self.ready.replace(self.target)

    def undo(self) -> None:
        """Take it out again, as far as it got."""
        if not self.ready.exists():
            self.target.replace(self.ready)
        if self.old.exists() and not self.target.exists():
            self.old.replace(self.target)

    def discard(self) -> None:
        """Remove what did not get to its place."""
        if self.ready.is_dir():
            shutil.rmtree(self.ready, ignore_errors=True)
        else:
            self.ready.unlink(missing_ok=True)
        if self.old.is_file():
            self.old.unlink()

    def finish(self) -> None:
        """Give the new folder what else the old one had, and remove that."""
        if not self.old.exists():
            return
        try:
            _give_others(self.old, self.target)
        except BaseException:  # of an interrupt, too: nothing else knows where they are
            _give_others(self.old, self.target)
            self._remove()
            raise
        self._remove()

    def _remove(self) -> None:
        try:
            shutil.rmtree(self.old)
        except OSError as error:
            logger.warning("%s is saved; what it held before is left: %s", self.target, error)


def _exchange(new: Path, folder: Path) -> _Exchange:
    target = Path(os.path.realpath(folder / new.name))
    return _Exchange(new, target, temporary_of(target), temporary_of(target))


def _give_others(old: Path, target: Path) -> None:
    """Move what the new folder does not have there, but for weights."""
    for entry in old.iterdir():
        if not (target / entry.name).exists() and not _WEIGHTS.fullmatch(entry.name):
            entry.replace(target / entry.name)


def refuse_other_weights(folder: Path, message: str) -> None:
    """Raise where a folder holds weights that ``from_pretrained`` would take for its model's.

    Args:
        folder: of the model.
        message: that is raised: `BESIDE_SAVED` or `BESIDE_LOADED`.

    Raises:
        ConfigError: naming one of them.
    """
    found = sorted(path.name for pattern in _OTHERS for path in folder.glob(pattern))
    if found:
        raise ConfigError(message.format(folder, found[0]))
