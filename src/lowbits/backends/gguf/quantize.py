"""Quantizers of all GGUF types that can be quantized without a table of lattice points."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from lowbits.backends.gguf import (
    quantize_float,
    quantize_iq4,
    quantize_k,
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
