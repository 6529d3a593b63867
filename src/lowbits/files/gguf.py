"""GGUF files: what they hold, and their tensors as weights; read within bounds, on demand.

[Note: GGUF shapes]
A file has a tensor's dimensions in the reverse of torch's order, the values in the same one. Block
types need rows of whole blocks; ComfyUI's files for SD 1.5 and SDXL therefore hold convolutions
with other rows as ``(elements / 256, 256)``, and their own shape in the metadata
``comfy.gguf.orig_shape.<name>``. Where its rows do not end with a block, the weight's rows cannot
be taken apart, and its blocks stand in ``(blocks, block_bytes)``.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.backends.gguf.backend import GgufBackend, scheme_name
from lowbits.core.backend import Packed
from lowbits.core.source import Extent
from lowbits.errors import FormatError
from lowbits.files.gguf_header import Header, TensorInfo, read_header
from lowbits.files.gguf_types import (
    STORED_TYPES,
    StoredType,
    is_finite,
    refusal,
    stored_type,
    swap_order,
    type_name,
)
from lowbits.files.weights import Weight, read_into

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from lowbits.files.gguf_values import GgufMetadata

_ORDERS: Final = {"<": "little", ">": "big"}
_ORIGINAL_SHAPE: Final = "comfy.gguf.orig_shape."
_MAX_ORIGINAL_DIMENSIONS: Final = 8


@final
@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: of the tensor.
        shape: as a module holds it, in torch's order.
        type_name: ggml's, e.g. ``"Q4_K"``; ``"type 77"`` where it is not known.
        extent: its bytes; of an unknown type, all up to the next tensor.
        stored_shape: that the file has for it; see [Note: GGUF shapes].
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    extent: Extent
    stored_shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.extent.nbytes

    @property
    def offset(self) -> int:
        """First byte in the file."""
        return self.extent.offset


@final
class GgufFile:
    """An open GGUF file: its header; tensors are read when they are asked for.

    Attributes:
        path: of the file.
        version: 2 or 3.
        byte_order: ``"little"`` or ``"big"``; tensors are handed out in this machine's.
        metadata: by key; `GgufMetadata.typed` has the types as well.
        tensors: by name, as they come in the file.
        problems: what is strange about the file, and does not keep it from being read.
    """

    def __init__(self, path: Path, header: Header, tensors: Mapping[str, GgufTensor]) -> None:
        self.path = path
        self.version = header.version
        self.byte_order = _ORDERS[header.order]
        self.metadata: GgufMetadata = header.metadata
        self.tensors = tensors
        self.problems = tuple(_problems(header, tensors))

    @property
    def architecture(self) -> str | None:
        """``general.architecture``; None where the file does not say."""
        value = self.metadata.at_hand("general.architecture")
        return value if isinstance(value, str) else None

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored, in this machine's byte order.

        Returns:
            Of ordinary types the tensor; of block types ``(rows, row_bytes)`` uint8, of the rows
            that the file has.

        Raises:
            FormatError: a type that cannot be read, or a file that was changed or replaced.
            KeyError: there is no such tensor.
        """
        tensor = self.tensors[name]
        kind = self._kind(tensor)
        blocks = self._blocks(tensor, kind)
        if kind.dtype is not None:
            return blocks.view(-1).view(kind.dtype).view(tensor.shape)
        return blocks.view(math.prod(tensor.stored_shape[:-1]), -1)

    def dequantize(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        *,
        allow_nonfinite: bool = False,
    ) -> Tensor:
        """Return a tensor's values.

        Args:
            name: of the tensor.
            dtype: of the result; the arithmetic of block types is float32.
            allow_nonfinite: take NaN and infinity for values.

        Raises:
            FormatError: as `read`, and where a value, or the scale of a block, is not finite.
            KeyError: there is no such tensor.
        """
        tensor = self.tensors[name]
        value = self._value(tensor, allow_nonfinite=allow_nonfinite)
        if isinstance(value, Packed):
            value = GgufBackend().unpack(value, dtype)
        return value.to(dtype).view(tensor.shape)

    def weights(self, *, allow_nonfinite: bool = False) -> dict[str, Weight]:
        """Return the tensors as weights: nothing is read until a weight's `read` is called.

        Block types are of the scheme ``gguf-<type>``, a row for each of the first dimension.

        Args:
            allow_nonfinite: let NaN and infinity through, instead of raising `FormatError` when
                such a weight is read.
        """
        return {
            tensor.name: self._weight(tensor, allow_nonfinite=allow_nonfinite)
            for tensor in self.tensors.values()
        }

    def _weight(self, tensor: GgufTensor, *, allow_nonfinite: bool) -> Weight:
        kind = STORED_TYPES.get(tensor.type_name)
        dtype = kind.dtype if kind else None
        read = partial(self._value, tensor, allow_nonfinite=allow_nonfinite)
        scheme = scheme_name(tensor.type_name) if dtype is None else None
        return Weight(tensor.name, tensor.shape, dtype, tensor.nbytes, read, scheme)

    def _value(self, tensor: GgufTensor, *, allow_nonfinite: bool) -> Tensor | Packed:
        kind = self._kind(tensor)
        blocks = self._blocks(tensor, kind)
        if not allow_nonfinite and not is_finite(blocks, kind):
            raise FormatError(
                "it holds NaN or infinity; allow_nonfinite=True reads it all the same",
                self.path,
                tensor.name,
                tensor.offset,
            )
        if kind.dtype is not None:
            return blocks.view(-1).view(kind.dtype).view(tensor.shape)
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        row_length = math.prod(tensor.shape) // rows
        is_sliceable = row_length % kind.weights == 0
        qdata = blocks.view(rows, -1) if is_sliceable else blocks
        packed = Packed(scheme_name(kind.name), (rows, row_length), {"qdata": qdata})
        return replace(packed, row_sliceable=is_sliceable)

    def _kind(self, tensor: GgufTensor) -> StoredType:
        reason = refusal(tensor.type_name)
        kind = STORED_TYPES.get(tensor.type_name)
        if kind and kind.fields is None and self.byte_order != sys.byteorder:
            reason = (
                f"how blocks of {kind.name} stand in {self.byte_order}-endian files is not known"
            )
        if kind is None or reason:
            raise FormatError(f"it cannot be read: {reason}", self.path, tensor.name, tensor.offset)
        return kind

    def _blocks(self, tensor: GgufTensor, kind: StoredType) -> Tensor:
        """Return a tensor's bytes, ``(blocks, block_bytes)`` uint8, in this machine's order."""
        blocks = torch.empty(tensor.nbytes, dtype=torch.uint8, device="cpu")
        read_into(blocks, tensor.extent, tensor.name)
        blocks = blocks.view(-1, kind.block_bytes)
        if self.byte_order != sys.byteorder:
            swap_order(blocks, kind)
        return blocks


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Open a GGUF file, of version 2 or 3 and either byte order.

    Its header is read and checked: sizes, shapes and offsets against the file's own size. No
    tensor is read, nor a long array of the metadata; both are read from the path when they are
    asked for, and refused where another file has taken its place.

    Tensors of up to five dimensions are read, and of none; the trailing bytes of a file, and gaps
    between its tensors, are reported as `GgufFile.problems`.

    Args:
        path: of the file.

    Raises:
        FormatError: no GGUF file, or one that does not hold what it claims to hold.
        OSError: the file is not there, a folder, or may not be read.
    """
    path = Path(path)
    header = read_header(path)
    tensors = {}
    for info in header.infos:
        if info.name in tensors:
            raise FormatError("it is there twice", path, info.name, info.position)
        tensors[info.name] = _tensor(path, header, info)
    return GgufFile(path, header, _bounded(header, tensors))


def _tensor(path: Path, header: Header, info: TensorInfo) -> GgufTensor:
    kind = stored_type(info.number)
    offset, nbytes = header.data_start + info.offset, 0
    if info.offset % header.alignment:
        raise FormatError(
            f"its offset {info.offset} is not a multiple of {header.alignment}",
            path,
            info.name,
            info.position,
        )
    if kind is not None:
        row_length = info.shape[-1] if info.shape else 1
        if row_length % kind.weights:
            raise FormatError(
                f"its rows of {row_length} do not hold whole blocks of {kind.name}, which are of "
                f"{kind.weights}",
                path,
                info.name,
                info.position,
            )
        nbytes = kind.nbytes(math.prod(info.shape))
    if offset + nbytes > header.size:
        raise FormatError(
            f"the file is truncated: needs {offset + nbytes} bytes, has {header.size}",
            path,
            info.name,
            offset,
        )
    shape = _original_shape(path, header, info) or info.shape
    extent = Extent(path, offset, nbytes, header.stamp)
    return GgufTensor(info.name, shape, type_name(info.number), extent, info.shape)


def _original_shape(path: Path, header: Header, info: TensorInfo) -> tuple[int, ...] | None:
    """Return the shape that the metadata has for a tensor. See [Note: GGUF shapes]."""
    key = _ORIGINAL_SHAPE + info.name
    if key not in header.metadata:
        return None
    value = header.metadata.at_hand(key)
    sizes = value if isinstance(value, tuple) else ()
    shape = tuple(size for size in sizes if type(size) is int and size > 0)
    is_short = 0 < len(shape) == len(sizes) <= _MAX_ORIGINAL_DIMENSIONS
    if not is_short or math.prod(shape) != math.prod(info.shape):
        listed = f" {sizes[:_MAX_ORIGINAL_DIMENSIONS]}" if isinstance(value, tuple) else ""
        raise FormatError(
            f"its original shape{listed} is none of {math.prod(info.shape)} values",
            path,
            info.name,
            info.position,
        )
    return shape


def _bounded(header: Header, tensors: dict[str, GgufTensor]) -> Mapping[str, GgufTensor]:
    """Check that tensors do not overlap; those of unknown types end where the next one begins."""
    in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for tensor, following in zip_longest(in_order, in_order[1:]):
        end = following.offset if following else header.size
        if tensor.offset + tensor.nbytes > end:
            raise FormatError(
                f"its bytes overlap those of {following.name}",
                tensor.extent.path,
                tensor.name,
                tensor.offset,
            )
        if tensor.type_name not in STORED_TYPES:
            extent = replace(tensor.extent, nbytes=end - tensor.offset)
            tensors[tensor.name] = replace(tensor, extent=extent)
    return tensors


def _problems(header: Header, tensors: Mapping[str, GgufTensor]) -> Iterator[str]:
    yield from _unused_bytes(header, tensors.values())
    for tensor in tensors.values():
        reason = refusal(tensor.type_name)
        if reason:
            yield f"{tensor.name} cannot be read: {reason}"
    metadata = header.metadata
    architecture = metadata.at_hand("general.architecture")
    if "general.architecture" in metadata and not isinstance(architecture, str):
        yield "general.architecture is not a string"
    parts = metadata.at_hand("split.count")
    if isinstance(parts, int):
        if parts > 1:
            yield f"it is one of {parts} parts of a model; the others are not read"
    elif "split.count" in metadata:
        yield "split.count is not a number"
    for key in metadata:
        if key.startswith(_ORIGINAL_SHAPE) and key.removeprefix(_ORIGINAL_SHAPE) not in tensors:
            yield f"{key} is about no tensor"


def _unused_bytes(header: Header, tensors: Iterable[GgufTensor]) -> Iterator[str]:
    """Name bytes that are of no tensor, and more than what aligns the next one."""
    end = header.data_start
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset > end:
            yield f"{tensor.offset - end} bytes before {tensor.name} are of no tensor"
        end = tensor.offset + tensor.nbytes
        end += -end % header.alignment
    if header.size > end:
        yield f"{header.size - end} bytes follow the last tensor"
