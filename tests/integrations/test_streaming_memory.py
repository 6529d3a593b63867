"""What streaming costs on the host: a process of its own, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from processes import new_process, run_in
from safetensors.torch import load_file, save_file
from torch import nn

import lowbits

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, LAYERS = 1024, 48  # 201 MB
BUDGET = 20_000_000


def build(width: int = WIDTH, layers: int = LAYERS) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def used_bytes() -> int:
    """Return what a process has of the host's memory; pages of mapped files are not its own."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kinds = ("RssAnon:", "RssShmem:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))


def with_apply(model: nn.Module, path: Path) -> Callable[[], Any]:
    return lowbits.apply(
        model, device="cpu", gpu_weights=BUDGET, location="disk", source=path, swap="async"
    ).stats


def with_streamer(model: nn.Module, path: Path) -> Callable[[], Any]:
    return (
        lowbits.LayerStreamer(model, device="cpu", budget=BUDGET, location="disk", source=path)
        .attach()
        .stats
    )


def measure(begin: Callable[[nn.Module, Path], Callable[[], Any]], path: Path) -> dict[str, Any]:
    """Stream a model from its file, and say what that took."""
    small = build(8, 3)
    with lowbits.LayerStreamer(small, device="cpu", budget=600, location="disk"):
        small(torch.ones(1, 8))  # imports what is imported at the first use
    with torch.device("meta"):
        model = build()
    model.load_state_dict(load_file(path), assign=True)  # mapped
    before = used_bytes()
    stats = begin(model, path)
    attached = used_bytes()
    x = torch.ones(1, WIDTH)
    with torch.no_grad():
        for _ in range(3):
            result = model(x)
    return {
        "attached": attached - before,
        "running": used_bytes() - before,
        "disk": stats().disk_bytes,
        "host": stats().host_bytes,
        "peak": stats().peak_device_bytes,
        "copied": stats().copied_bytes,
        "result": result.sum().item(),
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("begin", [with_apply, pytest.param(with_streamer, marks=pytest.mark.slow)])
def test_a_model_is_streamed_from_its_file(begin: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = build()
    save_file(model.state_dict(), path)
    with torch.no_grad():
        expected = model(torch.ones(1, WIDTH)).sum().item()
    with new_process() as process:
        found = run_in(process, measure, begin, path)
    assert found["result"] == expected
    assert found["disk"] == 0, "every tensor is in the file"
    assert found["peak"] <= BUDGET
    assert found["copied"] > 3 * 150_000_000
    # The ring, staging buffers and torch's own: a tenth of the model where all of it is 201 MB.
    assert found["attached"] < 30_000_000
    assert found["running"] < BUDGET + found["host"] + 30_000_000
