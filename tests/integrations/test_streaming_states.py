"""What else lowbits does to a streamed target: switch, dequantize, streamers by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import PIPELINES, draw
from streamed import ASYNC_DISK, QUEUE_CPU, smallest_budget, stream

import lowbits
from lowbits import errors


def build(scheme: str) -> tuple[Any, torch.Tensor]:
    pipe: Any = PIPELINES["flux"].build()
    with lowbits.apply(pipe, scheme, device="cpu", keep_source="memory"):
        return pipe, draw("flux", pipe)


@pytest.mark.parametrize("scheme", ["bnb-nf4", "gguf-q8_0"])
def test_switch_keeps_the_options_of_streaming(scheme: str) -> None:
    pipe, expected = build(scheme)
    budget = 3 * smallest_budget(pipe)
    handle = lowbits.apply(
        pipe, device="cpu", gpu_weights=budget, keep_source="memory", **ASYNC_DISK
    )
    switched = handle.switch(scheme)
    assert torch.equal(draw("flux", pipe), expected)
    stats = switched.stats()
    assert (stats.budget_bytes, stats.location, stats.method) == (budget, "disk", "async")
    switched.restore()


@pytest.mark.parametrize("mode", [QUEUE_CPU, ASYNC_DISK], ids=["queue-cpu", "async-disk"])
def test_dequantized_while_streamed(mode: dict[str, Any]) -> None:
    expected_pipe, _ = build("native")
    lowbits.apply(expected_pipe, "bnb-nf4", device="cpu")
    lowbits.dequantize(expected_pipe)
    pipe, _ = build("native")
    stream(pipe, "bnb-nf4", **mode)
    lowbits.dequantize(pipe)
    assert torch.equal(draw("flux", pipe), draw("flux", expected_pipe))


def test_quantized_then_streamed_by_hand() -> None:
    pipe, _ = build("native")
    handle = lowbits.quantize(pipe.transformer, "gguf-q8_0", keep_source="memory")
    expected = draw("flux", pipe)
    with lowbits.LayerStreamer(pipe.transformer, device="cpu", budget="200KB") as streamer:
        assert torch.equal(draw("flux", pipe), expected)
        assert streamer.stats().peak_device_bytes <= 200_000
        with pytest.raises(errors.LowbitsError):
            handle.restore()
        assert torch.equal(draw("flux", pipe), expected)
    handle.restore()


def test_a_streamer_on_what_is_streamed_is_refused() -> None:
    pipe, expected = build("bnb-nf4")
    handle = stream(pipe, "bnb-nf4", keep_source="memory")
    with pytest.raises(errors.AlreadyPatchedError, match="streamed already"):
        lowbits.LayerStreamer(pipe.transformer, device="cpu", budget="1MB").attach()
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()
