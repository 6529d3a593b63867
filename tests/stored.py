"""Safetensors files as the forms of low-bit weights see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lowbits.core.registry import DEFAULT
from lowbits.core.source import extent_of, read_tensor
from lowbits.files.forms.recognise import recognise
from lowbits.files.weights import StoredTensor, Weight

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lowbits.core.backend import Packed


def stored(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return a file's tensors, and its metadata."""
    with safe_open(path, framework="pt") as file:
        names, metadata = list(file.keys()), file.metadata() or {}
    tensors = {name: read_tensor(path, name) for name in names}
    extents = {name: extent_of(path, name) for name in names}
    return {
        name: StoredTensor(name, tensor.dtype, tuple(tensor.shape), extents[name])
        for name, tensor in tensors.items()
    }, metadata


def recognised(path: Path, config: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    """Return the weights that a file holds."""
    return recognise(*stored(path), config, **kwargs)


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
