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
from lowbits.core.capability import has_float8_product, int8_rows
from lowbits.core.decode import (
    ByteTable,
    decode_rows,
    pack_codes,
    scale_groups,
    write_float8,
    write_int8,
)
from lowbits.core.products import dynamic_linear, widened_linear
from lowbits.core.scheme import LINEAR, Scheme

if TYPE_CHECKING:
    from torch import Tensor

_INT8: Final = ("torchao-int8", "torchao-int8-dynamic")
_FLOAT8: Final = ("torchao-float8", "torchao-float8-dynamic")
_INT4: Final = "torchao-int4"
#: The code that stands for the zero point in tinygemm's format.
_MIDDLE: Final = 8

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
        return decode_rows(packed, rows, dtype, out, self._write)

    def _write(self, packed: Packed, out: Tensor) -> None:
        qdata, scale = packed["qdata"], packed["scale"]
        if packed.scheme in _INT8:
            write_int8(qdata, scale, out)
        elif packed.scheme in _FLOAT8:
            write_float8(qdata, scale, out, torch.float8_e4m3fn)
        else:
            self._int4.write(qdata, out)
            scale_groups(out, scale, packed["zero_point"])

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor | None:
        """Multiply in 8 bits where the scheme is a dynamic one, or the device gains by it."""
        if x.numel() == 0 or packed.scheme == _INT4:
            return None
        qdata, scale = packed["qdata"], packed["scale"]
        if packed.scheme.endswith("-dynamic") and _has_product(x, packed):
            return dynamic_linear(x, qdata, scale, bias)
        codes = qdata if packed.scheme in _INT8 else qdata.view(torch.float8_e4m3fn)
        return widened_linear(x, codes, scale, bias)


def _has_product(x: Tensor, packed: Packed) -> bool:
    if packed.scheme not in _INT8:
        return has_float8_product(x.device, packed.shape)
    fewest = int8_rows(x.device, packed.shape)
    return fewest is not None and x.numel() // x.shape[-1] >= fewest


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
