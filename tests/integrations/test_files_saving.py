"""What saving mini-FLUX leaves behind: on disk, in the model, and for those who do not know it."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from miniflux import (
    MODEL,
    PACKED,
    SCHEME,
    assert_untouched,
    blank,
    drawn,
    empty,
    exchanged,
    picture,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from streamed import smallest_budget
from torch import nn

import lowbits
from lowbits.cli.loading import load_loras
from lowbits.errors import (
    CancelledError,
    ConfigError,
    FormatError,
    PatchError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")


def keys(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Others that come upon it


def test_loaders_of_others_fail_loudly(original: Any, saved: Path) -> None:
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        type(original.transformer).from_pretrained(saved / "transformer")
    with pytest.raises(OSError, match="model.safetensors"):
        type(original.text_encoder_2).from_pretrained(saved / "text_encoder_2")
    with pytest.raises(OSError, match="no file named"):
        type(original).from_pretrained(saved, local_files_only=True)
    assert {path.name for path in (saved / "transformer").iterdir()} == {
        "config.json", "lowbits.safetensors",
    }  # fmt: skip
    # What is not packed is as ever.
    assert (saved / "vae" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.bin",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
    ],
)
def test_weights_that_would_be_read_in_their_place(pipe: Any, tmp_path: Path, name: str) -> None:
    lowbits.quantize(pipe.transformer, SCHEME)
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(ConfigError, match=name):
        pipe.transformer.save_pretrained(tmp_path)
    assert files(tmp_path) == {name: b"old"}


def test_what_a_packed_model_is_asked_beside_saving(pipe: Any, tmp_path: Path) -> None:
    lowbits.quantize(pipe.transformer, SCHEME)
    with pytest.raises(
        PatchError, match=r"without push_to_hub, then huggingface_hub.upload_folder"
    ):
        pipe.transformer.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    pipe.transformer.save_pretrained(tmp_path / "rank 1", False)
    assert files(tmp_path) == {}
    pipe.transformer.save_pretrained(tmp_path / "rank 0", True)
    assert (tmp_path / "rank 0" / "lowbits.safetensors").exists()


def test_a_pipeline_over_an_ordinary_one(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    lowbits.apply(pipe, SCHEME, device="cpu")
    with pytest.raises(ConfigError, match="save into another folder"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("lowbits*"))
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").exists()


def test_an_ordinary_pipeline_over_a_packed_one(pipe: Any, tmp_path: Path) -> None:
    """Neither may be read silently in place of the other."""
    with lowbits.apply(pipe, SCHEME, device="cpu"):
        pipe.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="holds .* beside packed weights.*saved into twice"):
        lowbits.load_pipeline(tmp_path)


def test_an_ordinary_pipeline_over_a_packed_one_takes_its_place(pipe: Any, tmp_path: Path) -> None:
    with lowbits.apply(pipe, SCHEME, device="cpu"):
        lowbits.save(pipe, tmp_path)
    plain = picture(pipe)
    (tmp_path / "transformer" / "notes.txt").write_text("mine")
    lowbits.save(pipe, tmp_path)
    again = type(pipe).from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(picture(again), plain)
    assert not list(tmp_path.rglob("lowbits*"))
    assert (tmp_path / "transformer" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("how", ["cancelled", "refused", "full"])
def test_a_pipeline_that_cannot_be_saved_leaves_the_old_one(
    pipe: Any, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it: its models belong together."""
    folder = tmp_path / "pipe"
    lowbits.apply(pipe, SCHEME, device="cpu")
    lowbits.save(pipe, folder)
    with torch.no_grad():
        for part in (pipe.vae, pipe.text_encoder):
            for parameter in part.parameters():
                parameter.add_(1) if parameter.is_floating_point() else None
    options: dict[str, Any] = {}
    error: type[Exception] = OSError
    if how == "cancelled":
        options["cancel"] = lowbits.CancelToken()
        options["progress"] = lambda event: options["cancel"].cancel()
        error = CancelledError
    elif how == "refused":
        (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"old")
        error = ConfigError
    else:
        monkeypatch.setattr(pipe.scheduler, "save_pretrained", full)
    before = files(folder)
    with pytest.raises(error):
        lowbits.save(pipe, folder, **options)
    assert files(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["x.gguf", "x.pt", "x.bin", "x.SAFETENSORS"])
