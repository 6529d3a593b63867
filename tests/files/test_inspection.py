"""`lowbits.inspect`: what is in a file, from its header alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny
from torch import nn
from transformers import T5Config, T5EncoderModel

import lowbits
from lowbits.errors import ConfigError, FormatError
from lowbits.files import gguf as files_gguf
from lowbits.files import weights as files_weights

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = Path(__file__).parents[2] / "benchmarks" / "miniflux"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 128, bias=False), nn.Linear(128, 64)).to(torch.bfloat16)


@pytest.fixture
def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whatever reads tensors raise; a description in JSON is a tensor, too."""
    read = files_weights.read_into

    def refuse(out: torch.Tensor, extent: Any, name: str = "") -> None:
        assert extent.nbytes < 256, f"{name} was read"
        read(out, extent, name)

    monkeypatch.setattr(files_weights, "read_into", refuse)
    monkeypatch.setattr(files_gguf, "read_into", refuse)


def forge(folder: Path) -> Path:
    bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    codes, state = bnb.quantize_4bit(torch.randn(64, 256), quant_type="nf4", blocksize=64)
    tensors = {"a.weight": codes, "a.bias": torch.zeros(64)}
    tensors |= {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, folder / "forge.safetensors")
    return folder / "forge.safetensors"


def float8(folder: Path) -> Path:
    values = {"a.weight": torch.randn(64, 256).to(torch.float8_e4m3fn), "b": torch.zeros(3)}
    save_file(values, folder / "f8.safetensors")
    return folder / "f8.safetensors"


def own(folder: Path) -> Path:
    packed = model()
    lowbits.quantize(packed, "gguf-q4_k", rules={"1": "torchao-int8"})
    lowbits.save(packed, folder / "own.safetensors")
    return folder / "own.safetensors"


def gguf(folder: Path) -> Path:
    lowbits.save_gguf(model(), folder / "x.gguf", "Q4_K", names="diffusers", target="sdcpp")
    return folder / "x.gguf"


def plain(folder: Path) -> Path:
    save_file(model().state_dict(), folder / "plain.safetensors")
    return folder / "plain.safetensors"


