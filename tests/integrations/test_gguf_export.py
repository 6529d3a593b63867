"""What `lowbits.save_gguf` writes, as the gguf package, diffusers and lowbits read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import GGUFQuantizationConfig
from gguf_names import FLUX_DIFFUSERS
from tiny_models import CONFIGS, tiny
from torch import nn

import lowbits
from lowbits.backends.gguf.mixes import MIXES
from lowbits.backends.gguf.quantize import QUANTIZERS
from lowbits.core.packed import PackedLayer
from lowbits.core.registry import DEFAULT
from lowbits.errors import ConfigError, NonFiniteWeightError
from lowbits.files.checkpoint import OpenOptions, open_checkpoint
from lowbits.files.gguf import read_gguf

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

gguf = pytest.importorskip("gguf", reason="needs gguf")

#: Types and mixes, and what each target does not read of them.
KINDS = ("F32", *QUANTIZERS, *MIXES)
UNREAD = {
    "comfy": {"Q1_0", "Q2_0"},
    "sdcpp": set(),
    "diffusers": {"MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"},
}
UNETS = ("sd15", "sdxl")
QUICK = ("Q8_0", "Q4_K_M", "BF16", "IQ4_XS")
#: Sizes whose rows are whole blocks of 256.
WIDE: Mapping[str, Mapping[str, Any]] = {
    "flux": {
        "num_attention_heads": 8,
        "attention_head_dim": 32,
        "axes_dims_rope": (8, 12, 12),
        "joint_attention_dim": 256,
        "pooled_projection_dim": 256,
        "num_layers": 1,
        "num_single_layers": 1,
    },
    "sd3": {
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "caption_projection_dim": 256,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 256,
    },
    "wan": {
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "ffn_dim": 512,
        "text_dim": 256,
        "freq_dim": 256,
        "num_layers": 1,
    },
}


def kinds() -> list[Any]:
    return [
        pytest.param(kind, target, marks=() if kind in QUICK else pytest.mark.slow)
        for kind in KINDS
        for target in UNREAD
        if kind not in UNREAD[target]
    ]


def state(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Return diffusers' FLUX, a block of each, in small."""
    small = {3072: 256, 4096: 256, 12288: 512, 15360: 768, 18432: 512, 6144: 512}
    shapes = {
        name: tuple(small.get(size, size) for size in shape)
        for name, shape in FLUX_DIFFUSERS.items()
    }
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    tensors["transformer_blocks.0.attn.add_q_proj.weight"] = torch.randn(256, 256).to(dtype)
    tensors["single_transformer_blocks.0.attn.norm_q.weight"] = torch.randn(32).to(dtype)
    tensors["transformer_blocks.0.attn.to_q.bias"] = torch.randn(256).to(dtype)
    tensors["single_transformer_blocks.0.odd.weight"] = torch.randn(64, 96).to(dtype)
    tensors["single_transformer_blocks.0.odder.weight"] = torch.randn(64, 33).to(dtype)
    return tensors


