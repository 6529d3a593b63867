"""Quantizers of GGUF types: the bytes of the gguf package, or errors as small as ggml's."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbits.backends.gguf.quantize import BEST, QUANTIZERS, quantize
from lowbits.errors import ConfigError

gguf: Any = pytest.importorskip("gguf")

#: Types that the gguf package quantizes as well.
SAME_BYTES = ("BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "TQ1_0", "TQ2_0")

#: Root mean square errors of ggml, as parts of the standard deviation, on `gaussian()` and
#: `heavy_tailed()`: ggml_quantize_chunk of libggml-base 0.20.2 without an importance matrix.
GGML_ERRORS = {
    "Q8_0": (0.005354, 0.007348), "Q5_1": (0.037935, 0.045419), "Q5_0": (0.042731, 0.058532),
    "Q4_1": (0.078535, 0.094099), "Q4_0": (0.086108, 0.115980), "Q6_K": (0.017744, 0.023056),
    "Q5_K": (0.036133, 0.043938), "Q4_K": (0.071579, 0.086884), "Q3_K": (0.150944, 0.183870),
    "Q2_K": (0.297691, 0.341718), "IQ4_NL": (0.076156, 0.093576), "IQ4_XS": (0.076749, 0.094556),
    "MXFP4": (0.114704, 0.131917), "NVFP4": (0.095390, 0.091516), "TQ1_0": (0.807705, 0.842390),
    "TQ2_0": (0.807705, 0.842390), "Q2_0": (0.717770, 0.729176), "Q1_0": (0.601109, 0.705884),
}  # fmt: skip

#: The same with ggml's importance matrix all ones, which ``effort="best"`` is to stay below.
GGML_ONES_ERRORS = {
    "Q4_0": (0.081713, 0.112884), "Q4_K": (0.070948, 0.086268), "Q5_K": (0.035435, 0.043321),
    "Q6_K": (0.017311, 0.022596), "Q3_K": (0.144665, 0.177621), "Q2_K": (0.268794, 0.301490),
}  # fmt: skip

CASES = (*((name, "ref") for name in QUANTIZERS), *((name, "best") for name in BEST))

#: Types whose scales are float16.
HALF_SCALED = [case for case in CASES if case[0] not in {"F16", "BF16", "MXFP4", "NVFP4"}]

#: Types that are to have ggml's bytes where float16 has too few digits for the scale.
GGML_SMALL = [(name, "ref") for name in (*SAME_BYTES, "IQ4_NL")]


def block_of(name: str) -> int:
    """Return how many weights share a block; the gguf package does not know all types."""
    others = {"F16": 1, "BF16": 1, "Q1_0": 128, "Q2_0": 64, "NVFP4": 64}
    if name in others:
        return others[name]
    size: int = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]
    return size


def gaussian(count: int = 2**18) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def heavy_tailed(count: int = 2**18) -> Tensor:
    """Student's t with four degrees of freedom."""
    normal = torch.randn(5, count, generator=torch.Generator().manual_seed(1))
    return normal[0] * 2 / normal[1:].square().sum(0).sqrt()


def with_outlier(name: str, value: float) -> Tensor:
    blocks = gaussian(2**12).view(-1, block_of(name)).clone()
    blocks[:, block_of(name) // 3] = value
    return blocks


def decode(packed: Tensor, name: str) -> Tensor:
    if name == "F16":
        return packed.view(torch.float16).float()
    if name in {"Q1_0", "Q2_0"}:
        scale = packed[:, :2].contiguous().view(torch.float16).float()
        bits = int(name[1])
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        codes = (packed[:, 2:, None] >> shifts & (1 << bits) - 1).flatten(1).float()
        return scale * (codes * 2 - 1 if bits == 1 else codes - 1)
    if name not in gguf.GGMLQuantizationType.__members__:
        pytest.skip(f"gguf {gguf.__version__} has no {name}")
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name])
    decoded: Tensor = torch.from_numpy(values)
    return decoded


def error(values: Tensor, name: str, effort: str = "ref") -> float:
    packed = quantize(values.view(-1, block_of(name)), name, effort=effort)
    difference = decode(packed, name).flatten() - values
    return float(difference.square().mean().sqrt() / values.std())


