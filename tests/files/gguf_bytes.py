"""GGUF files put together by hand, right ones and wrong ones."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lowbits.files.gguf import GgufFile, read_gguf

if TYPE_CHECKING:
    from pathlib import Path

#: Numbers of metadata types, and how `struct` packs them.
KINDS = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"),
    "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?"), "str": (8, ""), "array": (9, ""),
    "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d"),
}  # fmt: skip
F32, Q8_0 = 0, 8
PLAIN = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


@dataclass
class Gguf:
    """What a file says; counts and bytes are those of what it holds unless given.

    Attributes:
        keys: encoded metadata, one by one.
        infos: encoded tensor infos, one by one.
        data: what follows the header, once that is padded.
    """

    keys: list[bytes] = field(default_factory=list)
    infos: list[bytes] = field(default_factory=list)
    data: bytes = b""
    version: int = 3
    order: str = "<"
    tensor_count: int | None = None
    key_count: int | None = None
    alignment: int = 32
    magic: bytes = b"GGUF"

    def header(self) -> bytes:
        tensors = len(self.infos) if self.tensor_count is None else self.tensor_count
        keys = len(self.keys) if self.key_count is None else self.key_count
        counts = struct.pack(self.order + "IQQ", self.version, tensors, keys)
        return self.magic + counts + b"".join(self.keys) + b"".join(self.infos)

    def bytes(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data


def string(text: str | bytes, order: str = "<") -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(order + "Q", len(data)) + data


def value(kind: str, content: Any, order: str = "<") -> bytes:
    if kind == "str":
        return string(content, order)
    return struct.pack(order + KINDS[kind][1], content)


def key(name: str | bytes, kind: str, content: Any, order: str = "<") -> bytes:
    """Encode a metadata value; a list is an array of values of the kind."""
    head = string(name, order)
    number = KINDS[kind][0]
    if not isinstance(content, list):
        return head + struct.pack(order + "I", number) + value(kind, content, order)
    head += struct.pack(order + "IIQ", 9, number, len(content))
    return head + b"".join(value(kind, element, order) for element in content)


def array_head(name: str, kind: str, count: int) -> bytes:
    """Encode a metadata array that has no elements yet."""
    return string(name) + struct.pack("<IIQ", 9, KINDS[kind][0], count)


def info(
    name: str | bytes,
    dims: tuple[int, ...],
    number: int = F32,
    offset: int = 0,
    order: str = "<",
    dimensions: int | None = None,
) -> bytes:
    """Encode a tensor info; dims are in the file's order, the reverse of torch's."""
    count = len(dims) if dimensions is None else dimensions
    shape = struct.pack(f"{order}I{len(dims)}Q", count, *dims)
    return string(name, order) + shape + struct.pack(order + "IQ", number, offset)


def floats(*values: float, order: str = "<") -> bytes:
    return struct.pack(f"{order}{len(values)}f", *values)


def q8_0(scale: float, codes: list[int], order: str = "<") -> bytes:
    return struct.pack(f"{order}e32b", scale, *codes)


def small(order: str = "<", version: int = 3) -> Gguf:
    """Return a file with a value of most kinds, a vector and a matrix of blocks."""
    keys = [
        key("general.architecture", "str", "flux", order),
        key("general.file_type", "u32", 7, order),
        key("a.bool", "bool", True, order),
        key("an.i64", "i64", -5, order),
        key("an.f64", "f64", 0.25, order),
        key("tokens", "str", ["a", "", "\u00e9t\u00e9"], order),
        key("numbers", "i16", [1, -2, 3], order),
    ]
    infos = [
        info("norm.weight", (4,), F32, 0, order),
        info("proj.weight", (32, 2), Q8_0, 32, order),
    ]
    data = floats(1, 2, 3, -4, order=order) + bytes(16)
    data += q8_0(0.5, list(range(32)), order) + q8_0(-2.0, list(range(-32, 0)), order)
    return Gguf(keys, infos, data, version, order)


def opened(folder: Path, file: Gguf | bytes) -> GgufFile:
    path = folder / "model.gguf"
    path.write_bytes(file if isinstance(file, bytes) else file.bytes())
    return read_gguf(path)
