"""Types with scales and minima in blocks of 256: Q2_K, Q4_K, Q5_K.

A block is cut into groups, each of which is ``scale * code - minimum``. The scales and minima of a
block are small whole numbers, times one float16 each.

Sources: ``quantize_row_q2_K_ref``, ``quantize_row_q4_K_ref``, ``quantize_row_q5_K_ref``,
``make_qkx2_quants`` in ggml-quants.c; the layouts are ``block_q2_K`` to ``block_q5_K`` in
ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.backends.gguf.quantize_search import (
    TINY,
    as_bytes,
    below,
    choose,
    columns,
    digits,
    divide,
    fold,
    halves,
    nibbles,
    quarters,
    split,
    half_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@final
@dataclass(frozen=True)
class RangeSearch:
    """How the range of a group is searched.

    Attributes:
        top: highest code.
        first: the first candidate divides the range by ``top + first``.
        count: candidates, each dividing by 0.1 more than the one before.
        absolute: weigh absolute errors, not squares.
    """

    top: int
    first: float
    count: int
    absolute: bool = False


Q2: Final = RangeSearch(top=3, first=-0.5, count=16, absolute=True)
Q4: Final = RangeSearch(top=15, first=-1.0, count=21)
Q5: Final = RangeSearch(top=31, first=-0.5, count=16)


def quantize_q4_k(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 144)`` uint8."""
    x = columns(blocks, 32)
    d, dmin, sub, codes = _affine(x, *search_range(x, _spread_weight(x), Q4), Q4.top, 63)
    return torch.cat([half_bytes(d), half_bytes(dmin), _six_bits(sub), nibbles(codes.view(4, 2, 32, -1).transpose(0, 1))], 1)


def quantize_q5_k(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 176)`` uint8."""
    x = columns(blocks, 32)
    d, dmin, sub, codes = _affine(x, *search_range(x, _spread_weight(x), Q5), Q5.top, 63)
    codes, fifth = split(codes, 16)
    parts = [half_bytes(d), half_bytes(dmin), _six_bits(sub), as_bytes(digits(fifth, 2))]
    return torch.cat([*parts, nibbles(codes.view(4, 2, 32, -1).transpose(0, 1))], 1)


def quantize_q2_k(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 84)`` uint8."""
    x = columns(blocks, 16)
    d, dmin, (scales, minima), codes = _affine(x, *search_range(x, x.abs(), Q2), Q2.top, 15)
    parts = [nibbles(torch.stack([scales, minima])), quarters(codes)]
    return torch.cat([*parts, half_bytes(d), half_bytes(dmin)], 1)


def _spread_weight(x: Tensor) -> Tensor:
    """Weigh the error of a weight by its magnitude and the group's root mean square."""
    return divide(fold(x.square()), x.shape[1]).sqrt() + x.abs()


