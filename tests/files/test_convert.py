"""`lowbits.convert`: from every kind of checkpoint to every scheme."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from converting import bits, contents, loaded, net, net_file, require_same, stored
from safetensors.torch import load_file, save_file
from schemes import every_scheme
from tiny_models import tiny
from torch import nn
from transformers import T5Config, T5EncoderModel

import lowbits
from lowbits.core.registry import DEFAULT
from lowbits.errors import (
    ConfigError,
    NoCapableBackendError,
    SourceUnavailableError,
)
from lowbits.files.checkpoint import OpenOptions, open_checkpoint
from lowbits.files.own import weights_of

if TYPE_CHECKING:
    from pathlib import Path

ONE_EACH = ("bnb-nf4", "torchao-int8", "quanto-int8", "float8-e4m3fn", "gguf-q4_0")


@pytest.mark.parametrize("scheme", every_scheme())
def test_a_lone_file_becomes_what_quantize_makes_of_its_model(tmp_path: Path, scheme: str) -> None:
    src, dst = net_file(tmp_path), tmp_path / "packed.safetensors"
    report = lowbits.convert(src, dst, scheme)
    wanted = loaded(src, net())
    handle = lowbits.quantize(wanted, scheme)
    require_same(loaded(dst, net()), wanted)
    assert {layer.fqn for layer in report.packed} == {x.fqn for x in handle.report().packed}
    assert {x.fqn: x.bytes_after for x in report.layers} == {
        x.fqn: x.bytes_after for x in handle.report().layers
    }


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ONE_EACH)
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_2", "vae"])
def test_folders_become_what_quantize_makes_of_their_models(
    tmp_path: Path, flux_folder: Path, part: str, scheme: str
) -> None:
    _compare_folder(tmp_path, flux_folder / part, scheme)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_folders_in_nf4(tmp_path: Path, flux_folder: Path, part: str) -> None:
    _compare_folder(tmp_path, flux_folder / part, "bnb-nf4")


def _compare_folder(tmp_path: Path, src: Path, scheme: str) -> None:
    def model() -> nn.Module:
        config = json.loads((src / "config.json").read_text())
        if "_class_name" in config:
            cls: Any = getattr(diffusers, config["_class_name"])
            return cls.from_pretrained(src, dtype=torch.bfloat16)  # type: ignore[no-any-return]
        import transformers

        cls = getattr(transformers, config["architectures"][0])
        return cls.from_pretrained(src, dtype=torch.bfloat16)  # type: ignore[no-any-return]

    try:
        lowbits.convert(src, tmp_path / "out", scheme)
    except NoCapableBackendError:
        with pytest.raises(NoCapableBackendError):  # no row of the VAE is whole blocks
            lowbits.quantize(model(), scheme)
        assert src.name == "vae"
        return
    assert (tmp_path / "out" / "config.json").read_bytes() == (src / "config.json").read_bytes()
    wanted = model()
    lowbits.quantize(wanted, scheme)
    require_same(loaded(tmp_path / "out", model()), wanted)


@pytest.mark.parametrize("scheme", ["bnb-nf4", pytest.param("gguf-q8_0", marks=pytest.mark.slow)])
def test_a_pipeline_is_packed_as_apply_packs_it(
    tmp_path: Path, flux_folder: Path, scheme: str
) -> None:
    report = lowbits.convert(flux_folder, tmp_path / "out", scheme)
    assert {layer.component for layer in report.packed} == {"transformer", "text_encoder_2"}
    got = lowbits.load_pipeline(tmp_path / "out")
    wanted = diffusers.FluxPipeline.from_pretrained(flux_folder, dtype=torch.bfloat16)
    lowbits.quantize(wanted, scheme)
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        require_same(getattr(got, name), getattr(wanted, name))
    assert not list((tmp_path / "out" / "transformer").glob("diffusion_pytorch_model*"))


def test_patterns_go_over_a_whole_pipeline(tmp_path: Path, flux_folder: Path) -> None:
    report = lowbits.convert(
        flux_folder,
        tmp_path / "out",
        "bnb-nf4",
        rules={"vae.*": "float8-e4m3fn", "*.SelfAttention.*": "quanto-int8"},
        skip=["transformer.single_transformer_blocks.*"],
    )
    schemes = {
        (layer.component, "single" in layer.fqn): layer.scheme
        for layer in report.packed
        if "SelfAttention" not in layer.fqn
    }
    assert schemes == {
        ("transformer", False): "bnb-nf4",
        ("text_encoder_2", False): "bnb-nf4",
        ("vae", False): "float8-e4m3fn",
    }
    assert {x.scheme for x in report.packed if "SelfAttention" in x.fqn} == {"quanto-int8"}
    got = lowbits.load_pipeline(tmp_path / "out")
    assert contents(weights_of(got.vae)[0])["encoder.mid_block.attentions.0.to_q.weight"][0]
    with pytest.raises(ConfigError, match="matches no layer"):
        lowbits.convert(flux_folder, tmp_path / "x", "bnb-nf4", skip=["unet.*"])
    assert not (tmp_path / "x" / "model_index.json").exists()


def test_shards_are_one_model(tmp_path: Path) -> None:
    tensors = net().state_dict()
    names = list(tensors)
    shards = {f"m-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = tmp_path / "m.safetensors.index.json"
    listed = {name: file for file, part in shards.items() for name in part}
    index.write_text(json.dumps({"weight_map": listed}))
    whole = tmp_path / "whole.safetensors"
    save_file(tensors, whole)
    lowbits.convert(index, tmp_path / "a.safetensors", "bnb-nf4")
    lowbits.convert(whole, tmp_path / "b.safetensors", "bnb-nf4")
    require_same(
        loaded(tmp_path / "a.safetensors", net()), loaded(tmp_path / "b.safetensors", net())
    )


@pytest.mark.parametrize("scheme", ["bnb-nf4", "gguf-q5_1"])
def test_from_gguf(tmp_path: Path, scheme: str) -> None:
    src, dst = tmp_path / "net.gguf", tmp_path / "out.safetensors"
    lowbits.save_gguf(net(), src, "F16", names="diffusers", target="sdcpp")
    lowbits.convert(src, dst, scheme)
    wanted = loaded(src, net())
    lowbits.quantize(wanted, scheme)
    require_same(loaded(dst, net()), wanted)


def test_to_gguf(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    src, dst = net_file(tmp_path), tmp_path / "out.gguf"
    report = lowbits.convert(src, dst, "gguf-q4_k")
    assert any("architecture is not known" in text for text in report.warnings)
    assert {x.fqn for x in report.packed} == {
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")
    } | {"head"}
    wanted = loaded(src, net())
    lowbits.quantize(wanted, "gguf-q4_k", skip=["embed_tokens"], rules={"head": "gguf-q4_k"})
    got = loaded(dst, net())
    require_same(got.get_submodule("blocks"), wanted.get_submodule("blocks"))
    assert contents(weights_of(got)[0])["head.weight"][0] == "gguf-q4_k"


def test_folders_become_gguf_with_the_names_that_others_read(
    tmp_path: Path, flux_folder: Path
) -> None:
    report = lowbits.convert(flux_folder / "transformer", tmp_path / "x.gguf", "gguf-q8_0")
    opened = open_checkpoint(tmp_path / "x.gguf", OpenOptions(DEFAULT))
    assert opened.architecture == "flux"
    assert opened.weights["double_blocks.0.img_attn.qkv.weight"].scheme == "gguf-q8_0"
    assert not report.warnings
    assert len(report.table().splitlines()) < 40
    model = diffusers.FluxTransformer2DModel.from_pretrained(flux_folder / "transformer")
    wanted = tmp_path / "y.gguf"
    lowbits.save_gguf(model.to(torch.bfloat16), wanted, "Q8_0")
    assert wanted.read_bytes() == (tmp_path / "x.gguf").read_bytes()
    report = lowbits.convert(flux_folder / "text_encoder_2", tmp_path / "t5.gguf", "gguf-q8_0")
    assert any("the model's own names" in text for text in report.warnings)
    encoder = T5EncoderModel.from_pretrained(flux_folder / "text_encoder_2")
    assert any(
        x.scheme == "gguf-q8_0" for x in lowbits.load(tmp_path / "t5.gguf", into=encoder).layers
    )


def test_the_longer_search_is_used(tmp_path: Path) -> None:
    src, name = net_file(tmp_path), "blocks.0.up.weight"
    values = load_file(src)[name].float()
    errors = {}
    for scheme in ("gguf-q4_k", "gguf-q4_k-best"):
        lowbits.convert(src, tmp_path / f"{scheme}.gguf", scheme)
        got = stored(tmp_path / f"{scheme}.gguf")[name]
        assert got.scheme == "gguf-q4_k"
        packed: Any = got.read()
        backend, _ = DEFAULT.find("gguf-q4_k")
        assert backend
        errors[scheme] = float((backend.unpack(packed, torch.float32) - values).square().sum())
    assert errors["gguf-q4_k-best"] < errors["gguf-q4_k"]
    saved = tmp_path / "saved.gguf"
    lowbits.save_gguf(load_file(src), saved, "Q4_K-best", target="sdcpp")
    expected: Any = stored(tmp_path / "gguf-q4_k-best.gguf")[name].read()
    again: Any = stored(saved)[name].read()
    assert torch.equal(again["qdata"], expected["qdata"])
    with pytest.raises(ConfigError, match="Q8_0 is not searched longer; these are: Q4_0, Q6_K"):
        lowbits.save_gguf(load_file(src), tmp_path / "not.gguf", "Q8_0-best", target="sdcpp")
    assert not (tmp_path / "not.gguf").exists()


def test_what_was_searched_longer_keeps_its_bytes_in_gguf(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    src, own, dst = net_file(tmp_path), tmp_path / "own.safetensors", tmp_path / "x.gguf"
    lowbits.convert(src, own, "gguf-q4_0-best", skip=["embed_tokens"])
    report = lowbits.convert(own, dst, "gguf-q4_0")
    assert not any("second time" in text for text in report.warnings)
    name = "blocks.1.down.weight"
    before, after = contents(stored(own))[name], contents(stored(dst))[name]
    assert torch.equal(before[1]["qdata"], after[1]["qdata"])


def test_weights_of_the_scheme_keep_their_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    src, first, second = net_file(tmp_path), *(tmp_path / f"{i}.safetensors" for i in "12")
    lowbits.convert(src, first, "bnb-nf4", rules={"*.down": "gguf-q8_0"})
    report = lowbits.convert(first, second, "bnb-nf4", on_requantize="allow")
    before, after = contents(stored(first)), contents(stored(second))
    for name, (scheme, parts) in before.items():
        if scheme == "gguf-q8_0":
            assert after[name][0] == "bnb-nf4"
            continue
        assert after[name][0] == scheme
        assert all(torch.equal(bits(parts[k]), bits(after[name][1][k])) for k in parts)
    assert not report.warnings
    report = lowbits.convert(first, second, "bnb-nf4", rules={"*.down": "gguf-q8_0"})
    assert not report.warnings
    assert contents(stored(second)).keys() == before.keys()
    assert not caplog.records


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_a_second_quantization_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    src, low = net_file(tmp_path), tmp_path / "low.safetensors"
    lowbits.convert(src, low, "bnb-nf4")
    dst = tmp_path / f"dst.{suffix}"
    with caplog.at_level(logging.WARNING, "lowbits"):
        report = lowbits.convert(low, dst, "gguf-q8_0")
    texts = [record.getMessage() for record in caplog.records]
    assert len([text for text in texts if "bnb-nf4 to gguf-q8_0" in text]) == 1
    assert len([text for text in report.warnings if "bnb-nf4 to gguf-q8_0" in text]) == 1
    caplog.clear()
    before = dst.read_bytes()
    with pytest.raises(SourceUnavailableError, match="bnb-nf4 to gguf-q5_0"):
        lowbits.convert(low, dst, "gguf-q5_0", on_requantize="error")
    assert dst.read_bytes() == before
    report = lowbits.convert(low, dst, "gguf-q5_0", on_requantize="allow")
    assert not any("second time" in text for text in (*report.warnings, *caplog.messages))
    with pytest.raises(ConfigError, match="on_requantize: got 'never'"):
        lowbits.convert(low, dst, "gguf-q5_0", on_requantize="never")


def test_a_pipeline_of_two_models_warns_once(
    tmp_path: Path, flux_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lowbits.convert(flux_folder, tmp_path / "low", "bnb-nf4")
    with caplog.at_level(logging.WARNING, "lowbits"):
        report = lowbits.convert(tmp_path / "low", tmp_path / "other", "bnb-fp4")
    assert len([t for t in report.warnings if "bnb-nf4 to bnb-fp4" in t]) == 1
    assert len([t for t in caplog.messages if "bnb-nf4 to bnb-fp4" in t]) == 1


def test_16_bits_are_not_quantized_a_second_time(tmp_path: Path) -> None:
    src, half, low = net_file(tmp_path), tmp_path / "h.safetensors", tmp_path / "l.safetensors"
    lowbits.convert(src, half, "gguf-bf16")
    assert not lowbits.convert(half, tmp_path / "x.safetensors", "bnb-nf4").warnings
    lowbits.convert(src, low, "bnb-nf4")
    warnings = lowbits.convert(low, tmp_path / "x.gguf", "gguf-f16").warnings
    assert not any("second time" in text for text in warnings)


def test_rules_and_skip(tmp_path: Path) -> None:
    src, dst = net_file(tmp_path), tmp_path / "x.safetensors"
    rules = {"blocks.*": "quanto-int8", "*.down": "native", "head": "bnb-fp4"}
    lowbits.convert(src, dst, "bnb-nf4", rules=rules, skip=["blocks.1", "embed_tokens"])
    schemes = {name: weight.scheme for name, weight in stored(dst).items() if weight.scheme}
    assert schemes == {"blocks.0.up.weight": "quanto-int8", "head.weight": "bnb-fp4"}
    for wrong in ({"rules": {"block.*": "bnb-nf4"}}, {"skip": ["unet"]}):
        with pytest.raises(ConfigError, match="matches no layer"):
            lowbits.convert(src, dst, "bnb-nf4", **wrong)
    with pytest.raises(ConfigError, match="skip: got the string"):
        lowbits.convert(src, dst, "bnb-nf4", skip="head")
    assert {n: w.scheme for n, w in stored(dst).items() if w.scheme} == schemes


def test_configs_of_diffusers_say_what_to_skip(tmp_path: Path) -> None:
    src, dst = net_file(tmp_path), tmp_path / "x.safetensors"
    config = diffusers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float16,
        llm_int8_skip_modules=["down"],
    )
    lowbits.convert(src, dst, config)
    weights = stored(dst)
    assert weights["blocks.0.up.weight"].scheme == "bnb-nf4"
    assert weights["blocks.0.up.weight"].compute_dtype == torch.float16
    assert weights["blocks.0.down.weight"].scheme is None


@pytest.mark.parametrize(
    ("entry", "scheme"),
    [
        ("bnb-nf4", "bnb-nf4"),
        ("bnb-nf4 (fp16 LoRA)", "bnb-nf4"),
        ("float8-e4m3fn (fp16 LoRA)", "float8-e4m3fn"),
        ("Automatic", None),
        ("Automatic (fp16 LoRA)", None),
    ],
)
def test_entries_of_forges_menu(tmp_path: Path, entry: str, scheme: str | None) -> None:
    lowbits.convert(net_file(tmp_path), tmp_path / "x.safetensors", entry)
    assert stored(tmp_path / "x.safetensors")["blocks.0.up.weight"].scheme == scheme


def test_the_report_is_of_the_files(tmp_path: Path) -> None:
    src, dst = net_file(tmp_path), tmp_path / "x.safetensors"
    report = lowbits.convert(src, dst, "torchao-int8")
    assert report.bytes_before == sum(t.nbytes for t in load_file(src).values())
    assert report.bytes_after == sum(weight.nbytes for weight in stored(dst).values())
    assert report.bytes_after == sum(t.nbytes for t in load_file(dst).values())


def test_ties_are_stored_once_and_stay(tmp_path: Path) -> None:
    config = T5Config(d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=1, vocab_size=128)
    model = T5EncoderModel(config)
    lowbits.save(model, tmp_path / "plain.safetensors")
    for src in (tmp_path / "plain.safetensors", tmp_path / "one.safetensors"):
        lowbits.convert(
            tmp_path / "plain.safetensors", tmp_path / "one.safetensors", "torchao-int8"
        )
        lowbits.convert(src, tmp_path / "two.safetensors", "torchao-int8")
        names = list(load_file(tmp_path / "two.safetensors"))
        assert len([name for name in names if "embed" in name or "shared" in name]) <= 2
        weights = stored(tmp_path / "two.safetensors")
        assert weights["shared.weight"] is weights["encoder.embed_tokens.weight"]
    other = T5EncoderModel(config)
    lowbits.load(tmp_path / "two.safetensors", into=other)
    lowbits.quantize(model, "torchao-int8")
    require_same(other, model)


def test_low_bit_files_of_others_are_sources(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    weight = torch.randn(64, 256)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    tensors = {"blocks.0.w.weight": codes}
    tensors |= {f"blocks.0.w.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    save_file(tensors, tmp_path / "forge.safetensors")
    lowbits.convert(tmp_path / "forge.safetensors", tmp_path / "own.safetensors", "bnb-nf4")
    name, (scheme, parts) = next(iter(contents(stored(tmp_path / "own.safetensors")).items()))
    assert (name, scheme) == ("blocks.0.w.weight", "bnb-nf4")
    assert torch.equal(bits(next(p for p in parts.values() if p.dtype == torch.uint8)), bits(codes))


def test_float8_files_become_gguf(tmp_path: Path) -> None:
    tensors = {
        "blocks.0.w.weight": torch.randn(64, 256).to(torch.float8_e4m3fn),
        "blocks.0.w.bias": torch.randn(64).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    lowbits.convert(tmp_path / "x.safetensors", tmp_path / "x.gguf", "gguf-q8_0")
    bias: Any = stored(tmp_path / "x.gguf")["blocks.0.w.bias"].read()
    assert torch.equal(bias.float(), tensors["blocks.0.w.bias"].float())


def test_a_reference_model_stays_loadable(tmp_path: Path) -> None:
    model = tiny("flux")
    lowbits.save_gguf(model, tmp_path / "f16.gguf", "F16")
    lowbits.convert(tmp_path / "f16.gguf", tmp_path / "x.safetensors", "torchao-int8")
    other = tiny("flux")
    report = lowbits.load(tmp_path / "x.safetensors", into=other)
    assert any(layer.scheme == "torchao-int8" for layer in report.layers)
