"""`lowbits convert` and `lowbits inspect`."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

import lowbits
from lowbits.cli import tables
from lowbits.cli.app import app
from lowbits.cli.bars import Bars

if TYPE_CHECKING:
    from typer.testing import Result

MODEL = Path(__file__).parents[2] / "benchmarks" / "miniflux"
TRANSFORMER = str(MODEL / "transformer")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def run(*arguments: object, width: int = 200) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(width)})


def small(folder: Path, value: float = 0.5) -> Path:
    path = folder / "small.safetensors"
    save_file({f"blocks.{i}.w.weight": torch.full((64, 256), value) for i in (0, 1)}, path)
    return path


def require_error(result: Result, message: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_a_model_is_converted(tmp_path: Path) -> None:
    dst = tmp_path / "x.gguf"
    result = run("convert", TRANSFORMER, dst, "--scheme", "gguf-q4_k")
    assert result.exit_code == 0, result.output
    assert not result.stderr
    summary, wrote = result.stdout.splitlines()
    assert re.fullmatch(
        r"9\.17 MiB -> 3\.\d\d MiB \(2\.\d\dx\), \d+ weights packed as Q4_K.*", summary
    )
    assert wrote == f"wrote {dst}"
    assert lowbits.inspect(dst).architecture == "flux"


def test_a_report_folds_what_is_alike(tmp_path: Path) -> None:
    result = run("convert", TRANSFORMER, tmp_path / "x.gguf", "-s", "gguf-q4_k", "--report")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len([line for line in lines if " vector " in line]) == 1
    assert [line for line in lines if "flux keeps img_in in high precision" in line]
    assert [line for line in lines if re.search(r"single_blocks\.\*\.linear1 +2 +tensor", line)]
    result = run("convert", TRANSFORMER, tmp_path / "x.safetensors", "-s", "bnb-nf4", "--report")
    assert "transformer_blocks.*.ff.net.*.proj" in result.stdout
    assert len(result.stdout.splitlines()) < 50


def test_a_pipeline_with_rules(tmp_path: Path) -> None:
    arguments = ("--rule", "*.to_q=gguf-q8_0", "--skip", "text_encoder_2", "--report")
    result = run("convert", MODEL, tmp_path / "out", "-s", "quanto-int8", *arguments)
    assert result.exit_code == 0, result.output
    assert {"gguf-q8_0", "quanto-int8"} <= set(result.stdout.split())
    assert "skipped by 'text_encoder_2'" in result.stdout
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_a_second_quantization_is_noted(tmp_path: Path) -> None:
    low, dst = tmp_path / "low.safetensors", tmp_path / "x.safetensors"
    assert run("convert", small(tmp_path), low, "-s", "bnb-nf4").exit_code == 0
    result = run("convert", low, dst, "-s", "bnb-fp4")
    notes = [line for line in result.stdout.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "from bnb-nf4 to bnb-fp4" in notes[0]
    result = run("convert", low, dst, "-s", "bnb-fp4", "--report")
    assert result.stdout.count("from bnb-nf4 to bnb-fp4") == 1
    result = run("convert", low, dst, "-s", "bnb-fp4", "--on-requantize", "allow")
    assert "bnb-nf4 to" not in result.output
    require_error(
        run("convert", low, dst, "-s", "bnb-fp4", "--on-requantize", "error"), "bnb-nf4 to bnb-fp4"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TRANSFORMER, "x.gguf", "-s", "gguf-q4k"], "unknown scheme 'gguf-q4k'; did you mean"),
        ([TRANSFORMER, "x.gguf", "-s", "bnb-nf4"], "a GGUF file holds schemes of GGUF"),
        ([TRANSFORMER, "x.gguf", "-s", "gguf-q8_0", "--skip", "a"], "rules, skip: "),
        ([TRANSFORMER, "x", "-s", "bnb-nf4", "--skip", "unet"], "pattern 'unet' matches no layer"),
        ([TRANSFORMER, TRANSFORMER, "-s", "bnb-nf4"], "save into another folder"),
        ([str(MODEL), "x.gguf", "-s", "gguf-q8_0"], "is a pipeline of several models"),
        ([str(MODEL), str(MODEL), "-s", "bnb-nf4"], "the pipeline's own folder"),
        ([str(MODEL / "README.md"), "x.gguf", "-s", "gguf-q8_0"], "not a safetensors file"),
        ([TRANSFORMER, "no/x.gguf", "-s", "gguf-q8_0"], "no/x.gguf: No such file or directory"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    require_error(run("convert", *arguments), message)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    src = small(tmp_path, float("nan"))
    for name in ("x.gguf", "x.safetensors"):
        result = run("convert", src, tmp_path / name, "-s", "gguf-q8_0")
        require_error(result, "blocks.0.w")
    assert [path.name for path in tmp_path.iterdir()] == [src.name]


def test_misuse_shows_the_usage(tmp_path: Path) -> None:
    for arguments, message in (
        (("convert", tmp_path / "no", "x"), "does not exist"),
        (("convert", TRANSFORMER, "x.gguf"), "Missing option '--scheme'"),
        (("convert", TRANSFORMER, "x.gguf", "-s", "bnb-nf4", "--rule", "a"), "--rule"),
        (("convert", TRANSFORMER, "x", "-s", "bnb-nf4", "--on-requantize", "a"), "is not one of"),
        (("inspect", tmp_path / "no"), "does not exist"),
        (("inspect",), "Missing argument"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        (
            "convert",
            ["--scheme", "--rule", "--skip", "--on-requantize", "--report", "a weight at a"],
        ),
        ("inspect", ["--json", "without reading its tensors"]),
    ],
)
def test_help(command: str, texts: list[str]) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert all(text in result.stdout for text in texts)


def test_a_file_is_inspected(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    lowbits.convert(TRANSFORMER, path, "gguf-q8_0")
    result = run("inspect", path)
    assert result.exit_code == 0
    assert not result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "format:       gguf"
    assert lines[1] == "architecture: flux"
    assert "FluxTransformer2DModel" in lines[2]
    assert re.fullmatch(
        r"weights:      4\.81 million, \d\.\d\d MiB, \d+\.\d{3} bits each", lines[3]
    )
    assert [line.split()[0] for line in lines[4:]] == ["gguf-q8_0", "bfloat16", "float32"]
    assert len({len(line) for line in lines[4:]}) == 1


def test_json_of_an_inspection(tmp_path: Path) -> None:
    result = run("inspect", TRANSFORMER, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found == json.loads(json.dumps(lowbits.inspect(TRANSFORMER).to_dict()))
    assert (found["format"], found["bits_per_weight"]) == ("safetensors", 16.0)
    assert list(found["forms"][0]) == ["form", "tensors", "weights", "nbytes"]


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
    require_error(run("inspect", MODEL), "name one of text_encoder")
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    require_error(run("inspect", tmp_path / "x.pt"), "is a pickle")
    require_error(run("inspect", tmp_path), "no file in it ends with .safetensors")
    shutil.copyfile(MODEL / "transformer" / "config.json", tmp_path / "x.gguf")
    require_error(run("inspect", tmp_path / "x.gguf"), "x.gguf: not a")


def test_the_bar_shows_bytes_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=90, get_time=lambda: now[0])
    with Bars(console, in_bytes=True) as bars:
        bars._progress.get_time = lambda: now[0]
        for gigabytes in range(5):
            bars.track("converting", gigabytes << 30, 24 << 30)
            now[0] += 10.0
    last = ESCAPES.sub("", stream.getvalue()).replace("\r", "\n").rstrip().splitlines()[-1]
    assert last.startswith("converting ")
    assert "4.0/24.0 GiB" in last
    assert re.search(r"0:03:\d\d left", last)


def test_convert_moves_its_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=90)
    monkeypatch.setattr(tables, "make_console", lambda **_: console)
    seen: list[tuple[str, float, float | None]] = []
    track = Bars.track

    def spy(bars: Bars, phase: str, done: float, total: float | None) -> None:
        seen.append((phase, done, total))
        track(bars, phase, done, total)

    monkeypatch.setattr(Bars, "track", spy)
    assert run("convert", small(tmp_path), tmp_path / "x.gguf", "-s", "gguf-q8_0").exit_code == 0
    assert seen == [
        ("checking values", 65536, 131072),
        ("checking values", 131072, 131072),
        ("converting", 17408, 34816),
        ("converting", 34816, 34816),
    ]
    shown = ESCAPES.sub("", stream.getvalue())
    assert "converting" in shown
    assert "34.0/34.0 KiB" in shown
