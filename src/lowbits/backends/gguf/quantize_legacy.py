"""Types of 32 weights a block: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

A block is, in this order: scale (float16), minimum (float16; ``_1`` types), the fifth bits (4
bytes; Q5 types), codes.

Sources: ``quantize_row_q4_0_ref`` to ``quantize_row_q8_0_ref`` in ggml-quants.c; the bytes are
those of the ``gguf`` package. The layouts are ``block_q4_0`` to ``block_q8_0`` in ggml-common.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from lowbits.backends.gguf.quantize_fit import search_scale
from lowbits.backends.gguf.quantize_search import (
    as_bytes,
    columns,
    digits,
    divide,
    half_bytes,
    inverse,
    magnitude,
    nibbles,
    round_half_away,
    split,
    storable,
)

if TYPE_CHECKING:
    from torch import Tensor

#: What the largest weight of a block is divided into in the search for Q4_0, with either sign.
_DIVISORS: Final = tuple(sign * (6.6 + 0.15 * step) for step in range(17) for sign in (1, -1))


def quantize_q8_0(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 32)`` float32 to ``(n, 34)`` uint8."""
    scale = divide(magnitude(blocks, 1), 127)
    codes = round_half_away(blocks * inverse(scale)).to(torch.int8).view(torch.uint8)
    return torch.cat([half_bytes(scale), codes], 1)


def quantize_q4_0(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 32)`` float32 to ``(n, 18)`` uint8."""
    scale, codes = _around_zero(blocks, 8)
    return torch.cat([half_bytes(scale), _halves_of(codes)], 1)


def quantize_q5_0(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 32)`` float32 to ``(n, 22)`` uint8."""
    scale, codes = _around_zero(blocks, 16)
    low, fifth = split(codes, 16)
    return torch.cat([half_bytes(scale), _bits(fifth), _halves_of(low)], 1)


def quantize_q4_1(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 32)`` float32 to ``(n, 20)`` uint8."""
    scale, minimum, codes = _from_minimum(blocks, 15)
    return torch.cat([half_bytes(scale), half_bytes(minimum), _halves_of(codes)], 1)


def quantize_q5_1(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 32)`` float32 to ``(n, 24)`` uint8."""
    scale, minimum, codes = _from_minimum(blocks, 31)
    low, fifth = split(codes, 16)
    header = [half_bytes(scale), half_bytes(minimum)]
    return torch.cat([*header, _bits(fifth), _halves_of(low)], 1)


def quantize_q4_0_best(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 32)`` float32 to ``(n, 18)`` uint8 with the least squared error found.

    The scale is searched on both sides of the one that the largest weight gives, with the largest
    weight at either end of the codes.
    """
    x = columns(blocks, 32)
    scale = storable(search_scale(x, None, 8, _DIVISORS))
    step = scale.half().float()
    codes = (x / torch.where(step == 0, torch.inf, step)).round_().clamp_(-8, 7).add_(8)
    return torch.cat([half_bytes(scale), _halves_of(codes[0])], 1)


def _around_zero(blocks: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Return scales and codes ``(32, n)``; the first weight furthest from zero has the lowest."""
    furthest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).t()
    scale = furthest / -bound
    codes = columns(blocks, 32)[0].mul_(inverse(scale)).add_(bound + 0.5)
    return scale.contiguous(), codes.trunc_().clamp_(0, 2 * bound - 1)


def _from_minimum(blocks: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales, minima and codes ``(32, n)``."""
    x = columns(blocks, 32)[0]
    minimum = x.amin(0, keepdim=True)
    scale = divide(x.amax(0, keepdim=True) - minimum, top)
    codes = x.sub_(minimum).mul_(inverse(scale)).add_(0.5).trunc_()
    return scale, minimum, codes.clamp_(0, top)


def _halves_of(codes: Tensor) -> Tensor:
    """Pack ``(32, n)`` codes of 4 bits: weight j shares a byte with weight j + 16."""
    return nibbles(codes.view(2, 16, -1))


def _bits(bits: Tensor) -> Tensor:
    """Pack ``(32, n)`` bits, the first the lowest, to ``(n, 4)`` bytes."""
    return as_bytes(digits(bits.view(4, 8, -1).transpose(0, 1), 2))
