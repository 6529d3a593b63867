"""Weights that are in low bits already, and are quantized once more."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, draw
from torch import nn

import lowbits
from lowbits import errors
from lowbits.core.packed import PackedLayer

FLOAT8S = (torch.float8_e4m3fn, torch.float8_e5m2)


def in_float8(dtype: torch.dtype, bias: torch.dtype = torch.bfloat16) -> Any:
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 256), nn.LayerNorm(256))
    model.to(bias)
    for layer in (model[0], model[1]):
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return model


@pytest.mark.parametrize("dtype", FLOAT8S)
def test_float8_weights_are_packed_from_their_values(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = in_float8(dtype)
    original = model[0].weight
    values = original.detach().float().clone()
    with caplog.at_level(logging.WARNING, "lowbits"):
        handle = lowbits.quantize(model, "bnb-nf4", keep_source="memory")
    (record,) = caplog.records
    name = str(dtype).removeprefix("torch.")
    assert f"2 weights (32.00 KiB) from {name} to bnb-nf4" in record.message
    assert "load the weights in 16 or 32 bits" in record.message
    assert record.message in handle.report().warnings
    assert {row.reason for row in handle.report().packed} == {f"stored as {name} before"}
    assert model[0].weight.dtype == next(model.parameters()).dtype == torch.bfloat16
    expected: Any = nn.Linear(256, 64)
    expected.weight = nn.Parameter(values)
    lowbits.quantize(expected, "bnb-nf4")
    assert torch.equal(model[0].weight.to(torch.float32), expected.weight.bfloat16().float())
    assert model(torch.randn(2, 256, dtype=torch.bfloat16)).isfinite().all()
    handle.restore()
    assert model[0].weight is original
    assert original.dtype == dtype
    assert torch.equal(original.float(), values)


@pytest.mark.parametrize("dtype", FLOAT8S)
def test_the_plain_cast_of_the_same_float8_loses_nothing(dtype: torch.dtype) -> None:
    model = in_float8(dtype)
    values = model[0].weight.detach().float()
    scheme = str(dtype).removeprefix("torch.").replace("_", "-") + "-raw"
    handle = lowbits.quantize(model, scheme, on_requantize="error")
    assert not handle.report().warnings
    assert torch.equal(model[0].weight.float(), values)


def test_error_refuses_before_anything_changes_and_allow_says_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = in_float8(torch.float8_e4m3fn)
    with pytest.raises(errors.SourceUnavailableError, match="float8_e4m3fn to bnb-nf4.*'allow'"):
        lowbits.quantize(model, "bnb-nf4", on_requantize="error")
    assert type(model[0]) is nn.Linear
    with caplog.at_level(logging.WARNING, "lowbits"):
        handle = lowbits.quantize(model, "bnb-nf4", on_requantize="allow", keep_source="memory")
    assert not caplog.records
    assert not handle.report().warnings
    with pytest.raises(errors.ConfigError, match="on_requantize: got 'maybe'"):
        lowbits.quantize(model, "bnb-nf4", on_requantize="maybe")


def test_a_cast_of_layerwise_casting_is_left_alone() -> None:
    pipe = PIPELINES["flux"].build(dtype=torch.bfloat16)
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
    )
    handle = lowbits.quantize(pipe, "bnb-nf4", components=["transformer"], on_requantize="error")
    rows = {row.fqn: row for row in handle.report().layers}
    assert "remove that hook first" in rows["transformer_blocks.0.attn.to_q"].reason
    assert draw("flux", pipe).isfinite().all()


def test_sixteen_bits_are_not_low() -> None:
    model: Any = nn.Sequential(nn.Linear(256, 64))
    lowbits.quantize(model, "gguf-bf16")
    twin = copy.deepcopy(model)
    handle = lowbits.quantize(twin, "bnb-nf4", on_requantize="error")
    assert not handle.report().warnings


def test_a_part_of_an_applied_module_is_refused() -> None:
    model: Any = nn.Sequential(nn.Sequential(nn.Linear(256, 64)), nn.Linear(64, 64))
    handle = lowbits.quantize(model, "bnb-nf4", keep_source="memory")
    for part in (model[0], model[0][0]):
        with pytest.raises(errors.AlreadyPatchedError, match="a part of"):
            lowbits.quantize(part, "float8-e4m3fn")
    twin = copy.deepcopy(model)
    again = lowbits.quantize(twin[0], "float8-e4m3fn", on_requantize="allow")
    with pytest.raises(errors.AlreadyPatchedError, match="a part of"):
        lowbits.quantize(twin, "float8-e4m3fn")
    again.restore()
    handle.restore()
    handle = lowbits.quantize(model, "bnb-nf4", keep_source="none")
    with pytest.raises(errors.AlreadyPatchedError, match="a part of"):
        lowbits.quantize(model[0], "float8-e4m3fn")


def test_what_was_packed_first_can_be_let_go() -> None:
    model: Any = nn.Sequential(nn.Linear(256, 64))
    lowbits.quantize(model, "gguf-q8_0")
    twin = copy.deepcopy(model)
    handle = lowbits.quantize(twin, "bnb-nf4", on_requantize="allow", keep_source="none")
    assert handle.report().bytes_before == 64 * 256 * 34 // 32 + 64 * 4
    with pytest.raises(errors.SourceUnavailableError, match="not kept"):
        handle.restore()


def test_what_the_caller_did_meanwhile_stays() -> None:
    model: Any = nn.Sequential(nn.Linear(256, 64))
    lowbits.quantize(model, "gguf-q8_0")
    twin = copy.deepcopy(model)
    codes = twin[0].weight_qdata.clone()
    handle = lowbits.quantize(twin, "bnb-nf4", on_requantize="allow", keep_source="memory")
    twin.half()
    handle.restore()
    assert twin[0].weight.dtype == torch.float16
    assert torch.equal(twin[0].weight_qdata, codes)
    handle = lowbits.quantize(twin, "bnb-nf4", on_requantize="allow", keep_source="memory")
    lowbits.dequantize(twin)
    assert type(twin[0]) is nn.Linear


def test_a_copy_of_a_packed_pipeline_is_streamed_as_it_is() -> None:
    pipe = PIPELINES["flux"].build()
    lowbits.quantize(pipe, "bnb-nf4")
    expected = draw("flux", pipe)
    pipe.register_modules(**{name: copy.deepcopy(m) for name, m in pipe.components.items()
                             if isinstance(m, nn.Module)})  # fmt: skip
    handle = lowbits.apply(pipe, "native", device="cpu", gpu_weights="300kB", location="cpu")
    assert torch.equal(draw("flux", pipe), expected)
    assert not handle.report().warnings
    assert "bnb-nf4" in {row.scheme for row in handle.report().layers}
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_q, PackedLayer)
    handle.restore()
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_q, PackedLayer)
    assert torch.equal(draw("flux", pipe), expected)


def test_a_switch_goes_back_to_the_originals_and_does_not_warn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model: Any = nn.Sequential(nn.Linear(256, 64))
    handle = lowbits.quantize(model, "gguf-q8_0", keep_source="memory")
    with caplog.at_level(logging.WARNING, "lowbits"):
        handle.switch("bnb-nf4")
    assert not caplog.records