#: By maker: the format, and tensors, values and bytes of each form.
EXPECTED: list[tuple[Callable[[Path], Path], str, dict[str, tuple[int, int, int]]]] = [
    (plain, "safetensors", {"bfloat16": (3, 40960 + 64, 81920 + 128)}),
    (
        gguf,
        "gguf",
        {
            "gguf-q4_k": (1, 32768, 32768 * 9 // 16),
            "gguf-q5_0": (1, 8192, 8192 * 11 // 16),
            "float32": (1, 64, 256),
        },
    ),
    (
        own,
        "lowbits",
        {
            "gguf-q4_k": (1, 32768, 32768 * 9 // 16),
            "torchao-int8": (1, 8192, 8192 + 64 * 4),
            "bfloat16": (1, 64, 128),
        },
    ),
    (float8, "safetensors", {"float8-e4m3fn-raw": (1, 16384, 16384), "float32": (1, 3, 12)}),
]


@pytest.mark.parametrize(("make", "kind", "forms"), EXPECTED, ids=[e[0].__name__ for e in EXPECTED])
def test_forms_are_counted_exactly(
    tmp_path: Path,
    make: Callable[[Path], Path],
    kind: str,
    forms: dict[str, tuple[int, int, int]],
    request: pytest.FixtureRequest,
) -> None:
    path = make(tmp_path)
    request.getfixturevalue("_unread")
    found = lowbits.inspect(path)
    assert found.format == kind
    assert {form.form: (form.tensors, form.weights, form.nbytes) for form in found.forms} == forms
    assert [form.nbytes for form in found.forms] == sorted(
        (form.nbytes for form in found.forms), reverse=True
    )
    assert found.weights == sum(weights for _, weights, _ in forms.values())
    assert found.nbytes == sum(nbytes for *_, nbytes in forms.values())
    assert found.bits_per_weight == found.nbytes * 8 / found.weights
    assert json.loads(json.dumps(found.to_dict()))["bits_per_weight"] == found.bits_per_weight
    assert found.problems == ()


def test_weights_of_bitsandbytes_are_one_each(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = forge(tmp_path)
    request.getfixturevalue("_unread")
    found = {form.form: form for form in lowbits.inspect(path).forms}
    assert set(found) == {"bnb-nf4", "float32"}
    assert (found["bnb-nf4"].tensors, found["bnb-nf4"].weights) == (1, 64 * 256)
    assert found["bnb-nf4"].nbytes >= 64 * 256 * 4.5 / 8


def test_ties_are_counted_once(tmp_path: Path) -> None:
    encoder = T5EncoderModel(
        T5Config(d_model=64, d_ff=64, d_kv=16, num_heads=4, num_layers=1, vocab_size=128)
    )
    lowbits.save(encoder, tmp_path / "t5.safetensors")
    found = lowbits.inspect(tmp_path / "t5.safetensors")
    assert found.weights == sum(p.numel() for p in encoder.parameters())
    assert found.architecture == "t5"


@pytest.mark.parametrize(
    ("name", "architecture", "loads_as"),
    [
        ("flux", "flux", "FluxTransformer2DModel"),
        ("sd3", "sd3", "SD3Transformer2DModel"),
        ("wan", "wan", "WanTransformer3DModel"),
        ("sdxl", "sdxl", "UNet2DConditionModel"),
        ("qwen-image", "qwen_image", "QwenImageTransformer2DModel"),
    ],
)
def test_models_are_recognized_in_each_format(
    tmp_path: Path, name: str, architecture: str, loads_as: str
) -> None:
    denoiser = tiny(name)
    lowbits.save_gguf(denoiser, tmp_path / "comfy.gguf", "Q8_0")
    lowbits.save_gguf(denoiser, tmp_path / "bare.gguf", "Q8_0", arch=None, target="sdcpp")
    lowbits.save_gguf(denoiser, tmp_path / "own.gguf", "F16", names="diffusers")
    lowbits.save(denoiser, tmp_path / "x.safetensors")
    denoiser.save_pretrained(tmp_path / "folder")
    for path in tmp_path.iterdir():
        found = lowbits.inspect(path)
        assert found.architecture == architecture, path.name
        assert loads_as in (found.loads_as or "").split(" or "), path.name
        assert f"architecture: {architecture}" in found.table()


def test_the_maker_is_named(tmp_path: Path) -> None:
    found = lowbits.inspect(own(tmp_path))
    assert found.versions["lowbits"] == lowbits.__version__
    assert {"torch", "torchao"} <= found.versions.keys()
    assert f"format:       lowbits, by lowbits {lowbits.__version__}" in str(found)
    assert lowbits.inspect(gguf(tmp_path)).versions == {}


def test_problems_are_shown(tmp_path: Path) -> None:
    path = gguf(tmp_path)
    path.write_bytes(path.read_bytes() + bytes(4096))
    found = lowbits.inspect(path)
    assert len(found.problems) == 1
    for problem in found.problems:
        assert f"problem: {problem}" in found.table()
    assert found.to_dict()["problems"] == found.problems


def test_forms_of_no_scheme_are_listed(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tensors = {
        "a.weight": torch.randint(0, 255, (64, 128), dtype=torch.uint8),
        "a.weight_scale": torch.ones(64, 16).to(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.ones(()),
        "a.comfy_quant": torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = lowbits.inspect(tmp_path / "x.safetensors")
    assert [form.form for form in found.forms] == ["comfy:nvfp4"]


def test_pickles_are_opened_where_that_is_allowed(tmp_path: Path) -> None:
    torch.save(model().state_dict(), tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="is a pickle"):
        lowbits.inspect(tmp_path / "x.pt")
    found = lowbits.inspect(tmp_path / "x.pt", allow_pickle=True)
    assert (found.format, found.weights) == ("pickle", 40960 + 64)


def test_a_pipeline_is_named_with_its_models() -> None:
    with pytest.raises(ConfigError, match="several models: name one of .*transformer, vae"):
        lowbits.inspect(MODEL)
    assert lowbits.inspect(MODEL / "transformer").bits_per_weight == 16


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(3))
    (tmp_path / "x.safetensors").write_bytes(b"{}")
    for name in ("x.gguf", "x.safetensors"):
        with pytest.raises(FormatError, match=name):
            lowbits.inspect(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        lowbits.inspect(tmp_path / "nothing")


def test_an_empty_file_has_no_bits(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    found = lowbits.inspect(tmp_path / "x.safetensors")
    assert (found.bits_per_weight, found.forms) == (0.0, ())
    assert "0.00 million" in found.table()


def test_a_row_for_each_form_lines_up(tmp_path: Path) -> None:
    rows = [
        line for line in lowbits.inspect(own(tmp_path)).table().splitlines() if " tensors" in line
    ]
    assert len(rows) == 3
    assert len({line.index(" tensors") for line in rows}) == 1
    assert len({len(line) for line in rows}) == 1
