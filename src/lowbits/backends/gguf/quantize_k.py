"""Types with scales and minima in blocks of 256: Q2_K, Q4_K, Q5_K.

A block is cut into groups, each of which is ``scale * code - minimum``. The scales and minima of a
block are small whole numbers, times one float16 each.

Sources: ``quantize_row_q2_K_ref``, ``quantize_row_q4_K_ref``, ``quantize_row_q5_K_ref`` in
ggml-quants.c; the layouts are ``block_q2_K`` to ``block_q5_K`` in ggml-common.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from lowbits.backends.gguf.quantize_fit import RangeSearch, search_range
from lowbits.backends.gguf.quantize_search import (
    as_bytes,
    columns,
    digits,
    divide,
    fold,
    half_bytes,
    inverse,
    nibbles,
    quarters,
    split,
    storable,
)

if TYPE_CHECKING:
    from torch import Tensor

Q2: Final = RangeSearch(top=3, first=-0.5, count=16, absolute=True)
Q4: Final = RangeSearch(top=15, first=-1.0, count=21)
Q5: Final = RangeSearch(top=31, first=-0.5, count=16)


class Ranges(NamedTuple):
    """Scales and minima of blocks, in steps.

    Attributes:
        d: ``(1, 1, n)``, step of the scales; float16 once stored.
        dmin: ``(1, 1, n)``, step of the minima; float16 once stored.
        scales: ``(groups, 1, n)``, whole numbers from 0 up.
        minima: ``(groups, 1, n)``, whole numbers from 0 up.
    """

    d: Tensor
    dmin: Tensor
    scales: Tensor
    minima: Tensor

    @classmethod
    def of(cls, scale: Tensor, minimum: Tensor, limit: int) -> Ranges:
        """Round ``(groups, 1, n)`` to ``limit`` steps of the largest of each block."""
        d, scales = _in_steps(scale, limit)
        dmin, minima = _in_steps(minimum, limit)
        return cls(d, dmin, scales, minima)

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Return scales and minima as they will be decoded, ``(groups, 1, n)`` float32."""
        return self.scales * self.d.half(), self.minima * self.dmin.half()

    def codes(self, x: Tensor, top: int) -> Tensor:
        """Return the nearest codes; 0 where the scale is not positive."""
        scale, minimum = self.decoded()
        usable = torch.where(scale > 0, scale, torch.inf)
        return (x + minimum).div_(usable).round_().clamp_(0, top)

    def header(self) -> Tensor:
        """Return the steps as ``(n, 4)`` bytes."""
        return torch.cat([half_bytes(self.d), half_bytes(self.dmin)], 1)


def quantize_q2_k(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 84)`` uint8."""
    x = columns(blocks, 16)
    return pack_q2_k(x, Ranges.of(*search_range(x, x.abs(), Q2), 15))


def quantize_q4_k(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 144)`` uint8."""
    x = columns(blocks, 32)
    return pack_q4_k(x, Ranges.of(*search_range(x, _spread_weight(x), Q4), 63))


def quantize_q5_k(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 176)`` uint8."""
    x = columns(blocks, 32)
    return pack_q5_k(x, Ranges.of(*search_range(x, _spread_weight(x), Q5), 63))


def pack_q2_k(x: Tensor, ranges: Ranges) -> Tensor:
    """Code columns ``(16, 16, n)``, to ``(n, 84)`` bytes."""
    packed = nibbles(torch.stack([ranges.scales, ranges.minima]))
    return torch.cat([packed, quarters(ranges.codes(x, Q2.top)), ranges.header()], 1)


def pack_q4_k(x: Tensor, ranges: Ranges) -> Tensor:
    """Code columns ``(8, 32, n)``, to ``(n, 144)`` bytes."""
    return torch.cat([ranges.header(), _six_bits(ranges), _pairs(ranges.codes(x, Q4.top))], 1)


def pack_q5_k(x: Tensor, ranges: Ranges) -> Tensor:
    """Code columns ``(8, 32, n)``, to ``(n, 176)`` bytes."""
    low, fifth = split(ranges.codes(x, Q5.top), 16)
    parts = [ranges.header(), _six_bits(ranges), as_bytes(digits(fifth, 2)), _pairs(low)]
    return torch.cat(parts, 1)


def _spread_weight(x: Tensor) -> Tensor:
    """Weigh errors by the weight's magnitude plus the root mean square of its group."""
    return divide(fold(x.square()), x.shape[1]).sqrt() + x.abs()


def _in_steps(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return the step, ``(1, 1, n)``, and the values as multiples of it from 0 to ``limit``."""
    step = storable(divide(values.amax(0, keepdim=True), limit))
    return step, (values * inverse(step)).round_().clamp_(max=limit)


def _six_bits(ranges: Ranges) -> Tensor:
    """Pack eight scales and eight minima of 6 bits to ``(n, 12)`` bytes.

    Source: ``get_scale_min_k4`` in ggml-quants.c.
    """
    scales, minima = (part.squeeze(1).to(torch.uint8) for part in (ranges.scales, ranges.minima))
    rows = [
        scales[:4] | scales[4:] >> 4 << 6,
        minima[:4] | minima[4:] >> 4 << 6,
        scales[4:] & 15 | minima[4:] << 4,
    ]
    return torch.cat(rows).t()


def _pairs(codes: Tensor) -> Tensor:
    """Pack ``(8, 32, n)`` codes of 4 bits to ``(n, 128)`` bytes, which two groups share."""
    return nibbles(codes.view(4, 2, 32, -1).transpose(0, 1))
