"""GGUF block formats as schemes: ``gguf-q8_0`` and the legacy types."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, final

import torch

from lowbits.backends.gguf.legacy import BLOCK, TYPES
from lowbits.core.backend import Packed, QuantBackend, Rows
from lowbits.core.decode import deliver
from lowbits.core.scheme import Scheme
from lowbits.errors import FormatError, suggestion

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX: Final = "gguf-"


def _scheme(type_name: str) -> Scheme:
    kind = TYPES[type_name]
    header = "float16 scale and minimum" if kind.has_minimum else "float16 scale"
    return Scheme(
        _PREFIX + type_name.lower(),
        f"GGUF {type_name}: {kind.bits} bit, {header} per {BLOCK}",
        kind.bits,
        32 if kind.has_minimum else 16,
        (BLOCK,),
        row_multiple=BLOCK,
    )


_SCHEMES: Final = tuple(_scheme(name) for name in TYPES)


@final
class GgufBackend(QuantBackend):
    """GGUF's block types, in torch on any device."""

    name: ClassVar[str] = "gguf"

    def schemes(self) -> tuple[Scheme, ...]:
        """Return the schemes of this backend."""
        return _SCHEMES

    def probe(self) -> str | None:
        """Quantize one block with each type."""
        row = torch.linspace(-1, 1, BLOCK).view(1, BLOCK)
        for kind in TYPES.values():
            kind.dequantize(kind.quantize(row))
        return None

    def pack(self, weight: Tensor, scheme: Scheme) -> Packed:
        """Quantize rows of whole blocks."""
        qdata = TYPES[_type_name(scheme.name)].quantize(weight)
        return Packed(scheme.name, (weight.shape[0], weight.shape[1]), {"qdata": qdata})

    def unpack(
        self,
        packed: Packed,
        dtype: torch.dtype,
        out: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Decode in float32."""
        packed = packed.rows(rows)
        values = TYPES[_type_name(packed.scheme)].dequantize(packed["qdata"])
        return deliver(values, dtype, out)

    def decode(
        self,
        data: Tensor,
        type_name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Decode bytes as they stand in a GGUF file.

        Args:
            data: uint8, contiguous, any shape: the rows of the tensor one after the other.
            type_name: ggml's name, e.g. ``"Q4_0"``.
            shape: of the result, torch's order; the last dimension holds whole blocks.
            dtype: of the result; the arithmetic is float32.

        Raises:
            FormatError: unknown type, or bytes that do not make this shape.
        """
        if type_name not in TYPES:
            raise FormatError(
                f"cannot decode GGUF type {type_name!r}{suggestion(type_name, TYPES)} "
                f"known: {', '.join(TYPES)}"
            )
        kind = TYPES[type_name]
        expected = torch.Size(shape).numel() // BLOCK * kind.block_bytes
        if data.numel() != expected or shape[-1] % BLOCK:
            raise FormatError(
                f"{type_name} of shape {tuple(shape)} takes {expected} bytes in rows of whole "
                f"blocks of {BLOCK}; got {data.numel()} bytes"
            )
        return kind.dequantize(data.reshape(1, -1)).view(shape).to(dtype)


def _type_name(scheme_name: str) -> str:
    return scheme_name.removeprefix(_PREFIX).upper()
