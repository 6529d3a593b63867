"""What calls take beside weights is measured, and is what ``"auto"`` leaves free from then on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from streaming.devices import Net, faked, unit_bytes

import lowbits
from lowbits import LayerStreamer
from lowbits.core.packed import workspace_bytes
from lowbits.streaming.activations import Activations
from lowbits.streaming.device_ops import AcceleratorOps, CpuOps
from lowbits.testing.accelerator import fake_accelerator
from lowbits.testing.streams import ThreadedOps

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1 << 30
MIB = 1 << 20
CPU = torch.device("cpu")


class Use:
    """A forward hook that takes memory for a moment, as a block that computes does."""

    def __init__(self, card: ThreadedOps, nbytes: int) -> None:
        self.card, self.nbytes = card, nbytes

    def __call__(self, *_: Any) -> None:
        self.card.use(self.nbytes)


@pytest.mark.parametrize(
    ("calls", "known", "at_most"),
    [
        # Each: the peak before, then what is there, and the peak, when the call is over.
        ([], None, 1000),
        ([(500, 300, 700)], 400, 400),  # it reached the peak
        ([(500, 300, 1900)], 1600, 1600),
        ([(500, 300, 500)], 200, 200),  # it took no more than that
        ([(5000, 300, 5000)], 4700, 1000),  # somebody else did, before
        ([(5000, 300, 5000), (5000, 4900, 5000)], 100, 100),
        ([(500, 300, 700), (900, 300, 900)], 400, 400),
        ([(5000, 300, 5000), (5000, 300, 5100), (5100, 4900, 5100)], 4800, 4800),
    ],
)
def test_what_is_known(calls: list[tuple[int, int, int]], known: int | None, at_most: int) -> None:
    class Counter:
        def used_bytes(self) -> tuple[int, int] | None:
            return next(answers)

    found = Activations()
    ops: Any = Counter()
    for peak_before, now, peak in calls:
        answers = iter([(0, peak_before), (now, peak)])
        with found.measured(ops, is_due=True):
            pass
    assert found.nbytes == known
    assert found.at_most(1000) == at_most
    with found.measured(ops, is_due=False):
        pass


def test_what_fails_or_is_not_counted_tells_nothing() -> None:
    found = Activations()
    with found.measured(CpuOps(CPU), is_due=True):
        pass
    card = ThreadedOps()

    def fails() -> None:
        with card, found.measured(card, is_due=True):
            card.use(5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert found.nbytes is None


def test_a_streamer_leaves_what_its_calls_took() -> None:
    model, x = Net([64, 24, 80, 64]), torch.randn(3, 16)
    with torch.no_grad():
        expected = model(x)
    card = ThreadedOps(capacity_bytes=3 * GIB)
    use = Use(card, 100 * MIB)
    for block in model.blocks:
        block.register_forward_hook(use)
    with torch.no_grad(), card, faked(card):
        streamer = LayerStreamer(model, device=CPU, budget="auto", location="cpu").attach()
        assert streamer.stats().budget_bytes == 2 * GIB
        assert streamer.stats().activation_bytes == 0
        for _ in range(3):
            assert torch.equal(model(x), expected)
        assert streamer.stats().activation_bytes == 100 * MIB
        streamer.detach()
        streamer.attach()
        assert streamer.stats().budget_bytes == 3 * GIB - 100 * MIB
        use.nbytes = 2 * GIB  # a larger picture
        model(x)
        streamer.detach()
        streamer.attach()
        assert streamer.stats().budget_bytes == GIB
        streamer.detach()


def test_passes_that_are_not_timed_are_not_measured() -> None:
    model, x = Net([64, 24, 80, 64]), torch.randn(3, 16)
    card = ThreadedOps()
    streamer = LayerStreamer(
        model, device=CPU, budget=unit_bytes(model) // 2, location="cpu", method="queue"
    )
    with torch.no_grad(), card, faked(card), streamer:
        asked = []
        for _ in range(16):
            with mock.patch.object(ThreadedOps, "used_bytes", return_value=(0, 0)) as used:
                model(x)
            asked.append(used.call_count)
    assert asked == [2] * 5 + [0, 0, 2] + [0] * 6 + [2, 0]


def a_pipeline_is_placed_by_what_its_calls_took() -> None:
    from pipelines import PIPELINES, draw

    pipe = PIPELINES["flux"].build()
    expected = draw("flux", pipe)
    card = ThreadedOps(fake_accelerator(), capacity_bytes=GIB + 300_000)
    use = Use(card, 50 * MIB)
    for model in (pipe.transformer.single_transformer_blocks[-1], pipe.vae.decoder):
        model.register_forward_hook(use)
    with card, faked(card):
        handle = lowbits.apply(pipe, device="fakegpu", location="cpu", swap="queue")
        for _ in range(2):
            assert torch.equal(draw("flux", pipe), expected)
        stats = handle.stats()
        assert stats.budget_bytes == 300_000
        assert stats.activation_bytes >= 50 * MIB
        use.nbytes = GIB + 50_000  # a larger picture
        draw("flux", pipe)
        handle.reconfigure()
        assert handle.stats().budget_bytes == 250_000
        handle.reconfigure(reserve=GIB)
        assert handle.stats().budget_bytes == 300_000
        handle.reconfigure(reserve="auto")
        assert handle.stats().budget_bytes == 250_000
        card.capacity_bytes = 3 * GIB
        handle.reconfigure()
        assert not handle.is_streamed
        assert torch.equal(draw("flux", pipe), expected)
        handle.restore()


def test_a_pipeline_is_placed_by_what_its_calls_took(run_beside: Callable[..., Any]) -> None:
    run_beside(a_pipeline_is_placed_by_what_its_calls_took)


def test_a_workspace_is_left_too() -> None:
    model, x = Net([64, 24, 80, 64]), torch.randn(3, 16)
    lowbits.quantize(model, "gguf-q8_0", rules={"*": "gguf-q8_0"}, keep_source="none")
    workspace = workspace_bytes(model)
    assert workspace > 0
    card = ThreadedOps(capacity_bytes=3 * GIB)
    with torch.no_grad(), card, faked(card):
        streamer = LayerStreamer(model, device=CPU, budget="auto", location="cpu")
        for budget in (2 * GIB, 3 * GIB - workspace):
            streamer.attach()
            model(x)
            assert streamer.stats().budget_bytes == budget
            streamer.detach()


def the_fake_accelerator_does_not_count() -> None:
    assert AcceleratorOps(fake_accelerator()).used_bytes() is None


def test_a_device_without_an_allocator(run_beside: Callable[..., Any]) -> None:
    run_beside(the_fake_accelerator_does_not_count)
