"""float8 layerwise cast: no library needed, torch's own dtypes.

The ``-raw`` schemes are the plain cast that diffusers' layerwise casting and Forge do, byte for
byte. The others scale each output row to the format's range first: 2.65 % against 3.30 % error on
Gaussian weights in e4m3, because half of the usual weights are subnormal in it unscaled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, final

import torch

from lowbits.core.backend import Packed, QuantBackend, Rows
from lowbits.core.capability import has_float8_product
from lowbits.core.decode import decode_rows, scale_by_row, write_float8
from lowbits.core.memory import temporary
from lowbits.core.products import dynamic_linear, widened_linear
from lowbits.core.scheme import LINEAR, Scheme
from lowbits.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS: Final = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

_DYNAMIC: Final = "float8-e4m3fn-dynamic"

_SCHEMES: Final = (
    Scheme(
        "float8-e4m3fn",
        "float8 e4m3, one scale per output row",
        8,
        32,
        forge_name="float8-e4m3fn",
    ),
    Scheme("float8-e5m2", "float8 e5m2, one scale per output row", 8, 32, forge_name="float8-e5m2"),
    Scheme(
        _DYNAMIC,
        "float8 e4m3 weights and activations, float8 matrix product",
        8,
        32,
        kinds=(LINEAR,),
        row_multiple=16,
        fallbacks=("float8-e4m3fn",),
    ),
    Scheme("float8-e4m3fn-raw", "float8 e4m3, plain cast as in Forge and diffusers", 8, 0),
    Scheme("float8-e5m2-raw", "float8 e5m2, plain cast as in Forge and diffusers", 8, 0),
)


@final
class Float8Backend(QuantBackend):
    """Casts to float8, with or without a scale per row."""

    name: ClassVar[str] = "float8"

    def schemes(self) -> tuple[Scheme, ...]:
        """Return the schemes of this backend."""
        return _SCHEMES

    def probe(self) -> str | None:
        """Cast one value to each format and back."""
        for dtype in FORMATS.values():
            torch.ones(1).to(dtype).float()
        return torch.__version__

    @torch.no_grad()  # what is written with out= has no gradient; a Parameter may be given
    def pack(self, weight: Tensor, scheme: Scheme) -> Packed:
        """Cast, scaled to the format's range where the scheme has a scale."""
        dtype = FORMATS[_format(scheme.name)]
        limit = torch.finfo(dtype).max
        tensors = {}
        values = temporary("scaled", weight, torch.float32)
        if scheme.group_bits:
            scale = torch.abs(weight, out=values).amax(1, keepdim=True) / limit
            tensors["scale"] = torch.where(scale == 0, 1.0, scale)
            weight = torch.div(weight, tensors["scale"], out=values)
        # Past its limit e5m2 becomes infinite and e4m3 NaN on some devices: saturate everywhere.
        torch.clamp(weight, -limit, limit, out=values)
        tensors["qdata"] = values.to(dtype).view(torch.uint8)
        return Packed(scheme.name, (weight.shape[0], weight.shape[1]), tensors)

    def unpack(
        self,
        packed: Packed,
        dtype: torch.dtype,
        out: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Move the bits to float16's, and scale."""
        return decode_rows(packed, rows, dtype, out, _write)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor | None:
        """Multiply in 8 bits where the scheme is the dynamic one, or the device gains by it."""
        if x.numel() == 0:
            return None
        scale = packed.tensors.get("scale")
        is_dynamic = packed.scheme == _DYNAMIC and has_float8_product(x.device, packed.shape)
        if is_dynamic and scale is not None:
            return dynamic_linear(x, packed["qdata"], scale, bias)
        codes = packed["qdata"].view(FORMATS[_format(packed.scheme)])
        return widened_linear(x, codes, scale, bias)


def _write(packed: Packed, out: Tensor) -> None:
    kind = FORMATS[_format(packed.scheme)]
    write_float8(packed["qdata"], packed.tensors.get("scale"), out, kind)


def _format(scheme_name: str) -> str:
    return scheme_name.removeprefix("float8-").removesuffix("-raw").removesuffix("-dynamic")


def stored(codes: Tensor, scale: Tensor | None) -> Packed:
    """Return a float8 weight as files hold it; nothing is quantized again.

    Args:
        codes: ``(rows, ...)`` float8, contiguous; of two dimensions or more.
        scale: to multiply by, one for all or one for each row; None: 1.

    Raises:
        FormatError: another dtype, or scales of other numbers.
    """
    names = {dtype: name for name, dtype in FORMATS.items()}
    if codes.dtype not in names or codes.dim() < 2:
        raise FormatError(f"float8 codes are {codes.dtype} of shape {tuple(codes.shape)}")
    flat = codes.view(torch.uint8).reshape(codes.shape[0], -1)
    shape = (flat.shape[0], flat.shape[1])
    if scale is None:
        return Packed(f"float8-{names[codes.dtype]}-raw", shape, {"qdata": flat})
    tensors = {"qdata": flat, "scale": scale_by_row(scale, shape[0])}
    return Packed(f"float8-{names[codes.dtype]}", shape, tensors)
