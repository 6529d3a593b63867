"""`lowbits compare`: the measurement, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import lowbits
from lowbits.cli import compare as comparing
from lowbits.cli import outputs, tables
from lowbits.cli.app import _scheme_names, app
from lowbits.cli.drawing import draw
from lowbits.cli.loading import Recipe, load_pipeline, read_recipe
from lowbits.cli.reader import load_reader, read
from lowbits.cli.sheet import Layout, layout
from lowbits.core.registry import DEFAULT
from lowbits.errors import BackendUnavailableError, ConfigError

MODEL = Path(__file__).parents[2] / "benchmarks" / "miniflux"
LORA = MODEL / "lora" / "stripes.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """Compare two schemes, one seed and two steps each."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    options = ["--schemes", "bnb-nf4, gguf-q8_0", "--seeds", "1", "--steps", "2", "--blind"]
    result = CliRunner().invoke(
        app, ["compare", str(MODEL), "--out", str(folder), *options], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    return result, folder


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(MODEL, CPU)


@pytest.fixture(scope="module")
def phases() -> dict[str, list[float]]:
    return {}


@pytest.fixture(scope="module")
def found(pipe: Any, phases: dict[str, list[float]]) -> comparing.Comparison:
    """Compare one scheme, and note how far each phase got."""

    def track(phase: str, done: float, total: float) -> None:
        phases[phase] = [done, total]

    return comparing.compare(pipe, _plan("torchao-int8"), track)


def _plan(*schemes: str) -> comparing.Plan:
    recipe = Recipe(("a photo of a bag",), call={**read_recipe(MODEL).call, "true_cfg_scale": 1.0})
    return comparing.Plan(recipe, schemes, seeds=3, batch=2, device=CPU)


def _without_bnb(name: str) -> Any:
    if name.startswith("bnb"):
        raise BackendUnavailableError("bitsandbytes is missing")
    return DEFAULT.find(name)


def _no_track(phase: str, done: float, total: float) -> None: ...


def test_the_table_starts_with_full_precision(written: tuple[Result, Path]) -> None:
    result, folder = written
    names = ("full precision", "bnb-nf4", "gguf-q8_0")
    places = [result.stdout.index(name) for name in names]
    assert places == sorted(places)
    assert f"wrote {folder / 'report.json'}" in result.stdout
    assert not result.stderr


def test_the_report_has_everything(written: tuple[Result, Path]) -> None:
    report = json.loads((written[1] / "report.json").read_text())
    assert list(report) == [
        "model",
        "prompts",
        "labels",
        "call",
        "seeds",
        "batch",
        "pictures",
        "device",
        "full_precision",
        "schemes",
        "skipped",
        "machine",
    ]
    assert report["model"] == "miniflux"
    assert report["call"]["num_inference_steps"] == 2
    assert report["pictures"] == 10
    assert report["machine"]["packages"].keys() >= {"lowbits", "torch", "diffusers"}
    full, (nf4, q8) = report["full_precision"], report["schemes"]
    assert full["bits_per_weight"] == 32
    assert full["psnr_db"] is full["convert_s"] is full["restored"] is None
    assert (nf4["bits_per_weight"], q8["bits_per_weight"]) == (4.5, 8.5)
    assert nf4["packed_component_bytes"] < q8["packed_component_bytes"] < nf4["total_bytes"]
    assert 20 < nf4["psnr_db"] < q8["psnr_db"]
    assert nf4["restored"] is q8["restored"] is True
    assert 0 <= nf4["accuracy"] <= 1
    assert nf4["convert_s"] > 0
    assert nf4["seconds_per_picture"] > 0


def test_the_sheet_has_the_size_of_its_layout(written: tuple[Result, Path]) -> None:
    _, folder = written
    # Pictures of 32 pixels are enlarged by 4.
    expected = Layout(tile=(128, 128), rows=3, columns=10, figures=4)
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.size == expected.size


def test_the_blind_test_needs_no_network(written: tuple[Result, Path]) -> None:
    page = (written[1] / "blind.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 20
    assert "@@" not in page
    for outside in ("http:", "https:", "//cdn", "<link", "@import", "url("):
        assert outside not in page


def test_batches_cover_each_seed_once() -> None:
    assert list(_plan().batches()) == [
        ("a photo of a bag", range(2)),
        ("a photo of a bag", range(2, 3)),
    ]


def test_batches_make_no_difference_to_the_figures(found: comparing.Comparison) -> None:
    (result,) = found.results
    assert result.pictures.shape == (1, 3, 32, 32)
    assert result.accuracy is None
    assert result.restored
    assert 30 < result.psnr_db < math.inf


def test_each_phase_is_followed_to_its_end(
    found: comparing.Comparison, phases: dict[str, list[float]]
) -> None:
    assert phases["full precision: drawing"] == [3, 3]
    assert phases["torchao-int8 (1 of 1): restoring"] == [2, 2]
    done, total = phases["torchao-int8 (1 of 1): packing"]
    assert done == total > 0


def test_a_scheme_that_fails_is_skipped(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: p.clone() for name, p in pipe.transformer.named_parameters()}

    def failing(*arguments: Any) -> torch.Tensor:
        if any(name.endswith("_qdata") for name, _ in pipe.transformer.named_parameters()):
            raise NotImplementedError("no such kernel")
        return draw(*arguments)

    monkeypatch.setattr("lowbits.cli.compare.draw", failing)
    found = comparing.compare(pipe, _plan("quanto-int8", "native"), _no_track)
    assert found.skipped == (
        comparing.Skipped("quanto-int8", "NotImplementedError: no such kernel"),
    )
    assert [result.scheme for result in found.results] == ["native"]
    assert found.results[0].psnr_db == math.inf
    for name, parameter in pipe.transformer.named_parameters():
        assert torch.equal(parameter, before[name])


def test_schemes_that_cannot_be_used_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DEFAULT, "require", _without_bnb)
    usable, skipped = comparing.usable_schemes(["bnb-nf4 (fp16 LoRA)", "gguf-q8_0", "gguf-q8_0"])
    assert usable == ("gguf-q8_0",)
    assert skipped == (comparing.Skipped("bnb-nf4", "bitsandbytes is missing"),)


def test_prompts_are_needed(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(tmp_path), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "has no compare.json with prompts: pass --prompt" in result.stderr


def test_own_prompts_are_drawn_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DEFAULT, "require", _without_bnb)
    options = ["--prompt", "a photo of a coat", "--seeds", "1", "--steps", "1", "--blind"]
    arguments = ["compare", str(MODEL), "--out", str(tmp_path), "--schemes", "bnb-nf4", *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "skipped bnb-nf4: bitsandbytes is missing\n" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["prompts"] == ["a photo of a coat"]
    assert report["labels"] == report["schemes"] == []
    assert report["full_precision"]["accuracy"] is None
    assert not (tmp_path / "blind.html").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--schemes", "bnb-nf4", "--all"], 2, "exclude each other"),
        (["--schemes", "bnb-nf5"], 1, "did you mean 'bnb-nf4'"),
        (["--schemes", " ,"], 2, "got ' ,', expected names as bnb-nf4,gguf-q8_0"),
        (["--lora", "merge"], 2, "needs --lora-weights"),
        (["--lora", "fp8"], 2, "got 'fp8', expected auto, fp16, merge"),
    ],
)
def test_what_is_asked_for_must_make_sense(
    tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    arguments = ["compare", str(MODEL), "--out", str(tmp_path), *options]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == code
    assert message in result.stderr


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(comparing, "compare", None)
    arguments = ["compare", str(MODEL), "--out", str(tmp_path / "file" / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr == f"error: {tmp_path / 'file' / 'out'}: Not a directory\n"


def test_all_schemes_are_those_of_every_backend() -> None:
    names = {info.name for info in lowbits.schemes() if info.can_quantize} - {"native"}
    assert set(_scheme_names(None, all_schemes=True)) == names
    assert set(_scheme_names(None, all_schemes=False)) == set(comparing.DEFAULT_SCHEMES) <= names


def test_a_pipeline_must_take_what_it_is_told_and_draw() -> None:
    with pytest.raises(ConfigError, match="_Mute takes no steps"):
        draw(_Mute(), "a bag", [0], {"steps": 1}, lambda _: None)
    with pytest.raises(ConfigError, match="_Mute draws no pictures"):
        draw(_Mute(), "a bag", [0], {"negative_prompt": ""}, lambda _: None)


class _Mute:
    def __call__(
        self,
        prompt: list[str],
        negative_prompt: list[str],
        generator: list[torch.Generator],
        output_type: str,
    ) -> object:
        assert negative_prompt == [""] * len(prompt)
        return object()


def test_equal_pictures_have_infinite_psnr() -> None:
    pictures = torch.rand(2, 3, 8, 8)
    assert comparing.psnr_db(pictures, pictures.clone()) == math.inf
    assert comparing.psnr_db(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)) == (
        pytest.approx(20)
    )


def test_pictures_of_nan_are_reported(found: comparing.Comparison, tmp_path: Path) -> None:
    (result,) = found.results
    nan = dataclasses.replace(result, psnr_db=math.nan)
    broken = dataclasses.replace(found, results=(nan,))
    outputs.write_outputs(broken, "mini", tmp_path, blind=True)
    (row,) = json.loads((tmp_path / "report.json").read_text())["schemes"]
    assert row["has_nan"]
    assert row["psnr_db"] is None
    assert not outputs.result_dict(result)["has_nan"]
    assert "nan" in tables.format_psnr(math.nan)
    assert (tmp_path / "contact_sheet.png").exists()


def test_the_reader_reads_clothes() -> None:
    reader = load_reader(MODEL / "classifier.safetensors")
    trousers = torch.zeros(1, 3, 32, 32)
    trousers[..., 3:29, 10:15] = trousers[..., 3:29, 17:22] = trousers[..., 3:8, 10:22] = 0.7
    assert read(reader, trousers).tolist() == [1]


def test_a_sheet_shows_every_result(found: comparing.Comparison) -> None:
    sheet = outputs.make_sheet(found, "mini", outputs.machine())
    assert sheet.title == "mini in low bits"
    assert [row.name for row in sheet.rows] == ["full precision", "torchao-int8"]
    assert sheet.columns == ("a photo of a bag",)
    assert len(sheet.figures) == len(sheet.rows[0].figures) == 3
    assert layout(sheet).columns == 1


def test_a_lora_is_drawn_at_three_strengths(tmp_path: Path) -> None:
    lora = ["--lora-weights", f"{LORA}=0.8", "--lora", "fp16", "--lora", "merge"]
    options = ["--schemes", "bnb-nf4", "--prompt", "a bag", "--prompt", "a coat", "--seeds", "1"]
    result = CliRunner().invoke(
        app,
        ["compare", str(MODEL), "--out", str(tmp_path), *options, "--steps", "2", *lora],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 0, result.output
    assert "bnb-nf4 merge" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["pictures"] == 6
    assert report["lora_strengths"] == [{"lora_0": 0.0}, {"lora_0": 0.4}, {"lora_0": 0.8}]
    assert [row["lora"] for row in report["schemes"]] == ["fp16", "merge"]
    assert all(row["restored"] and row["psnr_db"] > 15 for row in report["schemes"])
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.size == Layout(tile=(128, 128), rows=3, columns=6, figures=3).size


def test_columns_of_a_lora_stand_by_their_prompts() -> None:
    plan = dataclasses.replace(_plan(), adapters={"x": 1.0})
    plan = dataclasses.replace(plan, recipe=Recipe(("a", "b")))
    numbers = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 4, 4) / 255
    stored = comparing.Stored(0, 0, 32.0)
    found = comparing.Result("x", stored, None, None, 1.0, math.inf, None, None, numbers)
    sheet = outputs.make_sheet(comparing.Comparison(plan, found, (), ()), "m", outputs.machine())
    named = ["LoRA 0: a", "LoRA 0.5: a", "LoRA 1: a", "LoRA 0: b", "LoRA 0.5: b", "LoRA 1: b"]
    assert list(sheet.columns) == named
    assert [picture.getpixel((0, 0)) for picture in sheet.rows[0].pictures] == [
        (level, level, level) for level in (0, 2, 4, 1, 3, 5)
    ]
