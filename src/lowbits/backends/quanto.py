"""optimum-quanto: int8, float8, int4 and int2 weights.

quanto's own quantizers make the codes; its C++ unpacking extension is never compiled, because the
codes are packed here, two or four of one row in a byte. quanto keeps scale and shift of int4 and
int2 in the weight's dtype; here they are float16, and the codes are chosen for the rounded values.
Weights that quanto itself quantized keep theirs.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

import torch

from lowbits.core.backend import Packed, QuantBackend, Rows
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
from lowbits.core.products import widened_linear
from lowbits.core.scheme import Scheme
from lowbits.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor, nn

#: quanto's choice for a row: 128, else the next multiple of 32 below that divides it.
_GROUPS: Final = (128, 96, 64, 32)

_SCHEMES: Final = (
    Scheme("quanto-int8", "int8 weights, float32 scale per row", 8, 32),
    Scheme(
        "quanto-int4",
        "int4 weights, float16 scale and shift per 128",
        4,
        32,
        _GROUPS,
        row_multiple=32,
        fallbacks=("quanto-int8",),
    ),
    Scheme(
        "quanto-int2",
        "int2 weights, float16 scale and shift per 128",
        2,
        32,
        _GROUPS,
        row_multiple=32,
        fallbacks=("quanto-int8",),
    ),
    Scheme("quanto-float8", "float8 e4m3 weights, float32 scale per row", 8, 32),
)

#: Of a weight that quanto stored, by the dtype of its codes.
BYTE_SCHEMES: Final = {
    torch.int8: "quanto-int8",
    torch.float8_e4m3fn: "quanto-float8",
    torch.float8_e5m2: "float8-e5m2",
}


@final
class QuantoBackend(QuantBackend):
    """optimum-quanto's weight schemes."""

    name: ClassVar[str] = "quanto"
    requires: ClassVar[str | None] = "lowbits[quanto]"
    foreign: ClassVar[Foreign | None] = Foreign(
        "optimum.quanto",
        (
            *("weight_qtype", "weight_group_size", "activation_qtype", "optimizer"),
            *("_quantize_hooks", "input_scale", "output_scale", "name", "source_cls"),
        ),
    )

    def __init__(self) -> None:
        self._tables = {
            "quanto-int4": ByteTable.of_codes(range(16)),
            "quanto-int2": ByteTable.of_codes(range(4)),
        }

    def schemes(self) -> tuple[Scheme, ...]:
        """Return the schemes of this backend."""
        return _SCHEMES

    def probe(self) -> str | None:
        """Quantize two rows with each scheme."""
        rows = torch.linspace(-1, 1, 64).view(2, 32)
        for scheme in _SCHEMES:
            self.pack(rows, scheme)
        return metadata.version("optimum-quanto")

    def pack(self, weight: Tensor, scheme: Scheme) -> Packed:
        """Quantize with quanto."""
        shape = (weight.shape[0], weight.shape[1])
        bits = int(scheme.code_bits)
        if bits == 8:
            tensors = _pack_rows(weight, "qint8" if scheme.name == "quanto-int8" else "qfloat8")
        else:
            tensors = _pack_groups(weight, bits, scheme.group_size(shape[1]))
        return Packed(scheme.name, shape, tensors)

    def unpack(
        self,
        packed: Packed,
        dtype: torch.dtype,
        out: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Compute ``codes * scale``, minus the shift where there is one."""
        return decode_rows(packed, rows, dtype, out, self._write)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor | None:
        """Multiply by 8-bit codes as they are, where the device gains by it."""
        if packed.scheme in self._tables:
            return None
        qdata = packed["qdata"]
        codes = qdata if packed.scheme == "quanto-int8" else qdata.view(torch.float8_e4m3fn)
        return widened_linear(x, codes, packed["scale"], bias)

    def adopt(self, layer: nn.Module) -> Packed | None:
        """Take over a layer of quanto's that was frozen."""
        weight, is_foreign = layer._parameters.get("weight"), is_of(layer, "optimum.quanto")
        is_quantized = is_of(weight, "optimum.quanto")
        if weight is None or not (is_quantized or is_foreign):
            return None
        if getattr(layer, "activation_qtype", None) is not None:
            raise FormatError("quanto quantizes its activations too")
        if is_quantized:
            return _adopt(weight)
        if getattr(layer, "weight_qtype", None) is None:
            return None  # a layer norm
        raise FormatError("quanto did not quantize it yet: call optimum.quanto.freeze")

    def _write(self, packed: Packed, out: Tensor) -> None:
        qdata, scale = packed["qdata"], packed["scale"]
        if packed.scheme == "quanto-int8":
            write_int8(qdata, scale, out)
        elif packed.scheme == "quanto-float8":
            write_float8(qdata, scale, out, torch.float8_e4m3fn)
        else:
            self._tables[packed.scheme].write(qdata, out)
            scale_groups(out, scale, packed["offset"])


def _pack_rows(weight: Tensor, qtype_name: str) -> dict[str, Tensor]:
    from optimum import quanto

    qtype = getattr(quanto, qtype_name)
    axis = 0 if weight.shape[0] > 1 else None  # quanto calls one row "per tensor"
    scale = quanto.AbsmaxOptimizer()(weight, qtype, axis)
    scale = torch.where(scale == 0, 1.0, scale)  # quanto divides an all-zero row by zero
    codes = torch.ops.quanto.quantize_symmetric(weight, qtype.dtype, axis, scale)
    qdata = codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
    return {"qdata": qdata, "scale": scale.view(-1, 1)}


def _pack_groups(weight: Tensor, bits: int, group_size: int) -> dict[str, Tensor]:
    from optimum import quanto

    qtype = {2: quanto.qint2, 4: quanto.qint4}[bits]
    # Called past its front door, which takes a weight of one group for "per tensor", and fails.
    scale, shift = quanto.MaxOptimizer().optimize(weight.view(-1, group_size), qtype, 0)
    scale, shift = scale.half().float(), shift.half().float()
    scale = torch.where(scale == 0, 1.0, scale)  # a constant group: its shift says it all
    codes = torch.ops.quanto.quantize_affine(weight, bits, 0, group_size, scale, shift)
    rows = weight.shape[0]
    return {
        "qdata": pack_codes(codes.view(rows, -1), bits),
        "scale": scale.half().view(rows, -1),
        "offset": -shift.half().view(rows, -1),
    }


def stored_bytes(codes: Tensor, scale: Tensor) -> Packed:
    """Return an 8-bit weight as quanto stores it; nothing is quantized again.

    Float8 e5m2 becomes a weight of the ``float8`` backend.

    Args:
        codes: ``(rows, ...)`` int8 or float8.
        scale: one for all, or one for each row; floating.

    Raises:
        FormatError: codes of another dtype, or scales of other numbers.
    """
    if codes.dtype not in BYTE_SCHEMES or codes.dim() < 2:
        raise FormatError(f"quanto's codes {tuple(codes.shape)} of {codes.dtype} are of no scheme")
    flat = codes.reshape(codes.shape[0], -1).contiguous()
    qdata = flat if flat.dtype == torch.int8 else flat.view(torch.uint8)
    tensors = {"qdata": qdata, "scale": scale_by_row(scale.reshape(-1, 1), qdata.shape[0])}
    return Packed(BYTE_SCHEMES[codes.dtype], (qdata.shape[0], qdata.shape[1]), tensors)


def stored_bits(bits: int, packed_codes: Tensor, scale: Tensor, shift: Tensor) -> Packed:
    """Return a weight of 2 or 4 bits as quanto stores it, a group of weights in each row.

    quanto puts the codes of one group below those of another into a byte; here they are in order.
    A group is a row, or a part of one: `regrouped` makes rows of them.

    Args:
        bits: 2 or 4.
        packed_codes: ``(ceil(groups * bits / 8), group_size)`` uint8.
        scale: ``(groups, 1)``, floating.
        shift: ``(groups, 1)``: floating, to be subtracted; or an integer, to be subtracted from
            the codes.

    Raises:
        FormatError: tensors of other shapes, or values that float32 does not hold.

    Source: ``PackedTensor`` and ``QBitsDequantizer`` of optimum-quanto 0.2.7.
    """
    groups, per_byte = scale.numel(), 8 // bits
    is_whole = packed_codes.dtype == torch.uint8 and packed_codes.dim() == 2
    if not is_whole or packed_codes.shape[0] != -(-groups // per_byte) or shift.numel() != groups:
        raise FormatError(
            f"int{bits} codes of {groups} groups, with {shift.numel()} shifts, are "
            f"{tuple(packed_codes.shape)} of {packed_codes.dtype}"
        )
    group_size = packed_codes.shape[1]
    if group_size % per_byte:
        raise FormatError(f"groups of {group_size} codes of {bits} bits are not whole bytes")
    parts = [packed_codes >> bits * i & (1 << bits) - 1 for i in range(per_byte)]
    codes = torch.cat(parts)[:groups]
    tensors = {
        "qdata": pack_codes(codes, bits),
        "scale": scale.reshape(groups, 1),
        "offset": _offset(scale, shift).reshape(groups, 1),
    }
    return Packed(f"quanto-int{bits}", (groups, group_size), tensors)


def regrouped(packed: Packed, shape: tuple[int, int]) -> Packed:
    """Return an int4 or int2 weight with other rows: as many groups after each other as fit.

    Args:
        packed: of the schemes ``quanto-int4`` and ``quanto-int2``.
        shape: ``(rows, row_length)`` of as many weights.

    Raises:
        FormatError: rows are not whole groups.
    """
    groups = packed["scale"].numel()
    size = packed.shape[0] * packed.shape[1]
    if shape[0] < 1 or shape[0] * shape[1] != size or groups % shape[0]:
        raise FormatError(f"{groups} groups of {size} weights do not make {shape} in whole groups")
    tensors = {name: tensor.view(shape[0], -1) for name, tensor in packed.tensors.items()}
    return replace(packed, shape=shape, tensors=tensors)


def _offset(scale: Tensor, shift: Tensor) -> Tensor:
    if shift.is_floating_point():
        return -shift
    if scale.dtype == torch.float32 and shift.any():
        # (code - shift) * scale is rounded once, code * scale - shift * scale three times.
        raise FormatError("integer shifts with float32 scales are of no scheme")
    return -shift.float() * scale.float()


def _adopt(weight: nn.Parameter) -> Packed:
    quantized: Any = weight
    kind = type(weight).__name__
    if weight.dim() < 2 or getattr(quantized, "axis", None) not in (0, None):
        raise FormatError(f"quanto's {kind} of shape {tuple(weight.shape)} has no scale per row")
    if hasattr(quantized, "_shift") or hasattr(quantized, "_scale_shift"):
        # Those of its kernels (tinygemm, AWQ) are told to be ordinary ones first.
        plain = quantized if kind == "WeightQBitsTensor" else quantized.weight_qbits_tensor()
        bits = plain._qtype.bits
        packed = stored_bits(bits, plain._data._data, plain._scale, plain._shift)
        rows = weight.shape[0]
        return regrouped(packed, (rows, weight.numel() // rows))
    plain = quantized if kind == "WeightQBytesTensor" else quantized.weight_qbytes_tensor()
    return stored_bytes(plain._data, plain._scale)
