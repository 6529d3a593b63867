"""GGUF types whose codes are evenly spaced: Q, K and TQ types, and 16-bit floats.

Each function decodes ``(n, block_bytes)`` uint8, contiguous, into ``out``, ``(n, weights)``
float32, contiguous. Arithmetic is float32, with the roundings of ``dequantize_row_*`` in
ggml-quants.c: the values are those of the ``gguf`` package bit for bit. Source of the layouts:
ggml-common.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowbits.backends.gguf.blocks import (
    codes,
    half,
    place,
    planes,
    scale_by,
    spread_bits,
    spread_pairs,
    wider,
)

if TYPE_CHECKING:
    from torch import Tensor


def f16(blocks: Tensor, out: Tensor) -> None:
    """Decode ``F16``: one float16 a block."""
    out.copy_(blocks.view(torch.float16))


def bf16(blocks: Tensor, out: Tensor) -> None:
    """Decode ``BF16``: one bfloat16 a block."""
    out.copy_(blocks.view(torch.bfloat16))


def q8_0(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_q8_0``: scale, 32 signed bytes."""
    out.copy_(blocks[:, 2:].view(torch.int8))
    scale_by(out, half(blocks, 0))


def q4_0(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_q4_0``: scale, 16 bytes of nibbles around 8."""
    place([codes(plane, 8) for plane in planes(blocks[:, 2:], 4)], out, 1)
    scale_by(out, half(blocks, 0))


def q4_1(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_q4_1``: scale, minimum, 16 bytes of nibbles."""
    place([codes(plane) for plane in planes(blocks[:, 4:], 4)], out, 1)
    scale_by(out, half(blocks, 0), -half(blocks, 2))


def _five_bits(fifth: Tensor, nibbles: Tensor) -> list[Tensor]:
    """Return the two planes of 5-bit codes of blocks whose fifth bits are 4 bytes in order."""
    high = spread_bits(fifth).view(-1, 2, 2)
    return [low | high[:, i] << 4 for i, low in enumerate(planes(nibbles, 4))]


def q5_0(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_q5_0``: scale, fifth bits, 16 bytes of nibbles; codes around 16."""
    parts = _five_bits(blocks[:, 2:6], blocks[:, 6:])
    place([codes(plane, 16) for plane in parts], out, 1)
    scale_by(out, half(blocks, 0))


def q5_1(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_q5_1``: scale, minimum, fifth bits, 16 bytes of nibbles."""
    parts = _five_bits(blocks[:, 4:8], blocks[:, 8:])
    place([codes(plane) for plane in parts], out, 1)
    scale_by(out, half(blocks, 0), -half(blocks, 2))


def q1_0(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_q1_0``: scale, 128 bits in order, for minus or plus the scale."""
    signs = spread_bits(blocks[:, 2:]).view(torch.int8)
    out.copy_(signs.mul_(2).sub_(1))
    scale_by(out, half(blocks, 0))


def q2_0(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_q2_0``: scale, 64 2-bit codes in order around 1."""
    out.copy_(spread_pairs(blocks[:, 2:]).view(torch.int8).sub_(1))
    scale_by(out, half(blocks, 0))


def q2_k(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_q2_K``: 16 bytes (scale, minimum: 4 bits), 2-bit codes, their two scales."""
    place([codes(plane) for plane in planes(blocks[:, 16:80].view(-1, 2, 32), 2)], out, 2)
    nibbles = blocks[:, :16]
    scale_by(
        out, (nibbles & 15).float() * half(blocks, 80), (nibbles >> 4).float() * half(blocks, 82)
    )


def q3_k(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_q3_K``: third bits, 2-bit codes, 6-bit scales, their scale; codes around 4."""
    low, high = planes(blocks[:, 32:96].view(-1, 2, 32), 2), planes(blocks[:, :32], 1)
    target = out.view(-1, 8, 32)
    for group in range(8):
        plane = low[group % 4][:, group // 4] | high[group] << 2
        target[:, group].copy_(codes(plane, 4))
    scale_by(out, (_q3_scales(blocks[:, 96:108]) - 32).view(torch.int8).float() * half(blocks, 108))


def _q3_scales(data: Tensor) -> Tensor:
    """Return 16 scales of 6 bits: low nibbles in bytes 0 to 7, high bits in 8 to 11."""
    first, second, high = wider(data, torch.int32).unbind(1)
    nibble, top = 0x0F0F0F0F, 0x30303030
    parts = (
        first & nibble | high << 4 & top,
        second & nibble | high << 2 & top,
        first >> 4 & nibble | high & top,
        second >> 4 & nibble | high >> 2 & top,
    )
    return torch.stack(parts, 1).view(torch.uint8)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and minimum of the 8 groups of a Q4_K or Q5_K block, ``(n, 8)`` float32 each.

    The bytes 4 to 15 hold them in 6 bits each; source: ``get_scale_min_k4``.
    """
    packed = wider(blocks[:, 4:16], torch.int32)
    own, rest = packed[:, :2], packed[:, 2:]
    low = own & 0x3F3F3F3F
    high = torch.cat([rest, rest >> 4], 1) & 0x0F0F0F0F | own >> 2 & 0x30303030
    six_bits = torch.stack([low, high], 2).view(torch.uint8).view(-1, 2, 8)
    scaled = six_bits * half(blocks, 0, 2).unsqueeze(-1)
    return scaled[:, 0], scaled[:, 1]


def q4_k(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_q4_K``: two scales, 6-bit scales and minimums, nibbles."""
    place([codes(plane) for plane in planes(blocks[:, 16:].view(-1, 4, 32), 4)], out, 4)
    scale_by(out, *_k_scales(blocks))


def q5_k(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_q5_K``: as Q4_K, with 32 bytes of fifth bits before the nibbles."""
    low, high = planes(blocks[:, 48:].view(-1, 4, 32), 4), planes(blocks[:, 16:48], 1)
    target = out.view(-1, 8, 32)
    for group in range(8):
        plane = low[group % 2][:, group // 2] | high[group] << 4
        target[:, group].copy_(codes(plane))
    scale_by(out, *_k_scales(blocks))


def q6_k(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_q6_K``: nibbles, upper two bits, 16 signed scales, their scale; around 32."""
    low, high = (
        planes(blocks[:, :128].view(-1, 2, 64), 4),
        planes(blocks[:, 128:192].view(-1, 2, 32), 2),
    )
    parts = [codes(low[i // 2].view(-1, 2, 2, 4)[:, :, i % 2] | high[i] << 4, 32) for i in range(4)]
    place(parts, out, 2)
    scale_by(out, blocks[:, 192:208].view(torch.int8).float() * half(blocks, 208))


def tq1_0(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_tq1_0``: five base-3 digits a byte (48 bytes), four in 4 more; scale.

    A byte is a fraction of 256: multiplied by 3, its digit is what goes over. Digits are around 1.
    """
    start = 0
    for data, width, digits in (
        (blocks[:, :32], 32, 5),
        (blocks[:, 32:48], 16, 5),
        (blocks[:, 48:52], 4, 4),
    ):
        rest = data
        for _ in range(digits):
            # The digit is how often three times the rest, less than 768, holds 256.
            digit = (rest >= 86).view(torch.int8) + (rest >= 171).view(torch.int8)
            out[:, start : start + width].copy_(digit.sub_(1))
            rest, start = rest * 3, start + width
    scale_by(out, half(blocks, 52))


def tq2_0(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_tq2_0``: 2-bit codes around 1; scale."""
    place([codes(plane, 1) for plane in planes(blocks[:, :64].view(-1, 2, 32), 2)], out, 2)
    scale_by(out, half(blocks, 64))
