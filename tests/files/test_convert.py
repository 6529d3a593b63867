"""`lowbits.convert`: from every kind of checkpoint to every scheme, and whatever goes wrong."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from pipelines import PIPELINES
from safetensors.torch import load_file, save_file
from schemes import every_scheme
from tiny_models import tiny
from torch import nn
from transformers import T5Config, T5EncoderModel

import lowbits
from lowbits.core.backend import Packed
from lowbits.core.registry import DEFAULT
from lowbits.errors import (
    CancelledError,
    ConfigError,
    NoCapableBackendError,
    NonFiniteWeightError,
    SourceUnavailableError,
    UnknownSchemeError,
)
from lowbits.files.checkpoint import OpenOptions, open_checkpoint
from lowbits.files.own import weights_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lowbits.files.weights import Weight

ONE_EACH = ("bnb-nf4", "torchao-int8", "quanto-int8", "float8-e4m3fn", "gguf-q4_0")


class Block(nn.Module):
    """Two layers of whole GGUF blocks, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(256, 64)
        self.down = nn.Linear(64, 256, bias=False)
        self.norm = nn.LayerNorm(256)


class Net(nn.Module):
    """What a file without a config may be of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 256)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(256, 8)


def net(dtype: torch.dtype = torch.bfloat16) -> Net:
    return Net().to(dtype)


def net_file(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    path = folder / "net.safetensors"
    save_file(net(dtype).state_dict(), path)
    return path


def loaded(path: Path, into: nn.Module) -> nn.Module:
    lowbits.load(path, into=into)
    return into


def contents(weights: Mapping[str, Weight]) -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    """Return scheme and tensors of each weight."""
    found = {}
    for name, weight in weights.items():
        value = weight.read()
        parts = dict(value.tensors) if isinstance(value, Packed) else {"": value}
        found[name] = (value.scheme if isinstance(value, Packed) else "", parts)
    return found


def require_same(got: nn.Module, wanted: nn.Module) -> None:
    """Compare modules bit for bit: schemes, codes, scales, and what is not packed."""
    left, right = contents(weights_of(got)[0]), contents(weights_of(wanted)[0])
    assert left.keys() == right.keys()
    for name, (scheme, parts) in right.items():
        assert left[name][0] == scheme, name
        assert left[name][1].keys() == parts.keys(), name
        for field, tensor in parts.items():
            other = left[name][1][field]
            assert other.dtype == tensor.dtype, (name, field)
            assert other.shape == tensor.shape, (name, field)
            assert torch.equal(bits(other), bits(tensor)), (name, field)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def stored(path: Path) -> Mapping[str, Weight]:
    return open_checkpoint(path, OpenOptions(DEFAULT)).weights


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("flux")
    PIPELINES["flux"].build(dtype=torch.bfloat16).save_pretrained(folder)
    return folder


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


def test_a_model_of_which_nothing_would_be_packed_is_refused(tmp_path: Path) -> None:
    save_file({"blocks.0.w.weight": torch.randn(64, 33)}, tmp_path / "x.safetensors")
    with pytest.raises(NoCapableBackendError, match=r"blocks\.0\.w"):
        lowbits.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "gguf-q4_0")
    lowbits.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "native")


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
    require_same(got.blocks, wanted.blocks)
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
            lowbits.convert(src, dst, "bnb-nf4", **wrong)  # type: ignore[arg-type]
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


def test_unknown_schemes_are_refused_before_anything_is_written(
    tmp_path: Path, flux_folder: Path
) -> None:
    src, out = net_file(tmp_path), tmp_path / "out"
    out.mkdir()
    for wrong in ("bnb-nf5", "gguf-q9_k"):
        for dst in (out / "x.safetensors", out / "x.gguf", out / "folder"):
            error = ConfigError if dst.suffix == ".gguf" else UnknownSchemeError
            if wrong == "gguf-q9_k":
                error = UnknownSchemeError
            with pytest.raises(error):
                lowbits.convert(src, dst, wrong)
        with pytest.raises(UnknownSchemeError):
            lowbits.convert(flux_folder, out / "pipe", wrong)
    with pytest.raises(UnknownSchemeError):
        lowbits.convert(src, out / "x.safetensors", "bnb-nf4", rules={"head": "bnb-nf5"})
    with pytest.raises(ConfigError, match="can only be decoded"):
        lowbits.convert(src, out / "x.gguf", "gguf-iq2_xxs")
    assert not list(out.iterdir())


def test_gguf_takes_no_patterns_no_other_schemes_and_one_model(
    tmp_path: Path, flux_folder: Path
) -> None:
    src, dst = net_file(tmp_path), tmp_path / "x.gguf"
    for options in ({"rules": {"head": "gguf-q8_0"}}, {"skip": ["head"]}):
        with pytest.raises(ConfigError, match="rules, skip"):
            lowbits.convert(src, dst, "gguf-q8_0", **options)  # type: ignore[arg-type]
    for scheme in ("bnb-nf4", "native"):
        with pytest.raises(ConfigError, match="holds schemes of GGUF"):
            lowbits.convert(src, dst, scheme)
    for name in ("x.gguf", "x.safetensors"):
        with pytest.raises(ConfigError, match="pipeline of several models"):
            lowbits.convert(flux_folder, tmp_path / name, "gguf-q8_0")
    assert [path.name for path in tmp_path.iterdir()] == [src.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, suffix: str, value: float
) -> None:
    src, out = tmp_path / "net.safetensors", tmp_path / "out"
    tensors = net().state_dict()
    tensors["blocks.1.up.weight"][3, 5] = value
    save_file(tensors, src)
    out.mkdir()
    dst = out / f"x.{suffix}"
    with pytest.raises(NonFiniteWeightError, match=r"blocks\.1\.up"):
        lowbits.convert(src, dst, "gguf-q8_0")
    assert not list(out.iterdir())
    dst.write_bytes(b"old")
    with pytest.raises(NonFiniteWeightError):
        lowbits.convert(src, dst, "gguf-q8_0")
    assert dst.read_bytes() == b"old"
    assert [path.name for path in out.iterdir()] == [dst.name]
    if suffix == "safetensors":
        lowbits.convert(src, dst, "gguf-q8_0", skip=("blocks.1.up",))
        got: Any = stored(dst)["blocks.1.up.weight"].read()
        assert torch.equal(bits(got), bits(tensors["blocks.1.up.weight"]))


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
@pytest.mark.parametrize("after", [0, 3])
def test_cancelling_leaves_the_old_file(tmp_path: Path, suffix: str, after: int) -> None:
    src, out = net_file(tmp_path), tmp_path / "out"
    out.mkdir()
    dst = out / f"x.{suffix}"
    dst.write_bytes(b"old")
    token, events = lowbits.CancelToken(), []

    def progress(event: lowbits.ProgressEvent) -> None:
        events.append(event)
        if len(events) == after:
            token.cancel()

    if not after:
        token.cancel()
    with pytest.raises(CancelledError, match="convert"):
        lowbits.convert(src, dst, "gguf-q8_0", progress=progress, cancel=token)
    assert len(events) == after
    assert dst.read_bytes() == b"old"
    assert [path.name for path in out.iterdir()] == [dst.name]


def test_a_cancelled_gguf_conversion_is_not_read_whole_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, reads = net_file(tmp_path), []
    import lowbits.files.gguf_export as exporting

    read = exporting.decoded
    monkeypatch.setattr(
        exporting,
        "decoded",
        lambda weight, *args: (reads.append(weight.name), read(weight, *args))[1],
    )
    token = lowbits.CancelToken()
    token.cancel()
    with pytest.raises(CancelledError):
        lowbits.convert(src, tmp_path / "x.gguf", "gguf-q8_0", cancel=token)
    assert not reads


KILLED = """
import os, signal, sys
import lowbits
def progress(event):
    if event.done_bytes * 2 > event.total_bytes:
        os.kill(os.getpid(), signal.SIGKILL)
