"""bitsandbytes: NF4 and FP4 in blocks of 64, LLM.int8() per row.

bitsandbytes makes the bytes, on any device it supports, CPUs included; they are read by tables, so
that a packed model runs, and can be unpickled, without the library. Code words and the layout of
the nested scales are those of bitsandbytes 0.50 (``bitsandbytes/functional.py``). Weights that the
library itself quantized may have blocks of another size: of any that it knows.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, ClassVar, Final, final

import torch

from lowbits.core.backend import Packed, QuantBackend, Rows
from lowbits.core.decode import ByteTable, decode_rows, scale_groups, write_int8
from lowbits.core.foreign import Foreign, is_of, plain
from lowbits.core.functional import linear_by_rows
from lowbits.core.memory import part_weights
from lowbits.core.products import widened_linear
from lowbits.core.scheme import CONVOLUTIONS, LINEAR, PARAMETER, Scheme
from lowbits.core.tracing import constant, needs_plain_ops
from lowbits.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK: Final = 64
#: Sizes that bitsandbytes quantizes in.
BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
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
    foreign: ClassVar[Foreign | None] = Foreign(
        "bitsandbytes",
        (
            *("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage"),
            *("ipex_linear_is_set", "support_avx512bf16_for_cpu"),
            *("state", "index", "source_cls"),
        ),
        ("weight.quant_state.original_dtype", "weight.quant_state.dtype"),
    )

    def __init__(self) -> None:
        self._nf4 = ByteTable.of_codes(NF4, high_first=True)
        self._fp4 = ByteTable.of_codes(FP4, high_first=True)
        self._dynamic = _dynamic_table()

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
            return _pack_int8(weight)
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
            is_sliceable = packed.shape[1] % _block(packed) == 0
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
        is_able = x.device.type == "cuda" and x.dtype in _FUSED
        if is_able and packed.shape[1] % _block(packed) == 0 and x.numel() > 0 and has_kernels():
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
            x, codes, packed.shape, scale, _block(packed), kind, bias=bias, **nested
        )
        return y

    def adopt(self, layer: nn.Module) -> Packed | None:
        """Take over ``Linear4bit`` and ``Linear8bitLt``, used or not."""
        weight = layer._parameters.get("weight")
        if weight is None or not is_of(weight, "bitsandbytes"):
            return None
        if type(weight).__name__ == "Int8Params":
            return _adopt_int8(layer, weight)
        return _adopt_4bit(layer, weight)

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
        scale = packed["scale"].view(-1).repeat_interleave(_block(packed))
        return values.view(-1)[: rows * row_length].mul_(scale[: rows * row_length]).view(rows, -1)

    def _without_nesting(self, packed: Packed, rows: Rows | None = None) -> Packed:
        """Return some rows with their scales decoded: they are of the scheme ``bnb-nf4`` then."""
        tensors = {name: packed[name] for name in ("qdata", "scale")}
        is_sliceable = packed.shape[1] % _block(packed) == 0
        part = replace(packed, scheme="bnb-nf4", tensors=tensors, row_sliceable=is_sliceable).rows(
            rows
        )
        nested = packed["nested_scale"][_nested_blocks(packed, rows)]
        scale = torch.empty_like(nested)
        self._dynamic.write(part["scale"], scale)
        scale = scale * nested + packed["offset"]
        return replace(part, tensors={"qdata": part["qdata"], "scale": scale})


def _pack_int8(weight: Tensor) -> Packed:
    """Quantize as ``int8_vectorwise_quant`` does on a CPU; on CUDA it takes nothing but float16."""
    absmax = weight.abs().amax(1, keepdim=True).float()
    codes = torch.round(weight * torch.where(absmax > 0, 127.0 / absmax, 0.0)).to(torch.int8)
    return stored_int8(codes, absmax)


def _zero_codes(codes: Tensor, is_zero: Tensor) -> None:
    """Write NF4's code of 0 into blocks; two codes are in a byte."""
    flat = codes.view(-1)
    flat[is_zero.repeat_interleave(BLOCK // 2)[: len(flat)]] = _NF4_ZEROS


def stored_4bit(
    kind: str,
    shape: tuple[int, int],
    codes: Tensor,
    absmax: Tensor,
    block: int,
    nested: tuple[Tensor, Tensor] | None = None,
) -> Packed:
    """Return a 4-bit weight as bitsandbytes stores it; nothing is quantized again.

    Nested scales of FP4, which no scheme has, are decoded.

    Args:
        kind: ``"nf4"`` or ``"fp4"``.
        shape: ``(rows, row_length)`` of the weight.
        codes: its bytes, in any shape and dtype; two codes in each, the first one in the high bits.
        absmax: ``ceil(weights / block)`` scales, floating; uint8 where they are nested.
        block: weights that share a scale.
        nested: the scales of `absmax`, one for 256 of them, and the offset to add.

    Raises:
        FormatError: a size that bitsandbytes does not have, or tensors that do not fit it.
    """
    weights = shape[0] * shape[1]
    blocks = require_blocks(weights, block, codes.nbytes, absmax.numel())
    qdata = codes.contiguous().view(-1).view(torch.uint8)
    is_sliceable = shape[1] % block == 0
    grid = (shape[0], -1) if is_sliceable else (1, -1)
    tensors = {"qdata": qdata.view(grid)}
    if nested is None:
        tensors["scale"] = absmax.float().view(grid)
        return Packed(f"bnb-{kind}", shape, tensors, row_sliceable=is_sliceable)
    scale, offset = nested[0].float().view(-1), nested[1].float().view(1)
    if absmax.dtype != torch.uint8 or scale.numel() != -(-blocks // NESTED_BLOCK):
        raise FormatError(
            f"{blocks} nested scales of {absmax.dtype} have {scale.numel()} scales of their own; "
            f"expected torch.uint8, and one for each {NESTED_BLOCK}"
        )
    if kind == "nf4":
        tensors |= {"scale": absmax.view(grid), "nested_scale": scale, "offset": offset}
        return Packed(_NESTED, shape, tensors, row_sliceable=False)
    decoded = torch.empty(1, blocks, device=absmax.device)
    _dynamic_table().write(absmax.view(1, -1), decoded)
    decoded = decoded.view(-1) * scale.repeat_interleave(NESTED_BLOCK)[:blocks] + offset
    return stored_4bit(kind, shape, codes, decoded, block)


def require_blocks(weights: int, block: int, code_bytes: int, scales: int) -> int:
    """Return in how many blocks some weights are.

    Raises:
        FormatError: bitsandbytes has no blocks of that size, or there are other numbers of bytes
            and scales than those make.
    """
    if block not in BLOCKS:
        raise FormatError(f"block size {block!r}; bitsandbytes has {', '.join(map(str, BLOCKS))}")
    blocks = -(-weights // block)
    if code_bytes != -(-weights // 2) or scales != blocks:
        raise FormatError(
            f"{weights} weights of 4 bits in blocks of {block} take {-(-weights // 2)} bytes and "
            f"{blocks} scales; got {code_bytes} and {scales}"
        )
    return blocks


def require_code_book(kind: str, values: Tensor) -> None:
    """Raise `FormatError` where a stored code book is not the one that codes are read by.

    Args:
        kind: ``"nf4"``, ``"fp4"``, or ``"dynamic"`` for that of nested scales.
        values: as stored, floating.
    """
    book = {"nf4": NF4, "fp4": FP4}.get(kind) or _dynamic_values()
    expected = torch.tensor(book, dtype=torch.float32, device=values.device).to(values.dtype)
    if not values.is_floating_point() or not torch.equal(values.view(-1), expected):
        raise FormatError(f"its code book is not that of bitsandbytes' {kind}")


def stored_int8(codes: Tensor, absmax: Tensor) -> Packed:
    """Return a weight of LLM.int8() as bitsandbytes stores it.

    Args:
        codes: ``(rows, row_length)`` int8.
        absmax: the largest absolute value of each row, floating: ``SCB``.

    Raises:
        FormatError: not one for each row.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2 or absmax.numel() != codes.shape[0]:
        raise FormatError(
            f"int8 codes for {absmax.numel()} rows have shape {tuple(codes.shape)}, {codes.dtype}"
        )
    # LLM.int8() divides by 127 when it multiplies; the scale is stored ready to use.
    tensors = {"qdata": codes.contiguous(), "scale": absmax.float().view(-1, 1) / 127}
    return Packed("bnb-int8", (codes.shape[0], codes.shape[1]), tensors)


def _adopt_4bit(layer: nn.Module, weight: nn.Parameter) -> Packed:
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:
        raise FormatError("bitsandbytes did not quantize it yet: it does when it is moved")
    codes, absmax, nested = plain(weight), state.absmax, None
    if getattr(state, "packing_format_for_cpu", False):
        # Where the CPU has AVX512-BF16, the first pass has put codes and scales into its order.
        from bitsandbytes import functional as bnb

        absmax = absmax.t().reshape(-1)
        codes, _ = bnb._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
    elif state.nested:
        nested = state.state2.absmax, state.offset
        require_code_book("dynamic", state.state2.code)
    require_code_book(state.quant_type, state.code)
    rows, row_length = state.shape[0], torch.Size(state.shape[1:]).numel()
    return stored_4bit(state.quant_type, (rows, row_length), codes, absmax, state.blocksize, nested)


def _adopt_int8(layer: nn.Module, weight: nn.Parameter) -> Packed:
    """Read what its Parameter has before the first pass, and the layer from then on."""
    sources = (getattr(layer, "state", None), weight)
    found = {
        name: next((v for s in sources if (v := getattr(s, name, None)) is not None), None)
        for name in ("CB", "SCB")
    }
    if found["SCB"] is None:
        raise FormatError("bitsandbytes did not quantize it yet: it does when it is moved")
    codes = plain(weight) if found["CB"] is None else plain(found["CB"])
    return stored_int8(codes, found["SCB"])


@constant
def has_kernels() -> bool:
    """Say whether bitsandbytes is here: a packed model also runs without it."""
    try:
        import bitsandbytes  # noqa: F401 - registers its operators
    except ImportError:
        return False
    return True


def _block(packed: Packed) -> int:
    """Return how many weights share a scale: sizes are powers of 2, so that their number tells."""
    weights, blocks = packed.shape[0] * packed.shape[1], packed["scale"].numel()
    block = BLOCK
    while -(-weights // block) > blocks:
        block *= 2
    return block if -(-weights // block) == blocks else BLOCKS[0]


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


def _dynamic_table() -> ByteTable:
    return ByteTable([[value] for value in _dynamic_values()])


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
