"""Models and pipelines that diffusers and transformers quantized, taken over."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pipelines import PIPELINES, draw

import lowbits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FLAGS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit")


def quanto_config() -> Any:
    return pytest.importorskip("diffusers").QuantoConfig(weights_dtype="int8")


def torchao_config() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return pytest.importorskip("diffusers").TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize(
    ("config", "scheme"), [(quanto_config, "quanto-int8"), (torchao_config, "torchao-int8")]
)
def test_a_pipeline_with_a_quantized_denoiser(
    tmp_path: Path, config: Callable[[], Any], scheme: str
) -> None:
    pipe: Any = PIPELINES["flux"].build()
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = type(pipe.transformer).from_pretrained(
        tmp_path, quantization_config=config(), torch_dtype=torch.float32
    )
    transformer = pipe.transformer
    expected = draw("flux", pipe)
    report = lowbits.adopt(pipe)
    assert {layer.component for layer in report.packed} == {"transformer"}
    assert {layer.scheme for layer in report.packed} == {scheme}
    torch.testing.assert_close(draw("flux", pipe), expected, rtol=0, atol=2e-3)
    assert pipe.transformer is transformer
    assert not any(flag in transformer.__dict__ for flag in FLAGS)
    assert "quantization_config" not in transformer.config
    assert getattr(transformer.config, "quantization_config", None) is None
    transformer.save_pretrained(tmp_path / "packed")
    loaded = type(transformer).from_config(transformer.config)
    again = lowbits.load(tmp_path / "packed", into=loaded)
    assert {(x.fqn, x.scheme) for x in again.packed} == {(x.fqn, x.scheme) for x in report.packed}
    assert transformer.state_dict()["proj_out.weight"].shape == transformer.proj_out.weight.shape
    transformer.to(torch.float64)
    transformer.to(torch.float32)
    handle = lowbits.apply(pipe, "native", device="cpu")
    torch.testing.assert_close(draw("flux", pipe), expected, rtol=0, atol=2e-3)
    handle.restore()
    lowbits.dequantize(pipe)
    torch.testing.assert_close(draw("flux", pipe), expected, rtol=0, atol=2e-3)
    transformer.save_pretrained(tmp_path / "again")


def test_what_was_converted_is_forgotten_by_its_config(tmp_path: Path) -> None:
    """Saved as ordinary layers later, they would be taken for quantized ones."""
    pipe: Any = PIPELINES["flux"].build()
    pipe.transformer.save_pretrained(tmp_path / "full")
    pipe.transformer = type(pipe.transformer).from_pretrained(
        tmp_path / "full", quantization_config=torchao_config(), torch_dtype=torch.float32
    )
    pipe.save_pretrained(tmp_path / "quantized")
    lowbits.convert(tmp_path / "quantized", tmp_path / "packed", "gguf-q8_0", on_requantize="allow")
    config = json.loads((tmp_path / "packed" / "transformer" / "config.json").read_text("utf-8"))
    before = json.loads((tmp_path / "quantized" / "transformer" / "config.json").read_text("utf-8"))
    assert before.pop("quantization_config")
    assert config == before
    loaded = type(pipe.transformer).from_config({**before, "quantization_config": {"x": 1}})
    lowbits.load(tmp_path / "packed" / "transformer", into=loaded)
    assert "quantization_config" not in loaded.config
    lowbits.dequantize(loaded)
    loaded.save_pretrained(tmp_path / "plain")
    plain = type(loaded).from_pretrained(tmp_path / "plain")
    assert torch.equal(plain.proj_out.weight, loaded.proj_out.weight)


def test_a_text_encoder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    pipe: Any = PIPELINES["flux"].build()
    pipe.text_encoder_2.save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    pipe.text_encoder_2 = encoder = type(pipe.text_encoder_2).from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32
    )
    expected = draw("flux", pipe)
    report = lowbits.adopt(pipe)
    assert {layer.component for layer in report.packed} == {"text_encoder_2"}
    torch.testing.assert_close(draw("flux", pipe), expected, rtol=0, atol=2e-3)
    assert not any(flag in encoder.__dict__ for flag in FLAGS)
    assert getattr(encoder.config, "quantization_config", None) is None
    assert encoder.dtype == torch.float32
    encoder.to(torch.float16)
    assert encoder.dtype == torch.float16
