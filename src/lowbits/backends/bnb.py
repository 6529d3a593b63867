"""bitsandbytes: NF4 and FP4 in blocks of 64, LLM.int8() per row.

bitsandbytes makes the bytes, on any device it supports, CPUs included; they are read by tables, so
that a packed model runs, and can be unpickled, without the library. Code words and the layout of
the nested scales are those of bitsandbytes 0.50 (``bitsandbytes/functional.py``).
"""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, ClassVar, Final, final

import torch

from lowbits.core.backend import Packed, QuantBackend, Rows
from lowbits.core.decode import ByteTable, decode_rows, scale_groups, write_int8
from lowbits.core.functional import linear_by_rows
from lowbits.core.memory import part_weights
from lowbits.core.products import widened_linear
from lowbits.core.scheme import CONVOLUTIONS, LINEAR, PARAMETER, Scheme
from lowbits.core.tracing import constant, needs_plain_ops

if TYPE_CHECKING:
    from torch import Tensor

BLOCK: Final = 64
#: Scales in a block of nested ("double quantized") scales.
NESTED_BLOCK: Final = 256

# The 16 quantiles of the normal distribution of QLoRA, appendix E (arXiv:2305.14314), as float32.
NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent, one of mantissa; scaled so that the largest is 1.
_FP4: Final = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5,
               0.1666666716337204, 0.25)  # fmt: skip
FP4: Final = (*_FP4, 0.0, *(-value for value in _FP4[1:]))

#: What the fused kernels multiply.
_FUSED: Final = (torch.float16, torch.bfloat16, torch.float32)

_FP4_SCHEME: Final = "bnb-fp4"
_NESTED: Final = "bnb-nf4-dq"
#: A byte of two codes of 0.
_NF4_ZEROS: Final = 0x77

_SCHEMES: Final = (
    Scheme(
        "bnb-nf4", "NormalFloat 4 bit, float32 scale per 64", 4, 32, (BLOCK,), forge_name="bnb-nf4"
    ),
    Scheme(
        _NESTED,
        "NormalFloat 4 bit, scales quantized to 8 bits (QLoRA's double quantization)",
        4,
        8,
        (BLOCK,),
        kinds=(LINEAR, *CONVOLUTIONS, PARAMETER),
    ),
    Scheme(
        _FP4_SCHEME,
        "4 bit floating point, float32 scale per 64",
        4,
        32,
        (BLOCK,),
        forge_name="bnb-fp4",
    ),
    Scheme("bnb-int8", "LLM.int8() weights, float32 scale per row, threshold 0", 8, 32),
)


