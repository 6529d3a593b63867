"""Safetensors files made by hand, right or wrong."""

from __future__ import annotations

import json
from typing import Any


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