def package_values(path: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Return type and values of each tensor, as the gguf package reads it."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tensor.shape.tolist()[::-1]
        found[tensor.name] = (
            tensor.tensor_type.name,
            torch.tensor(values, dtype=torch.float32).view(shape),
        )
    return found


@pytest.mark.parametrize(("kind", "target"), kinds())
def test_the_gguf_package_reads_equal_values(tmp_path: Path, kind: str, target: str) -> None:
    if kind in UNREAD["comfy"]:
        pytest.skip(f"the gguf package does not decode {kind}")
    path, tensors = tmp_path / "x.gguf", state()
    report = lowbits.save_gguf(tensors, path, kind, target=target, arch="flux")
    ours, theirs = read_gguf(path), package_values(path)
    assert list(theirs) == list(tensors)
    types = {layer.fqn: layer.scheme for layer in report.layers}
    for name, (type_name, values) in theirs.items():
        assert types[name.removesuffix(".weight")] == type_name
        assert values.shape == tensors[name].shape
        assert torch.equal(ours.dequantize(name), values), name
        exact = tensors[name].float()
        if type_name in ("F32", "BF16"):
            assert torch.equal(values, exact), name
        elif type_name == "F16":
            assert torch.equal(values, exact.half().float()), name
        else:
            relative = float((values - exact).norm() / exact.norm())
            assert relative < 4 * 2 ** -DEFAULT.find(f"gguf-{type_name.lower()}")[1].code_bits
    base = MIXES[kind].type_name if kind in MIXES else kind
    assert types["transformer_blocks.0.attn.to_q"] == base
    assert types["x_embedder"] == ("F32" if kind == "F32" else _high(target))


def _high(target: str) -> str:
    return "F16" if target == "diffusers" else "BF16"


@pytest.mark.parametrize("target", UNREAD)
def test_types_that_a_target_does_not_read_are_refused(tmp_path: Path, target: str) -> None:
    for kind in UNREAD[target]:
        with pytest.raises(ConfigError, match=f"{target} does not read {kind}"):
            lowbits.save_gguf(state(), tmp_path / "x.gguf", kind, target=target, arch="flux")
    assert not list(tmp_path.iterdir())


def _diffusers_values(module: nn.Module) -> dict[str, torch.Tensor]:
    from diffusers.quantizers.gguf.utils import (
        GGML_QUANT_SIZES,
        GGUFParameter,
        dequantize_functions,
    )

    found = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, GGUFParameter):
            block, size = GGML_QUANT_SIZES[tensor.quant_type]
            blocks = tensor.as_tensor().view(torch.uint8)
            decode = dequantize_functions[tensor.quant_type]
            # In float32: without a dtype, the product of its scales is in float16.
            values = decode(blocks.reshape(-1, size), block, size, dtype=torch.float32)
            found[name] = values.reshape(*blocks.shape[:-1], -1)
        else:
            found[name] = tensor.detach().float()
    return found


def _ours(path: Path, name: str) -> dict[str, torch.Tensor]:
    model = tiny(name, **WIDE[name])
    lowbits.load(path, into=model)
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        lowbits.dequantize(model)
    return dict(model.state_dict())


DIFFUSERS = [k for k in KINDS if k not in UNREAD["diffusers"]]