@final
class BitsAndBytesBackend(QuantBackend):
    """bitsandbytes' 4-bit and 8-bit weights."""

    name: ClassVar[str] = "bnb"
    requires: ClassVar[str | None] = "lowbits[bnb]"

    def __init__(self) -> None:
        self._nf4 = ByteTable.of_codes(NF4, high_first=True)
        self._fp4 = ByteTable.of_codes(FP4, high_first=True)
        self._dynamic = ByteTable([[value] for value in _dynamic_values()])

    def schemes(self) -> tuple[Scheme, ...]:
        """Return the schemes of this backend."""
        return _SCHEMES

    def probe(self) -> str | None:
        """Quantize blocks, whole and broken ones, with each scheme on the CPU, and read them."""
        for row_length in (BLOCK, 33):  # 0.49 drops the last code of an odd number
            for scheme in _SCHEMES:
                self.unpack(self.pack(torch.ones(5, row_length), scheme), torch.float32)
        return metadata.version("bitsandbytes")

    def packed_bytes(self, scheme: Scheme, rows: int, row_length: int) -> int:
        """Return the exact bytes: 4-bit blocks run over the whole weight, across rows."""
        if scheme.code_bits == 8:
            return super().packed_bytes(scheme, rows, row_length)
        weights = rows * row_length
        blocks = -(-weights // BLOCK)
        nested_bytes = 4 * -(-blocks // NESTED_BLOCK) + 4 if scheme.name == _NESTED else 0
        return -(-weights // 2) + blocks * scheme.group_bits // 8 + nested_bytes

    def pack(self, weight: Tensor, scheme: Scheme) -> Packed:
        """Quantize with bitsandbytes."""
        if scheme.name == "bnb-int8":
            return _pack_int8(weight, scheme)
        from bitsandbytes import functional as bnb

        shape = (weight.shape[0], weight.shape[1])
        kind = "fp4" if scheme.name == _FP4_SCHEME else "nf4"
        sliceable = shape[1] % BLOCK == 0
        grid = (shape[0], -1) if sliceable else (1, -1)
        parts = [
            bnb.quantize_4bit(part, blocksize=BLOCK, compress_statistics=False, quant_type=kind)
            for part in torch.split(weight.view(-1), part_weights(weight.device))
        ]
        absmax = torch.cat([state.absmax for _, state in parts])
        tensors = {"qdata": torch.cat([codes.view(-1) for codes, _ in parts]).view(grid)}
        if scheme.name != _NESTED:
            return Packed(
                scheme.name, shape, tensors | {"scale": absmax.view(grid)}, row_sliceable=sliceable
            )
        # A scale that was 0 is decoded as something else, and CUDA's kernel has any code for 0 / 0.
        _zero_codes(tensors["qdata"], absmax == 0)
        offset = absmax.mean()
        scale, nested = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        tensors |= {
            "scale": scale.view(grid),
            "nested_scale": nested.absmax,
            "offset": offset.view(1),
        }
        return Packed(scheme.name, shape, tensors, row_sliceable=False)

    def unpack(
        self,
        packed: Packed,
        dtype: torch.dtype,
        out: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Look the codes up, and scale."""
        if packed.scheme == _NESTED:
            is_sliceable = packed.shape[1] % BLOCK == 0
            packed = self._without_nesting(packed, rows if is_sliceable else None)
            rows = None if is_sliceable else rows
        if packed.row_sliceable:
            return decode_rows(packed, rows, dtype, out, self._write)
        values = self._decode_across_rows(packed)
        if rows is not None:
            values = values[rows[0] : rows[1]] if isinstance(rows, tuple) else values[rows]
        return values.to(dtype) if out is None else out.copy_(values)

    def sliceable(self, packed: Packed) -> Packed | None:
        """Return a weight whose nested scales are decoded, where its rows are whole blocks."""
        is_able = packed.scheme == _NESTED and packed.shape[1] % BLOCK == 0
        return self._without_nesting(packed) if is_able else None

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor | None:
        """Multiply by bitsandbytes' fused 4-bit kernels, or by int8 codes, on an accelerator."""
        if packed.scheme == "bnb-int8":
            return widened_linear(x, packed["qdata"], packed["scale"], bias)
        is_able = x.device.type == "cuda" and x.dtype in _FUSED and packed.shape[1] % BLOCK == 0
        if is_able and x.numel() > 0 and has_kernels():
            return self._fused(x, packed, bias)
        if packed.scheme == _NESTED and x.device.type == "cpu" and not needs_plain_ops():
            # Once for the whole weight: by rows, each part would decode its scales by itself.
            return linear_by_rows(x, self._without_nesting(packed), bias, self)
        return None

    def _fused(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        kind = "fp4" if packed.scheme == _FP4_SCHEME else "nf4"
        codes, scale = packed["qdata"].view(-1, 1), packed["scale"].view(-1)
        nested = {}
        if packed.scheme == _NESTED:
            nested = {
                "absmax_8bit": scale,
                "absmax_code": self._dynamic.on(x.device).view(-1),
                "absmax_offset": packed["offset"].view(()),
            }
            scale = packed["nested_scale"]
        y: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x, codes, packed.shape, scale, BLOCK, kind, bias=bias, **nested
        )
        return y

    def _write(self, packed: Packed, out: Tensor) -> None:
        if packed.scheme == "bnb-int8":
            write_int8(packed["qdata"], packed["scale"], out)
            return
        self._table(packed).write(packed["qdata"], out)
        scale_groups(out, packed["scale"])

    def _table(self, packed: Packed) -> ByteTable:
        return self._fp4 if packed.scheme == _FP4_SCHEME else self._nf4

    def _decode_across_rows(self, packed: Packed) -> Tensor:
        """Decode a weight whose blocks run across its rows; float32."""
        rows, row_length = packed.shape
        codes = packed["qdata"]
        values = torch.empty(1, codes.numel() * 2, device=codes.device)
        self._table(packed).write(codes, values)
        scale = packed["scale"].view(-1).repeat_interleave(BLOCK)
        return values.view(-1)[: rows * row_length].mul_(scale[: rows * row_length]).view(rows, -1)

    def _without_nesting(self, packed: Packed, rows: Rows | None = None) -> Packed:
        """Return some rows with their scales decoded: they are of the scheme ``bnb-nf4`` then."""
        tensors = {name: packed[name] for name in ("qdata", "scale")}
        is_sliceable = packed.shape[1] % BLOCK == 0
        part = replace(packed, scheme="bnb-nf4", tensors=tensors, row_sliceable=is_sliceable).rows(
            rows
        )
        nested = packed["nested_scale"][_nested_blocks(packed, rows)]
        scale = torch.empty_like(nested)
        self._dynamic.write(part["scale"], scale)
        scale = scale * nested + packed["offset"]
        return replace(part, tensors={"qdata": part["qdata"], "scale": scale})


def _pack_int8(weight: Tensor, scheme: Scheme) -> Packed:
    """Quantize as ``int8_vectorwise_quant`` does on a CPU; on CUDA it takes nothing but float16."""
    absmax = weight.abs().amax(1, keepdim=True).float()
    codes = torch.round(weight * torch.where(absmax > 0, 127.0 / absmax, 0.0)).to(torch.int8)
    # LLM.int8() divides by 127 when it multiplies; the scale is stored ready to use.
    tensors = {"qdata": codes, "scale": absmax / 127}
    return Packed(scheme.name, (weight.shape[0], weight.shape[1]), tensors)


def _zero_codes(codes: Tensor, is_zero: Tensor) -> None:
    """Write NF4's code of 0 into blocks; two codes are in a byte."""
    flat = codes.view(-1)
    flat[is_zero.repeat_interleave(BLOCK // 2)[: len(flat)]] = _NF4_ZEROS


@constant
def has_kernels() -> bool:
    """Say whether bitsandbytes is here: a packed model also runs without it."""
    try:
        import bitsandbytes  # noqa: F401 - registers its operators
    except ImportError:
        return False
    return True


def _nested_blocks(packed: Packed, rows: Rows | None) -> Tensor:
    """Return the nested block that each scale of some rows is in."""
    count, per_row = packed["scale"].shape
    device = packed["scale"].device
    which = (
        rows
        if isinstance(rows, torch.Tensor)
        else torch.arange(*(rows or (0, count)), device=device)
    )
    return (which.unsqueeze(1) * per_row + torch.arange(per_row, device=device)) // NESTED_BLOCK


def _dynamic_values() -> list[float]:
    """Return bitsandbytes' 8-bit "dynamic tree" code book, ascending, 256 values in [-1, 1].

    Seven decades, each split at the middles of equal steps between 0.1 and 1; source:
    ``create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)``.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        means = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += means + [-mean for mean in means]
    return sorted(values)
