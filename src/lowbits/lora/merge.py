"""W + what adapters add to it, quantized from W itself, a few rows at a time.

Quantizing a weight that was quantized before loses a small delta: of one of 1 to 3 % of |W|, in
nf4, all but 2 to 4 %, for it moves hardly a code. So a sum is always made of the full-precision
weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from lowbits.core.memory import temporary
from lowbits.core.packing import packed_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lowbits.core.backend import Packed, QuantBackend
    from lowbits.core.scheme import Scheme


class Delta(ABC):
    """What one adapter adds to a weight of ``(rows, row_length)``."""

    @abstractmethod
    def add_to(self, total: Tensor, weight: Tensor, start: int, stop: int) -> None:
        """Add it to some rows.

        Args:
            total: ``(stop - start, row_length)`` float32, on the device that computes; written.
            weight: those rows without any adapter, floating, on any device; not changed.
            start: the first row.
            stop: the row after the last one.
        """


@final
@dataclass(frozen=True)
class LowRank(Delta):
    """A product of two thin matrices, as LoRA's.

    Attributes:
        up: ``(rows, rank)``, floating, on any device.
        down: ``(rank, row_length)``, as above.
        scale: of the product.
    """

    up: Tensor
    down: Tensor
    scale: float

    def add_to(self, total: Tensor, weight: Tensor, start: int, stop: int) -> None:  # noqa: ARG002 - of all deltas
        """Add those rows of ``scale * up @ down``, computed in float32."""
        up = self.up[start:stop].to(total.device, torch.float32)
        total.addmm_(up, self.down.to(total.device, torch.float32), alpha=self.scale)


@final
@dataclass(frozen=True)
class Dense(Delta):
    """A matrix, as LoHa and LoKr make of their factors.

    Attributes:
        matrix: ``(rows, row_length)``, floating, on any device.
        scale: of it.
    """

    matrix: Tensor
    scale: float

    def add_to(self, total: Tensor, weight: Tensor, start: int, stop: int) -> None:  # noqa: ARG002 - of all deltas
        """Add those rows, times the scale."""
        total.add_(self.matrix[start:stop].to(total.device, torch.float32), alpha=self.scale)


@final
@dataclass(frozen=True)
class Decomposed(Delta):
    """What gives every row of the sum a length that was learned (DoRA).

    Attributes:
        delta: that turns the rows.
        magnitude: ``(rows,)``, the lengths.

    Source: DoRA, arXiv:2402.09353, equation 5: ``m * (W + BA) / |W + BA|``, by rows of W.
    """

    delta: Delta
    magnitude: Tensor

    def add_to(self, total: Tensor, weight: Tensor, start: int, stop: int) -> None:
        """Add the difference between the rows of that length and the weight's."""
        turned = weight.to(total.device, torch.float32, copy=True)
        self.delta.add_to(turned, weight, start, stop)
        length = self.magnitude[start:stop].to(total.device, torch.float32)
        factor = length / torch.linalg.vector_norm(turned, dim=1)
        total.addcmul_(turned, factor[:, None]).sub_(weight.to(total.device, torch.float32))


@final
class MergedWeight:
    """A weight and what is added to it, made a few rows at a time."""

    def __init__(self, weight: Tensor, deltas: Sequence[Delta], device: torch.device) -> None:
        """Keep what it is made of.

        Args:
            weight: full precision, ``(rows, row_length)``, on any device; not changed.
            deltas: added to it, each to the weight alone.
            device: that computes.
        """
        self._weight, self._deltas, self._device = weight, deltas, device

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, row_length)``."""
        rows, row_length = self._weight.shape
        return rows, row_length

    @torch.no_grad()
    def added(self, start: int, stop: int) -> Tensor:
        """Return what is added to some rows, float32."""
        weight = self._weight[start:stop]
        zeros = torch.zeros(weight.shape, dtype=torch.float32, device=self._device)
        return self._add(zeros, weight, start, stop)

    @torch.no_grad()
    def rows(self, start: int, stop: int) -> Tensor:
        """Return some rows of the sum: float32 where anything is added.

        On a CPU the next rows are written over them.
        """
        weight = self._weight[start:stop]
        if not self._deltas:
            return weight
        weight = weight.to(self._device)
        total = temporary("sum", weight, torch.float32).copy_(weight)
        return self._add(total, weight, start, stop)

    def _add(self, total: Tensor, weight: Tensor, start: int, stop: int) -> Tensor:
        for delta in self._deltas:
            delta.add_to(total, weight, start, stop)
        return total

    def pack(self, scheme: Scheme, backend: QuantBackend) -> list[Packed]:
        """Quantize the sum; return its parts, of some rows each, in order.

        With nothing added, they are bit for bit what packing the weight gives.

        Raises:
            NonFiniteWeightError: it holds NaN or infinity.
        """
        return list(packed_parts(self.rows, self.shape, scheme, backend, self._device))


@final
@dataclass
class Survival:
    """How much of what was added to weights is found in what they decode to.

    ``sum of <after - before, added> / sum of <added, added>`` over all weights: 1 where the effect
    is as strong as it was meant, 0 where it is lost. What quantizing adds beside it does not count.
    """

    _found: float = 0.0
    _meant: float = 0.0

    @torch.no_grad()
    def add(
        self, merged: MergedWeight, before: Packed, after: Sequence[Packed], backend: QuantBackend
    ) -> None:
        """Count one weight.

        Args:
            merged: what it is meant to be.
            before: the weight as packed without what is added.
            after: the parts of what was packed with it, in order.
            backend: of both.
        """
        start = 0
        for part in after:
            rows = start, start + part.shape[0]
            added = merged.added(*rows)
            change = backend.unpack(part, torch.float32)
            change = change - backend.unpack(before, torch.float32, rows=rows)
            self._found += _sum(change * added)
            self._meant += _sum(added.square())
            start = rows[1]

    @property
    def has_counted(self) -> bool:
        """Whether anything was added to the weights that were counted."""
        return self._meant > 0

    @property
    def share(self) -> float:
        """The figure; 1 where nothing was added."""
        return self._found / self._meant if self._meant else 1.0


def _sum(rows: Tensor) -> float:
    """Add up a matrix: the sums of its rows in float64, which not every device has."""
    return float(rows.sum(1).cpu().sum(dtype=torch.float64))