@pytest.mark.parametrize(
    "kind",
    [k if k in ("Q4_K_M", "Q8_0") else pytest.param(k, marks=pytest.mark.slow) for k in DIFFUSERS],
)
@pytest.mark.parametrize(
    ("model_name", "names"),
    [(n, "diffusers") for n in WIDE] + [(n, "reference") for n in WIDE if n != "flux"],
)
def test_from_single_file_reads_equal_weights(
    tmp_path: Path, model_name: str, names: str, kind: str
) -> None:
    model = tiny(model_name, **WIDE[model_name])
    model.save_config(tmp_path)
    path = tmp_path / "x.gguf"
    report = lowbits.save_gguf(model, path, kind, names=names, target="diffusers")
    if kind not in ("F32", "F16", "BF16"):
        assert len(report.packed) > 5
    theirs = type(model).from_single_file(
        path,
        config=str(tmp_path),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    values, ours = _diffusers_values(theirs), _ours(path, model_name)
    assert values.keys() == ours.keys()
    for name, tensor in values.items():
        assert torch.equal(tensor, ours[name]), name
        exact = model.state_dict()[name]
        assert float((tensor - exact).norm() / exact.norm()) < 0.5


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in UNETS else ()) for n in CONFIGS]
)
@pytest.mark.parametrize("target", ["comfy", "sdcpp"])
def test_models_come_back_from_reference_names(tmp_path: Path, name: str, target: str) -> None:
    model = tiny(name)
    report = lowbits.save_gguf(model, tmp_path / "x.gguf", "F32", target=target)
    assert {layer.scheme for layer in report.layers} == {"F32"}
    other = tiny(name)
    lowbits.load(tmp_path / "x.gguf", into=other)
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["sdxl", pytest.param("sd15", marks=pytest.mark.slow)])
def test_unets_are_reshaped_and_read_back(tmp_path: Path, name: str) -> None:
    model, path = tiny(name), tmp_path / "x.gguf"
    report = lowbits.save_gguf(model, path, "Q8_0")
    reader = gguf.GGUFReader(path)
    shapes = {t.name: tuple(t.shape.tolist()[::-1]) for t in reader.tensors}
    prefix, reshaped = "comfy.gguf.orig_shape.", 0
    for field in reader.fields.values():
        if field.name.startswith(prefix):
            tensor = field.name.removeprefix(prefix)
            assert shapes[tensor][-1] == 256
            original = torch.Size(field.contents())
            assert original.numel() == torch.Size(shapes[tensor]).numel()
            assert shapes[tensor] != tuple(original)
            reshaped += 1
    assert reshaped > 20
    assert any(x.scheme == "Q8_0" and len(x.shape) == 4 for x in report.layers)
    other = tiny(name)
    lowbits.load(path, into=other)
    if any(isinstance(module, PackedLayer) for module in other.modules()):
        lowbits.dequantize(other)
    for key, tensor in model.state_dict().items():
        got = other.state_dict()[key]
        assert got.shape == tensor.shape
        assert float((got - tensor).norm() / tensor.norm()) < 0.02, key
    plain = lowbits.save_gguf(model, path, "Q8_0", target="sdcpp")
    assert not any(key.startswith(prefix) for key in read_gguf(path).metadata)
    assert not any(x.scheme == "Q8_0" and len(x.shape) == 4 for x in plain.layers)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("names", ["diffusers", "reference"])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_packed_layers_of_the_type_keep_their_bytes(
    tmp_path: Path, name: str, names: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = tiny(name, **WIDE[name]), tmp_path / "x.gguf"
    lowbits.quantize(model, f"gguf-{kind.lower()}")
    codes = _codes(model)
    report = lowbits.save_gguf(model, path, kind, names=names)
    assert not report.warnings
    other = tiny(name, **WIDE[name])
    lowbits.load(path, into=other)
    found = _codes(other)
    kept = [key for key in codes if key in found]
    assert len(kept) > 5
    assert all(torch.equal(found[key], codes[key]) for key in kept)
    assert not [text for text in caplog.messages if "second time" in text]


def test_packed_unets_keep_their_bytes_where_rows_are_reshaped(tmp_path: Path) -> None:
    model, path = tiny("sdxl"), tmp_path / "x.gguf"
    lowbits.quantize(model, "gguf-q8_0")
    before = {key: layer_values(part) for key, part in _packed(model).items()}
    lowbits.save_gguf(model, path, "Q8_0")
    other = tiny("sdxl")
    lowbits.load(path, into=other)
    lowbits.dequantize(other)
    kept = ["time_embedding", "add_embedding", "conv_in", "conv_out"]
    for key, values in before.items():
        got: Any = other.get_submodule(key).weight
        if key.split(".")[0] not in kept:
            assert torch.equal(got, values), key


def _packed(model: nn.Module) -> dict[str, PackedLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLayer)}


def layer_values(layer: PackedLayer) -> torch.Tensor:
    from lowbits.core.packed import packed_weight

    packed = packed_weight(layer, "weight")
    backend, _ = DEFAULT.find(packed.scheme)
    assert backend
    shape = layer.lowbits_layouts["weight"].shape
    return backend.unpack(packed, torch.float32).view(shape)


def _codes(model: nn.Module) -> dict[str, torch.Tensor]:
    from lowbits.core.packed import packed_weight

    return {key: packed_weight(part, "weight")["qdata"] for key, part in _packed(model).items()}


