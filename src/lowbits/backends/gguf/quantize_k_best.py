"""Q2_K to Q6_K with the least squared error found, all weights counting alike.

ggml fits every group by itself and then rounds the scales. Here the search goes on from there among
what a block can hold: the neighbours of each group's whole numbers, and the float16 steps that fit
them best.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.backends.gguf.quantize_fit import RangeSearch, search_range, search_scale
from lowbits.backends.gguf.quantize_k import (
    Q2,
    Q4,
    Q5,
    Ranges,
    pack_q2_k,
    pack_q4_k,
    pack_q5_k,
)
from lowbits.backends.gguf.quantize_k_signed import (
    Q3_BOUND,
    Q6_BOUND,
    Scales,
    pack_q3_k,
    pack_q6_k,
)
from lowbits.backends.gguf.quantize_search import Sums, below, choose, columns, fold, inverse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_ROUNDS: Final = 2
_NEAR_SCALES: Final = (-2, -1, 0, 1, 2)
_NEAR_MINIMA: Final = (-1, 0, 1)
_Q3_DIVISORS: Final = tuple(sign * (3 + 0.1 * step) for step in range(16) for sign in (1, -1))
_Q6_DIVISORS: Final = tuple(sign * (30 + 0.25 * step) for step in range(13) for sign in (1, -1))


def quantize_q2_k_best(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 84)`` uint8."""
    x = columns(blocks, 16)
    return pack_q2_k(x, _best_ranges(x, RangeSearch(top=Q2.top, first=-1.0, count=16), 15))


def quantize_q3_k_best(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 110)`` uint8."""
    x = columns(blocks, 16)
    return pack_q3_k(x, _best_scales(x, Q3_BOUND, _Q3_DIVISORS, 32))


def quantize_q4_k_best(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 144)`` uint8."""
    x = columns(blocks, 32)
    return pack_q4_k(x, _best_ranges(x, RangeSearch(top=Q4.top, first=-2.0, count=41), 63))


def quantize_q5_k_best(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 176)`` uint8."""
    x = columns(blocks, 32)
    return pack_q5_k(x, _best_ranges(x, RangeSearch(top=Q5.top, first=-2.0, count=41), 63))


def quantize_q6_k_best(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 210)`` uint8."""
    x = columns(blocks, 16)
    return pack_q6_k(x, _best_scales(x, Q6_BOUND, _Q6_DIVISORS, 128))


def _best_scales(x: Tensor, bound: int, divisors: Sequence[float], limit: int) -> Scales:
    """Search scales of columns, from ``-limit`` to ``limit - 1`` steps, without minima."""
    d, steps = Scales.of(search_scale(x, None, bound, divisors), limit)
    trial = _Trial(x, -bound, bound - 1)
    zero = torch.zeros_like(steps)
    for _ in range(_ROUNDS):
        best, chosen = trial.error(steps * d.half(), zero), steps
        for near in _NEAR_SCALES:
            candidate = (steps + near).clamp_(-limit, limit - 1)
            error = trial.error(candidate * d.half(), zero)
            better = below(error, best)
            best, chosen = choose(better, error, best), choose(better, candidate, chosen)
        steps = chosen
        d = _refit_step(trial, d, steps, zero)
    return Scales(d, steps)


def _refit_step(trial: _Trial, d: Tensor, steps: Tensor, zero: Tensor) -> Tensor:
    """Return the step that fits the codes best, if it lowers the errors of the blocks."""
    before = _over_groups(trial.error(steps * d.half(), zero))
    _, product, square, _ = trial.sums()
    fitted = _over_groups(steps * product) / _over_groups(steps * steps * square)
    after = _over_groups(trial.error(steps * fitted.half(), zero))
    return torch.where(_lower(after, before), fitted, d)


def _best_ranges(x: Tensor, search: RangeSearch, limit: int) -> Ranges:
    """Search scales and minima of columns, up to ``limit`` steps."""
    ranges = Ranges.of(*search_range(x, torch.ones_like(x), search), limit)
    trial = _Trial(x, 0, search.top)
    for _ in range(_ROUNDS):
        ranges = _refit_ranges(trial, _nearby(trial, ranges, limit))
    return ranges


def _nearby(trial: _Trial, ranges: Ranges, limit: int) -> Ranges:
    """Move the whole numbers of every group to the best of the neighbours."""
    best, (scales, minima) = trial.error(*ranges.decoded()), ranges[2:]
    for near_scale in _NEAR_SCALES:
        for near_minimum in _NEAR_MINIMA:
            candidate = ranges._replace(
                scales=(ranges.scales + near_scale).clamp_(0, limit),
                minima=(ranges.minima + near_minimum).clamp_(0, limit),
            )
            error = trial.error(*candidate.decoded())
            better = below(error, best)
            best = choose(better, error, best)
            scales = choose(better, candidate.scales, scales)
            minima = choose(better, candidate.minima, minima)
    return ranges._replace(scales=scales, minima=minima)


def _refit_ranges(trial: _Trial, ranges: Ranges) -> Ranges:
    """Fit both steps to the codes by least squares, where that lowers the errors of the blocks."""
    before = _over_groups(trial.error(*ranges.decoded()))
    code, product, square, value = trial.sums()
    d, dmin, scales, minima = ranges
    # The normal equations of d * (scales * code) - dmin * minima.
    both = _over_groups(scales * minima * code)
    of_d = _over_groups(scales * scales * square)
    of_dmin = _over_groups(minima * minima) * trial.size
    right_d, right_dmin = _over_groups(scales * product), _over_groups(minima * value)
    determinant = of_d * of_dmin - both * both
    fitted = ranges._replace(
        d=(right_d * of_dmin - right_dmin * both) / determinant,
        dmin=(right_d * both - right_dmin * of_d) / determinant,
    )
    after = _over_groups(trial.error(*fitted.decoded()))
    better = _lower(after, before) & (fitted.d > 0) & (fitted.dmin >= 0)
    return ranges._replace(
        d=torch.where(better, fitted.d, d), dmin=torch.where(better, fitted.dmin, dmin)
    )


def _lower(after: Tensor, before: Tensor) -> Tensor:
    """Compare errors; a block that float16 cannot hold is to stay infinite."""
    return (after < before) & before.isfinite()


def _over_groups(values: Tensor) -> Tensor:
    """Sum ``(groups, 1, n)`` to ``(1, 1, n)``."""
    return fold(values.squeeze(1).clone()).unsqueeze(0)


@final
class _Trial:
    """The squared errors of columns under scales and minima that are tried."""

    def __init__(self, x: Tensor, lowest: int, highest: int) -> None:
        self.size = x.shape[1]
        self._x = x
        self._limits = lowest, highest
        self._shifted, self._codes = torch.empty_like(x), torch.empty_like(x)
        self._errors = Sums(torch.empty_like(x))

    def error(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """Return the sums of squares, all ``(groups, 1, n)``, of ``scale * code - minimum``."""
        torch.add(self._x, minimum, out=self._shifted)
        torch.mul(self._shifted, inverse(scale), out=self._codes)
        self._codes.round_().clamp_(*self._limits)
        errors = torch.mul(self._codes, scale, out=self._errors.terms).sub_(self._shifted)
        errors.mul_(errors)
        return self._errors.take().clone()

    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum the codes of the last trial, their products with x, their squares, and x."""
        codes, x = self._codes, self._x
        return fold(codes.clone()), fold(codes * x), fold(codes * codes), fold(x.clone())
