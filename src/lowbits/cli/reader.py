"""The reader: a small classifier that says what is on a picture of mini-FLUX.

The same network as in ``benchmarks/miniflux/reader.py``, which trains it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def load_reader(path: Path) -> nn.Sequential:
    """Load a reader from its safetensors file, ready to read."""
    stages = [*_stage(1, 24), *_stage(24, 48), *_stage(48, 64)]
    reader = nn.Sequential(*stages, nn.Flatten(), nn.Linear(576, 96), nn.ReLU(), nn.Linear(96, 10))
    reader.load_state_dict(load_file(path), strict=True)
    return reader.eval()


@torch.no_grad()
def read(reader: nn.Sequential, pictures: Tensor) -> Tensor:
    """Return the class of each of ``(n, 3, 32, 32)`` pictures in 0 to 1, as ``(n,)`` int64."""
    grey = pictures.clamp(0, 1).mean(1, keepdim=True)[..., 2:30, 2:30] * 2 - 1
    classes: Tensor = reader(grey).argmax(1)
    return classes


def _stage(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
