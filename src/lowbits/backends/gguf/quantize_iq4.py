"""Types of 4 bits with uneven levels: IQ4_NL and IQ4_XS.

Source: ``quantize_row_iq4_nl_impl`` in ggml-quants.c without weights; the levels are
``kvalues_iq4nl`` and the layouts ``block_iq4_nl`` and ``block_iq4_xs`` in ggml-common.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from lowbits.backends.gguf.codebook import IQ4_VALUES
from lowbits.backends.gguf.quantize_fit import search_levels
from lowbits.backends.gguf.quantize_search import (
    as_bytes,
    columns,
    digits,
    furthest,
    half_bytes,
    inverse,
    nibbles,
    split,
    storable,
)

if TYPE_CHECKING:
    from torch import Tensor

#: What the largest weight of a group is stretched to, in order.
_STRETCHES: Final = (127.0, *(float(step - 127) for step in range(-7, 8)))


def quantize_iq4_nl(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 32)`` float32 to ``(n, 18)`` uint8."""
    x = columns(blocks, 32)
    scale = _search(x)
    codes = _nearest(x * (2 * inverse(scale)), _codes(x.device))
    return torch.cat([half_bytes(scale), nibbles(codes.view(2, 16, -1))], 1)


def quantize_iq4_xs(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 256)`` float32 to ``(n, 136)`` uint8."""
    x = columns(blocks, 32)
    scale = _search(x)
    d = storable(furthest(-scale, 0) / 32)
    steps = (scale * inverse(d)).round_().clamp_(-32, 31)
    codes = _nearest(x * (2 * inverse(steps * d)), _codes(x.device))
    low, high = split(steps.squeeze(1) + 32, 16)
    parts = [
        half_bytes(d),
        as_bytes(digits(high.view(2, 4, -1).transpose(0, 1), 4)),
        nibbles(low.view(4, 2, -1).transpose(0, 1)),
        nibbles(codes.view(8, 2, 16, -1).transpose(0, 1)),
    ]
    return torch.cat(parts, 1)


def _search(x: Tensor) -> Tensor:
    """Find the scale of every group with the least squared error, weighed by the square."""
    levels = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=x.device)
    table = levels[_codes(x.device).int()]
    return search_levels(x, x.square(), lambda scaled: _nearest(scaled.mul_(2), table), _STRETCHES)


def _codes(device: torch.device) -> Tensor:
    """Return the code, float32, nearest to ``(index - 256) / 2``, for 512 indices.

    The middle between two levels is a whole number of halves, and has the higher one's code.
    """
    levels = torch.tensor(IQ4_VALUES, device=device)
    middles = levels[1:] + levels[:-1]
    doubled = torch.arange(-256, 256, device=device)
    return (doubled.unsqueeze(1) >= middles).sum(1).float()


def _nearest(doubled: Tensor, table: Tensor) -> Tensor:
    """Return the entry for each of ``doubled``, twice the values; they are overwritten."""
    # NaN, of scales that overflowed, becomes any integer.
    index = doubled.floor_().clamp_(-256, 255).add_(256).int().clamp_(0, 511)
    return table.index_select(0, index.view(-1)).view_as(doubled)
