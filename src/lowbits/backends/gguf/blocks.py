"""Reading the fields of GGUF blocks: whole words instead of single codes, no loop over weights.

Blocks are ``(n, block_bytes)`` uint8. Codes lie in bytes such that code ``i`` of a group shares its
byte with code ``i + width``, so that shifting eight bytes at a time gives whole *planes* of codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

#: The lowest bit of each byte of a word.
ONES: Final = 0x0101010101010101
#: Bit ``i`` of byte ``i`` of a word, and the bits below the highest one of each byte.
_DIAGONAL: Final = 0x8040201008040201 - 2**64
_BELOW: Final = 0x7F7F7F7F7F7F7F7F


def half(blocks: Tensor, offset: int, count: int = 1) -> Tensor:
    """Return ``count`` float16 values at an even byte offset as ``(n, count)`` float32."""
    column = offset // 2
    return blocks.view(torch.float16)[:, column : column + count].float()


def wider(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bytes several at a time: ``(..., width)`` uint8 as ``(..., width / size)`` integers.

    A copy: a field begins anywhere in its block, a wider integer where its size divides.
    """
    return data.clone(memory_format=torch.contiguous_format).view(dtype)


def planes(data: Tensor, bits: int) -> list[Tensor]:
    """Split bytes into their codes, the lowest bits first.

    Args:
        data: ``(..., width)`` uint8; width is a multiple of 8.
        bits: of a code: 1, 2 or 4.

    Returns:
        ``8 / bits`` tensors ``(..., width / 8)`` int64, a code in each byte.
    """
    packed = wider(data, torch.int64)
    mask = (2**bits - 1) * ONES
    return [(packed >> shift if shift else packed) & mask for shift in range(0, 8, bits)]


def codes(plane: Tensor, minus: int = 0) -> Tensor:
    """Return a plane's codes, less a zero point: ``(..., width)``, uint8 where that is 0."""
    values = plane.view(torch.uint8)
    return values if minus == 0 else (values - minus).view(torch.int8)


def spread_bits(data: Tensor) -> Tensor:
    """Return a word for each byte, whose byte ``i`` is the byte's bit ``i``; int64."""
    diagonal = data.long().mul_(ONES).bitwise_and_(_DIAGONAL)
    # Adding 0x7F carries each byte's one bit, wherever it is, into its highest.
    return diagonal.add_(_BELOW).bitwise_right_shift_(7).bitwise_and_(ONES)


def spread_pairs(data: Tensor) -> Tensor:
    """Return the four 2-bit codes of each byte as four bytes: int32, data's shape."""
    byte = data.int()
    return (byte | byte << 6 | byte << 12 | byte << 18).bitwise_and_(0x03030303)


def place(parts: list[Tensor], out: Tensor, groups: int) -> None:
    """Write planes of codes beside each other into ``(n, weights)`` float32.

    Args:
        parts: ``(n, groups, width)`` integers, or ``(n, width)`` for one group, in order.
        out: written; ``weights = groups * len(parts) * width``.
        groups: of a block.
    """
    target = out.view(out.shape[0], groups, len(parts), -1)
    for i, part in enumerate(parts):
        target[:, :, i].copy_(part.view(out.shape[0], groups, -1))


def scale_by(out: Tensor, scale: Tensor, minimum: Tensor | None = None) -> None:
    """Compute ``out * scale - minimum`` in place, each shared by an equal part of a block.

    Args:
        out: ``(n, weights)`` float32.
        scale: ``(n, groups)`` float32.
        minimum: as scale.
    """
    grouped = out.view(*scale.shape, -1)
    grouped.mul_(scale.unsqueeze(-1))
    if minimum is not None:
        grouped.sub_(minimum.unsqueeze(-1))
