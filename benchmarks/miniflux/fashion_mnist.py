"""Fashion-MNIST: reading its files, and the picture formats of the pipeline and of the reader.

The files come from the Debian package ``dataset-fashion-mnist``; see README.md.
"""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from pathlib import Path

_IMAGE_HEADER_BYTES = 16
_LABEL_HEADER_BYTES = 8


class LabelledImages(NamedTuple):
    """One split of the data set.

    Attributes:
        images: ``(n, 1, 28, 28)`` float32 in [-1, 1]; the background is -1.
        labels: ``(n,)`` int64, 0 to 9.

    """

    images: torch.Tensor
    labels: torch.Tensor


def load_split(folder: Path, split: Literal["train", "t10k"]) -> LabelledImages:
    """Read one split.

    Args:
        folder: where the four ``*-ubyte.gz`` files are.
        split: ``train`` has 60,000 pictures, ``t10k`` 10,000.

    Returns:
        The pictures and their labels.

    Source: the IDX format, http://yann.lecun.com/exdb/mnist/.

    """
    images = _payload(folder / f"{split}-images-idx3-ubyte.gz", _IMAGE_HEADER_BYTES)
    labels = _payload(folder / f"{split}-labels-idx1-ubyte.gz", _LABEL_HEADER_BYTES)
    return LabelledImages(images.view(-1, 1, 28, 28) / 127.5 - 1, labels.long())


def _payload(path: Path, header_bytes: int) -> torch.Tensor:
    # A bytearray, because torch warns about tensors over read-only memory.
    raw = bytearray(gzip.decompress(path.read_bytes()))
    return torch.frombuffer(raw, dtype=torch.uint8, offset=header_bytes)


def to_rgb32(images: torch.Tensor) -> torch.Tensor:
    """Pad ``(n, 1, 28, 28)`` grey pictures to ``(n, 3, 32, 32)``, what the VAE takes."""
    return functional.pad(images, (2, 2, 2, 2), value=-1.0).expand(-1, 3, -1, -1)


def to_grey28(images: torch.Tensor) -> torch.Tensor:
    """Undo `to_rgb32`: ``(n, 3, 32, 32)`` pictures, clamped to [-1, 1], as ``(n, 1, 28, 28)``."""
    return images.clamp(-1, 1).mean(1, keepdim=True)[..., 2:30, 2:30]