def search_range(x: Tensor, weight: Tensor, search: RangeSearch) -> tuple[Tensor, Tensor]:
    """Find the scale and the minimum of every group with the least weighted error.

    Each candidate divides the range, codes the weights, and fits scale and minimum to the codes by
    least squares; the minimum is never above 0. A candidate that wins also sets the minimum from
    which later candidates count.

    Args:
        x: ``(groups, size, n)``.
        weight: as ``x``, at least 0.
        search: the candidates.

    Returns:
        Scale and minus the minimum, ``(groups, 1, n)``, both at least 0.

    Source: ``make_qkx2_quants`` in ggml-quants.c. Here values are taken from the weighted mean, so
    that the sums of squares keep their digits for groups far from zero.
    """
    total = fold(weight.clone())
    mean = fold(weight * x) / torch.where(total == 0, 1.0, total)
    y = x - mean
    low, high = x.amin(1, keepdim=True).clamp_(max=0) - mean, x.amax(1, keepdim=True) - mean
    pair = torch.stack([weight, weight * y])
    codes, terms = torch.empty_like(x), x.new_empty(3, *x.shape)
    pair_terms, squares, additions = terms[:2], terms[2], halves(terms)
    sums = terms[..., :1, :].unbind()

    def loss(scale: Tensor, offset: Tensor) -> Tensor:
        if search.absolute:
            return fold((codes * scale).add_(offset).sub_(y).abs_().mul_(weight))
        # The weighted sum of squares of the errors, less that of y.
        code, product, square = sums
        cross = (offset * code - product) * scale
        return cross + cross + scale * scale * square + offset * offset * total

    def encode(divisor: float) -> None:
        # A minimum that was fitted may lie at or above the highest value.
        per_code = divisor / (high - low).clamp_(min=TINY)
        torch.sub(y, low, out=codes).mul_(per_code).round_().clamp_(0, search.top)
        torch.mul(pair, codes, out=pair_terms)
        torch.mul(pair_terms[0], codes, out=squares)
        for first, second in additions:
            first.add_(second)

    scale = divide(high - low, search.top)
    encode(search.top)
    best = loss(scale, low)
    for candidate in range(search.count):
        encode(search.top + search.first + 0.1 * candidate)
        fitted, offset, fits = _least_squares(sums, total, mean)
        error = loss(fitted, offset)
        better = below(error, best).bitwise_and_(fits)
        best = choose(better, error, best)
        scale = choose(better, fitted, scale)
        low = choose(better, offset, low)
    return scale, (low + mean).neg_().clamp_(min=0)


def _least_squares(sums: Sequence[Tensor], total: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit ``scale * code + offset`` to values less their mean: scale, offset, mask of the fits.

    Args:
        sums: of the weighted codes, their products with the values, and their squares.
        total: sum of the weights.
        mean: what was taken from the values; the minimum, ``offset + mean``, is at most 0.
    """
    code, product, square = sums
    center = code / total
    spread = square - center * code
    scale = product / spread
    offset = scale * -center
    above = below(-mean, offset)
    scale = choose(above, (product + mean * code) / square, scale)
    offset = choose(above, -mean, offset)
    # All codes equal: the spread is what rounding left of it.
    return scale, offset, below(square * 1e-6, spread)


def _affine(
    x: Tensor, scale: Tensor, minimum: Tensor, top: int, limit: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """Round scales and minima to ``limit`` steps of the block's largest, and code ``x``.

    Returns:
        Step of the scales ``(n,)``, step of the minima ``(n,)``, (scales, minima) in steps
        ``(groups, 1, n)``, codes as ``x``; all float32.
    """
    d, scales = _in_steps(scale, limit)
    dmin, minima = _in_steps(minimum, limit)
    return d, dmin, (scales, minima), encode(x, scales * d.half(), minima * dmin.half(), top)


def _in_steps(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return the step, ``(n,)``, and the values as multiples of it from 0 to ``limit``."""
    peak = values.amax(0, keepdim=True)
    steps = torch.where(peak > 0, peak.new_full((), limit) / peak, 0.0)
    return divide(peak, limit).view(-1), (values * steps).round_().clamp_(max=limit)


def encode(x: Tensor, scale: Tensor, minimum: Tensor, top: int) -> Tensor:
    """Return the nearest codes of ``scale * code - minimum``; 0 where the scale is not positive."""
    usable = torch.where(scale > 0, scale, torch.inf)
    return (x + minimum).div_(usable).round_().clamp_(0, top)


def _six_bits(sub: tuple[Tensor, Tensor]) -> Tensor:
    """Pack eight scales and eight minima of 6 bits, ``(8, 1, n)``, to ``(n, 12)`` bytes.

    Source: ``get_scale_min_k4`` in ggml-quants.c.
    """
    scales, minima = (values.to(torch.uint8).squeeze(1) for values in sub)
    rows = [
        scales[:4] | scales[4:] >> 4 << 6,
        minima[:4] | minima[4:] >> 4 << 6,
        scales[4:] & 15 | minima[4:] << 4,
    ]
    return torch.cat(rows).t()
