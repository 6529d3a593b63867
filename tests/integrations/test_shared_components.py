"""Pipelines that share components: one of them packs what they share, any may stream it."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pipelines import PIPELINES, draw
from streamed import Anatomy

import lowbits
from lowbits import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

RESIDENT: dict[str, Any] = {"device": "cpu", "keep_source": "memory"}
STREAMED: dict[str, Any] = {**RESIDENT, "gpu_weights": "300KB", "location": "cpu"}


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    lowbits.device_budget("cpu", None)
    gc.collect()


class Pair:
    """Two pipelines that differ in their denoiser only."""

    def __init__(self) -> None:
        self.first: Any = PIPELINES["flux"].build()
        other = PIPELINES["flux"].build(seed=1).transformer
        self.second: Any = type(self.first)(**{**self.first.components, "transformer": other})
        self.second.set_progress_bar_config(disable=True)
        self.draw()  # leaves attributes behind
        self.anatomies = [Anatomy(self.first), Anatomy(self.second)]

    def draw(self) -> list[torch.Tensor]:
        return [draw("flux", pipe) for pipe in (self.first, self.second)]

    def check(self) -> None:
        for anatomy in self.anatomies:
            anatomy.check()


def equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("options", [RESIDENT, STREAMED], ids=["resident", "streamed"])
def test_what_the_first_has_packed_stays_its_own(options: dict[str, Any]) -> None:
    pair = Pair()
    one = lowbits.apply(pair.first, "bnb-nf4", **RESIDENT)
    two = lowbits.apply(pair.second, "bnb-nf4", components=["transformer"], **options)
    assert lowbits.handle(pair.first) is one
    assert lowbits.handle(pair.second) is two
    assert lowbits.handle(pair.first.text_encoder_2) is one
    gc.collect()
    pictures = pair.draw()
    assert one.stats().peak_device_bytes > 0
    assert len(two.stats().units) > 0 or options is RESIDENT
    if options is STREAMED:
        with pytest.raises(errors.AlreadyPatchedError, match="part of another pipeline"):
            one.restore()
        with pytest.raises(errors.AlreadyPatchedError, match="part of another pipeline"):
            one.switch("gguf-q8_0")
        assert equal(pair.draw(), pictures)
    two.restore()
    assert torch.equal(draw("flux", pair.first), pictures[0])
    one.restore()
    pair.check()


@pytest.mark.parametrize("options", [RESIDENT, STREAMED], ids=["resident", "streamed"])
def test_restoring_one_restores_whatever_it_shares(options: dict[str, Any]) -> None:
    pair = Pair()
    lowbits.apply(pair.first, "bnb-nf4", **RESIDENT)
    lowbits.apply(pair.second, "bnb-nf4", components=["transformer"], **options)
    lowbits.restore(pair.second)
    if lowbits.handle(pair.first):
        lowbits.restore(pair.first)
    pair.check()


def test_a_cap_that_comes_afterwards_holds_for_both() -> None:
    pair = Pair()
    one = lowbits.apply(pair.first, "bnb-nf4", **RESIDENT)
    two = lowbits.apply(pair.second, "bnb-nf4", components=["transformer"], **RESIDENT)
    pictures = pair.draw()
    budget = lowbits.device_budget("cpu", "800KB")
    assert budget is not None
    for _ in range(2):
        assert equal(pair.draw(), pictures)
    assert 0 < budget.peak_bytes <= budget.budget_bytes
    assert (one.is_streamed, two.is_streamed) == (True, True)
    lowbits.device_budget("cpu", None)
    assert (one.is_streamed, two.is_streamed) == (False, False)
    assert equal(pair.draw(), pictures)
    two.restore()
    one.restore()
    pair.check()


def test_a_packed_pipeline_may_be_applied_under_a_cap_that_another_takes_part_in() -> None:
    pair = Pair()
    lowbits.device_budget("cpu", "800KB")
    one = lowbits.apply(pair.first, "bnb-nf4", **RESIDENT)
    two = lowbits.apply(pair.second, "bnb-nf4", components=["transformer"], **RESIDENT)
    shared = [layer for layer in one.report().layers if layer.component == "text_encoder_2"]
    left = [layer for layer in two.report().layers if layer.component == "text_encoder_2"]
    assert left
    assert sum(layer.bytes_before for layer in left) == sum(layer.bytes_after for layer in shared)
    pictures = pair.draw()
    lowbits.device_budget("cpu", None)
    assert equal(pair.draw(), pictures)
    two.restore()
    one.restore()
    pair.check()


def test_what_one_streams_the_other_places_no_more() -> None:
    pair = Pair()
    one = lowbits.apply(pair.first, "bnb-nf4", **RESIDENT)
    two = lowbits.apply(pair.second, "bnb-nf4", components=["transformer"], **RESIDENT)
    pictures = pair.draw()
    two.reconfigure(gpu_weights="300KB", location="cpu")
    assert equal(pair.draw(), pictures)
    one.reconfigure(gpu_weights="400KB", location="cpu")
    assert equal(pair.draw(), pictures)
    for handle, cap in ((one, 400_000), (two, 300_000)):
        assert 0 < handle.stats().peak_device_bytes <= cap
    budget = lowbits.device_budget("cpu", "350KB")
    assert budget is not None
    assert equal(pair.draw(), pictures)
    assert 0 < budget.peak_bytes <= 350_000
    lowbits.device_budget("cpu", None)
    assert equal(pair.draw(), pictures)
    two.restore()
    one.restore()
    pair.check()


def test_a_model_that_a_streamer_has_is_placed_by_that() -> None:
    model: Any = PIPELINES["flux"].build().transformer
    handle = lowbits.apply(model, "bnb-nf4", **RESIDENT)
    with lowbits.LayerStreamer(model, device="cpu", budget="200KB", location="cpu") as streamer:
        with pytest.raises(errors.AlreadyPatchedError, match="streamed already"):
            handle.reconfigure(gpu_weights="300KB")
        lowbits.device_budget("cpu", "150KB")
        assert streamer.stats().budget_bytes == 150_000
        lowbits.device_budget("cpu", None)
        assert streamer.stats().budget_bytes == 200_000
    assert handle.stats().peak_device_bytes > 200_000
    handle.restore()
