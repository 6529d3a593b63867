"""Tensors under other names: a key map carried out, and what it is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lowbits.files.rows import KeyMap


def joined(key_map: KeyMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a key map makes of others."""
    return {
        name: torch.cat([segment.take(tensors[segment.source]) for segment in segments])
        for name, segments in key_map.items()
    }


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
