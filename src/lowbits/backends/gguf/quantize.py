"""Quantizers of all GGUF types that can be quantized without a table of lattice points."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from lowbits.backends.gguf import (
    quantize_float,
    quantize_iq4,
    quantize_k,
    quantize_k_best,
    quantize_k_signed,
    quantize_legacy,
    quantize_ternary,
)
from lowbits.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

#: Quantizers by ggml type: ``(n, block)`` float32 to ``(n, block_bytes)`` uint8 on its device.
QUANTIZERS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType({
    "F16": quantize_float.quantize_f16,
    "BF16": quantize_float.quantize_bf16,
    "Q8_0": quantize_legacy.quantize_q8_0,
    "Q5_1": quantize_legacy.quantize_q5_1,
    "Q5_0": quantize_legacy.quantize_q5_0,
    "Q4_1": quantize_legacy.quantize_q4_1,
    "Q4_0": quantize_legacy.quantize_q4_0,
    "Q6_K": quantize_k_signed.quantize_q6_k,
    "Q5_K": quantize_k.quantize_q5_k,
    "Q4_K": quantize_k.quantize_q4_k,
    "Q3_K": quantize_k_signed.quantize_q3_k,
    "Q2_K": quantize_k.quantize_q2_k,
    "IQ4_NL": quantize_iq4.quantize_iq4_nl,
    "IQ4_XS": quantize_iq4.quantize_iq4_xs,
    "MXFP4": quantize_float.quantize_mxfp4,
    "NVFP4": quantize_float.quantize_nvfp4,
    "TQ1_0": quantize_ternary.quantize_tq1_0,
    "TQ2_0": quantize_ternary.quantize_tq2_0,
    "Q2_0": quantize_ternary.quantize_q2_0,
    "Q1_0": quantize_ternary.quantize_q1_0,
})  # fmt: skip

_BEST: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType({
    "Q4_0": quantize_legacy.quantize_q4_0_best,
    "Q6_K": quantize_k_best.quantize_q6_k_best,
    "Q5_K": quantize_k_best.quantize_q5_k_best,
    "Q4_K": quantize_k_best.quantize_q4_k_best,
    "Q3_K": quantize_k_best.quantize_q3_k_best,
    "Q2_K": quantize_k_best.quantize_q2_k_best,
})  # fmt: skip

#: The types of which ``effort="best"`` makes other bytes than ``effort="ref"``.
BEST: Final = tuple(_BEST)

EFFORTS: Final = ("ref", "best")

#: Weights quantized at once: on a processor what its caches hold, elsewhere what keeps it busy.
_CPU_CHUNK: Final = 2**18
_DEVICE_CHUNK: Final = 2**22


def quantize(blocks: Tensor, type_name: str, *, effort: str = "ref") -> Tensor:
    """Quantize blocks of weights.

    Args:
        blocks: ``(n, block)`` float32, contiguous; left as they are.
        type_name: as in ggml, e.g. ``"Q4_K"``.
        effort: ``"ref"`` for what ggml makes without an importance matrix, ``"best"`` for a smaller
            squared error in more time, where :data:`BEST` lists the type.

    Returns:
        ``(n, block_bytes)`` uint8, on the device of the blocks. Where float16 cannot hold a scale,
        the block decodes to infinity or NaN; only MXFP4 and NVFP4 cannot express that.

    Raises:
        ConfigError: unknown type or effort.
    """
    if type_name not in QUANTIZERS:
        known = ", ".join(QUANTIZERS)
        raise ConfigError(f"cannot quantize to GGUF type {type_name!r}; can: {known}")
    if effort not in EFFORTS:
        raise ConfigError(f"effort: expected one of {', '.join(EFFORTS)}, got {effort!r}")
    quantizer = QUANTIZERS[type_name]
    if effort == "best":
        quantizer = _BEST.get(type_name, quantizer)
    if blocks.shape[0] == 0:
        return quantizer(blocks.new_zeros(1, blocks.shape[1]))[:0]
    weights = _CPU_CHUNK if blocks.device.type == "cpu" else _DEVICE_CHUNK
    step = weights // blocks.shape[1]
    first = quantizer(blocks[:step])
    if blocks.shape[0] <= step:
        return first
    packed = first.new_empty(blocks.shape[0], first.shape[1])
    packed[:step] = first
    for start in range(step, blocks.shape[0], step):
        packed[start : start + step] = quantizer(blocks[start : start + step])
    return packed
