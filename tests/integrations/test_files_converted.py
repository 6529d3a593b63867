"""mini-FLUX converted from file to file, and loaded into pipelines: the picture stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from miniflux import (
    MODEL,
    PACKED,
    TYPES,
    blank,
    empty,
    exchanged,
    packed_layers,
    picture,
    referenced,
    schemes,
    values,
)
from safetensors.torch import save_file

import lowbits
from lowbits.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")

#: Conversion has no part that knows a scheme.
SCHEMES = schemes("bnb-nf4-dq")


@pytest.fixture(scope="module")
def pipe(original: Any) -> Any:
    """Return one pipeline for all tests: each leaves it as it was."""
    return original


# Converted


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("into_folder", [False, True])
def test_a_converted_model(pipe: Any, tmp_path: Path, scheme: str, *, into_folder: bool) -> None:
    target = tmp_path / "out" if into_folder else tmp_path / "t.safetensors"
    lowbits.convert(MODEL / "transformer", target, scheme)
    model = empty(pipe.transformer)
    lowbits.load(target, into=model, dtype=torch.float32)
    with lowbits.apply(pipe, scheme, device="cpu", components=["transformer"]):
        expected, schemes = picture(pipe), packed_layers(pipe.transformer)
    assert packed_layers(model) == schemes
    with exchanged(pipe, transformer=model):
        assert torch.equal(picture(pipe), expected)


@pytest.mark.parametrize("type_name", TYPES)
def test_a_model_converted_to_gguf(pipe: Any, tmp_path: Path, type_name: str) -> None:
    file, saved = tmp_path / "t.gguf", tmp_path / "saved.gguf"
    lowbits.convert(MODEL / "transformer", file, f"gguf-{type_name.lower()}")
    lowbits.save_gguf(pipe.transformer, saved, type_name)
    model, other = blank(pipe.transformer), blank(pipe.transformer)
    lowbits.load(file, into=model)
    lowbits.load(saved, into=other)
    # Also where a mix gives more bits to those that come first: both files are in one order.
    packed = packed_layers(model)
    assert packed_layers(other) == packed
    # What is not quantized is bfloat16 in the folder, and float32 in the pipeline.
    one, two = values(model), values(other)
    assert all(torch.equal(one[name], two[name]) for name in packed)
    assert packed or type_name in ("F16", "BF16")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_converted_pipeline(pipe: Any, tmp_path: Path, scheme: str) -> None:
    lowbits.convert(MODEL, tmp_path / "out", scheme)
    loaded = lowbits.load_pipeline(tmp_path / "out", dtype=torch.float32)
    with lowbits.apply(pipe, scheme, device="cpu"):
        expected = picture(pipe)
        schemes = {name: packed_layers(getattr(pipe, name)) for name in PACKED}
    assert {name: packed_layers(getattr(loaded, name)) for name in PACKED} == schemes
    assert torch.equal(picture(loaded), expected)


def test_gguf_converted_to_a_file_of_lowbits(pipe: Any, tmp_path: Path) -> None:
    """Rows of fused weights, in their names, to a file and from there into parts."""
    file = tmp_path / "t.gguf"
    lowbits.save_gguf(pipe.transformer, file, "Q8_0")
    lowbits.convert(file, tmp_path / "t.safetensors", "native")
    pictures = []
    for path in (file, tmp_path / "t.safetensors"):
        for model in (blank(pipe.transformer), empty(pipe.transformer)):
            lowbits.load(path, into=model)
            with exchanged(pipe, transformer=model):
                pictures.append(picture(pipe))
    assert all(torch.equal(pictures[0], other) for other in pictures[1:])


# Into pipelines


def test_one_model_of_a_pipeline(pipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.gguf"
    lowbits.save_gguf(pipe.transformer, file, "Q8_0")
    model = blank(pipe.transformer)
    lowbits.load(file, into=model)
    with exchanged(pipe, transformer=model):
        expected = picture(pipe)
    others = {name: part for name, part in pipe.components.items() if name != "transformer"}
    with exchanged(pipe, transformer=blank(pipe.transformer)):
        report = lowbits.load(file, into=pipe)
        assert {layer.component for layer in report.layers} == {"transformer"}
        assert report.warnings == ()
        assert torch.equal(picture(pipe), expected)
        assert all(pipe.components[name] is part for name, part in others.items())


def all_in_one(pipe: Any) -> dict[str, Tensor]:
    """Return all models in one state dict, as UIs have them."""
    tensors, _ = referenced(pipe.transformer)
    parts = {
        "model.diffusion_model.": tensors,
        "text_encoders.clip_l.transformer.": pipe.text_encoder.state_dict(),
        "text_encoders.t5xxl.transformer.": pipe.text_encoder_2.state_dict(),
        "vae.": pipe.vae.state_dict(),
    }
    return {
        prefix + name: tensor.clone()
        for prefix, part in parts.items()
        for name, tensor in part.items()
    }


def test_all_models_of_a_pipeline_in_one_file(pipe: Any, plain: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "all.safetensors"
    save_file(all_in_one(pipe), file)
    names = (*PACKED, "text_encoder", "vae")
    with exchanged(pipe, **{name: blank(getattr(pipe, name)) for name in names}):
        assert not torch.equal(picture(pipe), plain)
        report = lowbits.load(file, into=pipe)
        assert {layer.component for layer in report.layers} == set(names)
        assert torch.equal(picture(pipe), plain)
        # T5's second name of its tied embedding is in the file as well.
        extra = "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"
        assert report.warnings in ((), (f"not used: {extra}",))


def test_a_broken_model_of_several_changes_none(pipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "all.safetensors"
    save_file(all_in_one(pipe), file)
    file.write_bytes(file.read_bytes()[:-64])
    names = (*PACKED, "text_encoder", "vae")
    with exchanged(pipe, **{name: blank(getattr(pipe, name)) for name in names}):
        before = {name: dict(getattr(pipe, name).state_dict()) for name in names}
        with pytest.raises(lowbits.errors.FormatError):
            lowbits.load(file, into=pipe)
        for name in names:
            after = getattr(pipe, name).state_dict()
            assert all(after[key] is not None for key in before[name])
            assert all(torch.equal(after[key], t) for key, t in before[name].items())


def test_a_file_of_none_of_the_models(pipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"x.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(lowbits.errors.FormatError, match="none of the pipeline's models is in it"):
        lowbits.load(file, into=pipe)


# Refused


@pytest.fixture(scope="module")
def lora() -> Path:
    return MODEL / "lora" / "stripes.safetensors"


def test_a_lora_is_neither_packed_nor_loaded(pipe: Any, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stripes.safetensors is a LoRA: pipe.load_lora_weights"):
        lowbits.convert(lora, tmp_path / "x.safetensors", "bnb-nf4")
    with pytest.raises(ConfigError, match="stripes.safetensors is a LoRA"):
        lowbits.load(lora, into=pipe.transformer)
    assert list(tmp_path.iterdir()) == []
    assert lowbits.inspect(lora).path == str(lora)


def test_a_pipeline_is_no_model(pipe: Any) -> None:
    with pytest.raises(
        ConfigError, match="name one of text_encoder, text_encoder_2, transformer, vae; or"
    ):
        lowbits.load(MODEL, into=pipe.transformer)


def test_a_file_of_another_model_is_named(pipe: Any) -> None:
    file = MODEL / "classifier.safetensors"
    with pytest.raises(FormatError) as caught:
        lowbits.load(file, into=pipe.transformer)
    assert caught.value.path == str(file)


@pytest.mark.parametrize("name", ["out.bin", "out.PT", "out.ckpt"])
def test_a_folder_is_not_called_as_a_file_of_another_kind(name: str, tmp_path: Path) -> None:
    for source in (MODEL, MODEL / "transformer"):
        with pytest.raises(ConfigError, match="ends with neither .safetensors nor .gguf"):
            lowbits.convert(source, tmp_path / name, "bnb-nf4")
    assert list(tmp_path.iterdir()) == []
