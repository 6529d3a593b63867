"""Safetensors files made by hand, right or wrong, and tensors of any bits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Return the bytes of a file; a header that is no bytes is written as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def good() -> bytes:
    """Return a file of two tensors and metadata."""
    header = {
        "__metadata__": {"format": "pt", "ключ": "значение"},
        "a": entry("F32", [2, 2], 0, 16),
        "b": entry("U8", [3], 16, 19),
    }
    return file_of(header, bytes(range(19)))


def random_bytes(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a tensor of any dtype, of random bits but for a bool's."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, size, dtype=torch.uint8).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(found[name]), bits(tensor))
