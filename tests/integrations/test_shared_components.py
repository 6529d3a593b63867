"""Pipelines that share components: one of them packs what they share, any may stream it."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig
from pipelines import PIPELINES, draw
from streamed import Anatomy

import lowbits
from lowbits import errors
from lowbits.core.interception import streamed_part

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


@pytest.mark.parametrize("scheme", ["no-such", "gguf-q8_0"])
def test_a_switch_that_fails_leaves_what_others_own(scheme: str) -> None:
    pair = Pair()

    def progress(event: lowbits.ProgressEvent) -> None:
        raise ZeroDivisionError(event.fqn)

    one = lowbits.apply(pair.first, "bnb-nf4", components=["text_encoder"], **RESIDENT)
    two = lowbits.apply(pair.second, "native", progress=progress, **STREAMED)
    assert two.is_streamed
    assert "text_encoder" in two.components
    pictures = pair.draw()
    with pytest.raises((errors.UnknownSchemeError, ZeroDivisionError)):
        two.switch(scheme)
    assert (one.is_streamed, two.is_streamed) == (False, True)
    assert equal(pair.draw(), pictures)
    two.restore()
    assert one.is_active
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


@pytest.mark.parametrize(
    "merges", [("auto", "auto"), ("fp16", "merge"), ("merge", "fp16")], ids="-".join
)
def test_an_adapter_of_what_they_share_is_the_owners(merges: tuple[str, str]) -> None:
    pair = Pair()
    lowbits.apply(pair.first, "gguf-q8_0", lora=merges[0], **RESIDENT)
    lowbits.apply(pair.second, "gguf-q8_0", components=["transformer"], lora=merges[1], **STREAMED)
    before = pair.draw()
    encoder = pair.first.text_encoder_2
    encoder.add_adapter(LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False))
    acting = pair.draw()
    assert not any(map(torch.equal, acting, before))
    for pipe in (pair.first, pair.second):
        lowbits.merge_lora(pipe)
        merged = pair.draw()
        assert merges[0] == "merge" or not any(map(torch.equal, merged, acting))
        lowbits.unmerge_lora(pipe)
        assert merges[0] == "merge" or equal(pair.draw(), acting)


def test_a_handle_that_has_packed_nothing_ends_its_streaming() -> None:
    pair = Pair()
    one = lowbits.apply(pair.first, "bnb-nf4", **STREAMED)
    one.reconfigure(gpu_weights="all")
    other = type(pair.first)(**pair.first.components)
    other.set_progress_bar_config(disable=True)
    picture = draw("flux", pair.first)
    two = lowbits.apply(other, "bnb-nf4", components=[], **STREAMED)
    assert (two.is_active, two.is_streamed) == (True, True)
    assert torch.equal(draw("flux", other), picture)
    with pytest.raises(errors.AlreadyPatchedError):
        one.restore()
    two.reconfigure(gpu_weights="400KB")
    two.restore()
    with pytest.raises(errors.NotPatchedError):
        two.restore()
    one.restore()
    pair.check()


def test_what_a_dropped_pipeline_streams_can_be_restored() -> None:
    pair = Pair()
    one = lowbits.apply(pair.first, "bnb-nf4", **STREAMED)
    one.reconfigure(gpu_weights="all")
    lowbits.apply(pair.second, "bnb-nf4", components=["transformer"], **STREAMED)
    pair.draw()
    anatomy = pair.anatomies[0]
    del pair.second, pair.anatomies
    gc.collect()
    with pytest.raises(errors.AlreadyPatchedError):
        one.restore()
    lowbits.restore(pair.first)
    anatomy.check()


@pytest.mark.parametrize("begins", ["first", "second"])
def test_each_streams_a_part_of_what_the_other_has(begins: str) -> None:
    pair = Pair()
    one = lowbits.apply(pair.first, "bnb-nf4", **RESIDENT)
    two = lowbits.apply(pair.second, "bnb-nf4", components=["transformer"], **STREAMED)
    pictures = pair.draw()
    if begins == "first":
        two.reconfigure(gpu_weights="all")
        one.reconfigure(gpu_weights="300KB", location="cpu")
        assert equal(pair.draw(), pictures)
        two.restore()
        assert one.is_active
    else:
        one.reconfigure(gpu_weights="300KB", location="cpu")
        assert equal(pair.draw(), pictures)
        lowbits.restore(pair.second)
    if lowbits.handle(pair.first):
        lowbits.restore(pair.first)
    pair.check()


def test_the_cap_holds_when_the_one_that_streams_is_restored() -> None:
    pair = Pair()
    one = lowbits.apply(pair.first, "bnb-nf4", **RESIDENT)
    two = lowbits.apply(pair.second, "bnb-nf4", components=["transformer"], **RESIDENT)
    two.reconfigure(gpu_weights="300KB", location="cpu")
    budget = lowbits.device_budget("cpu", "350KB")
    assert budget is not None
    picture = pair.draw()[0]
    two.restore()
    assert torch.equal(draw("flux", pair.first), picture)
    assert all(map(streamed_part, (pair.first.text_encoder_2, pair.first.transformer)))
    assert 0 < budget.device_bytes <= budget.peak_bytes <= 350_000
    one.restore()
    pair.check()


def test_dequantizing_leaves_the_other_its_own() -> None:
    pair = Pair()
    lowbits.apply(pair.first, "bnb-nf4", **STREAMED)
    small = {**STREAMED, "gpu_weights": "200KB"}
    two = lowbits.apply(pair.second, "bnb-nf4", components=["transformer"], **small)
    pictures = pair.draw()
    lowbits.dequantize(pair.first)
    assert lowbits.handle(pair.first) is None
    assert two.is_active
    assert streamed_part(pair.second.transformer)
    for got, expected in zip(pair.draw(), pictures, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_a_refused_dequantize_streams_on() -> None:
    pipe: Any = PIPELINES["flux"].build()
    handle = lowbits.apply(pipe, "bnb-nf4", **RESIDENT)
    picture = draw("flux", pipe)
    with lowbits.LayerStreamer(pipe.transformer, device="cpu", budget="1MB", location="cpu"):
        handle.reconfigure(gpu_weights="300KB", location="cpu")
        with pytest.raises(errors.AlreadyPatchedError):
            lowbits.dequantize(pipe)
        assert streamed_part(pipe.vae) == "AutoencoderKL"
        assert torch.equal(draw("flux", pipe), picture)
    handle.restore()


def test_a_cap_leaves_a_part_to_its_streamer() -> None:
    model: Any = PIPELINES["flux"].build().transformer
    handle = lowbits.apply(model, "bnb-nf4", **RESIDENT)
    block = model.transformer_blocks[0]
    with lowbits.LayerStreamer(block, device="cpu", budget="100KB", location="cpu") as streamer:
        lowbits.device_budget("cpu", "90KB")
        assert streamer.stats().budget_bytes == 90_000
        lowbits.device_budget("cpu", None)
    handle.restore()
