"""GGUF's block types as schemes, ``gguf-q4_k``; and its mixes of them, ``gguf-q4_k_m``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final, final

import torch

from lowbits.backends.gguf.codebook import GRIDS, has_package
from lowbits.backends.gguf.mixes import MIXES, MixRule
from lowbits.backends.gguf.quantize import BEST, QUANTIZERS, quantize
from lowbits.backends.gguf.types import TYPES, GgufType
from lowbits.core.backend import Packed, QuantBackend, Rows
from lowbits.core.decode import decode_rows
from lowbits.core.foreign import Foreign, is_of, plain
from lowbits.core.scheme import Override, Scheme
from lowbits.errors import FormatError, NonFiniteWeightError, suggestion

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

PREFIX: Final = "gguf-"
#: Suffix of the schemes whose quantizer searches longer; the bytes are of the same type.
SEARCHED: Final = "-best"


def scheme_name(type_name: str) -> str:
    """Return the scheme of a type: ``"Q4_K"`` is ``"gguf-q4_k"``."""
    return PREFIX + type_name.lower()


def _schemes() -> Iterator[Scheme]:
    for kind in TYPES.values():
        fate = "" if kind.name in QUANTIZERS else "; decoded only"
        blocks = f", blocks of {kind.weights}" if kind.weights > 1 else ""
        yield _scheme(kind, scheme_name(kind.name), f"GGUF {kind.name}{blocks}{fate}")
    for name in BEST:
        summary = f"GGUF {name}, searched longer for less error"
        yield _scheme(TYPES[name], scheme_name(name) + SEARCHED, summary)
    for name, mix in MIXES.items():
        rules = (*mix.rules, MixRule("", mix.type_name))
        overrides = tuple(Override(r.pattern, scheme_name(r.type_name), r.first) for r in rules)
        more = ", more bits for values and feed-forward outputs" if mix.rules else ""
        summary = f"GGUF {name}: {mix.type_name}{more}"
        yield _scheme(TYPES[mix.type_name], scheme_name(name), summary, overrides)


def _scheme(kind: GgufType, name: str, summary: str, mix: tuple[Override, ...] = ()) -> Scheme:
    return Scheme(
        name,
        summary,
        kind.code_bits,
        round(kind.block_bytes * 8 - kind.weights * kind.code_bits),
        (kind.weights,),
        row_multiple=kind.weights,
        fallbacks=(scheme_name(kind.fallback),) if kind.fallback and not mix else (),
        can_quantize=kind.name in QUANTIZERS,
        mix=mix,
    )


@final
class GgufBackend(QuantBackend):
    """GGUF's block types, in torch on any device."""

    name: ClassVar[str] = "gguf"
    foreign: ClassVar[Foreign | None] = Foreign("diffusers.quantizers", ("compute_dtype", "device"))

    def __init__(self) -> None:
        self._schemes = tuple(_schemes())
        mixed = {scheme_name(name): mix.type_name for name, mix in MIXES.items()}
        self._types = {
            scheme.name: TYPES[mixed.get(scheme.name, type_name(scheme.name))]
            for scheme in self._schemes
        }

    def schemes(self) -> tuple[Scheme, ...]:
        """Return the schemes of this backend."""
        return self._schemes

    def unavailable(self, scheme: Scheme) -> str | None:
        """Say that the grids of IQ1 to IQ3 need the gguf package, where it is not here."""
        is_here = self._types[scheme.name].name not in GRIDS or has_package()
        return None if is_here else "needs the tables of gguf; pip install 'lowbits[gguf]'"

    def probe(self) -> str | None:
        """Quantize a row with each type, and read it."""
        row = torch.linspace(-1, 1, 256).view(1, 256)
        for name in QUANTIZERS:
            self.decode(self.encode(row, name), name, (1, 256))
        return None

    def packed_bytes(self, scheme: Scheme, rows: int, row_length: int) -> int:
        """Return the exact bytes: rows of whole blocks."""
        kind = self._types[scheme.name]
        return rows * row_length // kind.weights * kind.block_bytes

    def pack(self, weight: Tensor, scheme: Scheme) -> Packed:
        """Quantize rows of whole blocks."""
        effort = "best" if scheme.name.endswith(SEARCHED) else "ref"
        qdata = _encode(weight, self._types[scheme.name], effort)
        return Packed(scheme.name, (weight.shape[0], weight.shape[1]), {"qdata": qdata})

    def unpack(
        self,
        packed: Packed,
        dtype: torch.dtype,
        out: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Decode in float32; whole, where blocks run across rows: files hold such weights."""
        kind = self._types[packed.scheme]

        def write(part: Packed, values: Tensor) -> None:
            blocks = part["qdata"].view(-1, kind.block_bytes)
            kind.decode(blocks, values.view(-1, kind.weights))

        if packed.row_sliceable:
            return decode_rows(packed, rows, dtype, out, write)
        grid = (packed["qdata"].shape[0], kind.weights)
        in_blocks = replace(packed, shape=grid, row_sliceable=True)
        target = out.view(grid) if out is not None and rows is None else None
        values = decode_rows(in_blocks, None, dtype, target, write).view(packed.shape)
        if rows is not None:
            values = values[rows[0] : rows[1]] if isinstance(rows, tuple) else values[rows]
        if out is None:
            return values
        return out if target is not None else out.copy_(values)

    def adopt(self, layer: nn.Module) -> Packed | None:
        """Take over diffusers' ``GGUFLinear``."""
        weight = layer._parameters.get("weight")
        if weight is None or not is_of(weight, "diffusers.quantizers"):
            return None
        number = getattr(weight, "quant_type", None)
        return stored(_of_number(number), plain(weight))

    def encode(self, weight: Tensor, type_name: str, *, effort: str = "ref") -> Tensor:
        """Quantize to the bytes that stand in a GGUF file.

        Args:
            weight: ``(rows, row_length)`` float32, contiguous; rows of whole blocks.
            type_name: ggml's name, e.g. ``"Q4_K"``.
            effort: ``"ref"``: as llama.cpp does without an importance matrix; ``"best"``: search
                longer for less error, where the type has such a quantizer.

        Returns:
            ``(rows, row_bytes)`` uint8.

        Raises:
            ConfigError: a type that can be decoded only.
            FormatError: an unknown type, or a weight of another dtype or shape.
            NonFiniteWeightError: it holds NaN or infinity, which some types cannot express.
        """
        kind = _known(type_name)
        if weight.dtype != torch.float32 or weight.dim() != 2 or weight.shape[1] % kind.weights:
            raise FormatError(
                f"{type_name} is made of float32 (rows, row_length) in whole blocks of "
                f"{kind.weights}; got {weight.dtype} {tuple(weight.shape)}"
            )
        if not weight.isfinite().all():
            raise NonFiniteWeightError("the weight holds values that are NaN or infinite")
        return _encode(weight, kind, effort)

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
        kind = _known(type_name)
        size = torch.Size(shape)
        expected = size.numel() // kind.weights * kind.block_bytes
        is_whole = size and size.numel() and size[-1] % kind.weights == 0
        if not is_whole or data.numel() != expected or data.dtype != torch.uint8:
            raise FormatError(
                f"{type_name} of shape {tuple(shape)} takes {expected} bytes (uint8) in rows of "
                f"whole blocks of {kind.weights}; got {data.numel()} of {data.dtype}"
            )
        grid = (size[:-1].numel(), size[-1])
        qdata = data.reshape(grid[0], -1)
        return self.unpack(Packed(scheme_name(type_name), grid, {"qdata": qdata}), dtype).view(size)


def stored(type_name: str, data: Tensor) -> Packed:
    """Return a weight as it stands in a GGUF file; nothing is quantized again.

    Args:
        type_name: ggml's name, e.g. ``"Q4_K"``.
        data: ``(rows, row_bytes)`` uint8.

    Raises:
        FormatError: an unknown type, or rows that are not whole blocks of it.
    """
    kind = _known(type_name)
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] % kind.block_bytes:
        raise FormatError(
            f"rows of {type_name} are whole blocks of {kind.block_bytes} bytes; got {data.dtype} "
            f"of shape {tuple(data.shape)}"
        )
    shape = (data.shape[0], data.shape[1] // kind.block_bytes * kind.weights)
    return Packed(scheme_name(type_name), shape, {"qdata": data.contiguous()})


def _of_number(number: object) -> str:
    name = next((kind.name for kind in TYPES.values() if kind.number == number), None)
    if name is None:
        raise FormatError(f"GGUF type {number!r} is of no scheme")
    return name


def _encode(weight: Tensor, kind: GgufType, effort: str) -> Tensor:
    blocks = weight.reshape(-1, kind.weights)
    return quantize(blocks, kind.name, effort=effort).view(weight.shape[0], -1)


def _known(type_name: str) -> GgufType:
    if type_name not in TYPES:
        raise FormatError(
            f"unknown GGUF type {type_name!r}{suggestion(type_name, TYPES)}; "
            f"known: {', '.join(TYPES)}"
        )
    return TYPES[type_name]


def type_name(name: str) -> str:
    """Return ggml's name of what a scheme stores: ``"gguf-q4_k-best"`` is ``"Q4_K"``."""
    return name.removeprefix(PREFIX).removesuffix(SEARCHED).upper()
