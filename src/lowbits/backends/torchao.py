"""torchao: int8, int4 and float8 weights, the latter two with activations quantized on the fly too.

torchao makes the bytes. ``torchao-int4`` is the format of its ``tinygemm`` kernels (codes 0 to 15,
bfloat16 scale and zero point per group) with two codes in a byte, which torchao itself offers on
some GPUs only; its ``IntxWeightOnlyConfig`` keeps a 4-bit code in 8 bits and is not offered here.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, ClassVar, Final, final

import torch
from torch.nn import functional

from lowbits.core.backend import Packed, QuantBackend, Rows
from lowbits.core.decode import (
    ByteTable,
    decode_int8_rows,
    deliver,
    pack_codes,
    scale_groups,
    work_buffer,
)
from lowbits.core.scheme import LINEAR, Scheme

if TYPE_CHECKING:
    from torch import Tensor

_INT8: Final = ("torchao-int8", "torchao-int8-dynamic")
_FLOAT8: Final = ("torchao-float8", "torchao-float8-dynamic")
_INT4: Final = "torchao-int4"
#: The code that stands for the zero point in tinygemm's format.
_MIDDLE: Final = 8
_FLOAT8_MAX: Final = torch.finfo(torch.float8_e4m3fn).max

_SCHEMES: Final = (
    Scheme("torchao-int8", "int8 weights, float32 scale per row", 8, 32),
    Scheme(
        _INT4,
        "int4 weights, bfloat16 scale and zero point per 128",
        4,
        32,
        (128, 64, 32),
        row_multiple=32,
        fallbacks=("torchao-int8",),
    ),
    Scheme("torchao-float8", "float8 e4m3 weights, float32 scale per row", 8, 32),
    Scheme(
        "torchao-int8-dynamic",
        "int8 weights and activations, int8 matrix product",
        8,
        32,
        kinds=(LINEAR,),
        fallbacks=("torchao-int8",),
    ),
    Scheme(
        "torchao-float8-dynamic",
        "float8 weights and activations, float8 matrix product",
        8,
        32,
        kinds=(LINEAR,),
        row_multiple=16,
        fallbacks=("torchao-float8",),
    ),
)


@final
class TorchaoBackend(QuantBackend):
    """torchao's weight-only and dynamic schemes."""

    name: ClassVar[str] = "torchao"
    requires: ClassVar[str | None] = "lowbits[torchao]"

    def __init__(self) -> None:
        self._int4 = ByteTable.of_codes([code - _MIDDLE for code in range(16)])
        self._float8 = ByteTable.of_float8(torch.float8_e4m3fn)

    def schemes(self) -> tuple[Scheme, ...]:
        """Return the schemes of this backend."""
        return _SCHEMES

    def probe(self) -> str | None:
        """Quantize one row with each scheme."""
        row = torch.linspace(-1, 1, 32).view(1, 32)
        for scheme in _SCHEMES:
            self.pack(row, scheme)
        return metadata.version("torchao")

    def pack(self, weight: Tensor, scheme: Scheme) -> Packed:
        """Quantize with torchao."""
        shape = (weight.shape[0], weight.shape[1])
        if scheme.name == _INT4:
            return Packed(scheme.name, shape, _pack_int4(weight, scheme.group_size(shape[1])))
        if scheme.name in _INT8:
            return Packed(scheme.name, shape, _pack_int8(weight))
        return Packed(scheme.name, shape, _pack_float8(weight))

    def unpack(
        self,
        packed: Packed,
        dtype: torch.dtype,
        out: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Compute ``codes * scale``, for int4 ``(codes - 8) * scale + zero_point``."""
        packed = packed.rows(rows)
        if packed.scheme in _INT8:
            return decode_int8_rows(packed["qdata"], packed["scale"], dtype, out)
        table = self._int4 if packed.scheme == _INT4 else self._float8
        values = table.decode(packed["qdata"], work_buffer(out))
        values = scale_groups(values, packed["scale"], packed.tensors.get("zero_point"))
        return deliver(values, dtype, out)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor | None:
        """Multiply in low precision where the scheme is a dynamic one, and the device can."""
        if not packed.scheme.endswith("-dynamic"):
            return None
        flat = x.reshape(-1, x.shape[-1])
        is_int8 = packed.scheme in _INT8
        if flat.shape[0] == 0 or not _has_product(flat, packed.shape, is_int8=is_int8):
            return None
        y = (_int8_product if is_int8 else _float8_product)(flat, packed)
        y = y.to(x.dtype).view(*x.shape[:-1], packed.shape[0])
        return y if bias is None else y + bias


def _padded(weight: Tensor) -> Tensor:
    """Return rows that torchao quantizes one by one.

    It takes rows of one column for a single group; a zero beside it changes no scale.
    """
    return functional.pad(weight, (0, 1)) if weight.shape[1] == 1 else weight


def _pack_int8(weight: Tensor) -> dict[str, Tensor]:
    from torchao.quantization import Int8Tensor, PerRow

    quantized = Int8Tensor.from_hp(_padded(weight), PerRow())
    qdata = quantized.qdata[:, : weight.shape[1]].contiguous()
    return {"qdata": qdata, "scale": quantized.scale}


def _pack_float8(weight: Tensor) -> dict[str, Tensor]:
    from torchao.quantization import Float8Tensor, PerRow

    quantized = Float8Tensor.from_hp(_padded(weight), torch.float8_e4m3fn, PerRow())
    qdata = quantized.qdata.view(torch.uint8)[:, : weight.shape[1]]
    # torchao divides an all-zero row (padding of an embedding) by its zero scale.
    is_zero = quantized.scale == 0
    return {
        "qdata": qdata.masked_fill(is_zero, 0).contiguous(),
        "scale": quantized.scale.masked_fill(is_zero, 1),
    }


def _pack_int4(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    from torchao.quantization.quant_primitives import (
        MappingType,
        _choose_qparams_affine_tinygemm,
        _quantize_affine_tinygemm,
    )

    block, bounds = (1, group_size), {"quant_min": 0, "quant_max": 15}
    scale, zero_point = _choose_qparams_affine_tinygemm(
        weight,
        MappingType.ASYMMETRIC,
        block,
        torch.int32,
        eps=1e-6,
        scale_dtype=torch.bfloat16,
        zero_point_dtype=torch.bfloat16,
        **bounds,
    )
    # The codes are chosen for the scale as it is stored, not for the one it was rounded from.
    codes = _quantize_affine_tinygemm(
        weight, block, scale.float(), zero_point.float(), torch.int32, **bounds
    )
    grid = (weight.shape[0], -1)
    return {
        "qdata": pack_codes(codes.to(torch.uint8), 4),
        "scale": scale.view(grid),
        "zero_point": zero_point.view(grid),
    }


def _has_product(x: Tensor, shape: tuple[int, int], *, is_int8: bool) -> bool:
    """Say whether ``torch._int_mm``, or ``torch._scaled_mm`` by rows, takes these operands.

    CUDA's limits: int8 wants more than 16 rows and sides that are multiples of 8, float8 compute
    capability 8.9 and multiples of 16. A CPU takes anything.
    """
    if x.device.type != "cuda":
        return x.device.type == "cpu"
    if is_int8:
        return x.shape[0] > 16 and not (shape[0] % 8 or shape[1] % 8)
    properties = torch.cuda.get_device_properties(x.device)
    is_able = torch.version.hip is None and (properties.major, properties.minor) >= (8, 9)
    return is_able and not (shape[0] % 16 or shape[1] % 16)


def _int8_product(x: Tensor, packed: Packed) -> Tensor:
    """Quantize each row of x to int8, multiply in int8, scale back; ``(m, row_length)``."""
    scale = (x.float().abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (x.float() / scale).round().clamp(-128, 127).to(torch.int8)
    return torch._int_mm(codes, packed["qdata"].t()).float() * scale * packed["scale"].view(1, -1)


def _float8_product(x: Tensor, packed: Packed) -> Tensor:
    """Quantize each row of x to float8, multiply in float8, scale back; ``(m, row_length)``."""
    scale = (x.float().abs().amax(1, keepdim=True) / _FLOAT8_MAX).clamp_min(1e-12)
    codes = (x.float() / scale).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn)
    return torch._scaled_mm(
        codes,
        packed["qdata"].view(torch.float8_e4m3fn).t(),
        scale_a=scale,
        scale_b=packed["scale"].view(1, -1),
        # Row-wise scales exist for bfloat16 results only on CUDA.
        out_dtype=torch.float32 if x.device.type == "cpu" else torch.bfloat16,
    )