def test_names_of_other_files(pipe: Any, tmp_path: Path, name: str) -> None:
    for target in (pipe, pipe.transformer):
        with pytest.raises(ConfigError, match=f"path: {name} is called as a file of another kind"):
            lowbits.save(target, tmp_path / name)
    with pytest.raises(ConfigError, match="a pipeline into a folder"):
        lowbits.save(pipe, tmp_path / "x.safetensors")
    assert not files(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_config_that_cannot_be_written_leaves_the_old_weights(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowbits.save(pipe.transformer, tmp_path)
    before = files(tmp_path)
    lowbits.quantize(pipe.transformer, SCHEME)
    monkeypatch.setattr(type(pipe.transformer), "save_config", full)
    with pytest.raises(OSError, match="No space left"):
        lowbits.save(pipe.transformer, tmp_path)
    assert files(tmp_path) == before


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_pipeline_is_not_saved_over_a_file(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        lowbits.save(pipe, tmp_path / "file")
    assert files(tmp_path) == {"file": b"mine"}


def test_in_parts_over_one_file_and_back(pipe: Any, tmp_path: Path) -> None:
    """Whichever was written last is what is read, and nothing else stays."""
    module = pipe.transformer
    for scheme, size in ((SCHEME, "5GB"), ("torchao-int8", "1MB"), ("gguf-q8_0", "5GB")):
        with lowbits.quantize(module, scheme):
            lowbits.save(module, tmp_path, max_shard_size=size)
        report = lowbits.load(tmp_path, into=empty(module))
        assert {layer.scheme for layer in report.packed} == {scheme}
    assert set(files(tmp_path)) == {"config.json", "lowbits.safetensors"}


# The models


def test_restored_models_save_as_they_did(pipe: Any, tmp_path: Path) -> None:
    plain = picture(pipe)
    handle = lowbits.apply(pipe, SCHEME, device="cpu")
    assert all("save_pretrained" in vars(getattr(pipe, name)) for name in PACKED)
    assert "save_pretrained" not in vars(pipe.vae)
    handle.restore()
    for part in pipe.components.values():
        assert not isinstance(part, nn.Module) or "save_pretrained" not in vars(part)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(picture(again), plain)


def test_dequantized_models_save_as_they_did(original: Any, saved: Path, tmp_path: Path) -> None:
    loaded = lowbits.load_pipeline(saved)
    lowbits.dequantize(loaded)
    loaded.save_pretrained(tmp_path)
    again = type(original).from_pretrained(tmp_path, local_files_only=True)
    torch.testing.assert_close(picture(again), drawn(saved), rtol=0, atol=2e-5)


def test_a_switched_model_saves_what_it_is_now(pipe: Any, tmp_path: Path) -> None:
    handle = lowbits.apply(pipe, SCHEME, device="cpu")
    handle.switch("torchao-int8")
    expected = picture(pipe)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(picture(lowbits.load_pipeline(tmp_path)), expected)


def test_saving_changes_nothing(pipe: Any, tmp_path: Path) -> None:
    handle = lowbits.apply(pipe, SCHEME, device="cpu")
    expected = picture(pipe)
    state = {n: t.clone() for n, t in pipe.transformer.state_dict().items()}
    lowbits.save(pipe, tmp_path)
    assert all(torch.equal(t, state[n]) for n, t in pipe.transformer.state_dict().items())
    assert lowbits.handle(pipe) is handle
    assert torch.equal(picture(pipe), expected)


def _pickled(module: Any) -> Any:
    buffer = io.BytesIO()
    pickle.dump(module, buffer)
    return pickle.loads(buffer.getvalue())


@pytest.mark.parametrize("how", [copy.deepcopy, _pickled])
@pytest.mark.parametrize("part", PACKED)
def test_copies_save_by_lowbits_alone(
    pipe: Any, saved: Path, tmp_path: Path, part: str, how: Callable[[Any], Any]
) -> None:
    handle = lowbits.apply(pipe, SCHEME, device="cpu")
    made = how(getattr(pipe, part))
    handle.restore()
    with pytest.raises(PatchError, match=r"lowbits.save\(model, folder\)"):
        made.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    lowbits.save(made, tmp_path / "made")
    assert files(tmp_path / "made") == files(saved / part)
    lowbits.dequantize(made)
    made.save_pretrained(tmp_path / "plain")
    assert type(made).from_pretrained(tmp_path / "plain") is not None


def test_pipelines_of_copies(pipe: Any, saved: Path, tmp_path: Path) -> None:
    handle = lowbits.apply(pipe, SCHEME, device="cpu")
    copies = {name: copy.deepcopy(getattr(pipe, name)) for name in PACKED}
    handle.restore()
    with exchanged(pipe, **copies):
        with pytest.raises(PatchError, match="lowbits.save"):
            pipe.save_pretrained(tmp_path / "refused")
        lowbits.save(pipe, tmp_path / "made")
    loaded = lowbits.load_pipeline(tmp_path / "made")
    assert torch.equal(picture(loaded), drawn(saved))


# Streamed


@pytest.mark.parametrize(
    ("scheme", "location"),
    [
        (SCHEME, "disk"),
        ("native", "cpu"),
        pytest.param(SCHEME, "cpu", marks=pytest.mark.slow),
        pytest.param("native", "disk", marks=pytest.mark.slow),
    ],
)
def test_streamed_models_save_what_resident_ones_do(
    pipe: Any, tmp_path: Path, scheme: str, location: str
) -> None:
    with lowbits.apply(pipe, scheme, device="cpu"):
        for name in PACKED:
            lowbits.save(getattr(pipe, name), tmp_path / "resident" / name)
    budget = smallest_budget(pipe, scheme, location=location)
    handle = lowbits.apply(pipe, scheme, device="cpu", gpu_weights=budget, location=location)
    expected = picture(pipe)
    for name in PACKED:
        lowbits.save(getattr(pipe, name), tmp_path / "streamed" / name)
    assert torch.equal(picture(pipe), expected)
    handle.restore()
    assert files(tmp_path / "streamed") == files(tmp_path / "resident")


def test_a_streamed_pipeline(pipe: Any, saved: Path, tmp_path: Path) -> None:
    budget = smallest_budget(pipe, SCHEME)
    lowbits.apply(pipe, SCHEME, device="cpu", gpu_weights=budget, location="disk")
    pipe.save_pretrained(tmp_path)
    assert torch.equal(picture(lowbits.load_pipeline(tmp_path)), drawn(saved))


# With a LoRA


@pytest.mark.parametrize("scheme", [SCHEME, "native"])
def test_adapters_are_left_out(pipe: Any, tmp_path: Path, scheme: str) -> None:
    with lowbits.apply(pipe, scheme, device="cpu", components=["transformer"]):
        without = picture(pipe)
        lowbits.save(pipe.transformer, tmp_path / "before.safetensors")
    load_loras(pipe, {MODEL / "lora" / "stripes.safetensors": 1.0})
    with lowbits.apply(pipe, scheme, device="cpu", components=["transformer"], lora="fp16"):
        assert not torch.equal(picture(pipe), without)
        lowbits.save(pipe.transformer, tmp_path / "t.safetensors")
    found = keys(tmp_path / "t.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in found)
    assert found == keys(tmp_path / "before.safetensors")
    pipe.unload_lora_weights()
    model = empty(pipe.transformer)
    lowbits.load(tmp_path / "t.safetensors", into=model)
    with exchanged(pipe, transformer=model):
        assert torch.equal(picture(pipe), without)


def test_a_lora_on_what_was_loaded(saved: Path) -> None:
    loaded = lowbits.load_pipeline(saved)
    load_loras(loaded, {MODEL / "lora" / "stripes.safetensors": 1.0})
    assert not torch.equal(picture(loaded), drawn(saved))
    loaded.unload_lora_weights()
    assert torch.equal(picture(loaded), drawn(saved))


# Ties, shards, checksums


def test_ties_of_t5_are_stored_once(pipe: Any, tmp_path: Path) -> None:
    encoder = pipe.text_encoder_2
    for rules in ({"shared": "native"}, {"*": "torchao-int8"}):
        with lowbits.quantize(encoder, "torchao-int8", rules=rules):
            lowbits.save(encoder, tmp_path / "t5.safetensors")
            held = sum({id(t): t.nbytes for t in encoder.parameters()}.values())
        file = tmp_path / "t5.safetensors"
        stored = sum(tensor.nbytes for tensor in load_file(file).values())
        assert stored == held
        assert not any(name.startswith("encoder.embed_tokens") for name in keys(file))
        model = empty(encoder)
        lowbits.load(file, into=model)
        shared, tokens = model.shared, model.encoder.embed_tokens
        assert [*shared._parameters] == [*tokens._parameters]
        assert all(tokens._parameters[n] is p for n, p in shared._parameters.items())


def test_shards(original: Any, tmp_path: Path) -> None:
    with lowbits.apply(original, SCHEME, device="cpu"):
        expected = picture(original)
        lowbits.save(original, tmp_path, max_shard_size="500KB")
    folder = tmp_path / "transformer"
    shards = sorted(folder.glob("lowbits-*.safetensors"))
    assert len(shards) > 3
    sizes = [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= 500_000
    index = json.loads((folder / "lowbits.safetensors.index.json").read_text())
    named = {name: folder / file for name, file in index["weight_map"].items()}
    assert set(named.values()) == set(shards)
    assert set(named) == set().union(*map(keys, shards))
    assert index["metadata"]["total_size"] == sum(sizes)
    assert torch.equal(picture(lowbits.load_pipeline(tmp_path)), expected)
    for path in (folder, folder / "lowbits.safetensors.index.json"):
        model = blank(original.transformer)
        lowbits.load(path, into=model, verify=True)
    shards[1].unlink()
    model = blank(original.transformer)
    before = dict(model.state_dict())
    with pytest.raises((FormatError, OSError), match=shards[1].name):
        lowbits.load(folder, into=model)
    assert_untouched(model, before)


@pytest.mark.parametrize("size", ["5GB", "500KB"])
def test_a_flipped_byte(original: Any, tmp_path: Path, size: str) -> None:
    with lowbits.quantize(original.transformer, SCHEME):
        lowbits.save(original.transformer, tmp_path, max_shard_size=size)
    file = max(tmp_path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    lowbits.load(tmp_path, into=blank(original.transformer))
    model = blank(original.transformer)
    before = dict(model.state_dict())
    with pytest.raises(FormatError, match="checksum differs") as caught:
        lowbits.load(tmp_path, into=model, verify=True)
    assert caught.value.path.endswith(file.name)
    assert_untouched(model, before)


def test_verify_of_files_of_others_says_so(original: Any, tmp_path: Path) -> None:
    """A check that cannot be made must not seem to have passed."""
    file = tmp_path / "t.safetensors"
    save_file(original.transformer.state_dict(), file)
    with pytest.raises(ConfigError, match="verify"):
        lowbits.load(file, into=blank(original.transformer), verify=True)


# Progress


def test_progress_and_cancelling_of_a_module(pipe: Any, tmp_path: Path) -> None:
    lowbits.quantize(pipe.transformer, SCHEME)
    events: list[Any] = []
    lowbits.save(pipe.transformer, tmp_path, progress=events.append)
    assert len(events) > 50
    assert {event.stage for event in events} == {"save"}
    assert events[-1].done_bytes == events[-1].total_bytes
    before, token = files(tmp_path), lowbits.CancelToken()

    def stop(event: Any) -> None:
        token.cancel()

    with pytest.raises(CancelledError):
        lowbits.save(pipe.transformer, tmp_path, progress=stop, cancel=token)
    assert files(tmp_path) == before


def test_progress_and_cancelling_of_a_pipeline(pipe: Any, tmp_path: Path) -> None:
    lowbits.apply(pipe, SCHEME, device="cpu")
    events: list[Any] = []
    lowbits.save(pipe, tmp_path / "a", progress=events.append)
    assert len(events) > 50
    token = lowbits.CancelToken()
    token.cancel()
    with pytest.raises(CancelledError):
        lowbits.save(pipe, tmp_path / "b", cancel=token)
