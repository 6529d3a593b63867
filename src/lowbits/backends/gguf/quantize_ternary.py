"""Types of two or three levels: TQ1_0, TQ2_0, Q1_0, Q2_0.

Sources: ``quantize_row_tq1_0_ref``, ``quantize_row_tq2_0_ref``, ``quantize_row_q1_0_ref``,
``quantize_row_q2_0_ref`` in ggml-quants.c. TQ1_0 and TQ2_0 have the bytes of the ``gguf`` package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowbits.backends.gguf.quantize_search import (
    as_bytes,
    columns,
    digits,
    divide,
    fold,
    half_bytes,
    inverse,
    magnitude,
    quarters,
    round_half_away,
)

if TYPE_CHECKING:
    from torch import Tensor


def quantize_tq1_0(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 54)`` uint8: five codes a byte, in base 3."""
    codes, scale = _ternary(columns(blocks, 256)[0])
    parts = (
        codes[:160].view(5, 32, -1),
        codes[160:240].view(5, 16, -1),
        codes[240:].view(4, 4, -1),
    )
    numbers = [digits(part.flip(0), 3) for part in parts]
    # The last four bytes hold four codes each, and count as if a zero followed.
    numbers[2] *= 3
    # A fraction of 243 as one of 256, rounded up: multiplying it by 3 brings out the next code.
    scaled = (torch.cat(numbers) * 256 + 242).int() // 243
    return torch.cat([as_bytes(scaled), half_bytes(scale)], 1)


def quantize_tq2_0(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 66)`` uint8."""
    codes, scale = _ternary(columns(blocks, 256)[0])
    return torch.cat([quarters(codes), half_bytes(scale)], 1)


def quantize_q2_0(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 64)`` float32 to ``(n, 18)`` uint8: minus the scale, 0 or the scale."""
    codes, scale = _ternary(columns(blocks, 64)[0])
    return torch.cat(
        [half_bytes(scale), as_bytes(digits(codes.view(16, 4, -1).transpose(0, 1), 4))], 1
    )


def quantize_q1_0(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 128)`` float32 to ``(n, 18)`` uint8: signs and the mean magnitude."""
    x = columns(blocks, 128)[0]
    bits = (x >= 0).to(torch.uint8)
    scale = divide(fold(x.abs_()), 128)
    return torch.cat(
        [half_bytes(scale), as_bytes(digits(bits.view(16, 8, -1).transpose(0, 1), 2))], 1
    )


def _ternary(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(block, n)`` codes 0, 1, 2 and the largest magnitudes, ``(1, n)``."""
    scale = magnitude(x, 0)
    return round_half_away(x * inverse(scale)).add_(1), scale
