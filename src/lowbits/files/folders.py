"""Folders: written whole or not at all, and without weights that stand for others."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import contextmanager
from errno import ENOTDIR
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lowbits.errors import ConfigError
from lowbits.files.atomic import temporary_of

if TYPE_CHECKING:
    from collections.abc import Iterator

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

    Whatever is raised until then, what was there stays. Of a folder that is replaced, weights that
    the new one does not have are gone, and all else stays. A process that is killed leaves
    ``.<name>.*.tmp`` in it, or beside it where it is new, which may be deleted; one that is killed
    while folders take their places leaves some of them, and may leave the old one of the last under
    such a name.

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
        target.mkdir(exist_ok=True)
        # Folders first: the index of a pipeline tells of them.
        for entry in sorted(new.iterdir(), key=lambda entry: entry.is_file()):
            _place(entry, Path(os.path.realpath(target / entry.name)))
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _place(new: Path, target: Path) -> None:
    if new.is_file():
        new.replace(target)
        return
    # On the target's disk first, which may be another one, and full: renames cannot fail there.
    ready, old = temporary_of(target), temporary_of(target)
    try:
        shutil.move(new, ready)
        _exchange(ready, target, old)
    finally:
        shutil.rmtree(ready, ignore_errors=True)
    if old.exists():
        try:
            _give_others(old, target)
        except BaseException:  # of an interrupt, too: nothing else knows where they are
            _give_others(old, target)
            raise
        shutil.rmtree(old)


def _exchange(ready: Path, target: Path, old: Path) -> None:
    try:
        if target.is_dir():
            target.replace(old)
        ready.replace(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.replace(target)
        raise


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
