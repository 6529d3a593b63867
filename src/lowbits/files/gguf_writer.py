"""Writes GGUF files: the header first, then one tensor at a time."""

from __future__ import annotations

import math
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.core.memory import bytes_of
from lowbits.errors import ConfigError, FormatError, suggestion
from lowbits.files.atomic import atomic_file
from lowbits.files.gguf_header import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_KEY_BYTES,
)
from lowbits.files.gguf_types import STORED_TYPES, StoredType, swap_order
from lowbits.files.gguf_values import GgufValue

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from typing import BinaryIO

    from torch import Tensor

    from lowbits.files.gguf_values import Scalar

_VERSION: Final = 3
_IS_BIG_ENDIAN: Final = sys.byteorder == "big"
#: Of tensor names: stable-diffusion.cpp holds 160, ComfyUI-GGUF's llama.cpp 127, llama.cpp 63.
MAX_NAME_BYTES: Final = 127


@final
@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of a file that is to be written.

    Attributes:
        name: of the tensor, up to `MAX_NAME_BYTES`.
        shape: in torch's order, up to five dimensions; block types need rows of whole blocks.
        type_name: ggml's, e.g. ``"Q4_K"``, ``"F16"``.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without what aligns the next tensor."""
        return self._kind().nbytes(math.prod(self.shape))

    def check(self) -> None:
        """Raise `ConfigError` where a file cannot hold such a tensor."""
        size = len(_name(self.name))
        if not 0 < size <= MAX_NAME_BYTES:
            raise ConfigError(
                f"tensor name {self.name!r} has {size} bytes; expected 1 to {MAX_NAME_BYTES}"
            )
        kind = self._kind()
        row_length = self.shape[-1] if self.shape else 1
        if len(self.shape) > MAX_DIMENSIONS or min(self.shape, default=1) < 1:
            raise ConfigError(
                f"{self.name}: cannot write shape {tuple(self.shape)}; up to {MAX_DIMENSIONS} "
                "dimensions, none of them 0"
            )
        if row_length % kind.weights:
            raise ConfigError(
                f"{self.name}: rows of {row_length} do not hold whole blocks of {kind.name}, "
                f"which are of {kind.weights}"
            )

    def _kind(self) -> StoredType:
        if self.type_name not in STORED_TYPES:
            raise ConfigError(
                f"{self.name}: unknown GGUF type {self.type_name!r}"
                f"{suggestion(self.type_name, STORED_TYPES)}; known: {', '.join(STORED_TYPES)}"
            )
        return STORED_TYPES[self.type_name]


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, GgufValue | Scalar],
    tensors: Sequence[TensorToWrite],
    read: Callable[[TensorToWrite], Tensor],
) -> None:
    """Write a GGUF file, of version 3, lowest bytes first, tensors at multiples of 32 bytes.

    What was at the path stays there until the file is whole. Memory: one tensor.

    Args:
        path: of the file.
        metadata: by key, in the order to write it in. Plain integers are written as ``u32``, floats
            as ``f32``; `GgufValue` names any other type, and arrays.
        tensors: in the order to write them in.
        read: called once for each tensor, in that order; gives its bytes: of block types uint8 of
            any shape, of others a tensor of the type's dtype and of the shape, on any device.

    Raises:
        ConfigError: names, shapes, types or metadata that cannot be written.
        FormatError: `read` gave a tensor of another size or dtype.
        OSError: the file cannot be written.
    """
    path = Path(path)
    header = _header(metadata, tensors)
    with atomic_file(path) as file:
        _write(file, header)
        for tensor in tensors:
            _write_tensor(file, path, tensor, read)


def _header(metadata: Mapping[str, GgufValue | Scalar], tensors: Sequence[TensorToWrite]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        name = _name(key)
        if not 0 < len(name) <= MAX_KEY_BYTES:
            raise ConfigError(
                f"metadata key {key[:80]!r} has {len(name)} bytes; expected 1 to {MAX_KEY_BYTES}"
            )
        if key == ALIGNMENT_KEY and GgufValue.of(value) != GgufValue("u32", DEFAULT_ALIGNMENT):
            raise ConfigError(f"{ALIGNMENT_KEY} is always {DEFAULT_ALIGNMENT} here, got {value!r}")
        parts += [struct.pack("<Q", len(name)), name, GgufValue.of(value).encode()]
    offset, names = 0, set()
    for tensor in tensors:
        tensor.check()
        if tensor.name in names:
            raise ConfigError(f"tensor name {tensor.name!r} is there twice")
        names.add(tensor.name)
        parts.append(_info(tensor, offset))
        offset += tensor.nbytes + -tensor.nbytes % DEFAULT_ALIGNMENT
    return b"".join(parts)


def _info(tensor: TensorToWrite, offset: int) -> bytes:
    name = _name(tensor.name)
    shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
    number = STORED_TYPES[tensor.type_name].number
    return struct.pack("<Q", len(name)) + name + shape + struct.pack("<IQ", number, offset)


def _name(name: str) -> bytes:
    try:
        return name.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"name {name!r} cannot be written as UTF-8") from error


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    file.write(data)
    file.write(bytes(-len(data) % DEFAULT_ALIGNMENT))


def _write_tensor(
    file: BinaryIO, path: Path, tensor: TensorToWrite, read: Callable[[TensorToWrite], Tensor]
) -> None:
    # A function of its own: its tensor is gone before the next one is read.
    data = _data(path, tensor, read(tensor))
    _write(file, bytes_of(data))


def _data(path: Path, tensor: TensorToWrite, data: Tensor) -> Tensor:
    """Return a tensor's bytes as they stand in the file."""
    kind = STORED_TYPES[tensor.type_name]
    expected = kind.dtype or torch.uint8
    is_shaped = kind.dtype is None or data.shape == tensor.shape
    if data.dtype != expected or data.nbytes != tensor.nbytes or not is_shaped:
        raise FormatError(
            f"{kind.name} of shape {tuple(tensor.shape)} is {tensor.nbytes} bytes of {expected}; "
            f"got {tuple(data.shape)} of {data.dtype}",
            path,
            tensor.name,
        )
    data = data.detach().cpu().contiguous()
    if _IS_BIG_ENDIAN:
        blocks = data.view(-1).view(torch.uint8).view(-1, kind.block_bytes).clone()
        swap_order(blocks, kind)
        return blocks
    return data
