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
    scale_by_row,
    scale_groups,
    write_float8,
    write_int8,
)
from lowbits.core.foreign import Foreign, is_of
from lowbits.core.products import dynamic_linear, widened_linear
from lowbits.core.scheme import LINEAR, Scheme
from lowbits.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

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
    # Its layers are torch's own; both it and diffusers give each of them a description.
    foreign: ClassVar[Foreign | None] = Foreign(
        "torchao", ("extra_repr",), inputs="weight.act_quant_kwargs"
    )

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

    def adopt(self, layer: nn.Module) -> Packed | None:
        """Take over a weight that is one of torchao's tensors."""
        weight = layer._parameters.get("weight")
        if weight is None or not is_of(weight, "torchao"):
            return None
        kind = type(weight).__name__
        parts = {name: getattr(weight, name, None) for name in PARTS}
        held = {name: tensor for name, tensor in parts.items() if tensor is not None}
        return stored(kind, weight.shape, held, is_dynamic=_quantizes_rows(weight))

    def _write(self, packed: Packed, out: Tensor) -> None:
        qdata, scale = packed["qdata"], packed["scale"]
        if packed.scheme in _INT8 and scale.shape[1] > 1:
            scale_groups(out.copy_(qdata), scale)
        elif packed.scheme in _INT8:
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
        if scale.shape[1] > 1:
            return None  # of groups: torchao stored it, here there is one for each row
        if packed.scheme.endswith("-dynamic") and _has_product(x, packed):
            return dynamic_linear(x, qdata, scale, bias)
        codes = qdata if packed.scheme in _INT8 else qdata.view(torch.float8_e4m3fn)
        return widened_linear(x, codes, scale, bias)


def _has_product(x: Tensor, packed: Packed) -> bool:
    if packed.scheme not in _INT8:
        return has_float8_product(x.device, packed.shape)
    fewest = int8_rows(x.device, packed.shape)
    return fewest is not None and x.numel() // x.shape[-1] >= fewest


#: Tensors that torchao's tensors are made of; the last ones change the activations.
PARTS: Final = (
    *("qdata", "scale", "zero_point"),
    *("act_quant_scale", "act_quant_zero_point", "act_pre_scale"),
)


def stored(
    kind: str, shape: tuple[int, ...], parts: Mapping[str, Tensor], *, is_dynamic: bool
) -> Packed:
    """Return a weight as torchao stores it; nothing is quantized again.

    Float8 e5m2 becomes a weight of the ``float8`` backend.

    Args:
        kind: torchao's class: ``"Int8Tensor"``, ``"Float8Tensor"``, ``"Int4Tensor"``, or
            ``"IntxUnpackedToInt8Tensor"``, whose codes of fewer bits are in 8.
        shape: of the weight.
        parts: its tensors by name, out of `PARTS`.
        is_dynamic: whether activations are quantized too, each row by itself, as in the schemes
            ``torchao-int8-dynamic`` and ``torchao-float8-dynamic``.

    Raises:
        FormatError: a class, or a granularity, that no scheme holds; or tensors of other shapes.

    Source: torchao 0.18, ``torchao/quantization/quantize_/workflows``.
    """
    if len(shape) != 2 or "qdata" not in parts or "scale" not in parts:
        raise FormatError(f"a {kind} of shape {tuple(shape)} has only {', '.join(parts)}")
    if "act_pre_scale" in parts:
        raise FormatError(f"this {kind} is for inputs that are scaled before (AWQ, SmoothQuant)")
    scheme = stored_scheme(kind, parts["qdata"].dtype, shape[1], is_dynamic=is_dynamic)
    readers = {"Float8Tensor": _float8, "Int4Tensor": _int4}
    grid = (shape[0], shape[1])
    return Packed(scheme, grid, readers.get(kind, _int8)(grid, parts))


def stored_scheme(kind: str, dtype: torch.dtype, row_length: int, *, is_dynamic: bool) -> str:
    """Return the scheme of a weight as torchao stores it.

    Args:
        kind: torchao's class.
        dtype: of its codes.
        row_length: of the weight.
        is_dynamic: as for `stored`.

    Raises:
        FormatError: no scheme holds such weights.
    """
    schemes = {
        ("Int8Tensor", torch.int8): "torchao-int8",
        ("IntxUnpackedToInt8Tensor", torch.int8): "torchao-int8",
        ("Float8Tensor", torch.float8_e4m3fn): "torchao-float8",
        ("Float8Tensor", torch.float8_e5m2): "float8-e5m2",
        ("Int4Tensor", torch.int8): _INT4,
        ("Int4Tensor", torch.uint8): _INT4,
    }
    name = schemes.get((kind, dtype))
    if name is None:
        raise FormatError(
            f"torchao's {kind} of {dtype} is of no scheme; of one are "
            f"{', '.join(dict.fromkeys(known for known, _ in schemes))}"
        )
    dynamic = next((s for s in _SCHEMES if s.name == f"{name}-dynamic"), None)
    if is_dynamic and dynamic and dynamic.refusal(LINEAR, row_length) is None:
        return dynamic.name
    return name


def _int8(shape: tuple[int, int], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    qdata, zero_point = parts["qdata"], parts.get("zero_point")
    if qdata.shape != shape:
        raise FormatError(f"int8 codes of {shape} have shape {tuple(qdata.shape)}")
    if zero_point is not None and zero_point.any():
        raise FormatError("its zero point is not 0 (asymmetric int8)")
    scale = parts["scale"]
    is_grouped = scale.dim() == 2 and scale.shape[0] == shape[0] and scale.shape[1] > 1
    if is_grouped and shape[1] % scale.shape[1] == 0:
        return {"qdata": qdata.contiguous(), "scale": scale.float().contiguous()}
    return {"qdata": qdata.contiguous(), "scale": scale_by_row(scale, shape[0])}


def _float8(shape: tuple[int, int], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    qdata = parts["qdata"]
    if qdata.shape != shape:
        raise FormatError(f"float8 codes of {shape} have shape {tuple(qdata.shape)}")
    codes = qdata.contiguous().view(torch.uint8)
    return {"qdata": codes, "scale": scale_by_row(parts["scale"], shape[0])}


def _int4(shape: tuple[int, int], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make codes unsigned; scales and zero points, of a group a row, those of a row each."""
    qdata, scale, zero_point = parts["qdata"], parts["scale"], parts.get("zero_point")
    rows, row_length = shape
    is_whole = qdata.shape == (rows, row_length // 2)
    groups = scale.shape[0] if scale.dim() else 0
    if not is_whole or row_length % 2 or not groups or row_length % groups:
        raise FormatError(
            f"int4 codes of {shape} in {groups} groups are {qdata.dtype} {tuple(qdata.shape)}"
        )
    if scale.shape != (groups, rows) or zero_point is None or zero_point.shape != scale.shape:
        raise FormatError(f"its scale and zero point are not ({groups}, {rows}) both")
    return {
        "qdata": qdata.contiguous().view(torch.uint8) ^ 0x88,
        "scale": scale.t().contiguous(),
        "zero_point": zero_point.t().contiguous(),
    }


def _quantizes_rows(weight: nn.Parameter) -> bool:
    """Say whether a weight's inputs are quantized as the dynamic schemes do."""
    how = getattr(weight, "act_quant_kwargs", None)
    granularity = type(getattr(how, "granularity", None)).__name__
    mapping = getattr(getattr(how, "mapping_type", None), "name", "SYMMETRIC")
    is_static = getattr(weight, "act_quant_scale", None) is not None
    return granularity == "PerRow" and mapping == "SYMMETRIC" and not is_static


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
