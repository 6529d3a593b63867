"""Types of tensors as GGUF files hold them: block sizes, byte order, values that are no numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.backends.gguf.types import TYPES
from lowbits.core.memory import PART_WEIGHTS
from lowbits.core.packing import are_finite

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class StoredType:
    """How a file holds the tensors of a type.

    Attributes:
        name: as in ggml.
        number: of the type in a file.
        weights: in a block; 1 where the type is none of blocks.
        block_bytes: of a block, or of one value.
        dtype: of an ordinary tensor; None: the type is one of blocks.
        fields: ``(offset, bytes)`` of what a machine's byte order changes in a block; None: there
            are such fields, and no file that shows how they stand.
        halves: offsets of the float16 scales of a block, which make all of its values NaN or
            infinite or none; None: only decoding tells.
    """

    name: str
    number: int
    weights: int
    block_bytes: int
    dtype: torch.dtype | None = None
    fields: tuple[tuple[int, int], ...] | None = ()
    halves: tuple[int, ...] | None = ()

    def nbytes(self, elements: int) -> int:
        """Return the bytes of so many values in whole blocks."""
        return elements // self.weights * self.block_bytes


#: Offsets of float16 fields; source: ``block_*`` in ggml-common.h. MXFP4's scale is a power of two
#: that may be beyond float32, IQ1_M's is in pieces; those of NVFP4 are finite whatever their bits.
_HALVES: Final[dict[str, tuple[int, ...] | None]] = {
    **dict.fromkeys(("Q8_0", "Q5_0", "Q4_0", "IQ4_NL", "IQ4_XS", "Q1_0", "Q2_0"), (0,)),
    **dict.fromkeys(("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S"), (0,)),
    **dict.fromkeys(("Q5_1", "Q4_1", "Q5_K", "Q4_K"), (0, 2)),
    "Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82), "TQ2_0": (64,), "TQ1_0": (52,),
    "MXFP4": None, "IQ1_M": None, "NVFP4": (),
}  # fmt: skip
#: Other integers of several bytes: what ggml copies into one, or declares as one.
_WORDS: Final = {"Q5_0": ((2, 4),), "Q5_1": ((4, 4),), "IQ4_XS": ((2, 2),)}
#: Exponents of MXFP4 up to here keep the largest code, 12 times a power of two, within float32.
_MXFP4_FINITE: Final = 252
#: Their indices are declared as bytes or 16-bit words, and read as 32-bit ones.
_UNKNOWN_ORDER: Final = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")

_PLAIN: Final = {
    "F32": (0, torch.float32), "F16": (1, torch.float16), "BF16": (30, torch.bfloat16),
    "F64": (28, torch.float64), "I8": (24, torch.int8), "I16": (25, torch.int16),
    "I32": (26, torch.int32), "I64": (27, torch.int64),
}  # fmt: skip


def _plain(name: str, number: int, dtype: torch.dtype) -> StoredType:
    return StoredType(name, number, 1, dtype.itemsize, dtype, ((0, dtype.itemsize),))


def _blocks(name: str) -> StoredType:
    kind, halves = TYPES[name], _HALVES[name]
    fields = (*((offset, 2) for offset in halves or ()), *_WORDS.get(name, ()))
    return StoredType(
        name,
        kind.number,
        kind.weights,
        kind.block_bytes,
        fields=None if name in _UNKNOWN_ORDER else fields,
        halves=halves,
    )


#: By name: what can be read and written.
STORED_TYPES: Final = {
    **{name: _plain(name, number, dtype) for name, (number, dtype) in _PLAIN.items()},
    **{name: _blocks(name) for name in TYPES if name not in _PLAIN},
}
#: Numbers of types that ggml took out, and of those that it multiplies activations in.
_RETIRED: Final = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
_ACTIVATIONS: Final = {9: "Q8_1", 15: "Q8_K"}
_BY_NUMBER: Final = {kind.number: kind for kind in STORED_TYPES.values()}


def stored_type(number: int) -> StoredType | None:
    """Return a type that can be read, or None."""
    return _BY_NUMBER.get(number)


def type_name(number: int) -> str:
    """Return the name of a type, also of one that cannot be read."""
    kind = _BY_NUMBER.get(number)
    return kind.name if kind else (_RETIRED | _ACTIVATIONS).get(number, f"type {number}")


def refusal(name: str) -> str | None:
    """Say why tensors of a type cannot be read, or None where they can."""
    if name in STORED_TYPES:
        return None
    if name in _RETIRED.values():
        return f"its type {name} was taken out of GGUF; quantize the model again"
    if name in _ACTIVATIONS.values():
        return f"its type {name} is one of activations, not of weights"
    return f"its {name} is not known; a newer version of lowbits may read it"


def swap_order(blocks: Tensor, kind: StoredType) -> None:
    """Turn the bytes of each field round, in place.

    Args:
        blocks: ``(n, block_bytes)`` uint8.
        kind: whose fields are known.
    """
    assert kind.fields is not None
    for part in torch.split(blocks, max(1, PART_WEIGHTS // kind.weights)):
        for offset, width in kind.fields:
            field = part[:, offset : offset + width]
            field.copy_(field.flip(1))


def is_finite(blocks: Tensor, kind: StoredType) -> bool:
    """Say whether all values are numbers; of most types that is read off the scales.

    Args:
        blocks: ``(n, block_bytes)`` uint8, contiguous, in this machine's byte order.
        kind: of the blocks.
    """
    parts = torch.split(blocks, max(1, PART_WEIGHTS // kind.weights))
    return all(_is_finite(part, kind) for part in parts)


def _is_finite(blocks: Tensor, kind: StoredType) -> bool:
    if kind.dtype is not None:
        return not kind.dtype.is_floating_point or are_finite(blocks.view(kind.dtype))
    if kind.halves is not None:
        halves = [blocks.view(torch.float16)[:, offset // 2] for offset in kind.halves]
        return all(are_finite(values) for values in halves)
    if kind.name == "MXFP4" and int(blocks[:, 0].amax()) <= _MXFP4_FINITE:
        return True
    values = torch.empty(blocks.shape[0], kind.weights, dtype=torch.float32, device="cpu")
    TYPES[kind.name].decode(blocks, values)
    return are_finite(values)