lowbits.convert(sys.argv[1], sys.argv[2], "gguf-q8_0", progress=progress)
"""


@pytest.mark.parametrize("name", ["x.safetensors", pytest.param("x.gguf", marks=pytest.mark.slow)])
def test_a_killed_process_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    src, out = net_file(tmp_path), tmp_path / "out"
    out.mkdir()
    dst = out / name
    lowbits.convert(src, dst, "gguf-q4_0")
    before = dst.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, src, dst], check=False)
    assert done.returncode == -signal.SIGKILL
    assert dst.read_bytes() == before
    assert loaded(dst, net())
    assert all(file.endswith(".tmp") and file.startswith(f".{name}") for file in leftovers(out))


@pytest.mark.parametrize("scheme", ["gguf-q8_0", "bnb-nf4"])
def test_over_its_own_source(tmp_path: Path, scheme: str) -> None:
    src, other = net_file(tmp_path), tmp_path / "other.safetensors"
    lowbits.convert(src, other, scheme)
    lowbits.convert(src, src, scheme)
    require_same(loaded(src, net()), loaded(other, net()))
    lowbits.convert(src, src, scheme)
    require_same(loaded(src, net()), loaded(other, net()))


def test_a_gguf_file_over_itself(tmp_path: Path) -> None:
    src = tmp_path / "x.gguf"
    lowbits.convert(net_file(tmp_path), src, "gguf-f16")
    lowbits.convert(src, src, "gguf-q8_0")
    assert stored(src)["blocks.0.up.weight"].scheme == "gguf-q8_0"
    before = contents(stored(src))["blocks.0.up.weight"][1]["qdata"]
    lowbits.convert(src, src, "gguf-q8_0")
    assert torch.equal(contents(stored(src))["blocks.0.up.weight"][1]["qdata"], before)


def test_folders_over_themselves(tmp_path: Path, flux_folder: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(flux_folder / "transformer", folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="from_pretrained would go on reading"):
        lowbits.convert(folder, folder, "bnb-nf4")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    own = tmp_path / "own"
    lowbits.convert(folder, own, "bnb-nf4")
    lowbits.convert(own, own, "bnb-nf4", skip=["transformer_blocks.*"])
    assert (own / "config.json").read_bytes() == files["config.json"]


def test_pipelines_are_not_written_into_themselves(tmp_path: Path, flux_folder: Path) -> None:
    before = sorted(flux_folder.rglob("*"))
    for dst in (flux_folder, flux_folder / "packed", flux_folder / "vae" / ".."):
        with pytest.raises(ConfigError, match="own folder"):
            lowbits.convert(flux_folder, dst, "bnb-nf4")
    link = tmp_path / "link"
    link.symlink_to(flux_folder)
    with pytest.raises(ConfigError, match="own folder"):
        lowbits.convert(flux_folder, link, "bnb-nf4")
    assert sorted(flux_folder.rglob("*")) == before


def test_folders_that_are_missing_or_closed(tmp_path: Path) -> None:
    src = net_file(tmp_path)
    for name in ("x.safetensors", "x.gguf"):
        with pytest.raises(FileNotFoundError) as caught:
            lowbits.convert(src, tmp_path / "no" / name, "gguf-q8_0")
        assert caught.value.filename == str(tmp_path / "no" / name)
        with pytest.raises(FileNotFoundError):
            lowbits.convert(tmp_path / "no.safetensors", tmp_path / name, "gguf-q8_0")
    assert [path.name for path in tmp_path.iterdir()] == [src.name]
    lowbits.convert(src, tmp_path / "a" / "b", "bnb-nf4")
    assert (tmp_path / "a" / "b" / "lowbits.safetensors").is_file()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    src, closed = net_file(tmp_path), tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for name in ("x.safetensors", "x.gguf", "folder"):
        with pytest.raises(PermissionError):
            lowbits.convert(src, closed / name, "gguf-q8_0")


def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, out = net_file(tmp_path), tmp_path / "out"
    out.mkdir()

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    for name in ("x.safetensors", "x.gguf"):
        (out / name).write_bytes(b"old")
        with pytest.raises(OSError, match="No space left"):
            lowbits.convert(src, out / name, "gguf-q8_0")
        assert (out / name).read_bytes() == b"old"
    assert not leftovers(out)


@pytest.mark.parametrize(
    ("name", "scheme"), [("x.safetensors", "bnb-nf4"), ("x.gguf", "gguf-q4_0")]
)
def test_one_weight_at_a_time_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, scheme: str
) -> None:
    src = tmp_path / "many.safetensors"
    save_file({f"blocks.{i}.w.weight": torch.randn(64, 256) for i in range(12)}, src)
    from lowbits.files.weights import StoredTensor

    read, alive, most = StoredTensor.read, [], [0]

    def counted(stored_tensor: StoredTensor) -> torch.Tensor:
        tensor = read(stored_tensor)
        alive.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(StoredTensor, "read", counted)
    lowbits.convert(src, tmp_path / name, scheme)
    assert len(alive) >= 12
    assert most[0] == 1


@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf", "folder"])
def test_progress_goes_up_to_its_total(tmp_path: Path, flux_folder: Path, name: str) -> None:
    events: list[lowbits.ProgressEvent] = []
    src = net_file(tmp_path) if "." in name else flux_folder
    lowbits.convert(src, tmp_path / name, "gguf-q8_0", progress=events.append)
    checks = [event for event in events if event.stage == "check"]
    assert events[: len(checks)] == checks
    assert bool(checks) == name.endswith("gguf")
    for phase in (checks, events[len(checks) :]):
        if phase:
            _require_progress(phase)
    events = events[len(checks) :]
    names = {event.fqn for event in events}
    assert {event.stage for event in events} == {"convert"}
    if src == flux_folder:
        assert {name.split(".")[0] for name in names} == {"transformer", "text_encoder_2"}
    else:
        assert names == set(net().state_dict())


def _require_progress(events: list[lowbits.ProgressEvent]) -> None:
    done = [event.done_bytes for event in events]
    assert done == sorted(done)
    assert done[-1] == events[0].total_bytes > 0
    assert len({event.total_bytes for event in events}) == 1
    names = [event.fqn for event in events]
    assert len(names) == len(set(names))


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
