"""Types with signed scales in blocks of 256: Q3_K and Q6_K.

A block is cut into groups of 16, each of which is ``scale * code``. The scales of a block are small
whole numbers with a sign, times one float16.

Sources: ``quantize_row_q3_K_ref``, ``make_q3_quants``, ``quantize_row_q6_K_ref`` in ggml-quants.c;
the layouts are ``block_q3_K`` and ``block_q6_K`` in ggml-common.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from lowbits.backends.gguf.quantize_fit import search_scale
from lowbits.backends.gguf.quantize_search import (
    TINY,
    as_bytes,
    below,
    choose,
    columns,
    digits,
    fold,
    furthest,
    half_bytes,
    inverse,
    nibbles,
    quarters,
    split,
    storable,
)

if TYPE_CHECKING:
    from torch import Tensor

#: Half the number of codes.
Q3_BOUND: Final = 4
Q6_BOUND: Final = 32

_Q6_DIVISORS: Final = (32.0, *(32 + 0.1 * step for step in range(-9, 10) if step))

#: Passes over the weights of a group in the search for the codes of Q3_K. ggml makes up to five,
#: of which the last two lower the error by less than a hundred-thousandth.
_Q3_PASSES: Final = 3


class Scales(NamedTuple):
    """Scales of blocks, in steps.

    Attributes:
        d: ``(1, 1, n)``, the step; float16 once stored.
        steps: ``(groups, 1, n)``, whole numbers of either sign.
    """

    d: Tensor
    steps: Tensor

    @classmethod
    def of(cls, scale: Tensor, limit: int) -> Scales:
        """Round ``(groups, 1, n)`` to steps of the one furthest from 0, which is ``-limit``."""
        # Groups that reach as far up as down have a negative scale: those are to be exact.
        d = storable(furthest(-scale, 0) / limit)
        return cls(d, (scale * inverse(d)).round_().clamp_(-limit, limit - 1))

    def codes(self, x: Tensor, bound: int) -> Tensor:
        """Return the nearest codes, counted from 0."""
        scale = self.steps * self.d.half()
        codes = (x / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(-bound, bound - 1)
        # Groups that are zero have codes 0, as in ggml.
        return codes.add_((scale != 0) * float(bound))


def quantize_q3_k(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 110)`` uint8."""
    x = columns(blocks, 16)
    return pack_q3_k(x, Scales.of(_descend(x, Q3_BOUND), 32))


def pack_q3_k(x: Tensor, scales: Scales) -> Tensor:
    """Code columns ``(16, 16, n)``, to ``(n, 110)`` bytes."""
    low, high = split(scales.codes(x, Q3_BOUND), 4)
    low_scales, high_scales = split(scales.steps.squeeze(1) + 32, 16)
    parts = [
        as_bytes(digits(high.view(8, 32, -1), 2)),
        quarters(low),
        nibbles(low_scales.view(2, 8, -1)),
        as_bytes(digits(high_scales.view(4, 4, -1), 4)),
        half_bytes(scales.d),
    ]
    return torch.cat(parts, 1)


def quantize_q6_k(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 210)`` uint8."""
    x = columns(blocks, 16)
    return pack_q6_k(x, Scales.of(search_scale(x, x.square(), Q6_BOUND, _Q6_DIVISORS), 128))


def pack_q6_k(x: Tensor, scales: Scales) -> Tensor:
    """Code columns ``(16, 16, n)``, to ``(n, 210)`` bytes."""
    low, high = split(scales.codes(x, Q6_BOUND).view(2, 4, 32, -1), 16)
    parts = [
        nibbles(low.view(2, 2, 2, 32, -1).transpose(0, 1)),
        quarters(high),
        scales.steps.squeeze(1).to(torch.int8).view(torch.uint8).t(),
        half_bytes(scales.d),
    ]
    return torch.cat(parts, 1)


def _descend(x: Tensor, bound: int) -> Tensor:
    """Find the scale of every group by changing one code at a time, weighing by the square.

    Source: ``make_q3_quants`` in ggml-quants.c.
    """
    codes = (x * (inverse(furthest(x, 1)) * -bound)).round_().clamp_(-bound, bound - 1)
    weight = x.square()
    product, square = fold(weight * x * codes).squeeze(1), fold(weight * codes * codes).squeeze(1)
    zero = torch.zeros_like(product)
    rows = zip(x.unbind(1), weight.unbind(1), (weight * x).unbind(1), codes.unbind(1), strict=True)
    for value, heavy, moment, code in list(rows) * _Q3_PASSES:
        other_product = product - moment * code
        other_square = square - heavy * code * code
        new = (value * other_square).div_(other_product.clamp(min=TINY))
        new.round_().clamp_(-bound, bound - 1)
        new_product = other_product + moment * new
        new_square = other_square + heavy * new * new
        gain = new_product.square().mul_(square)
        better = below(product.square().mul_(new_square), gain)
        better.bitwise_and_(below(zero, other_product))
        code.copy_(choose(better, new, code))
        product = choose(better, new_product, product)
        square = choose(better, new_square, square)
    return (product * inverse(square)).unsqueeze(1)
