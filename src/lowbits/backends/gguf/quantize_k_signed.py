"""Types with signed scales in blocks of 256: Q3_K and Q6_K.

A block is cut into groups of 16, each of which is ``scale * code``. The scales of a block are small
whole numbers with a sign, times one float16.

Sources: ``quantize_row_q3_K_ref``, ``make_q3_quants``, ``quantize_row_q6_K_ref``,
``make_qx_quants`` in ggml-quants.c; the layouts are ``block_q3_K`` and ``block_q6_K`` in
ggml-common.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

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
    halves,
    inverse,
    nibbles,
    quarters,
    split,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

#: What the largest weight of a group is divided into, in order.
Q6_DIVISORS: Final = (32.0, *(32 + 0.1 * step for step in range(-9, 10) if step))

#: Passes over the weights of a group in the search for the codes of Q3_K.
_Q3_PASSES: Final = 5


def quantize_q6_k(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 210)`` uint8."""
    x = columns(blocks, 16)
    return pack_q6_k(x, search_scale(x, x.square(), 32, Q6_DIVISORS))


def pack_q6_k(x: Tensor, scale: Tensor) -> Tensor:
    """Code columns ``(16, 16, n)`` with scales near ``(16, 1, n)``."""
    d, scales, codes = _signed(x, scale, 128, 32)
    low, high = split(codes.view(2, 4, 32, -1), 16)
    pairs = low.view(2, 2, 2, 32, -1).transpose(0, 1)
    signed = scales.squeeze(1).to(torch.int8).view(torch.uint8).t()
    return torch.cat([nibbles(pairs), quarters(high), signed, half_bytes(d)], 1)


def quantize_q3_k(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 110)`` uint8."""
    x = columns(blocks, 16)
    d, scales, codes = _signed(x, _descend(x, 4), 32, 4)
    low, high = split(codes, 4)
    mask = as_bytes(digits(high.view(8, 32, -1), 2))
    low_scales, high_scales = split(scales.squeeze(1) + 32, 16)
    packed = [
        nibbles(low_scales.view(2, 8, -1)),
        as_bytes(digits(high_scales.view(4, 4, -1), 4)),
    ]
    return torch.cat([mask, quarters(low), *packed, half_bytes(d)], 1)


def search_scale(
    x: Tensor, weight: Tensor | None, bound: int, divisors: Sequence[float]
) -> Tensor:
    """Find the scale of every group with the least weighted squared error.

    Each divisor codes the weights so that the one furthest from zero is minus the divisor; least
    squares fit the scale to the codes, from ``-bound`` to ``bound - 1``.

    Args:
        x: ``(groups, size, n)``.
        weight: as ``x``, at least 0; None weighs all alike.
        bound: half the number of codes.
        divisors: the candidates; of equal ones the first wins.

    Returns:
        Scales, ``(groups, 1, n)``, 0 for groups that are zero.

    Source: ``make_qx_quants`` in ggml-quants.c.
    """
    far = furthest(x, 1)
    per_far = inverse(far)
    codes, terms = torch.empty_like(x), x.new_empty(2, *x.shape)
    products, squares, additions = terms[0], terms[1], halves(terms)
    product, square = terms[..., :1, :].unbind()
    factors = None if weight is None else torch.stack([weight * x, weight])
    # What overflows in the sums must not come out as zero.
    scale, best = far / -bound, torch.zeros_like(far)
    for divisor in divisors:
        torch.mul(x, per_far * -divisor, out=codes).round_().clamp_(-bound, bound - 1)
        if factors is None:
            torch.mul(x, codes, out=products)
            torch.mul(codes, codes, out=squares)
        else:
            torch.mul(factors, codes, out=terms)
            squares.mul_(codes)
        for first, second in additions:
            first.add_(second)
        fitted = product / square.clamp(min=TINY)
        gain = fitted * product
        better = below(best, gain)
        best = choose(better, gain, best)
        scale = choose(better, fitted, scale)
    return scale


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
        better = below(product.square().mul_(new_square), gain).bitwise_and_(below(zero, other_product))
        code.copy_(choose(better, new, code))
        product = choose(better, new_product, product)
        square = choose(better, new_square, square)
    return (product * inverse(square)).unsqueeze(1)


def _signed(x: Tensor, scale: Tensor, limit: int, bound: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round scales to steps of the block's furthest one, which is ``-limit``, and code ``x``.

    Returns:
        Step ``(n,)``, scales in steps ``(groups, 1, n)``, codes from 0 as ``x``; all float32.
    """
    # Groups that reach as far up as down have a negative scale: those are to be exact.
    per_step = inverse(furthest(-scale, 0)) * limit
    steps = (scale * per_step).round_().clamp_(-limit, limit - 1)
    d = inverse(per_step).view(-1)
    step = steps * d.half()
    codes = (x / torch.where(step == 0, torch.inf, step)).round_().clamp_(-bound, bound - 1)
    # Groups that are zero have codes 0, as in ggml.
    return d, steps, codes.add_((step != 0) * float(bound))
