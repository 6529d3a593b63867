"""Products with 8-bit weights: activations quantized too, or weights widened and scaled after.

Both leave the weight in 8 bits: nothing of its size is written in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

_FLOAT8_MAX: Final = torch.finfo(torch.float8_e4m3fn).max


def int8_product(x: Tensor, qdata: Tensor, scale: Tensor) -> Tensor:
    """Quantize each row of x to int8, multiply in int8, scale back.

    Args:
        x: ``(m, row_length)`` floating.
        qdata: ``(rows, row_length)`` int8.
        scale: ``(rows, 1)`` float32.

    Returns:
        ``(m, rows)`` float32.
    """
    x_scale = (x.float().abs().amax(1, keepdim=True) / 127).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    codes = (x.float() / x_scale).round().clamp(-128, 127).to(torch.int8)
    return torch._int_mm(codes, qdata.t()).float() * x_scale * scale.view(1, -1)


def float8_product(x: Tensor, qdata: Tensor, scale: Tensor) -> Tensor:
    """Quantize each row of x to float8 e4m3, multiply in float8, scale back.

    Args:
        x: ``(m, row_length)`` floating.
        qdata: ``(rows, row_length)`` uint8, the bytes of float8 e4m3 values.
        scale: ``(rows, 1)`` float32.

    Returns:
        ``(m, rows)`` float32 on a CPU, else bfloat16.
    """
    x_scale = (x.float().abs().amax(1, keepdim=True) / _FLOAT8_MAX).clamp_min(1e-12)
    codes = (x.float() / x_scale).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn)
    return torch._scaled_mm(
        codes,
        qdata.view(torch.float8_e4m3fn).t(),
        scale_a=x_scale,
        scale_b=scale.view(1, -1),
        # Row-wise scales exist for bfloat16 results only on CUDA.
        out_dtype=torch.float32 if x.device.type == "cpu" else torch.bfloat16,
    )


def dynamic_linear(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a linear layer in int8 or float8, whichever its codes are.

    Args:
        x: ``(..., row_length)`` floating.
        qdata: as for `int8_product` or `float8_product`.
        scale: ``(rows, 1)`` float32.
        bias: ``(rows,)``.

    Returns:
        ``(..., rows)`` in x's dtype.
    """
    product = int8_product if qdata.dtype == torch.int8 else float8_product
    y = product(x.reshape(-1, x.shape[-1]), qdata, scale).to(x.dtype)
    y = y.view(*x.shape[:-1], qdata.shape[0])
    return y if bias is None else y + bias


def widened_linear(
    x: Tensor, codes: Tensor, scale: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """Multiply by the codes as bfloat16, and scale what is less; None where that is unwise.

    For accelerators: 3 bytes of memory traffic a weight, where dequantizing in float32 takes 19,
    and 4 more for each number that is scaled: results, or weights where those are fewer.
    bfloat16 holds int8 and both float8 formats exactly, and the range of the unscaled sums, which
    float16 does not. A CPU dequantizes part by part in its cache instead.

    Args:
        x: ``(..., row_length)``.
        codes: ``(rows, row_length)`` int8, or float8.
        scale: ``(rows, 1)`` float32; None: 1.
        bias: ``(rows,)``.

    Returns:
        ``(..., rows)`` in x's dtype.
    """
    if x.dtype != torch.bfloat16 or x.device.type in ("cpu", "mps"):
        return None
    return _scaled_linear(x, codes, scale, bias)


def _scaled_linear(x: Tensor, codes: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    weight = codes.to(x.dtype)
    if scale is None:
        return functional.linear(x, weight, bias)
    # In place: the kernel multiplies in float32, and nothing is written in float32. Results have
    # their bias added by another kernel, weights do not.
    if 2 * (x.numel() // x.shape[-1]) > weight.shape[1]:
        return functional.linear(x, weight.mul_(scale), bias)
    y = functional.linear(x, weight).mul_(scale.view(-1))
    return y if bias is None else y.add_(bias)
