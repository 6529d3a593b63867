"""A LoRA that was fused and unloaded is in the codes alone: whatever comes, it stays there."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pipelines import PIPELINES, draw
from streamed import MODES, mode_name, smallest_budget

import lowbits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PLACES: tuple[dict[str, Any], ...] = ({}, *MODES)
SCHEMES = ("bnb-nf4", "gguf-q8_0")


def place_name(place: dict[str, Any]) -> str:
    return mode_name(place) or "resident"


@pytest.fixture(params=PLACES, ids=place_name)
def place(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def applied(
    pipe: Any, scheme: str, place: dict[str, Any], *, lora: str = "auto", progress: Any = None
) -> lowbits.Handle:
    if place:
        place = {**place, "gpu_weights": 6 * smallest_budget(pipe, scheme, keep_source="memory")}
    return lowbits.apply(
        pipe, scheme, device="cpu", keep_source="memory", lora=lora, progress=progress, **place
    )


def fuse(pipe: Any, lora: Path, strength: float = 1.0) -> torch.Tensor:
    """Fuse a LoRA, unload it, and draw."""
    pipe.load_lora_weights(lora, adapter_name="fused")
    pipe.fuse_lora(lora_scale=strength)
    pipe.unload_lora_weights()
    return draw("flux", pipe)


def test_a_switch_packs_it_too(place: dict[str, Any], lora: Path) -> None:
    pictures = {}
    for scheme in SCHEMES:
        pipe: Any = PIPELINES["flux"].build()
        applied(pipe, scheme, place)
        packed = draw("flux", pipe)
        pictures[scheme] = packed, fuse(pipe, lora)
        assert not torch.equal(*pictures[scheme])
    pipe = PIPELINES["flux"].build()
    handle = applied(pipe, SCHEMES[0], place)
    fuse(pipe, lora)
    handle = handle.switch(SCHEMES[1])
    assert torch.equal(draw("flux", pipe), pictures[SCHEMES[1]][1])
    handle = handle.switch(SCHEMES[0])
    assert torch.equal(draw("flux", pipe), pictures[SCHEMES[0]][1])
    lowbits.unmerge_lora(pipe)
    assert torch.equal(draw("flux", pipe), pictures[SCHEMES[0]][0])
    handle.restore()
    assert torch.equal(draw("flux", pipe), draw("flux", PIPELINES["flux"].build()))


def test_a_switch_keeps_what_is_fused_and_still_loaded(place: dict[str, Any], lora: Path) -> None:
    twin: Any = PIPELINES["flux"].build()
    applied(twin, SCHEMES[1], place)
    expected = fuse(twin, lora)
    pipe: Any = PIPELINES["flux"].build()
    handle = applied(pipe, SCHEMES[0], place)
    pipe.load_lora_weights(lora, adapter_name="fused")
    pipe.fuse_lora()
    handle = handle.switch(SCHEMES[1])
    assert torch.equal(draw("flux", pipe), expected)
    pipe.unfuse_lora()
    assert not torch.equal(draw("flux", pipe), expected)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()


def test_a_switch_that_fails_packs_it_again(place: dict[str, Any], lora: Path) -> None:
    class Fails:
        layers = 10**6

        def __call__(self, *_: Any) -> None:
            self.layers -= 1
            if not self.layers:
                raise KeyboardInterrupt

    fails = Fails()
    pipe: Any = PIPELINES["flux"].build()
    handle = applied(pipe, "gguf-q8_0", place, progress=fails)
    fused = fuse(pipe, lora)
    fails.layers = 20
    with pytest.raises(KeyboardInterrupt):
        handle.switch("bnb-nf4")
    assert torch.equal(draw("flux", pipe), fused)
    again = lowbits.handle(pipe)
    assert again is not None
    assert {layer.scheme for layer in again.report().layers} == {"gguf-q8_0", "native"}
    again.restore()


def test_a_switch_that_cannot_keep_it_says_so(lora: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe: Any = PIPELINES["flux"].build()
    plain = draw("flux", pipe)
    handle = applied(pipe, "gguf-q8_0", {})
    fuse(pipe, lora)
    handle.switch("native")
    assert "a LoRA that was fused and unloaded is gone from" in caplog.text
    assert torch.equal(draw("flux", pipe), plain)


def test_what_is_merged_unasked_on_top_goes_alone(place: dict[str, Any], lora: Path) -> None:
    pipe: Any = PIPELINES["flux"].build()
    applied(pipe, "gguf-q8_0", place, lora="merge")
    fused = fuse(pipe, lora, 0.5)
    for _ in range(2):
        pipe.load_lora_weights(lora, adapter_name="other")
        pipe.set_adapters(["other"], [-1.0])
        assert not torch.equal(draw("flux", pipe), fused)
        pipe.unload_lora_weights()
        assert torch.equal(draw("flux", pipe), fused)
    pipe.load_lora_weights(lora, adapter_name="other")
    both = draw("flux", pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora, adapter_name="other")  # no pass in between
    assert torch.equal(draw("flux", pipe), both)
    pipe.unload_lora_weights()
    assert torch.equal(draw("flux", pipe), fused)


@pytest.fixture
def _often() -> Iterator[None]:
    """Let threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_often")
def test_threads_compute_with_a_strength_that_changed_since(lora: Path) -> None:
    pipe: Any = PIPELINES["flux"].build()
    applied(pipe, "gguf-q8_0", {})
    pipe.load_lora_weights(lora, adapter_name="one")
    pipe.fuse_lora()
    pipe.set_adapters(["one"], [0.3])
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(8, layer.in_features)
    with torch.no_grad():
        expected = layer(x)
    wrong: list[bool] = []

    def work() -> None:
        with torch.no_grad():
            wrong.extend(not torch.equal(layer(x), expected) for _ in range(100))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 300
    assert not any(wrong)
    assert layer.scaling == {"one": 0.3}
    assert layer.merged_adapters == ["one"]


def test_a_restored_pipeline_that_peft_froze_is_streamed_again(lora: Path) -> None:
    """Its restored weights want gradients, as before; they are no adapters for that."""
    pipe: Any = PIPELINES["flux"].build()
    least = smallest_budget(pipe)
    handle = lowbits.apply(pipe, "bnb-nf4", device="cpu")
    pipe.load_lora_weights(lora)
    packed = draw("flux", pipe)
    handle.restore()
    expected = draw("flux", pipe)
    assert not torch.equal(expected, packed)
    handle = lowbits.apply(pipe, device="cpu", gpu_weights=2 * least, location="cpu")
    assert torch.equal(draw("flux", pipe), expected)
    assert handle.stats().depth
    handle.restore()
    assert torch.equal(draw("flux", pipe), expected)
