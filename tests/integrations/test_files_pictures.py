"""mini-FLUX through every kind of file: it draws the picture that it drew before."""

from __future__ import annotations

import functools
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
from oracles import bitsandbytes_values
from pipelines import PIPELINES, draw
from safetensors.torch import save_file
from torch import nn

import lowbits

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")

#: One scheme of each backend, the one with most to store; the others are slow.
SCHEMES = schemes("bnb-nf4-dq", "torchao-int4", "quanto-int4", "float8-e4m3fn", "gguf-q8_0")


@pytest.fixture(scope="module")
def pipe(original: Any) -> Any:
    """Return one pipeline for all tests: each leaves it as it was."""
    return original


def assert_same_values(module: nn.Module, expected: Mapping[str, Tensor]) -> None:
    found = values(module)
    assert set(found) == set(expected)
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not wrong


def as_applied(pipe: Any, report: lowbits.Report) -> Tensor:
    """Return the picture of the transformer quantized as a report says, layer by layer."""
    if not report.packed:
        return picture(pipe)
    rules = {layer.fqn: layer.scheme for layer in report.packed}
    rules = {"*": "native", **rules}
    with lowbits.quantize(pipe.transformer, report.packed[0].scheme, rules=rules):
        assert packed_layers(pipe.transformer) == {
            f"{layer.fqn}.weight": layer.scheme for layer in report.packed
        }
        return picture(pipe)


# lowbits' own


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_saved_pipeline(pipe: Any, plain: Tensor, tmp_path: Path, scheme: str) -> None:
    with lowbits.apply(pipe, scheme, device="cpu"):
        expected = picture(pipe)
        schemes = {name: packed_layers(getattr(pipe, name)) for name in PACKED}
        pipe.save_pretrained(tmp_path)
    assert torch.equal(picture(pipe), plain)
    assert scheme == "gguf-bf16" or not torch.equal(expected, plain)
    loaded = lowbits.load_pipeline(tmp_path)
    assert torch.equal(picture(loaded), expected)
    assert {name: packed_layers(getattr(loaded, name)) for name in PACKED} == schemes


@pytest.mark.parametrize("name", PIPELINES)
def test_a_saved_pipeline_of_each_kind(tmp_path: Path, name: str) -> None:
    pipe: Any = PIPELINES[name].build()
    lowbits.quantize(pipe, "bnb-nf4")
    expected = draw(name, pipe)
    pipe.save_pretrained(tmp_path)
    loaded = lowbits.load_pipeline(tmp_path)
    assert type(loaded) is type(pipe)
    assert torch.equal(draw(name, loaded), expected)