def test_another_form_is_told_of(tmp_path: Path) -> None:
    model = tiny("flux", **WIDE["flux"])
    lowbits.quantize(model, "bnb-nf4")
    report = lowbits.save_gguf(model, tmp_path / "x.gguf", "Q8_0")
    assert [text for text in report.warnings if "bnb-nf4 to gguf-q8_0" in text]


def test_other_types_than_f32_are_unquantized(tmp_path: Path) -> None:
    model = tiny("flux", **WIDE["flux"])
    lowbits.quantize(model, "gguf-q8_0")
    report = lowbits.save_gguf(model, tmp_path / "x.gguf", "F32")
    assert not report.warnings
    assert {layer.scheme for layer in report.layers} == {"F32"}
    assert not report.packed


def test_names_of_the_reference_need_a_reference(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 64), nn.LayerNorm(64), nn.Embedding(64, 256))
    with pytest.raises(ConfigError, match="no form with the reference's names"):
        lowbits.save_gguf(model, tmp_path / "x.gguf", "Q8_0")
    with pytest.raises(ConfigError, match="names: got 'own'"):
        lowbits.save_gguf(model, tmp_path / "x.gguf", "Q8_0", names="own")
    with pytest.raises(ConfigError, match="ComfyUI-GGUF needs an architecture"):
        lowbits.save_gguf(model, tmp_path / "x.gguf", "Q8_0", names="diffusers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["sdcpp", "diffusers"])
def test_any_module_with_its_own_names(tmp_path: Path, target: str) -> None:
    model, path = nn.Sequential(nn.Linear(256, 64), nn.Embedding(64, 256)), tmp_path / "x.gguf"
    report = lowbits.save_gguf(model, path, "Q8_0", names="diffusers", target=target)
    assert {layer.fqn: layer.scheme for layer in report.layers} == {
        "0": "Q8_0",
        "0.bias": "F32",
        "1": "F16",
    }
    assert "general.architecture" not in read_gguf(path).metadata
    other = nn.Sequential(nn.Linear(256, 64), nn.Embedding(64, 256))
    lowbits.load(path, into=other)
    ours, theirs = (m.get_parameter("1.weight") for m in (other, model))
    assert torch.equal(ours, theirs.half().float())


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("flux", "flux"),
        ("sd3", "sd3"),
        ("sd15", "sd1"),
        ("sdxl", "sdxl"),
        ("wan", "wan"),
        ("qwen-image", "qwen_image"),
        ("lumina2", "lumina2"),
        ("z-image", "lumina2"),
        ("aura", "aura"),
        ("ltx", "ltxv"),
        ("hunyuan", "hyvid"),
    ],
)
@pytest.mark.parametrize("names", ["diffusers", "reference"])
def test_the_architecture_is_recognized(tmp_path: Path, name: str, arch: str, names: str) -> None:
    lowbits.save_gguf(tiny(name), tmp_path / "x.gguf", "Q8_0", names=names)
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["general.architecture"].contents() == arch
    assert fields["general.quantization_version"].contents() == 2
    assert fields["general.file_type"].contents() == 7


def test_the_architecture_may_be_named_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    lowbits.save_gguf(state(), path, "Q4_K_M", arch="sd3")
    metadata = read_gguf(path).metadata
    assert metadata["general.architecture"] == "sd3"
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    lowbits.save_gguf(state(), path, "NVFP4", arch=None, target="sdcpp")
    assert "general.architecture" not in read_gguf(path).metadata
    with pytest.raises(ConfigError, match="needs an architecture"):
        lowbits.save_gguf(state(), path, "Q8_0", arch=None)
    with pytest.raises(ConfigError, match="did you mean 'flux'"):
        lowbits.save_gguf(state(), path, "Q8_0", arch="fluxx")


