"""Out of memory inside a pass: what it needs for running again."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from streaming.models import Stack, hungry, inputs, same, smallest_budget, stage_of, streamer_of
from torch import nn


def test_out_of_memory_is_recovered_with_fewer_slots_than_were_asked_for() -> None:
    model, layer = hungry(range(0))
    options: dict[str, Any] = {"depth": 3, "method": "async"}
    with torch.no_grad():
        expected = model(inputs())
        least = smallest_budget(model, **options)
        with streamer_of(model, budget=least, **options) as streamer:
            model(inputs())
            plan = stage_of(streamer).plan
            layer.at = range(layer.calls, layer.calls + 1)
            assert same(model(inputs()), expected)
            assert streamer.stats().recoveries == 1
            less = stage_of(streamer).plan
            assert plan is not None
            assert less is not None
            assert less.device_bytes < plan.device_bytes
            assert same(model(inputs()), expected)


def test_out_of_memory_for_ever_ends_though_a_depth_was_asked_for() -> None:
    model, layer = hungry(range(64))
    with torch.no_grad(), streamer_of(model, budget=10**6, depth=3, method="async") as streamer:
        with pytest.raises(torch.OutOfMemoryError, match="as asked"):
            model(inputs())
        assert layer.calls == streamer.stats().recoveries + 1
        layer.at = range(0)
        model(inputs())


class Cyclic(nn.Module):
    """Runs out of memory once, while it holds a tensor in a frame that refers to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[weakref.ref[Any]] = []
        self.is_due = False
        self.is_freed = False

    def forward(self, x: Any) -> Any:
        if self.is_due and not self.held:
            mine: dict[str, Any] = {"large": x + 1}
            mine["me"] = mine
            self.held.append(weakref.ref(mine["large"]))
            raise torch.OutOfMemoryError("as asked")
        self.is_freed = bool(self.held) and self.held[0]() is None
        return x


def test_what_a_failed_pass_held_is_gone_when_it_runs_again() -> None:
    """Though it refers to itself."""
    torch.manual_seed(0)
    layer = Cyclic()
    model = nn.Sequential(*(Stack(1) for _ in range(4)), layer).eval()
    with torch.no_grad(), streamer_of(model, budget=10**6) as streamer:
        expected = model(inputs())
        layer.is_due = True
        gc.disable()
        try:
            assert same(model(inputs()), expected)
        finally:
            gc.enable()
        assert streamer.stats().recoveries == 1
    assert layer.is_freed
