"""Safetensors files as the forms of low-bit weights see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from lowbits.core.registry import DEFAULT
from lowbits.files.forms.recognise import recognise
from lowbits.files.safetensors import read_safetensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lowbits.core.backend import Packed
    from lowbits.files.weights import Weight


def recognised(path: Path, config: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    """Return the weights that a file holds."""
    file = read_safetensors(path)
    return recognise(file.tensors, file.metadata, config, **kwargs)


def written(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Weight]:
    """Write a file, and return the weights that it holds."""
    file = path / "x.safetensors" if path.is_dir() else path
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, dict(metadata or {}) or None)
    found: dict[str, Weight] = recognised(file, config, **kwargs)
    return found


def packed_of(weight: Weight) -> Packed:
    """Read a low-bit weight, and see that it is what was announced."""
    packed: Any = weight.read()
    assert packed.scheme == weight.scheme
    assert packed.shape[0] == weight.shape[0]
    return packed  # type: ignore[no-any-return]


def values_of(weight: Weight) -> torch.Tensor:
    """Return a low-bit weight's values in float32."""
    packed = packed_of(weight)
    backend, _ = DEFAULT.find(packed.scheme)
    assert backend is not None
    return backend.unpack(packed, torch.float32).view(weight.shape)