@pytest.mark.parametrize("name", SAME_BYTES)
@pytest.mark.parametrize("kind", ["gaussian", "small", "tiny", "zero", "halves", "outlier"])
def test_bytes_of_the_gguf_package(name: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    blocks = {
        "gaussian": gaussian(2**14),
        "small": gaussian(2**14) * 1e-6,
        "tiny": gaussian(2**14) * 1e-30,
        "zero": torch.zeros(2**12),
        "halves": torch.randint(-9, 10, (2**14,), generator=generator) / 2,
        "outlier": with_outlier(name, -1000).flatten(),
    }[kind].view(-1, block_of(name))
    with np.errstate(all="ignore"):
        theirs = gguf.quants.quantize(blocks.numpy(), gguf.GGMLQuantizationType[name])
    assert quantize(blocks, name).numpy().tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", GGML_ERRORS)
def test_errors_are_those_of_ggml(name: str) -> None:
    for values, ggml in zip((gaussian(), heavy_tailed()), GGML_ERRORS[name], strict=True):
        assert error(values, name) <= 1.001 * ggml


@pytest.mark.parametrize("name", BEST)
def test_best_is_below_ref_and_ggml_with_even_weights(name: str) -> None:
    for values, ggml in zip((gaussian(), heavy_tailed()), GGML_ONES_ERRORS[name], strict=True):
        assert error(values, name, "best") < min(ggml, error(values, name))


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name not in BEST])
def test_best_is_ref_for_other_types(name: str) -> None:
    blocks = gaussian(2**12).view(-1, block_of(name))
    assert torch.equal(quantize(blocks, name, effort="best"), quantize(blocks, name))


@pytest.mark.parametrize(("name", "effort"), CASES)
def test_parts_have_the_bytes_of_the_whole(
    name: str, effort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = heavy_tailed(2**14).view(-1, block_of(name))
    original = blocks.clone()
    whole = quantize(blocks, name, effort=effort)
    count = blocks.shape[0]
    cuts = [0, 1, count // 3, count // 2 + 1, count]
    parts = [blocks[start:stop] for start, stop in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat([quantize(part, name, effort=effort) for part in parts]), whole)
    monkeypatch.setattr("lowbits.backends.gguf.quantize._CPU_CHUNK", 11 * block_of(name))
    assert torch.equal(quantize(blocks, name, effort=effort), whole)
    assert torch.equal(blocks, original)


@pytest.mark.parametrize(("name", "effort"), CASES)
def test_no_blocks(name: str, effort: str) -> None:
    some = quantize(torch.ones(1, block_of(name)), name, effort=effort)
    none = quantize(torch.ones(0, block_of(name)), name, effort=effort)
    assert none.shape == (0, some.shape[1])
    assert none.dtype == some.dtype == torch.uint8


@pytest.mark.parametrize(("name", "effort"), CASES)
@pytest.mark.parametrize("value", [0.0, 2.5, -3.7, 1e-30, -1e-42])
def test_constant_blocks(name: str, effort: str, value: float) -> None:
    blocks = torch.full((3, block_of(name)), value)
    decoded = decode(quantize(blocks, name, effort=effort), name)
    assert ((decoded - blocks).abs() <= 0.2 * abs(value) + 1e-29).all()


@pytest.mark.parametrize(("name", "effort"), [case for case in CASES if case[0] != "Q1_0"])
@pytest.mark.parametrize("value", [1000.0, -1000.0])
def test_outliers_survive(name: str, effort: str, value: float) -> None:
    blocks = with_outlier(name, value)
    decoded = decode(quantize(blocks, name, effort=effort), name)
    off = (decoded - blocks).abs()
    assert (off[:, block_of(name) // 3] <= 0.25 * abs(value)).all()
    assert (off <= 0.5 * abs(value)).all()


@pytest.mark.parametrize(("name", "effort"), HALF_SCALED)
@pytest.mark.parametrize("value", [1e10, -1e10, 1e15, 1e20, -3e38])
def test_what_float16_cannot_scale_is_not_finite(name: str, effort: str, value: float) -> None:
    decoded = decode(quantize(with_outlier(name, value), name, effort=effort), name)
    assert not decoded.isfinite().all(1).any()


@pytest.mark.parametrize(
    ("name", "effort"), [case for case in HALF_SCALED if case not in GGML_SMALL]
)
@pytest.mark.parametrize("size", [1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10])
def test_small_weights_do_not_grow(name: str, effort: str, size: float) -> None:
    blocks = gaussian(2**12).view(-1, block_of(name)) * size
    decoded = decode(quantize(blocks, name, effort=effort), name)
    assert decoded.isfinite().all()
    assert decoded.abs().max() <= 1.6 * blocks.abs().max()


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_steps_below_the_normal_range_of_float16(name: str) -> None:
    # With steps of 6e-8 what is 3e-6 wide still has some tens of levels.
    assert error(gaussian(2**14) * 3e-6, name) < 0.5


def test_floats_are_rounded_to_nearest() -> None:
    values = torch.tensor([[1.00390625], [1.01171875], [float("inf")], [float("-inf")], [3.3e38]])
    assert torch.equal(quantize(values, "BF16").view(torch.bfloat16), values.bfloat16())
    assert torch.equal(quantize(values, "F16").view(torch.float16), values.half())
    nan = torch.tensor([[float("nan")]])
    assert quantize(nan, "BF16").view(torch.bfloat16).isnan().all()


def test_unknown_type_and_effort() -> None:
    with pytest.raises(ConfigError, match="cannot quantize to GGUF type 'IQ2_S'; can: F16, BF16,"):
        quantize(torch.ones(1, 256), "IQ2_S")
    with pytest.raises(ConfigError, match="effort: expected one of ref, best, got 'high'"):
        quantize(torch.ones(1, 32), "Q8_0", effort="high")
