"""Searches for the scale, or the scale and the minimum, of a group of weights.

All work on columns, ``(groups, size, n)``: see ``quantize_search``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.backends.gguf.quantize_search import (
    TINY,
    Sums,
    below,
    choose,
    divide,
    fold,
    furthest,
    inverse,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

#: A fit whose codes spread less than this part of their mean square is made of rounding errors.
_LEAST_SPREAD: Final = 1e-6


@final
@dataclass(frozen=True)
class RangeSearch:
    """How the range of a group is searched.

    Attributes:
        top: highest code.
        first: the first candidate divides the range by ``top + first``.
        count: candidates, each dividing by 0.1 more than the one before.
        absolute: sum absolute errors, not squares.
    """

    top: int
    first: float
    count: int
    absolute: bool = False


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
    that the sums keep their digits for groups far from zero.
    """
    fit = _RangeFit(x, weight, search)
    low, high = x.amin(1, keepdim=True).clamp_(max=0) - fit.mean, x.amax(1, keepdim=True) - fit.mean
    scale = divide(high - low, search.top)
    fit.encode(low, high, search.top)
    best = fit.error(scale, low)
    for candidate in range(search.count):
        fit.encode(low, high, search.top + search.first + 0.1 * candidate)
        fitted, offset, fits = fit.least_squares()
        error = fit.error(fitted, offset)
        better = below(error, best).bitwise_and_(fits)
        best = choose(better, error, best)
        scale = choose(better, fitted, scale)
        low = choose(better, offset, low)
    return scale, (low + fit.mean).neg_().clamp_(min=0)


@final
class _RangeFit:
    """Codes of one candidate, and the sums over each group that fit and error are made of.

    Offsets are minima less the group's weighted mean, as are the values.
    """

    def __init__(self, x: Tensor, weight: Tensor, search: RangeSearch) -> None:
        self._search = search
        self._weight = weight
        self._total = fold(weight.clone()).clamp_(min=TINY)
        self.mean = fold(weight * x) / self._total
        self._values = x - self.mean
        self._factors = torch.stack([weight, weight * self._values])
        self._codes = torch.empty_like(x)
        # Weighted codes, their products with the values, and their squares.
        self._sums = Sums(x.new_empty(3, *x.shape))
        self._firsts, self._squares = self._sums.terms[:2], self._sums.terms[2]
        self._code, self._product, self._square = self._sums.result.unbind()
        self._errors = Sums(torch.empty_like(x)) if search.absolute else None

    def encode(self, low: Tensor, high: Tensor, divisor: float) -> None:
        """Code the values, the range from ``low`` to ``high`` divided by ``divisor``."""
        # A fitted minimum may lie at or above the highest value.
        per_code = divisor / (high - low).clamp_(min=TINY)
        torch.sub(self._values, low, out=self._codes).mul_(per_code)
        self._codes.round_().clamp_(0, self._search.top)
        torch.mul(self._factors, self._codes, out=self._firsts)
        torch.mul(self._firsts[0], self._codes, out=self._squares)
        self._sums.take()

    def least_squares(self) -> tuple[Tensor, Tensor, Tensor]:
        """Fit scale and offset to the codes; the third is a mask of the groups that have a fit."""
        center = self._code / self._total
        spread = self._square - center * self._code
        scale = self._product / spread
        offset = scale * -center
        # The minimum is not to be above 0: there, only the scale is fitted.
        above = below(-self.mean, offset)
        scale = choose(above, (self._product + self.mean * self._code) / self._square, scale)
        offset = choose(above, -self.mean, offset)
        return scale, offset, below(self._square * _LEAST_SPREAD, spread)

    def error(self, scale: Tensor, offset: Tensor) -> Tensor:
        """Return the weighted error; of squares, less what scale and offset do not change."""
        if self._errors is not None:
            errors = torch.mul(self._codes, scale, out=self._errors.terms)
            errors.add_(offset).sub_(self._values).abs_().mul_(self._weight)
            return self._errors.take().clone()
        cross = (offset * self._code - self._product) * scale
        squares = scale * scale * self._square + offset * offset * self._total
        return squares.add_(cross).add_(cross)


def search_scale(x: Tensor, weight: Tensor | None, bound: int, divisors: Sequence[float]) -> Tensor:
    """Find the scale of every group for codes from ``-bound`` to ``bound - 1``.

    Args:
        x: ``(groups, size, n)``.
        weight: of the squared errors, as ``x``, at least 0; None weighs all alike.
        bound: half the number of codes.
        divisors: the candidates: each gives minus itself as the code of the weight furthest from
            zero. Of candidates that are equally good the first wins.

    Returns:
        Scales, ``(groups, 1, n)``, 0 for groups that are zero.

    Source: ``make_qx_quants`` in ggml-quants.c.
    """

    def nearest(scaled: Tensor) -> Tensor:
        return scaled.round_().clamp_(-bound, bound - 1)

    return search_levels(x, weight, nearest, [-divisor for divisor in divisors])


def search_levels(
    x: Tensor,
    weight: Tensor | None,
    nearest: Callable[[Tensor], Tensor],
    stretches: Sequence[float],
) -> Tensor:
    """Find the scale of every group for any levels: as :func:`search_scale`.

    Each candidate takes the nearest levels, to which least squares fit the scale.

    Args:
        x: ``(groups, size, n)``.
        weight: of the squared errors, as ``x``, at least 0; None weighs all alike.
        nearest: returns the levels nearest to values, which it may overwrite.
        stretches: the candidates: what the weight furthest from zero is scaled to.
    """
    far = furthest(x, 1)
    per_far = inverse(far)
    sums = Sums(x.new_empty(2, *x.shape))
    products, squares = sums.terms
    product, square = sums.result
    factors = None if weight is None else torch.stack([weight * x, weight])
    # The first guess is what remains where the sums overflow: it is not to be zero.
    scale, best = divide(far, stretches[0]), torch.zeros_like(far)
    for stretch in stretches:
        levels = nearest(x * (per_far * stretch))
        if factors is None:
            torch.mul(x, levels, out=products)
            torch.mul(levels, levels, out=squares)
        else:
            torch.mul(factors, levels, out=sums.terms)
            squares.mul_(levels)
        sums.take()
        fitted = product / square.clamp(min=TINY)
        gain = fitted * product
        better = below(best, gain)
        best = choose(better, gain, best)
        scale = choose(better, fitted, scale)
    return scale
