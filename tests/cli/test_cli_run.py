"""`lowbits run`, and how commands fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from typer.testing import CliRunner

import lowbits
from lowbits.cli.app import app
from lowbits.errors import UnknownSchemeError

MODEL = str(Path(__file__).parents[2] / "benchmarks" / "miniflux")
PROMPT = "a photo of a sneaker"
#: Layers of a LoRA.
NAMES = ["to_q", "to_v", "proj_mlp"]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    out = tmp_path / "new" / "sneaker.png"
    arguments = ["run", MODEL, PROMPT, "-s", "gguf-q8_0", "-o", str(out), "--steps", "2"]
    result = CliRunner().invoke(app, [*arguments, "--set", "true_cfg_scale=1.0"])
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        assert picture.size == (32, 32)
    summary, weights, wrote = result.stdout.splitlines()
    assert "weights packed as gguf-q8_0, originals: none" in summary
    assert weights.startswith("weights: ")
    assert weights.endswith("on cpu, all of it to stay")
    assert wrote == f"wrote {out}"
    assert not result.stderr


def test_a_pipeline_that_was_converted_draws_as_it_is_stored(tmp_path: Path) -> None:
    folder, out = tmp_path / "packed", tmp_path / "sneaker.png"
    lowbits.convert(MODEL, folder, "gguf-q8_0")
    result = CliRunner().invoke(app, ["run", str(folder), PROMPT, "-o", str(out), "--steps", "2"])
    assert result.exit_code == 0, result.output
    alone = CliRunner().invoke(
        app,
        ["run", MODEL, PROMPT, "-s", "gguf-q8_0", "-o", str(tmp_path / "b.png"), "--steps", "2"],
    )
    assert alone.exit_code == 0, alone.output
    with Image.open(out) as found, Image.open(tmp_path / "b.png") as expected:
        assert found.tobytes() == expected.tobytes()
    again = ["run", str(folder), PROMPT, "-s", "bnb-nf4", "-o", str(out), "--steps", "1"]
    assert "\nnote: quantized a second time: " in CliRunner().invoke(app, again).stdout
    refused = CliRunner().invoke(app, ["compare", str(folder), "--out", str(tmp_path / "out")])
    assert refused.exit_code == 1
    assert "was saved packed (text_encoder_2, transformer): compare wants" in refused.stderr


def test_seeds_and_packing_options_reach_the_picture(tmp_path: Path) -> None:
    def draw(name: str, *options: str) -> bytes:
        out = tmp_path / name
        arguments = ["run", MODEL, PROMPT, "-s", "quanto-int8", "-o", str(out), "--steps", "1"]
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 0, result.output
        if "--report" in options:
            assert "vae.*" in result.stdout
            assert "gguf-q4_0" in result.stdout
        with Image.open(out) as picture:
            return picture.tobytes()

    first = draw("1.png")
    assert draw("2.png") == first
    assert draw("3.png", "--seed", "1") != first
    assert draw("4.png", "--skip", "*single*") != first
    components = ("--component", "transformer", "--component", "vae=quanto-int8")
    rule = ("--rule", "*ff*=gguf-q4_0", "--compute-dtype", "float32", "--report")
    assert draw("5.png", *components, *rule) != first


def test_a_lora_is_drawn_with(tmp_path: Path) -> None:
    pipe: Any = FluxPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False))
    factors = get_peft_model_state_dict(pipe.transformer)
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=factors)

    def draw(*options: str) -> np.ndarray[Any, Any]:
        out = tmp_path / "x.png"
        arguments = ["run", MODEL, PROMPT, "-s", "torchao-int8", "-o", str(out), "--steps", "1"]
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 0, result.output
        with Image.open(out) as picture:
            return np.asarray(picture).astype(float)

    file = str(tmp_path / "pytorch_lora_weights.safetensors")
    plain, beside = draw(), draw("--lora-weights", file)
    assert np.array_equal(draw("--lora-weights", f"{tmp_path}=0"), plain)
    effect = np.abs(beside - plain).mean()
    assert effect > 1
    merged = draw("--lora-weights", str(tmp_path), "--lora", "merge")
    assert 0 < np.abs(merged - beside).mean() < effect / 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-s", "bnb-nf5"], "unknown scheme 'bnb-nf5'; did you mean 'bnb-nf4'"),
        (["-s", "bnb-nf4", "--rule", "*=bnb-nf5"], "unknown scheme 'bnb-nf5'"),
        (["-s", "bnb-nf4", "--device", "gpux"], "device: got 'gpux', expected one such as cpu"),
        (["-s", "bnb-nf4", "--component", "unet"], "components: the target has no 'unet'"),
        (["-s", "bnb-nf4", "--lora-weights", MODEL], "lora_weights: "),
        (["-s", "bnb-nf4", "--set", "cfg=2"], "FluxPipeline takes no cfg"),
        (["-s", "bnb-nf4", "--set", "num_inference_steps=[]"], "(lowbits --debug shows where)"),
    ],
)
def test_an_error_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    out = ["-o", str(tmp_path / "x.png")]
    result = CliRunner().invoke(app, ["run", MODEL, PROMPT, *out, *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_a_place_for_the_picture_is_looked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbits.cli.app.load_pipeline", pytest.fail)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for out, code in (("file/x.png", 1), ("folder.png", 2)):
        arguments = ["run", MODEL, PROMPT, "-s", "bnb-nf4", "-o", str(tmp_path / out)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code
        assert tmp_path.name in "".join(result.stderr.split()) or "folder" in result.stderr


def test_debug_raises(tmp_path: Path) -> None:
    arguments = ["run", MODEL, PROMPT, "-s", "bnb-nf5", "-o", str(tmp_path / "x.png")]
    with pytest.raises(UnknownSchemeError):
        CliRunner().invoke(app, ["--debug", *arguments], catch_exceptions=False)


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path) -> None:
    arguments = ["-s", "bnb-nf4", "-o", str(tmp_path / "x.png")]
    result = CliRunner().invoke(app, ["run", str(tmp_path), PROMPT, *arguments])
    assert result.exit_code == 1
    assert "has no model_index.json" in result.stderr


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    arguments = ["-s", "float8-e5m2", "-o", str(tmp_path / "x.png")]
    result = CliRunner().invoke(app, ["run", MODEL, PROMPT, *arguments])
    assert result.exit_code == 1
    assert "this command needs diffusers: pip install 'lowbits[diffusers]'" in result.stderr


def test_other_missing_modules_are_bugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lowbits.cli.drawing", None)
    arguments = ["run", MODEL, PROMPT, "-s", "bnb-nf4", "-o", str(tmp_path / "x.png")]
    with pytest.raises(ModuleNotFoundError):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "x.png", "--set", "a=b"], "is no JSON"),
        (["-o", "x.png", "--set", "a"], "expected KEY=VALUE"),
        (["-o", "x.txt"], "ends in none of"),
        (["-o", "x.png", "--set", "a=NaN"], "is no JSON"),
        (["-o", "x.png", "--set", "a=1e999"], "is no JSON"),
        (["-o", "x.png", "--set", 'prompt="b"'], "prompt is what the command itself says"),
        (["-o", "x.png", "--seed", "99999999999999999999"], "--seed"),
        (["-o", "x.png", "--lora-weights", f"{MODEL}=nan"], "expected PATH=STRENGTH"),
    ],
)
def test_misuse_shows_the_usage(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(
        app, ["run", MODEL, PROMPT, "-s", "bnb-nf4", *arguments], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds list, expected an object"),
        (json.dumps({"prompts": [1]}), "prompts: got 1, expected a text"),
        (json.dumps({"call": 1}), "call: got int, expected dict"),
        (json.dumps({"prompts": ["a"], "labels": ["a", "b"]}), "got 2 labels for 1 prompts"),
    ],
)
def test_a_broken_recipe_is_named(tmp_path: Path, recipe: str, message: str) -> None:
    (tmp_path / "compare.json").write_text(recipe)
    result = CliRunner().invoke(app, ["compare", str(tmp_path), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert message in result.stderr
