"""mini-FLUX, streamed in the smallest budget there is: bit for bit the pictures of the resident."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from miniflux import MODEL
from schemes import every_scheme
from streamed import MODES, Anatomy, mode_name, smallest_budget

import lowbits
from lowbits import errors
from lowbits.cli.drawing import draw
from lowbits.cli.loading import read_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

CROSSED = [{"swap": "async", "location": "cpu"}, {"swap": "queue", "location": "disk"}]


def picture(pipe: Any, **call: Any) -> torch.Tensor:
    recipe = read_recipe(MODEL)
    settings = {**recipe.call, "num_inference_steps": 2, **call}
    return draw(pipe, recipe.prompts[-2], [0], settings, lambda _: None)


@pytest.fixture(scope="module")
def pipe(original: Any) -> Any:
    """Return one pipeline for all tests: each leaves it as it was."""
    return original


class Packed:
    """mini-FLUX in one scheme, and its picture while it is resident."""

    def __init__(self, pipe: Any, scheme: str) -> None:
        self.pipe = pipe
        self.handle = lowbits.apply(pipe, scheme, device="cpu", keep_source="memory")
        self.resident_bytes = self.handle.stats().peak_device_bytes
        self.picture = picture(pipe)
        self.smallest = self._needed(0)
        assert self._needed(self.smallest - 1) == self.smallest
        assert self.smallest < self.resident_bytes / 4

    def _needed(self, budget: int) -> int:
        with pytest.raises(errors.InsufficientMemoryError) as caught:
            self.handle.reconfigure(gpu_weights=budget)
        return caught.value.needed_bytes


def test_between_the_smallest_budget_and_the_whole(pipe: Any) -> None:
    packed = Packed(pipe, "gguf-q8_0")
    packed.handle.reconfigure(gpu_weights=(packed.smallest + packed.resident_bytes) // 2)
    assert torch.equal(picture(packed.pipe), packed.picture)
    stats = packed.handle.stats()
    assert stats.peak_device_bytes <= stats.budget_bytes
    packed.handle.reconfigure(gpu_weights="all")
    assert torch.equal(picture(packed.pipe), packed.picture)
    assert packed.handle.stats().peak_device_bytes == packed.resident_bytes
    assert not packed.handle.stats().method
    packed.handle.restore()


def test_applied_streamed_from_the_beginning_and_restored(pipe: Any) -> None:
    before = picture(pipe)
    anatomy = Anatomy(pipe)
    budget = smallest_budget(pipe, "bnb-nf4", keep_source="memory")
    anatomy.check()
    handle = lowbits.apply(
        pipe, "bnb-nf4", device="cpu", gpu_weights=budget, keep_source="memory", location="disk"
    )
    streamed = picture(pipe)
    handle.restore()
    anatomy.check()
    assert torch.equal(picture(pipe), before)
    with lowbits.apply(pipe, "bnb-nf4", device="cpu", keep_source="memory"):
        assert torch.equal(picture(pipe), streamed)
    anatomy.check()


def test_guidance_runs_the_denoiser_twice_in_a_step(pipe: Any) -> None:
    calls = {"true_cfg_scale": 2.0, "negative_prompt": "", "num_inference_steps": 3}
    expected = picture(pipe, **calls)
    plain = picture(pipe, true_cfg_scale=1.0, num_inference_steps=3)
    assert not torch.equal(plain, expected)
    budget = smallest_budget(pipe)
    with lowbits.apply(pipe, device="cpu", gpu_weights=budget, swap="async") as handle:
        assert torch.equal(picture(pipe, **calls), expected)
        assert torch.equal(picture(pipe, true_cfg_scale=1.0, num_inference_steps=3), plain)
        assert handle.stats().misses == 0


@pytest.fixture(scope="module", params=["native", *every_scheme()])
def packed(request: pytest.FixtureRequest, pipe: Any) -> Iterator[Packed]:
    made = Packed(pipe, request.param)
    yield made
    made.handle.restore()


@pytest.mark.parametrize(
    "mode",
    [*MODES, *(pytest.param(mode, marks=pytest.mark.slow) for mode in CROSSED)],
    ids=mode_name,
)
def test_the_smallest_budget_draws_the_same_picture(packed: Packed, mode: dict[str, Any]) -> None:
    packed.handle.reconfigure(gpu_weights=packed.smallest, **mode)
    assert torch.equal(picture(packed.pipe), packed.picture)
    stats = packed.handle.stats()
    assert stats.peak_device_bytes <= stats.budget_bytes == packed.smallest
    assert (stats.method, stats.location) == tuple(mode.values())
    assert stats.copied_bytes > packed.resident_bytes / 10
    assert not stats.recoveries
