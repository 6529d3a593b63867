"""The way back: from memory, from a proven file, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from pipelines import PIPELINES, draw
from safetensors.torch import load_file, save_file
from torch import nn

import lowbits
from lowbits import errors
from lowbits.core import convert

if TYPE_CHECKING:
    from pathlib import Path


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 96))


def state(target: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in target.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_memory_keeps_the_very_objects() -> None:
    target = model()
    parameters = list(target.parameters())
    lowbits.quantize(target, "bnb-nf4", keep_source="memory").restore()
    assert all(a is b for a, b in zip(target.parameters(), parameters, strict=True))


def test_file_is_used_where_it_holds_these_bits(tmp_path: Path) -> None:
    target = model()
    save_file(target.state_dict(), tmp_path / "model.safetensors")
    before = state(target)
    handle = lowbits.quantize(target, "bnb-nf4", source=tmp_path)
    assert {row.source for row in handle.report().packed} == {"file"}
    assert handle.report().restorable
    handle.restore()
    assert equal(state(target), before)


def test_a_16_bit_file_proves_a_model_that_was_loaded_in_float32(tmp_path: Path) -> None:
    target = model().bfloat16()
    save_file(target.state_dict(), tmp_path / "model.safetensors")
    target.float()
    before = state(target)
    handle = lowbits.quantize(target, "bnb-nf4", keep_source="file", source=tmp_path)
    handle.restore()
    assert equal(state(target), before)


def test_weights_that_are_not_the_files_stay_in_memory(tmp_path: Path) -> None:
    target = model()
    save_file(target.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        next(target.parameters())[0, 0] += 1e-3  # a fused LoRA, say
    before = state(target)
    handle = lowbits.quantize(target, "bnb-nf4", source=tmp_path, keep_source="auto")
    assert [row.source for row in handle.report().packed] == ["memory", "file"]
    handle.restore()
    assert equal(state(target), before)


def test_insisting_on_a_file_that_does_not_hold_the_weights_is_refused(tmp_path: Path) -> None:
    target = model()
    save_file(model().state_dict(), tmp_path / "model.safetensors")
    before = state(target)
    with pytest.raises(errors.SourceUnavailableError, match="2 weights are not in .* e.g. 0 "):
        lowbits.quantize(target, "bnb-nf4", keep_source="file", source=tmp_path)
    assert equal(state(target), before)


def test_a_file_that_changed_since_is_refused_and_the_model_stays_packed(tmp_path: Path) -> None:
    target = model()
    save_file(target.state_dict(), tmp_path / "model.safetensors")
    handle = lowbits.quantize(target, "bnb-nf4", source=tmp_path)
    packed = state(target)
    save_file(model().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(errors.SourceUnavailableError, match="is not what it was"):
        handle.restore()
    assert equal(state(target), packed)
    assert handle.is_active
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(errors.SourceUnavailableError, match="cannot read '0.weight'"):
        handle.restore()


def test_none_cannot_be_restored_and_says_what_can_be_done() -> None:
    target = model()
    handle = lowbits.quantize(target, "bnb-nf4", keep_source="none")
    assert not handle.report().restorable
    assert "were not kept" in handle.report().warnings[0]
    packed = state(target)
    for call in (handle.restore, lambda: handle.switch("bnb-fp4")):
        with pytest.raises(errors.SourceUnavailableError, match="load the model again"):
            call()
    assert equal(state(target), packed)
    lowbits.dequantize(target)
    assert type(target[0]) is nn.Linear
    assert lowbits.handle(target) is None


def test_auto_lets_originals_go_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(convert, "available_host_bytes", lambda: 0)
    lowbits.quantize(model(), "bnb-nf4", keep_source="none")
    assert not caplog.records
    handle = lowbits.quantize(model(), "bnb-nf4")
    assert "originals were not kept" in caplog.text
    assert {row.source for row in handle.report().packed} == {"none"}
    monkeypatch.setattr(convert, "available_host_bytes", lambda: 1 << 40)
    handle = lowbits.quantize(model(), "bnb-nf4")
    assert {row.source for row in handle.report().packed} == {"memory"}


def test_file_without_a_path_is_refused() -> None:
    with pytest.raises(errors.SourceUnavailableError, match="needs source=path"):
        lowbits.quantize(model(), "bnb-nf4", keep_source="file")


@pytest.mark.parametrize("name", ["x.gguf", "x.pt", "x.json", "x.safetensors"])
def test_a_path_of_another_kind_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF, or whatever")
    with pytest.raises(errors.ConfigError, match=f"source: .*{name} is no safetensors file"):
        lowbits.quantize(model(), "bnb-nf4", source=tmp_path / name)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="no such file or folder"):
        lowbits.quantize(model(), "bnb-nf4", source=tmp_path / "nope")


def test_a_cast_while_packed_is_kept_by_restore() -> None:
    target = model()
    expected = state(model().load_state_dict(target.state_dict()) and target)
    handle = lowbits.quantize(target, "bnb-nf4", keep_source="memory")
    target.bfloat16()
    handle.restore()
    for name, value in target.state_dict().items():
        assert torch.equal(value, expected[name].bfloat16())


def test_switch_packs_from_the_originals() -> None:
    target = model()
    before = state(target)
    direct = model()
    direct.load_state_dict(before)
    lowbits.quantize(direct, "gguf-q8_0")
    handle = lowbits.quantize(target, "quanto-int2", keep_source="memory").switch("gguf-q8_0")
    assert equal(state(target), state(direct))
    handle.restore()
    assert equal(state(target), before)


def test_a_switch_that_fails_leaves_the_old_scheme() -> None:
    target = model()
    handle = lowbits.quantize(target, "bnb-nf4", keep_source="memory")
    packed = state(target)
    with pytest.raises(errors.UnknownSchemeError):
        handle.switch("bnb-nf44")
    assert equal(state(target), packed)
    found = lowbits.handle(target)
    assert found is not None
    found.restore()


def test_a_switch_without_the_file_leaves_the_old_scheme(tmp_path: Path) -> None:
    target = model()
    file = tmp_path / "x.safetensors"
    save_file(target.state_dict(), file)
    before = state(target)
    handle = lowbits.quantize(target, "bnb-nf4", keep_source="memory", source=file)
    packed = state(target)
    file.rename(tmp_path / "moved")
    with pytest.raises(errors.ConfigError, match="x.safetensors"):
        handle.switch("gguf-q8_0")
    assert equal(state(target), packed)
    assert lowbits.handle(target) is handle
    handle.restore()
    assert equal(state(target), before)


def test_the_only_originals_are_not_written_over(tmp_path: Path) -> None:
    target = model()
    file, link = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file(target.state_dict(), file)
    link.symlink_to(file)
    before = state(target)
    handle = lowbits.quantize(target, "bnb-nf4", keep_source="file", source=file)
    for path in (file, link):
        with pytest.raises(errors.ConfigError, match="holds the originals.*another file"):
            lowbits.save(target, path)
    lowbits.save(target, tmp_path / "z.safetensors")
    handle.restore()
    assert equal(state(target), before)
    lowbits.save(target, file)


@pytest.mark.parametrize("name", ["own", "own/lowbits.safetensors"])
def test_shards_with_the_only_originals_are_not_written_over(tmp_path: Path, name: str) -> None:
    target = model()
    before = state(target)
    lowbits.save(target, tmp_path / "own", max_shard_size="10KB")
    there = sorted(tmp_path.rglob("*.safetensors"))
    assert len(there) > 1
    handle = lowbits.quantize(target, "bnb-nf4", keep_source="file", source=tmp_path / "own")
    for size in ("10KB", "1GB"):
        with pytest.raises(errors.ConfigError, match="holds the originals.*another file"):
            lowbits.save(target, tmp_path / name, max_shard_size=size)
    assert sorted(tmp_path.rglob("*.safetensors")) == there
    handle.restore()
    assert equal(state(target), before)


def test_originals_that_are_gone_are_in_nobodys_way(tmp_path: Path) -> None:
    target = model()
    for name in ("x", "y"):
        save_file(target.state_dict(), tmp_path / f"{name}.safetensors")
    lowbits.quantize(target, "bnb-nf4", keep_source="file", source=tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").unlink()
    lowbits.save(target, tmp_path / "y.safetensors")


def test_auto_with_little_memory_lets_only_unproven_originals_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = model()
    save_file({"0.weight": target.state_dict()["0.weight"]}, tmp_path / "part.safetensors")
    monkeypatch.setattr(convert, "available_host_bytes", lambda: 0)
    handle = lowbits.quantize(target, "bnb-nf4", source=tmp_path / "part.safetensors")
    assert [row.source for row in handle.report().packed] == ["file", "none"]
    with pytest.raises(errors.SourceUnavailableError):
        handle.restore()
    assert {source.kind for source in handle._parts()[0].journal.sources()} == {"file", "none"}


def test_variants_side_by_side_are_all_tried(tmp_path: Path) -> None:
    target = model()
    save_file(target.state_dict(), tmp_path / "model.safetensors")
    save_file(target.bfloat16().state_dict(), tmp_path / "model.zz.safetensors")
    target.load_state_dict(load_file(tmp_path / "model.safetensors"))
    target.float().load_state_dict(load_file(tmp_path / "model.safetensors"))
    handle = lowbits.quantize(target, "bnb-nf4", source=tmp_path, keep_source="file")
    assert {row.source for row in handle.report().packed} == {"file"}


def test_a_pipelines_folder_has_a_folder_for_each_component(tmp_path: Path) -> None:
    pipe = PIPELINES["flux"].build()
    expected = draw("flux", pipe)
    pipe.save_pretrained(tmp_path)
    handle = lowbits.apply(pipe, "bnb-nf4", source=tmp_path, device="cpu")
    sources = {(row.component, row.source) for row in handle.report().packed}
    assert ("transformer", "file") in sources
    handle.restore()
    assert torch.equal(draw("flux", pipe), expected)


def test_a_convolution_comes_back_from_a_file_in_its_memory_format(tmp_path: Path) -> None:
    target = nn.Sequential(nn.Conv2d(64, 64, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs lack it
    save_file(
        {k: v.contiguous() for k, v in target.state_dict().items()}, tmp_path / "m.safetensors"
    )
    before, stride = state(target), target[0].weight.stride()
    handle = lowbits.quantize(target, "float8-e4m3fn", keep_source="file", source=tmp_path)
    handle.restore()
    assert equal(state(target), before)
    assert target[0].weight.stride() == stride


def test_a_relative_path_is_meant_where_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = model()
    save_file(target.state_dict(), tmp_path / "model.safetensors")
    before = state(target)
    monkeypatch.chdir(tmp_path)
    handle = lowbits.quantize(target, "bnb-nf4", keep_source="file", source="model.safetensors")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    handle.restore()
    assert equal(state(target), before)


@pytest.mark.parametrize("comes", ["before", "after"])
def test_a_lora_does_not_hide_what_a_file_holds(comes: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    target = model()
    save_file(target.state_dict(), tmp_path / "model.safetensors")
    config = peft.LoraConfig(r=4, target_modules=["0"])
    options: dict[str, Any] = {"keep_source": "file", "source": tmp_path}
    if comes == "before":
        peft.inject_adapter_in_model(config, target)
        handle = lowbits.quantize(target, "bnb-nf4", **options)
    else:
        handle = lowbits.quantize(target, "bnb-nf4", **options)
        peft.inject_adapter_in_model(config, target)
        handle = handle.switch("gguf-q8_0")
    assert {row.source for row in handle.report().packed} == {"file"}
    handle.restore()
    held: Any = target[0]
    stored = load_file(tmp_path / "model.safetensors")["0.weight"]
    assert torch.equal(held.base_layer.weight, stored)
