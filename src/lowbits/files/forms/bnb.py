"""bitsandbytes' weights in files: NF4 and FP4 with a quant state, int8 with ``SCB``.

Forge's, diffusers' and transformers' files have them alike; source: ``QuantState.as_dict`` and
``Linear8bitLt._save_to_state_dict`` of bitsandbytes 0.50.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import torch

from lowbits.backends.bnb import (
    NESTED_BLOCK,
    require_blocks,
    require_code_book,
    stored_4bit,
    stored_int8,
)
from lowbits.errors import FormatError
from lowbits.files.forms.found import Checkpoint, Found, Listed, read_json, refusal, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lowbits.core.backend import Packed
    from lowbits.files.weights import StoredTensor

_STATE: Final = ".quant_state.bitsandbytes__"
_SCALE: Final = "SCB"
_DTYPES: Final = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
#: Values of ``weight_format`` but 0 are orders for GPUs that bitsandbytes does not write any more.
_ROW_ORDER: Final = 0


def find(checkpoint: Checkpoint) -> Iterator[Found]:
    """Yield the weights that bitsandbytes stored."""
    for name, part in checkpoint.tensors.items():
        base, mark, kind = name.partition(_STATE)
        if mark:
            yield _four_bits(checkpoint, base, kind, part)
        elif name.endswith(f".{_SCALE}"):
            yield _eight_bits(checkpoint, name.removesuffix(f".{_SCALE}"), part)


def _four_bits(checkpoint: Checkpoint, name: str, kind: str, part: StoredTensor) -> Found:
    state = read_json(part)
    codes = checkpoint.need(name, part)
    parts = {"codes": codes}
    for key in ("absmax", "quant_map"):
        parts[key] = checkpoint.need(f"{name}.{key}", part)
    is_nested = "nested_blocksize" in state
    for key in ("nested_absmax", "nested_quant_map") if is_nested else ():
        parts[key] = checkpoint.need(f"{name}.{key}", part)
    shape, block, dtype = _described(state, kind, part)
    weights = math.prod(shape)
    absmax = parts["absmax"]
    try:
        require_blocks(weights, block, codes.extent.nbytes, math.prod(absmax.shape))
    except FormatError as error:
        raise refusal(codes, error.args[0]) from error
    offset = _offset(state, part) if is_nested else None
    if (absmax.dtype == torch.uint8) != is_nested:
        raise refusal(absmax, f"{absmax.dtype} scales, although nested ones are {is_nested}")

    def make(tensors: Mapping[str, Tensor]) -> Packed:
        require_code_book(kind, tensors["quant_map"])
        nested = None
        if offset is not None:
            require_code_book("dynamic", tensors["nested_quant_map"])
            nested = tensors["nested_absmax"], torch.tensor(offset, dtype=torch.float32)
        grid = (shape[0], weights // shape[0])
        return stored_4bit(kind, grid, tensors["codes"], tensors["absmax"], block, nested)

    scheme = "bnb-nf4-dq" if is_nested and kind == "nf4" else f"bnb-{kind}"
    weight = Listed(name, shape, dtype, scheme)
    return checkpoint.found(weight, parts, make, (part.name,))


def _described(
    state: Mapping[str, Any], kind: str, part: StoredTensor
) -> tuple[tuple[int, ...], int, torch.dtype]:
    """Return the shape of a weight, its block size and dtype, as its quant state has them."""
    shape, block, dtype = state.get("shape"), state.get("blocksize"), state.get("dtype")
    if kind not in ("nf4", "fp4") or state.get("quant_type") != kind:
        raise refusal(part, f"quant_type {state.get('quant_type')!r} of a weight called {kind}")
    if not _is_shape(shape) or len(shape) < 2:
        raise refusal(part, f"shape {shape!r} of a quantized weight")
    if type(block) is not int:
        raise refusal(part, f"blocksize {block!r}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise refusal(part, f"dtype {dtype!r}; expected one of {', '.join(_DTYPES)}")
    return tuple(shape), block, _DTYPES[dtype]


def _is_shape(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 < n < 1 << 48 for n in value)


def _offset(state: Mapping[str, Any], part: StoredTensor) -> float:
    block, offset = state["nested_blocksize"], state.get("nested_offset")
    if block != NESTED_BLOCK:
        raise refusal(part, f"nested_blocksize {block!r}; bitsandbytes has {NESTED_BLOCK}")
    if type(offset) is int and abs(offset) < 1 << 64:
        return float(offset)
    if not isinstance(offset, float):
        raise refusal(part, f"nested_offset {offset!r}")
    return offset


def _eight_bits(checkpoint: Checkpoint, base: str, scale: StoredTensor) -> Found:
    name = base if base in checkpoint.tensors else f"{base}.weight"
    codes = checkpoint.need(name, scale)
    rows, _ = rows_of(codes)
    if codes.dtype != torch.int8 or len(codes.shape) != 2:
        raise refusal(codes, f"LLM.int8() weight of {codes.dtype}, shape {codes.shape}")
    if math.prod(scale.shape) != rows or not scale.dtype.is_floating_point:
        raise refusal(scale, f"{scale.dtype} of shape {scale.shape} for {rows} rows")
    module = name.removesuffix(".weight")
    parts = {"codes": codes, "scale": scale}
    if f"{module}.weight_format" in checkpoint.tensors:
        parts["order"] = checkpoint.tensors[f"{module}.weight_format"]
        if parts["order"].extent.nbytes > 8:
            raise refusal(parts["order"], f"shape {parts['order'].shape} of a number")
    weight = Listed(name, codes.shape, None, "bnb-int8")
    return checkpoint.found(weight, parts, _make_int8)


def _make_int8(tensors: Mapping[str, Tensor]) -> Packed:
    order = tensors.get("order")
    if order is not None and order.view(-1).tolist() != [_ROW_ORDER]:
        raise FormatError(f"weight_format {order.tolist()}: its codes are not in rows")
    return stored_int8(tensors["codes"], tensors["scale"])
