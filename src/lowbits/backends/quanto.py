"""optimum-quanto: int8, float8, int4 and int2 weights.

quanto's own quantizers make the codes; its C++ unpacking extension is never compiled, because the
codes are packed here, two or four of one row in a byte. quanto keeps scale and shift of int4 and
int2 in the weight's dtype; here they are float16, and the codes are chosen for the rounded values.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, ClassVar, Final, final

import torch

from lowbits.core.backend import Packed, QuantBackend, Rows
from lowbits.core.decode import (
    ByteTable,
    decode_rows,
    pack_codes,
    scale_groups,
    write_float8,
    write_int8,
)
from lowbits.core.products import widened_linear
from lowbits.core.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

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


@final
class QuantoBackend(QuantBackend):
    """optimum-quanto's weight schemes."""

    name: ClassVar[str] = "quanto"
    requires: ClassVar[str | None] = "lowbits[quanto]"

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
