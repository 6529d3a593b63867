"""GGUF types of 32 weights a block: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

A block is, in this order: scale (float16), minimum (float16; ``_1`` types), the fifth bits (4
bytes; Q5 types), codes. Source: ``block_q4_0`` to ``block_q8_0`` in ggml-common.h; rounding as in
ggml-quants.c and, byte for byte, the ``gguf`` package. Arithmetic is float32, so that scales cannot
overflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK: Final = 32


@final
@dataclass(frozen=True)
class BlockType:
    """A GGUF type of 32 weights a block.

    Attributes:
        name: as in ggml, e.g. ``"Q4_1"``.
        bits: of one code.
        has_minimum: codes count up from a stored minimum, not around zero.
    """

    name: str
    bits: int
    has_minimum: bool

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return 2 + 2 * self.has_minimum + BLOCK * self.bits // 8

    def quantize(self, weight: Tensor) -> Tensor:
        """Quantize ``(rows, row_length)`` float32 to ``(rows, blocks * block_bytes)`` uint8."""
        blocks = weight.view(-1, BLOCK)
        if self.bits == 8:
            scale = blocks.abs().amax(1, keepdim=True) / 127
            codes = _round_half_away(blocks * _inverse(scale)).to(torch.int8).view(torch.uint8)
            parts = [_bytes_of(scale), codes]
        else:
            parts = self._quantize_packed(blocks)
        return torch.cat(parts, 1).view(weight.shape[0], -1)

    def _quantize_packed(self, blocks: Tensor) -> list[Tensor]:
        levels = 2**self.bits
        if self.has_minimum:
            minimum = blocks.amin(1, keepdim=True)
            scale = (blocks.amax(1, keepdim=True) - minimum) / (levels - 1)
            codes = torch.trunc((blocks - minimum) * _inverse(scale) + 0.5)
            header = [_bytes_of(scale), _bytes_of(minimum)]
        else:
            # The value furthest from zero, with its sign, becomes the lowest code.
            furthest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
            scale = furthest / -(levels // 2)
            # ggml multiplies in float; the product is truncated after a half-code shift.
            codes = torch.trunc(blocks * _inverse(scale) + (levels // 2 + 0.5))
            header = [_bytes_of(scale)]
        codes = codes.clamp(0, levels - 1).to(torch.uint8)
        # Weight i shares a byte with weight i + 16.
        low = codes & 15
        nibbles = low[:, : BLOCK // 2] | low[:, BLOCK // 2 :] << 4
        fifth = [] if self.bits == 4 else [_pack_bits(codes >> 4)]
        return [*header, *fifth, nibbles]

    def dequantize(self, data: Tensor) -> Tensor:
        """Decode ``(rows, blocks * block_bytes)`` uint8 to ``(rows, blocks * 32)`` float32."""
        blocks = data.reshape(-1, self.block_bytes)
        scale = _float_of(blocks[:, :2])
        if self.bits == 8:
            return (blocks[:, 2:].view(torch.int8).float() * scale).view(data.shape[0], -1)
        start = 4 if self.has_minimum else 2
        codes = blocks[:, -BLOCK // 2 :]
        codes = torch.cat([codes & 15, codes >> 4], 1)
        if self.bits == 5:
            codes = codes | _unpack_bits(blocks[:, start : start + 4]) << 4
        if self.has_minimum:
            values = codes.float() * scale + _float_of(blocks[:, 2:4])
        else:
            values = (codes.float() - 2 ** (self.bits - 1)) * scale
        return values.view(data.shape[0], -1)


TYPES: Final = {
    kind.name: kind
    for kind in (
        BlockType("Q8_0", 8, has_minimum=False),
        BlockType("Q4_0", 4, has_minimum=False),
        BlockType("Q4_1", 4, has_minimum=True),
        BlockType("Q5_0", 5, has_minimum=False),
        BlockType("Q5_1", 5, has_minimum=True),
    )
}


def _inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 for 0: the scale before it is rounded to float16."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def _round_half_away(values: Tensor) -> Tensor:
    """Round as C's ``roundf``: torch.round rounds halves to even."""
    whole = torch.trunc(values)
    return whole + torch.trunc((values - whole) * 2)


def _bytes_of(scale: Tensor) -> Tensor:
    """Return ``(n, 1)`` float32 as ``(n, 2)`` bytes of float16."""
    return scale.half().view(torch.uint8)


def _float_of(data: Tensor) -> Tensor:
    """Return ``(n, 2)`` bytes of float16 as ``(n, 1)`` float32."""
    return data.contiguous().view(torch.float16).float()


def _pack_bits(bits: Tensor) -> Tensor:
    """Pack ``(n, 32)`` bits, the first in the lowest bit, to ``(n, 4)`` bytes."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 4, 8) * weights).sum(-1, dtype=torch.uint8)


def _unpack_bits(data: Tensor) -> Tensor:
    """Unpack ``(n, 4)`` bytes to ``(n, 32)`` bits."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return (data.unsqueeze(-1) >> shifts & 1).view(-1, 32)
