"""Loading what mini-FLUX was saved as: elsewhere, later, and where it cannot be loaded."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from miniflux import (
    MODEL,
    SCHEME,
    assert_untouched,
    blank,
    drawn,
    picture,
)
from safetensors.torch import load_file, save_file
from streamed import smallest_budget
from torch import nn

import lowbits
from lowbits.core.packed import PackedLayer
from lowbits.errors import (
    AlreadyPatchedError,
    CancelledError,
    ConfigError,
    FormatError,
)
from lowbits.files.gguf import read_gguf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")

# Elsewhere, later


_FRESH = """
import sys
for name in ("bitsandbytes", "torchao", "optimum", "gguf", "diffusers", "transformers", "numpy"):
    sys.modules[name] = None
import torch, lowbits
torch.set_num_threads(1)
folder = sys.argv[1]
x = torch.load(f"{folder}/x.pt")
for scheme in sys.argv[2:]:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
    lowbits.load(f"{folder}/{scheme}.safetensors", into=model, verify=True)
    with torch.no_grad():
        torch.save(model(x), f"{folder}/{scheme}.out")
"""
FRESH = (SCHEME, "bnb-nf4-dq", "bnb-int8", "torchao-int8", "torchao-int4", "quanto-int4",
         "quanto-float8", "float8-e4m3fn", "gguf-q8_0", "gguf-q5_1")  # fmt: skip


def test_a_fresh_process_without_the_libraries(tmp_path: Path) -> None:
    x, expected = torch.randn(3, 64), {}
    torch.save(x, tmp_path / "x.pt")
    for scheme in FRESH:
        model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
        lowbits.quantize(model, scheme, rules={"*": scheme})
        lowbits.save(model, tmp_path / f"{scheme}.safetensors")
        with torch.no_grad():
            expected[scheme] = model(x)
    subprocess.run([sys.executable, "-c", _FRESH, str(tmp_path), *FRESH], check=True)
    for scheme, y in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{scheme}.out"), y), scheme


_PICTURE = """
import sys
sys.modules["bitsandbytes"] = None
sys.path.insert(0, sys.argv[3])
import torch, lowbits
from miniflux import picture
torch.set_num_threads(1)
torch.save(picture(lowbits.load_pipeline(sys.argv[1])), sys.argv[2])
"""


@pytest.mark.slow
def test_a_picture_in_a_fresh_process_without_bitsandbytes(saved: Path, tmp_path: Path) -> None:
    tests = str(MODEL.parents[1] / "tests")
    command = [sys.executable, "-c", _PICTURE, str(saved), str(tmp_path / "p.pt"), tests]
    subprocess.run(command, check=True)
    assert torch.equal(torch.load(tmp_path / "p.pt"), drawn(saved))


@pytest.mark.parametrize("what", ["version", "layout"])
def test_a_newer_manifest_is_refused(original: Any, saved: Path, tmp_path: Path, what: str) -> None:
    data = (saved / "transformer" / "lowbits.safetensors").read_bytes()
    old, new = (rf"\"{what}\":{number}".encode() for number in (1, 2))
    assert data.count(old) == 1
    file = tmp_path / "t.safetensors"
    file.write_bytes(data.replace(old, new))
    model = blank(original.transformer)
    before = dict(model.state_dict())
    with pytest.raises(FormatError, match=f"{what} 2.*pip install -U lowbits"):
        lowbits.load(file, into=model)
    assert_untouched(model, before)


# All or nothing


def _missing(file: Path) -> None:
    tensors = load_file(file)
    del tensors["double_blocks.0.img_attn.qkv.bias"]
    save_file(tensors, file)


def _other_shape(file: Path) -> None:
    tensors = load_file(file)
    tensors["final_layer.linear.weight"] = tensors["final_layer.linear.weight"][:-1].contiguous()
    save_file(tensors, file)


def _another_width(file: Path) -> None:
    tensors = load_file(file)
    tensors["txt_in.weight"] = tensors["txt_in.weight"][:, :-1].contiguous()
    save_file(tensors, file)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("break_it", [_missing, _other_shape, _another_width, _cut])
def test_a_broken_file_of_the_reference(
    original: Any, tmp_path: Path, break_it: Callable[[Path], None]
) -> None:
    file, tensors = tmp_path / "t.safetensors", tmp_path / "t.gguf"
    lowbits.save_gguf(original.transformer, tensors, "F32")
    save_file({n: w.read() for n, w in read_gguf(tensors).weights().items()}, file)  # type: ignore[misc]
    model = blank(original.transformer)
    lowbits.load(file, into=model)
    before = dict(model.state_dict())
    break_it(file)
    with pytest.raises(FormatError):
        lowbits.load(file, into=model)
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelledError, MemoryError])
def test_a_pipeline_that_was_interrupted(
    original: Any, pipe: Any, saved: Path, error: type[BaseException]
) -> None:
    seen = 0

    def progress(_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 40:
            raise error

    before = dict(pipe.transformer.state_dict())
    with pytest.raises(error):
        lowbits.load(saved / "transformer", into=pipe, progress=progress)
    assert_untouched(pipe.transformer, before)
    seen = 0
    with pytest.raises(error):
        lowbits.load_pipeline(saved, progress=progress)


def test_an_applied_pipeline_is_refused(pipe: Any, saved: Path) -> None:
    handle = lowbits.apply(pipe, SCHEME, device="cpu", components=["transformer"])
    expected = picture(pipe)
    with pytest.raises(AlreadyPatchedError, match="transformer"):
        lowbits.load(saved / "transformer", into=pipe)
    assert torch.equal(picture(pipe), expected)
    # Another of its models may be loaded.
    lowbits.load(saved / "text_encoder_2", into=pipe.text_encoder_2)
    assert torch.equal(picture(pipe), drawn(saved))
    handle.restore()


# load_pipeline


def test_components_by_their_names_are_taken_as_they_are(original: Any, saved: Path) -> None:
    loaded = lowbits.load_pipeline(saved, transformer=original.transformer, vae=original.vae)
    assert loaded.transformer is original.transformer
    assert loaded.vae is original.vae
    assert lowbits.handle(loaded) is None


def test_a_dtype_for_all_of_it(saved: Path) -> None:
    loaded = lowbits.load_pipeline(saved, dtype=torch.float16)
    wo = loaded.text_encoder_2.encoder.block[0].layer[-1].DenseReluDense.wo
    assert isinstance(wo, PackedLayer)
    assert wo.weight.dtype == torch.float32, "transformers keeps wo in float32 at float16"
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        assert getattr(loaded, name).dtype == torch.float16
    assert picture(loaded).isfinite().all()


def test_each_model_in_the_dtype_of_its_file(original: Any, pipe: Any, tmp_path: Path) -> None:
    pipe.transformer.to(torch.bfloat16)
    with lowbits.apply(pipe, SCHEME, components=["transformer"], device="cpu"):
        lowbits.save(pipe, tmp_path)
    loaded = lowbits.load_pipeline(tmp_path)
    assert loaded.transformer.dtype == torch.bfloat16
    assert loaded.vae.dtype == original.vae.dtype == torch.float32
    before, after = original.vae.state_dict(), loaded.vae.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_folders_that_are_none(tmp_path: Path, original: Any) -> None:
    with pytest.raises(ConfigError, match="it is not a diffusers pipeline"):
        lowbits.load_pipeline(tmp_path)
    original.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no component that lowbits wrote"):
        lowbits.load_pipeline(tmp_path)


def test_loaded_and_streamed(saved: Path) -> None:
    loaded = lowbits.load_pipeline(saved)
    budget = smallest_budget(loaded)
    handle = lowbits.apply(loaded, "native", device="cpu", gpu_weights=budget)
    assert torch.equal(picture(loaded), drawn(saved))
    assert handle.stats().copied_bytes > 0
