"""Quantizers of GGUF types: the bytes of the gguf package, or errors as small as ggml's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowbits.backends.gguf.quantize import BEST, QUANTIZERS, quantize
from lowbits.errors import ConfigError

gguf: Any = pytest.importorskip("gguf")

#: Types that the gguf package quantizes as well.
SAME_BYTES = ("BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "TQ1_0", "TQ2_0")

#: Root mean square errors of ggml's quantizers, as a part of the standard deviation, on the
#: weights of `gaussian` and `heavy_tailed`: libggml-base 0.20.2, no importance matrix.
GGML_RMSE = {
    "Q8_0": (0.0, 0.0),
}

#: Efforts that can be asked for.
CASES = (*((name, "ref") for name in QUANTIZERS), *((name, "best") for name in BEST))


def block(name: str) -> int:
    size: int = {"Q1_0": 128, "Q2_0": 64}.get(name) or gguf.GGML_QUANT_SIZES[kind(name)][0]
    return size


def kind(name: str) -> Any:
    return gguf.GGMLQuantizationType[name]


def gaussian(count: int = 2**18) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def heavy_tailed(count: int = 2**18) -> Tensor:
    """Student's t with four degrees of freedom."""
    normal = torch.randn(5, count, generator=torch.Generator().manual_seed(1))
    return normal[0] * 2 / normal[1:].square().sum(0).sqrt()