def test_tensors_of_five_dimensions(tmp_path: Path) -> None:
    model, path = tiny("wan"), tmp_path / "x.gguf"
    name = "patch_embedding.weight"
    for target in UNREAD:
        lowbits.save_gguf(model, path, "Q8_0", target=target)
        kind, values = package_values(path)[name]
        assert kind == "F32"
        assert torch.equal(values, model.patch_embedding.weight)
    other = tiny("wan")
    lowbits.load(path, into=other)
    assert torch.equal(other.patch_embedding.weight, model.patch_embedding.weight)


def test_values_beyond_float16_are_reported(tmp_path: Path) -> None:
    tensors, path = state(torch.float32), tmp_path / "x.gguf"
    wide = "transformer_blocks.0.ff.net.2.weight"
    outer = "x_embedder.weight"
    tensors[wide][0, 0] = -70000.0
    tensors[outer][0, 0] = 70000.0
    report = {x.fqn: x for x in lowbits.save_gguf(tensors, path, "Q4_K").layers}
    layer = report[wide.removesuffix(".weight")]
    assert layer.scheme == "F32"
    assert "instead of Q4_K" in layer.reason
    assert "70000" in layer.reason
    assert layer.source == "-"
    assert report["x_embedder"].scheme == "F32"
    values = package_values(path)
    assert all(torch.equal(values[name][1], tensors[name]) for name in (wide, outer))
    tensors[wide][0, 0] = 65504.0
    report = {x.fqn: x for x in lowbits.save_gguf(tensors, path, "Q4_K").layers}
    assert report[wide.removesuffix(".weight")].scheme == "Q4_K"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    tensors = state()
    name = "transformer_blocks.0.attn.to_q.weight"
    tensors[name][0, 0] = value
    with pytest.raises(NonFiniteWeightError, match=name):
        lowbits.save_gguf(tensors, tmp_path / "x.gguf", "Q8_0")
    model = tiny("flux", **WIDE["flux"])
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_q.weight[0, 0] = value
    with pytest.raises(NonFiniteWeightError, match=r"img_attn\.qkv"):
        lowbits.save_gguf(model, tmp_path / "x.gguf", "Q8_0")
    assert not list(tmp_path.iterdir())


def test_state_dicts_are_written_as_they_are(tmp_path: Path) -> None:
    tensors, path = state(), tmp_path / "x.gguf"
    lowbits.save_gguf(tensors, path, "Q8_0")
    assert list(read_gguf(path).tensors) == list(tensors)
    opened = open_checkpoint(path, OpenOptions(DEFAULT))
    assert opened.architecture == "flux"
    for wrong in ({}, {"a": 1}, [1], None, "x"):
        with pytest.raises(ConfigError):
            lowbits.save_gguf(wrong, path, "Q8_0")


def test_progress_and_cancelling(tmp_path: Path) -> None:
    events: list[lowbits.ProgressEvent] = []
    path = tmp_path / "x.gguf"
    lowbits.save_gguf(state(), path, "Q8_0", progress=events.append)
    assert events[-1].done_bytes == events[-1].total_bytes
    assert [event.fqn for event in events] == [*state(), *state()]
    assert [event.stage for event in events] == [s for s in ("check", "convert") for _ in state()]
    before, token = path.read_bytes(), lowbits.CancelToken()
    token.cancel()
    with pytest.raises(lowbits.errors.CancelledError):
        lowbits.save_gguf(state(), path, "Q4_0", cancel=token)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.safetensors", {}, "path: .*x.safetensors is no .gguf file"),
        ("", {}, "path: .* is no .gguf file"),
        ("x.gguf", {"arch": 3}, "arch: got 3"),
        ("x.gguf", {"type_or_mix": None}, "type_or_mix: got None"),
        ("x.gguf", {"names": "mine"}, "names: got 'mine', expected one of"),
    ],
)
def test_values_that_mean_nothing_are_refused_by_name(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    kind = options.pop("type_or_mix", "Q8_0")
    with pytest.raises(ConfigError, match=message):
        lowbits.save_gguf(state(), tmp_path / name, kind, **options)
    assert not list(tmp_path.iterdir())
