"""Folders whose new contents take their places once all of them are written."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from contextlib import contextmanager
from errno import ENOTDIR
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

#: A model's weights, as diffusers, transformers and lowbits call them; variants have names between.
_WEIGHTS: Final = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model|lowbits)(-\d{5,}-of-\d{5,})?"
    r"\.(safetensors|bin)(\.index\.json)?"
)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder whose contents take their places in `path` once they are written.

    Whatever is raised until then, what was there stays. Of a folder that is replaced, weights that
    the new one does not have are gone, and all else stays. A process that is killed leaves
    ``.<name>.*.tmp`` beside it, which may be deleted; one that is killed while folders take their
    places leaves some of them.

    Args:
        path: a folder, which may be there; its parents are made.

    Raises:
        OSError: the system refuses to write.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(ENOTDIR, "not a folder", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name[:32]}.{secrets.token_hex(6)}.tmp")
    new.mkdir()
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
    if target.is_dir():
        for old in target.iterdir():
            if not (new / old.name).exists() and not _WEIGHTS.fullmatch(old.name):
                shutil.move(old, new / old.name)
        shutil.move(target, new.with_name(f"{new.name}.{secrets.token_hex(6)}"))
    shutil.move(new, target)
