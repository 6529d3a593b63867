"""Options of streaming, what reports and statistics say, and the command line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, draw
from streamed import MODES, mode_name, smallest_budget
from torch import nn
from typer.testing import CliRunner

import lowbits
from lowbits import errors
from lowbits.cli.app import app
from lowbits.config import parse_size

MODEL = str(Path(__file__).parents[2] / "benchmarks" / "miniflux")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("6GB", 6 * 10**9),
        ("6GiB", 6 * 2**30),
        ("6 GB", 6 * 10**9),
        ("6G", 6 * 10**9),
        ("1.5 MiB", 3 * 2**19),
        ("512kB", 512_000),
        ("512KiB", 2**19),
        ("2TB", 2 * 10**12),
        (" 7MB ", 7 * 10**6),
        ("100B", 100),
        ("100", 100),
        ("0", 0),
        (0, 0),
        (123, 123),
    ],
)
def test_sizes(text: Any, nbytes: int) -> None:
    assert parse_size(text, "budget") == nbytes
    assert lowbits.LowbitsConfig(gpu_weights=text, reserve=text).gpu_weights == nbytes


@pytest.mark.parametrize(
    "value", ["lots", "-3GB", "", "GB", "6 G B", "1e9", "6XB", "6,5GB", True, -1, 1.5, None, [6]]
)
@pytest.mark.parametrize("option", ["gpu_weights", "reserve"])
def test_what_is_no_size_is_refused(option: str, value: Any) -> None:
    with pytest.raises(errors.ConfigError, match=f"^{option}: got .*expected bytes or a size as"):
        lowbits.LowbitsConfig(**{option: value})
    model = nn.Linear(4, 4)
    with pytest.raises(errors.ConfigError, match=f"^{option}: got"):
        lowbits.apply(model, device="cpu", **{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swap": "fast"}, "swap: got 'fast', expected one of auto, queue, async"),
        ({"swap": "asynch"}, "did you mean 'async'"),
        ({"location": "ssd"}, "location: got 'ssd', expected one of auto, cpu, shared, disk"),
        ({"location": "share"}, "did you mean 'shared'"),
        ({"reserve": "all"}, "reserve: got 'all'"),
    ],
)
def test_what_is_no_choice_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        lowbits.LowbitsConfig(**options)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with lowbits.apply(model, device="cpu") as handle, pytest.raises(errors.ConfigError):
        handle.reconfigure(**options)


@pytest.mark.parametrize("option", ["device", "gpu_weights", "reserve", "swap", "location"])
def test_quantize_moves_nothing(option: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"{option}: quantize moves nothing"):
        lowbits.quantize(nn.Linear(64, 64), "bnb-nf4", **{option: "auto"})
    model = nn.Sequential(nn.Linear(64, 64))
    handle = lowbits.quantize(model, "bnb-nf4", rules={"*": "bnb-nf4"})
    with pytest.raises(errors.ConfigError, match="use lowbits.apply"):
        handle.reconfigure(gpu_weights="1MB")


@pytest.mark.parametrize("size", ["auto", "all", "1GB"])
def test_what_fits_stays_and_says_so(size: str) -> None:
    pipe = PIPELINES["flux"].build()
    handle = lowbits.apply(pipe, device="cpu", gpu_weights=size, location="disk")
    draw("flux", pipe)
    stats = handle.stats()
    total = sum(t.nbytes for m in handle.components.values() for t in m.state_dict().values())
    assert stats.peak_device_bytes == stats.budget_bytes
    assert stats.peak_device_bytes >= total
    assert (stats.method, stats.location, stats.units, stats.copied_bytes) == ("", "", (), 0)
    assert str(stats).endswith("on cpu, all of it to stay")


def test_a_place_that_there_is_not_falls_back_and_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = PIPELINES["flux"].build()
    with caplog.at_level(logging.INFO, "lowbits"):
        handle = lowbits.apply(pipe, device="cpu", gpu_weights="1MB", location="shared")
    assert handle.stats().location == "cpu"
    note = "memory of cpu is the host's: there is nothing to page-lock"
    assert handle.stats().notes == (note,)
    assert note in handle.report().warnings
    assert note in caplog.text
    handle.reconfigure(location="pageable")
    assert handle.stats().location == "cpu"
    assert not handle.stats().notes
    handle.reconfigure(location="auto")
    assert handle.stats().location == "disk"


@pytest.mark.parametrize("mode", MODES, ids=mode_name)
@pytest.mark.parametrize("scheme", ["native", "bnb-nf4"])
def test_numbers_agree_with_each_other(scheme: str, mode: dict[str, Any]) -> None:
    pipe = PIPELINES["flux"].build()
    budget = 2 * smallest_budget(pipe, scheme)
    handle = lowbits.apply(pipe, scheme, device="cpu", gpu_weights=budget, **mode)
    assert handle.stats().passes == handle.stats().peak_device_bytes == 0
    draw("flux", pipe)
    first = handle.stats()
    draw("flux", pipe)
    second = handle.stats()
    for stats in (first, second):
        total = sum(unit.nbytes for unit in stats.units)
        stored = sum(unit.nbytes * unit.copies for unit in stats.units)
        # Copies ahead may be under way.
        largest = max(unit.nbytes for unit in stats.units)
        assert abs(stats.copied_bytes - stored) <= 6 * largest
        assert stats.misses == sum(unit.misses for unit in stats.units)
        assert stats.stall_s == pytest.approx(sum(unit.stall_s for unit in stats.units))
        assert 0 < stats.peak_device_bytes <= stats.budget_bytes == budget < total
        kept = stats.host_bytes if mode["location"] == "cpu" else stats.disk_bytes
        assert total <= kept <= 1.5 * total + 2**20
        assert stats.pinned_bytes == 0
        assert {unit.name.partition(".")[0] for unit in stats.units} == set(handle.components)
        assert stats.to_dict()["units"][0]["name"] == stats.units[0].name
    # Four of each picture's five passes are known at its end: decode's ends with the next one.
    assert first.passes == 4
    assert second.passes == 9
    assert second.copied_bytes > first.copied_bytes


def test_numbers_tell_of_every_model_and_not_of_the_last_one() -> None:
    pipe = PIPELINES["sdxl"].build()
    budget = smallest_budget(pipe)
    handle = lowbits.apply(pipe, device="cpu", gpu_weights=budget, swap="async")
    draw("sdxl", pipe)  # the VAE, which ends a picture, is what is there now
    assert handle.stats().depth > 0
    assert handle.stats().predicted_s > 0.5 * handle.stats().actual_s


def test_the_report_is_of_what_is_packed_and_not_of_the_streaming() -> None:
    resident = PIPELINES["flux"].build()
    expected = lowbits.apply(resident, "bnb-nf4", device="cpu").report().to_dict()
    pipe = PIPELINES["flux"].build()
    budget = smallest_budget(pipe, "bnb-nf4")
    found = lowbits.apply(pipe, "bnb-nf4", device="cpu", gpu_weights=budget).report().to_dict()
    assert found["layers"] == expected["layers"]


@pytest.mark.parametrize("swap", ["queue", "async", "auto"])
def test_the_command_line_draws_the_same_picture(swap: str, tmp_path: Path) -> None:
    def run(name: str, *options: str) -> tuple[str, bytes]:
        out = tmp_path / name
        arguments = ["run", MODEL, "a photo of a bag", "-s", "gguf-q8_0", "-o", str(out)]
        settings = ["--steps", "2", "--set", "true_cfg_scale=1.0", "--device", "cpu"]
        result = CliRunner().invoke(app, [*arguments, *settings, *options])
        assert result.exit_code == 0, result.output
        return result.stdout, out.read_bytes()

    said, picture = run(
        "streamed.png", "--gpu-weights", "1MB", "--location", "disk", "--swap", swap
    )
    assert "of 976.56 KiB on cpu at most" in said
    assert "disk" in said
    said, resident = run("resident.png")
    assert "all of it to stay" in said
    assert picture == resident


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-weights", "lots"], "gpu_weights: got 'lots'"),
        (["--reserve", "lots"], "reserve: got 'lots'"),
        (["--gpu-weights", "10KB"], "need at least"),
    ],
)
def test_the_command_line_says_what_is_wrong(options: list[str], message: str) -> None:
    arguments = ["run", MODEL, "a bag", "-s", "gguf-q8_0", "-o", "none.png", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_a_config_streams() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    x = torch.randn(2, 64)
    expected = model(x)
    config = lowbits.LowbitsConfig(device="cpu", gpu_weights="40kB", swap="queue", location="cpu")
    with lowbits.apply(model, config) as handle:
        assert torch.equal(model(x), expected)
        assert handle.stats().budget_bytes == 40_000
    assert torch.equal(model(x), expected)
