"""What the searches for scales share.

Blocks are quantized as columns: ``(groups, size, n)`` holds weight ``j`` of group ``g`` of block
``i`` at ``[g, j, i]``. So everything that belongs to a group is a row of ``n`` numbers, which the
processor's vector units take as they lie.

[Note: parts and whole] The bytes of a block depend on nothing but its weights: not on the chunk,
the number of threads or the place in the vector registers. Therefore sums are taken by halves, in
one fixed order, with operations that IEEE 754 rounds once: ``torch.sum`` adds in another order at
the end of a row, and a product may or may not be fused with the sum that follows within one kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import torch

if TYPE_CHECKING:
    from torch import Tensor

#: A divisor in place of 0: what is divided by it is 0 in float16 or is not used.
TINY: Final = 1e-30


def columns(blocks: Tensor, size: int) -> Tensor:
    """Copy ``(n, block)`` to columns, ``(block / size, size, n)``, contiguous."""
    # Not .contiguous(): it would hand out a single block itself.
    copy = blocks.t().clone(memory_format=torch.contiguous_format)
    return copy.view(-1, size, blocks.shape[0])


@final
class Sums:
    """Sums of terms over the last dimension but one, a power of two.

    Attributes:
        terms: written by the caller before each sum, and overwritten by it.
        result: where the sums appear; the dimension is kept as 1. See [Note: parts and whole].
    """

    def __init__(self, terms: Tensor) -> None:
        self.terms = terms
        self.result = terms[..., :1, :]
        # Views are made once: to make one takes as long as to add a few thousand numbers.
        self._halves = []
        while terms.shape[-2] > 1:
            first, second = terms.chunk(2, -2)
            self._halves.append((first, second))
            terms = first

    def take(self) -> Tensor:
        """Sum the terms; returns the result, which holds until the terms are written again."""
        for first, second in self._halves:
            first.add_(second)
        return self.result


def fold(terms: Tensor) -> Tensor:
    """Sum over the last dimension but one, which is kept as 1; the terms are overwritten."""
    return Sums(terms).take().clone()


def divide(values: Tensor, divisor: float) -> Tensor:
    """Divide exactly: CUDA kernels multiply by the inverse of a plain number."""
    return values / values.new_full((), divisor)


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 for 0 and what is too small to have an inverse."""
    return torch.where(scale.abs() < 1e-37, 0.0, 1 / scale)


def below(low: Tensor, high: Tensor) -> Tensor:
    """Return a mask for :func:`choose`: where ``low < high``. NaN may count as either.

    Together they are several times as fast as comparison and ``torch.where`` on a processor, which
    branches for every element.
    """
    return (low - high).view(torch.int32) >> 31


def choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return ``new`` where the mask is set, else ``old``: all float32 of one shape."""
    bits = old.view(torch.int32)
    return (new.view(torch.int32) ^ bits).bitwise_and_(mask).bitwise_xor_(bits).view(torch.float32)


def storable(step: Tensor) -> Tensor:
    """Return steps that float16 holds with few digits or none as the next one up that it holds.

    Multiples of a step that is rounded down would not reach the largest of what they stand for.
    """
    smallest, ulp = 2.0**-14, 2.0**-24
    magnitude = (step.abs() / ulp).ceil_().mul_(ulp)
    return torch.where(step.abs() < smallest, torch.copysign(magnitude, step), step)


def magnitude(x: Tensor, dim: int) -> Tensor:
    """Return the largest magnitude; the dimension is kept."""
    return torch.maximum(x.amax(dim, keepdim=True), -x.amin(dim, keepdim=True)).abs_()


def furthest(x: Tensor, dim: int) -> Tensor:
    """Return the value furthest from zero, the positive one of two; the dimension is kept."""
    high, low = x.amax(dim, keepdim=True), x.amin(dim, keepdim=True)
    return torch.where(high >= -low, high, low)


def round_half_away(values: Tensor) -> Tensor:
    """Round as C's ``roundf``, in place: torch.round rounds halves to even."""
    part = values.frac()
    return values.sub_(part).add_(part.mul_(2).trunc_())


def split(codes: Tensor, base: int) -> tuple[Tensor, Tensor]:
    """Return remainder and quotient of whole numbers by a power of two."""
    high = codes.mul(1 / base).floor_()
    return codes.sub(high, alpha=base), high


def digits(codes: Tensor, base: int) -> Tensor:
    """Make ``(parts, ...)`` whole numbers the digits of one number, the first the lowest digit."""
    packed = codes[-1].clone()
    for part in reversed(codes[:-1].unbind()):
        packed.mul_(base).add_(part)
    return packed


def half_bytes(values: Tensor) -> Tensor:
    """Return ``n`` numbers as ``(n, 2)`` bytes of float16."""
    return values.view(-1, 1).half().view(torch.uint8)


def as_bytes(rows: Tensor) -> Tensor:
    """Return ``(..., n)`` whole numbers from 0 to 255 as the bytes of blocks, ``(n, rows)``."""
    return rows.to(torch.uint8).view(-1, rows.shape[-1]).t()


def nibbles(codes: Tensor) -> Tensor:
    """Pack ``(2, ..., n)`` codes of 4 bits, the first ones low, to ``(n, rows)`` bytes."""
    return as_bytes(torch.add(codes[0], codes[1], alpha=16))


def quarters(codes: Tensor) -> Tensor:
    """Pack ``(256, n)`` codes of 2 bits to ``(n, 64)`` bytes: 32 apart share one."""
    return as_bytes(digits(codes.view(2, 4, 32, -1).transpose(0, 1), 4))
