"""Conversions that are refused, stopped or killed: what was there stays, and nothing is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from converting import bits, contents, leftovers, loaded, net, net_file, require_same, stored
from safetensors.torch import save_file

import lowbits
from lowbits.errors import (
    CancelledError,
    ConfigError,
    NoCapableBackendError,
    NonFiniteWeightError,
    UnknownSchemeError,
)
from lowbits.files import gguf_export
from lowbits.files.weights import StoredTensor

if TYPE_CHECKING:
    from pathlib import Path

    from lowbits.core.registry import BackendRegistry
    from lowbits.files.weights import Weight


def test_a_model_of_which_nothing_would_be_packed_is_refused(tmp_path: Path) -> None:
    save_file({"blocks.0.w.weight": torch.randn(64, 33)}, tmp_path / "x.safetensors")
    with pytest.raises(NoCapableBackendError, match=r"blocks\.0\.w"):
        lowbits.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "gguf-q4_0")
    lowbits.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "native")


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


def test_a_file_goes_to_a_file_that_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x\.sft ends with neither \.safetensors nor \.gguf"):
        lowbits.convert(net_file(tmp_path), tmp_path / "x.sft", "bnb-nf4")
    assert not (tmp_path / "x.sft").exists()


def test_gguf_takes_no_patterns_no_other_schemes_and_one_model(
    tmp_path: Path, flux_folder: Path
) -> None:
    src, dst = net_file(tmp_path), tmp_path / "x.gguf"
    for options in ({"rules": {"head": "gguf-q8_0"}}, {"skip": ["head"]}):
        with pytest.raises(ConfigError, match="rules, skip"):
            lowbits.convert(src, dst, "gguf-q8_0", **options)
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
    reads: list[str] = []

    def read(weight: Weight, _: BackendRegistry) -> torch.Tensor:
        reads.append(weight.name)
        return torch.zeros(weight.shape)

    monkeypatch.setattr(gguf_export, "decoded", read)
    token = lowbits.CancelToken()
    token.cancel()
    with pytest.raises(CancelledError):
        lowbits.convert(net_file(tmp_path), tmp_path / "x.gguf", "gguf-q8_0", cancel=token)
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
    loaded(dst, net())
    assert all(file.endswith(".tmp") and file.startswith(f".{name}") for file in leftovers(out))


@pytest.mark.parametrize("scheme", ["gguf-q8_0", "bnb-nf4"])
def test_over_its_own_source(tmp_path: Path, scheme: str) -> None:
    src, other = net_file(tmp_path), tmp_path / "other.safetensors"
    beside = lowbits.convert(src, other, scheme)
    over = lowbits.convert(src, src, scheme)
    assert {layer.source for layer in beside.packed} == {"file"}
    assert {layer.source for layer in over.packed} == {"none"}
    require_same(loaded(src, net()), loaded(other, net()))
    lowbits.convert(src, src, scheme)
    require_same(loaded(src, net()), loaded(other, net()))


def test_a_gguf_file_over_itself(tmp_path: Path) -> None:
    src = tmp_path / "x.gguf"
    assert lowbits.convert(net_file(tmp_path), src, "gguf-q8_0").restorable
    lowbits.convert(net_file(tmp_path), src, "gguf-f16")
    assert not lowbits.convert(src, src, "gguf-q8_0").restorable
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


def test_a_pipeline_over_a_former_one(tmp_path: Path, flux_folder: Path) -> None:
    """What is only copied is of the same source as the rest: nothing else is left to be read."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    shutil.copytree(flux_folder, src)
    lowbits.convert(flux_folder, dst, "bnb-nf4")
    whole = next((src / "vae").glob("*.safetensors"))
    shard = whole.with_name(f"{whole.stem}-00001-of-00001.safetensors")
    whole.rename(shard)
    index = whole.with_name(f"{whole.name}.index.json")
    index.write_text('{"metadata": {}, "weight_map": {}}')
    lowbits.convert(src, dst, "bnb-nf4")
    assert {path.name for path in (dst / "vae").iterdir()} == {
        path.name for path in (src / "vae").iterdir()
    }


def test_a_pipeline_whose_rest_cannot_be_copied(
    tmp_path: Path, flux_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "dst"
    lowbits.convert(flux_folder, dst, "bnb-nf4")
    before = {path: path.read_bytes() for path in dst.rglob("*") if path.is_file()}

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowbits._convert.copy", refuse)
    with pytest.raises(OSError, match="No space left"):
        lowbits.convert(flux_folder, dst, "gguf-q8_0")
    assert {path: path.read_bytes() for path in dst.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [dst]


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
