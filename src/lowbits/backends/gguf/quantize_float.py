"""Types that hold floating point numbers: F16, BF16, MXFP4, NVFP4.

Sources: ``ggml_compute_fp32_to_bf16`` and ``ggml_fp32_to_ue4m3`` in ggml-impl.h,
``quantize_row_mxfp4_ref`` and ``quantize_row_nvfp4_ref`` in ggml-quants.c; the codes are E2M1 of
the OCP Microscaling Formats specification 1.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from lowbits.backends.gguf.quantize_search import columns, divide, magnitude, nibbles

if TYPE_CHECKING:
    from torch import Tensor

_INFINITY_BITS: Final = 0x7F800000


def quantize_f16(blocks: Tensor) -> Tensor:
    """Round ``(n, 1)`` float32 to ``(n, 2)`` bytes of float16."""
    return blocks.half().view(torch.uint8)


def quantize_bf16(blocks: Tensor) -> Tensor:
    """Round ``(n, 1)`` float32 to ``(n, 2)`` bytes of bfloat16, halves to even."""
    bits = blocks.view(torch.int32)
    rounded = bits + ((bits >> 16 & 1) + 0x7FFF)
    is_nan = (bits & 0x7FFFFFFF) > _INFINITY_BITS
    upper = torch.where(is_nan, bits | 0x00400000, rounded) >> 16
    return upper.to(torch.int16).view(torch.uint8)


def quantize_mxfp4(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 32)`` float32 to ``(n, 17)`` uint8: a power of two, then the codes."""
    x = columns(blocks, 32)
    largest = magnitude(x, 1).squeeze(1)
    # The exponent less 2, so that the largest weight lies between 4 and 8.
    exponent = (largest.view(torch.int32) >> 23).sub_(2).clamp_(min=0)
    codes = _e2m1(x, _power_of_two(exponent).unsqueeze(1))
    return torch.cat([exponent.to(torch.uint8).t(), nibbles(codes.view(2, 16, -1))], 1)


def quantize_nvfp4(blocks: Tensor) -> Tensor:
    """Quantize ``(n, 64)`` float32 to ``(n, 36)`` uint8: four scales, then the codes.

    The scales have no infinity: magnitudes above 2688 become 2688.
    """
    x = columns(blocks, 16)
    largest = magnitude(x, 1).squeeze(1)
    scale_bits, scale = _ue4m3(divide(largest, 6))
    codes = _e2m1(x, torch.where(scale > 0, scale, torch.inf).unsqueeze(1))
    packed = nibbles(codes.view(4, 2, 8, -1).transpose(0, 1))
    return torch.cat([scale_bits.to(torch.uint8).t(), packed], 1)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return ``2 ** (exponent - 127)`` for int32 from 0 to 254; the lowest is subnormal."""
    bits = torch.where(exponent == 0, 0x00400000, exponent << 23)
    return bits.view(torch.float32)


def _ue4m3(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round numbers from 0 to E4M3 without a sign as ggml does, halves away from zero.

    Returns:
        The codes, int32, at most 0x7E, and their values.
    """
    clipped = values.clamp(0, 448)
    bits = clipped.view(torch.int32)
    # Three bits of the mantissa are kept; the exponent's bias of 127 becomes 7.
    normal = ((bits + (1 << 19)) >> 20) - (120 << 3)
    normal = torch.where(normal >= 15 << 3, 0x7E, normal)
    subnormal = (clipped * 512 + 0.5).int().clamp_(0, 7)
    codes = torch.where(bits >> 23 <= 120, subnormal, normal)
    mantissa, exponent = codes & 7, codes >> 3
    small = mantissa * 2.0**-9
    large = ((exponent + 120 << 23) | mantissa << 20).view(torch.float32)
    return codes, torch.where(exponent == 0, small, large)


def _e2m1(x: Tensor, scale: Tensor) -> Tensor:
    """Return the codes of the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 times ``scale``, with a sign.

    Halves go to the smaller magnitude; what becomes zero has no sign.
    """
    doubled = (x / scale).abs_().mul_(2)
    # One code is 1 apart up to 4, then 2 up to 8, then 4 up to 12.
    codes = doubled.clamp(max=4).sub_(0.5).ceil_()
    codes += doubled.sub(4).mul_(0.5).clamp_(0, 2).sub_(0.5).ceil_()
    codes += doubled.sub_(8).mul_(0.25).clamp_(0, 1).sub_(0.5).ceil_()
    return codes.add_(codes.clamp(max=1).mul_(x < 0), alpha=8)