def test_an_ip_adapter_is_saved_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As diffusers leaves it out: it is loaded by itself."""
    pipe: Any = PIPELINES["sd15"].build()
    lowbits.quantize(pipe, "bnb-nf4")
    expected, width = draw("sd15", pipe), pipe.unet.config.cross_attention_dim
    layers = [n for n in pipe.unet.attn_processors if n.endswith("attn2.processor")]
    hidden = [pipe.unet.get_submodule(n.rpartition(".")[0]).to_k.out_features for n in layers]
    factors = {
        f"{2 * number + 1}.to_{part}_ip.weight": torch.randn(size, width)
        for number, size in enumerate(hidden)
        for part in "kv"
    }
    projection = {"proj.weight": torch.randn(4 * width, 32), "proj.bias": torch.randn(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    state = {"image_proj": projection, "ip_adapter": factors}
    pipe.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
    pipe.save_pretrained(tmp_path)
    loaded = lowbits.load_pipeline(tmp_path)
    assert "unet: not used: down_blocks.0" in caplog.text
    assert "processor.to_k_ip" in caplog.text
    loaded.unet.config["encoder_hid_dim_type"] = None  # diffusers saves that it was there
    loaded.unet.encoder_hid_proj = None
    assert torch.equal(draw("sd15", loaded), expected)


def test_a_saved_pipeline_whose_every_layer_is_packed(pipe: Any, tmp_path: Path) -> None:
    """Convolutions of the VAE, embeddings, CLIP."""
    names = [*PACKED, "text_encoder", "vae"]
    with lowbits.apply(
        pipe, "torchao-int8", components=names, rules={"*": "torchao-int8"}, device="cpu"
    ):
        expected = picture(pipe)
        lowbits.save(pipe, tmp_path)
    loaded = lowbits.load_pipeline(tmp_path)
    assert torch.equal(picture(loaded), expected)
    assert not list(tmp_path.rglob("diffusion_pytorch_model*"))
    assert not list(tmp_path.rglob("model*.safetensors"))
    # What was loaded can be saved, and loaded, once more.
    loaded.save_pretrained(tmp_path / "again")
    again = lowbits.load_pipeline(tmp_path / "again")
    assert torch.equal(picture(again), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_saved_model(pipe: Any, tmp_path: Path, scheme: str) -> None:
    file = tmp_path / "t.safetensors"
    with lowbits.apply(pipe, scheme, device="cpu", components=["transformer"]):
        expected = picture(pipe)
        lowbits.save(pipe.transformer, file)
    for model in (blank(pipe.transformer), empty(pipe.transformer)):
        lowbits.load(file, into=model)
        with exchanged(pipe, transformer=model):
            assert torch.equal(picture(pipe), expected)


def test_a_model_in_full_precision(pipe: Any, plain: Tensor, tmp_path: Path) -> None:
    for name in (*PACKED, "text_encoder", "vae"):
        part = getattr(pipe, name)
        lowbits.save(part, tmp_path / name)
        model = empty(part) if name == "transformer" else blank(part)
        lowbits.load(tmp_path / name, into=model)
        with exchanged(pipe, **{name: model}):
            assert torch.equal(picture(pipe), plain), name


# GGUF


@pytest.mark.parametrize("names", ["reference", "diffusers"])
@pytest.mark.parametrize("type_name", TYPES)
def test_gguf(pipe: Any, tmp_path: Path, type_name: str, names: str) -> None:
    file = tmp_path / "t.gguf"
    lowbits.save_gguf(pipe.transformer, file, type_name, names=names)
    model = blank(pipe.transformer)
    report = lowbits.load(file, into=model)
    assert len(report.packed) > 10 or type_name in ("F16", "BF16")
    with exchanged(pipe, transformer=model):
        found = picture(pipe)
    # Tensors that the file has in float16 and bfloat16 lost some bits there.
    rest = {
        name: tensor for name, tensor in values(model).items() if name not in packed_layers(model)
    }
    original = blank(pipe.transformer)
    original.load_state_dict({**pipe.transformer.state_dict(), **rest})
    with exchanged(pipe, transformer=original):
        assert torch.equal(as_applied(pipe, report), found)


def test_gguf_of_a_mix(pipe: Any, tmp_path: Path) -> None:
    """Types that differ between layers, some of them of fused ones."""
    test_gguf(pipe, tmp_path, "Q4_K_M", "reference")


@pytest.mark.parametrize("names", ["reference", "diffusers"])
def test_gguf_into_a_model_without_weights(pipe: Any, tmp_path: Path, names: str) -> None:
    file = tmp_path / "t.gguf"
    lowbits.save_gguf(pipe.transformer, file, "Q8_0", names=names)
    pictures = []
    for model in (blank(pipe.transformer), empty(pipe.transformer)):
        lowbits.load(file, into=model)
        with exchanged(pipe, transformer=model):
            pictures.append(picture(pipe))
    assert torch.equal(*pictures)


def test_gguf_of_a_packed_model_keeps_its_bytes(pipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.gguf"
    scheme = "gguf-q8_0"
    with lowbits.quantize(pipe.transformer, scheme):
        expected = picture(pipe)
        before, decoded = packed_layers(pipe.transformer), values(pipe.transformer)
        lowbits.save_gguf(pipe.transformer, file, "Q8_0", target="sdcpp")
    model = blank(pipe.transformer)
    lowbits.load(file, into=model)
    after = packed_layers(model)
    both = [name for name in before if name in after]
    assert len(both) > 10
    found = values(model)
    assert all(torch.equal(found[name], decoded[name]) for name in both)
    with exchanged(pipe, transformer=model):
        assert float((picture(pipe) - expected).abs().mean()) < 0.01


@pytest.mark.parametrize("type_name", ["Q8_0", pytest.param("Q4_K", marks=pytest.mark.slow)])
def test_gguf_of_diffusers_is_adopted(pipe: Any, tmp_path: Path, type_name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("gguf")
    file = tmp_path / "t.gguf"
    lowbits.save_gguf(
        pipe.transformer, file, type_name, names="diffusers", target="diffusers", arch=None
    )
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    theirs = diffusers.FluxTransformer2DModel.from_single_file(
        file,
        quantization_config=config,
        config=str(MODEL),
        subfolder="transformer",
        dtype=torch.float32,
        local_files_only=True,
    )
    with exchanged(pipe, transformer=theirs):
        expected = picture(pipe)
        report = lowbits.adopt(pipe)
        assert {layer.scheme for layer in report.packed} == {f"gguf-{type_name.lower()}"}
        adopted = picture(pipe)
    # diffusers decodes in float16.
    torch.testing.assert_close(adopted, expected, rtol=0, atol=2e-3)
    model = blank(pipe.transformer)
    lowbits.load(file, into=model)
    with exchanged(pipe, transformer=model):
        assert torch.equal(picture(pipe), adopted)


# Files of others


def test_reference_names_in_full_precision(pipe: Any, plain: Tensor, tmp_path: Path) -> None:
    tensors, _ = referenced(pipe.transformer)
    assert "double_blocks.0.img_attn.qkv.weight" in tensors
    for prefix in ("", "model.diffusion_model."):
        file = tmp_path / "t.safetensors"
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, file)
        model = empty(pipe.transformer)
        lowbits.load(file, into=model)
        with exchanged(pipe, transformer=model):
            assert torch.equal(picture(pipe), plain)


@pytest.mark.parametrize("kind", ["nf4", pytest.param("fp4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("nested", [False, True])
def test_forge_4bit(pipe: Any, tmp_path: Path, kind: str, *, nested: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    tensors, linear = referenced(pipe.transformer)
    stored: dict[str, Tensor] = {}
    decoded = dict(tensors)
    for name, tensor in tensors.items():
        if name not in linear:
            stored[f"model.diffusion_model.{name}"] = tensor
            continue
        codes, state = bnb.quantize_4bit(
            tensor, quant_type=kind, blocksize=64, compress_statistics=nested
        )
        decoded[name] = bitsandbytes_values(codes, state)
        parts = {"": codes} | {f".{k}": v for k, v in state.as_dict(packed=True).items()}
        stored |= {f"model.diffusion_model.{name}{part}": value for part, value in parts.items()}
    assert_draws_as_decoded(pipe, tmp_path, stored, decoded, f"bnb-{kind}")


def test_comfy_scaled_float8(pipe: Any, tmp_path: Path) -> None:
    tensors, linear = referenced(pipe.transformer)
    stored: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    decoded = dict(tensors)
    for name, tensor in tensors.items():
        if name not in linear:
            stored[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        codes = (tensor / scale).to(torch.float8_e4m3fn)
        decoded[name] = codes.float() * scale
        stored |= {name: codes, name.removesuffix("weight") + "scale_weight": scale}
    assert_draws_as_decoded(pipe, tmp_path, stored, decoded, "float8-e4m3fn")


def test_plain_float8(pipe: Any, tmp_path: Path) -> None:
    tensors, linear = referenced(pipe.transformer)
    stored = {n: t.to(torch.float8_e4m3fn) if n in linear else t for n, t in tensors.items()}
    decoded = {n: t.float() for n, t in stored.items()}
    assert_draws_as_decoded(pipe, tmp_path, stored, decoded, "float8-e4m3fn-raw")


def assert_draws_as_decoded(
    pipe: Any,
    folder: Path,
    stored: Mapping[str, Tensor],
    decoded: Mapping[str, Tensor],
    scheme: str,
) -> None:
    """See that a file makes packed layers of the values that its library decodes it to."""
    save_file(dict(stored), folder / "stored.safetensors")
    save_file(dict(decoded), folder / "decoded.safetensors")
    ordinary = blank(pipe.transformer)
    lowbits.load(folder / "decoded.safetensors", into=ordinary)
    assert not packed_layers(ordinary)
    for model in (blank(pipe.transformer), empty(pipe.transformer)):
        lowbits.load(folder / "stored.safetensors", into=model)
        schemes = packed_layers(model)
        linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert set(schemes) == linear
        assert {scheme} <= set(schemes.values()) <= {scheme, f"{scheme}-dq"}
        assert_same_values(model, values(ordinary))
        with exchanged(pipe, transformer=ordinary):
            expected = picture(pipe)
        with exchanged(pipe, transformer=model):
            torch.testing.assert_close(picture(pipe), expected, rtol=0, atol=2e-5)


def _quanto(weights: str) -> Any:
    pytest.importorskip("optimum.quanto")
    return pytest.importorskip("diffusers").QuantoConfig(weights_dtype=weights)


def _torchao(name: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return pytest.importorskip("diffusers").TorchAoConfig(getattr(quantization, name)())


@pytest.mark.parametrize(
    ("make", "scheme", "atol"),
    [
        (functools.partial(_quanto, "int8"), "quanto-int8", 2e-3),
        (functools.partial(_torchao, "Int8WeightOnlyConfig"), "torchao-int8", 2e-5),
        (functools.partial(_torchao, "Float8WeightOnlyConfig"), "torchao-float8", 2e-5),
    ],
    ids=["quanto-int8", "torchao-int8", "torchao-float8"],
)
def test_folders_of_diffusers(
    pipe: Any, tmp_path: Path, make: Any, scheme: str, atol: float
) -> None:
    cls = type(pipe.transformer)
    theirs = cls.from_pretrained(
        MODEL / "transformer", quantization_config=make(), torch_dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    with exchanged(pipe, transformer=theirs):
        expected = picture(pipe)
        lowbits.adopt(pipe)
        adopted, schemes = picture(pipe), packed_layers(theirs)
    torch.testing.assert_close(adopted, expected, rtol=0, atol=atol)
    assert set(schemes.values()) == {scheme}
    for model in (blank(pipe.transformer), empty(pipe.transformer)):
        lowbits.load(tmp_path, into=model, dtype=torch.float32)
        assert packed_layers(model) == schemes
        with exchanged(pipe, transformer=model):
            assert torch.equal(picture(pipe), adopted)


def test_a_folder_of_transformers_in_nf4(pipe: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = type(pipe.text_encoder_2).from_pretrained(
        MODEL / "text_encoder_2", quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path)
    with exchanged(pipe, text_encoder_2=theirs):
        lowbits.adopt(pipe)
        expected, schemes = picture(pipe), packed_layers(theirs)
    model = blank(pipe.text_encoder_2)
    lowbits.load(tmp_path, into=model)
    assert packed_layers(model) == schemes
    with exchanged(pipe, text_encoder_2=model):
        assert torch.equal(picture(pipe), expected)
