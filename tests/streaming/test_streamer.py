"""LayerStreamer: its budget, its options, its statistics, and packed models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schemes import LAYOUTS
from streaming.models import (
    WIDTH,
    Block,
    Snapshot,
    Stack,
    assert_streams,
    inputs,
    reference,
    same,
    smallest_budget,
    streamer_of,
)
from torch import nn

import lowbits
from lowbits.errors import ConfigError, InsufficientMemoryError
from lowbits.streaming import streamer as streamer_module
from lowbits.streaming.residency import Residency
from lowbits.streaming.streamer import LayerStreamer
from lowbits.testing.streams import VirtualOps

METHODS = ("queue", "async", "auto")
LOCATIONS = ("cpu", "disk")
WAYS = (("queue", "disk"), ("async", "cpu"))
DEPTHS = ("auto", 1, 2, 3, 6)
#: Those for which the error names a budget that will do: see the test of the others.
SURE_DEPTHS = ("auto", 1)


def uneven(sizes: list[int], *, tie: bool = False) -> Stack:
    """Return a stack whose blocks have these hidden sizes."""
    model = Stack(len(sizes))
    for number, size in enumerate(sizes):
        model.blocks[number] = Block(WIDTH, size)
    if tie:
        first: Any = model.blocks[0]
        last: Any = model.blocks[-1]
        last.norm.weight = first.norm.weight
    return model


@pytest.mark.property
@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 80), min_size=1, max_size=7),
    tie=st.booleans(),
    room=st.floats(0, 1.2),
    method=st.sampled_from(METHODS),
    location=st.sampled_from(LOCATIONS),
    depth=st.sampled_from(SURE_DEPTHS),
)
def test_any_budget_is_kept(
    sizes: list[int], *, tie: bool, room: float, method: str, location: str, depth: int | str
) -> None:
    model = uneven(sizes, tie=tie)
    options: Any = {"method": method, "depth": depth}
    least = smallest_budget(model, **options)
    total = sum(t.nbytes for t in model.state_dict().values())
    budget = least + int(room * total)
    assert_streams(model, inputs(), passes=3, budget=budget, location=location, **options)


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(1, 80), min_size=1, max_size=6),
    room=st.floats(0, 1.2),
    method=st.sampled_from(METHODS),
    depth=st.sampled_from(SURE_DEPTHS),
)
def test_a_counted_device_never_holds_more(
    sizes: list[int], room: float, method: str, depth: int | str
) -> None:
    """Not by the streamer's own count: by the memory that it asked for and still holds."""
    model = uneven(sizes)
    options: Any = {"method": method, "depth": depth}
    budget = smallest_budget(model, **options)
    budget += int(room * sum(t.nbytes for t in model.state_dict().values()))
    device = VirtualOps(bandwidth=1e9, capacity_bytes=budget)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        expected = model(inputs())
        patch.setattr(streamer_module, "device_ops", lambda _: device)
        streamer = LayerStreamer(model, device="cpu", budget=budget, location="cpu", **options)
        with streamer:
            for number in range(7):
                model.order.sort(reverse=number > 3)
                out = model(inputs())
                assert number > 3 or same(out, expected)
            assert streamer.stats().recoveries == 0
            # Loose tensors are not made by the device's `empty`; there are none here.
            assert device.peak_bytes <= streamer.stats().peak_device_bytes <= budget
        model.order.sort()
    assert device.allocated_bytes == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", SURE_DEPTHS)
def test_one_byte_decides(method: str, depth: int | str) -> None:
    model = uneven([8, 40, 16, 40])
    options: Any = {"method": method, "depth": depth}
    needed = smallest_budget(model, **options)
    before = Snapshot(model)
    pointers = before.pointers()
    with pytest.raises(InsufficientMemoryError) as caught:
        streamer_of(model, budget=needed - 1, **options).attach()
    assert caught.value.needed_bytes == needed
    assert caught.value.available_bytes == needed - 1
    assert caught.value.device == "cpu"
    assert str(needed) in str(caught.value)
    assert before.pointers() == pointers
    before.require()
    stats = assert_streams(model, inputs(), budget=needed, **options)
    assert stats.peak_device_bytes <= needed


@pytest.mark.parametrize(("sizes", "depth"), [([45, 3], 3), ([8, 40, 16, 40], 6)])
def test_one_byte_decides_for_a_depth_of_choice(sizes: list[int], depth: int) -> None:
    model = uneven(sizes)
    needed = smallest_budget(model, depth=depth)
    with pytest.raises(InsufficientMemoryError) as caught:
        streamer_of(model, budget=needed - 1, depth=depth).attach()
    assert caught.value.needed_bytes == needed
    assert_streams(model, inputs(), budget=needed, depth=depth)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_depth_of_choice(depth: int | str) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(9)))
    stats = assert_streams(model, inputs(), depth=depth)
    assert stats.depth == (1 if depth == "auto" else depth)


def test_the_least_is_about_one_layer() -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
    one = sum(p.nbytes for p in model[0].parameters()) + 256 - 64
    assert smallest_budget(model) == smallest_budget(model, depth=1) == one
    assert smallest_budget(model, depth=3) == 3 * one


def test_a_model_that_fits_is_copied_once() -> None:
    stats = assert_streams(Stack(4), inputs(), budget=10**6, passes=4)
    assert [unit.copies for unit in stats.units] == [1] * 5
    assert all(unit.is_resident for unit in stats.units)
    assert stats.depth == 0
    assert stats.misses == 0


@pytest.mark.parametrize("location", ["auto", "shared", "pinned", "pageable", "cpu", "disk"])
def test_locations_on_the_cpu(location: str) -> None:
    stats = assert_streams(Stack(3), inputs(), location=location)
    expected = {"auto": "disk", "disk": "disk"}.get(location, "cpu")
    assert stats.location == expected
    assert stats.pinned_bytes == 0
    assert (stats.disk_bytes > 0) is (expected == "disk")
    assert (stats.host_bytes > 0) is (expected == "cpu")
    assert bool(stats.notes) is (location in ("shared", "pinned"))


@pytest.mark.parametrize("passes", [1, 8])
def test_the_method_may_be_found_by_trial(passes: int) -> None:
    stats = assert_streams(Stack(5), inputs(), method="auto", passes=passes)
    assert stats.method in ("queue", "async")
    assert stats.passes == passes


def test_statistics_add_up() -> None:
    model = Stack(4)
    with streamer_of(model, depth=1, location="cpu") as streamer:
        assert streamer.stats().passes == streamer.stats().copied_bytes == 0
        for _ in range(4):
            model(inputs())
        stats = streamer.stats()
        assert stats.passes == 4
        assert stats.recoveries == 0
        assert stats.copied_bytes == sum(unit.copies * unit.nbytes for unit in stats.units)
        assert stats.misses == sum(unit.misses for unit in stats.units)
        assert stats.stall_s == pytest.approx(sum(unit.stall_s for unit in stats.units))
        assert 0 < stats.peak_device_bytes <= stats.budget_bytes
        assert stats.host_bytes == sum(unit.nbytes for unit in stats.units)
        assert all(unit.compute_s > 0 for unit in stats.units[:-1])
        assert [unit.is_base for unit in stats.units] == [False] * (len(stats.units) - 1) + [True]
        assert stats.actual_s > 0
        assert stats.predicted_s > 0
        text = str(stats)
        assert "4 passes" in text
        assert "cpu" in text
        assert "async" in text
        assert json.loads(json.dumps(stats.to_dict()))["passes"] == 4


def test_a_cast_does_not_change_what_statistics_mean() -> None:
    model = Stack(4)
    with streamer_of(model, location="cpu", budget=10**5) as streamer:
        model(inputs())
        before = streamer.stats()
        model.to(torch.float64)
        model(inputs().double())
        stats = streamer.stats()
    assert stats.copied_bytes > before.copied_bytes
    assert stats.host_bytes == sum(unit.nbytes for unit in stats.units)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("method", "asynch"),
        ("location", "gpu"),
        ("depth", 0),
        ("depth", 7),
        ("depth", "deep"),
        ("budget", "6 parsecs"),
        ("budget", -1),
    ],
)
def test_options_are_checked_before_anything(option: str, value: Any) -> None:
    options: dict[str, Any] = {"device": "cpu", "budget": 10**6, option: value}
    with pytest.raises(ConfigError, match=option):
        LayerStreamer(Stack(2), **options)
    target: Any = [Stack(2)]
    with pytest.raises(ConfigError, match="module: got list, expected a torch.nn.Module"):
        LayerStreamer(target, device="cpu", budget="1MB")


def test_sizes_are_strings_too() -> None:
    with LayerStreamer(Stack(2), device="cpu", budget="1MB") as streamer:
        assert streamer.stats().budget_bytes == 10**6
    with LayerStreamer(Stack(2), device="cpu", budget="auto") as streamer:
        assert streamer.stats().budget_bytes >= 0


def packed_stack(scheme: str) -> nn.Module:
    """Return a model of packed layers whose rows suit every scheme."""
    torch.manual_seed(0)
    model = Stack(3, 256, hidden=256).eval()
    lowbits.quantize(model, scheme)
    return model


@pytest.mark.parametrize("scheme", LAYOUTS)
def test_packed_models(scheme: str) -> None:
    torch.manual_seed(0)
    model, x = Stack(3, 256, hidden=256).eval(), inputs(256)
    before = Snapshot(model)
    lowbits.quantize(model, scheme)
    with torch.no_grad():
        for method, location in WAYS:
            stats = assert_streams(model, x, method=method, location=location, passes=2)
            assert stats.peak_device_bytes < stats.host_bytes + stats.disk_bytes
    lowbits.restore(model)
    before.require()


@pytest.mark.parametrize("scheme", ["none", "bnb-nf4"])
@pytest.mark.parametrize(("method", "location"), [*WAYS, ("async", "disk")])
def test_slots_are_poisoned_before_every_load(
    monkeypatch: pytest.MonkeyPatch, method: str, location: str, scheme: str
) -> None:
    """Bytes that nobody loaded cannot pass for weights: whoever reads them too soon gets NaN."""
    start = Residency._start

    def poisoned(self: Residency, home: Any) -> None:
        if home.slot.buffer is not None:
            home.slot.buffer[home.start : home.stop].fill_(0xFF)
        start(self, home)

    monkeypatch.setattr(Residency, "_start", poisoned)
    model = Stack(5) if scheme == "none" else packed_stack(scheme)
    x = inputs(WIDTH if scheme == "none" else 256)
    with torch.no_grad():
        for depth in (1, 3):
            assert_streams(model, x, depth=depth, method=method, location=location)


def test_a_read_of_a_weight_that_is_not_there_is_a_miss() -> None:
    model = reference()
    with streamer_of(model) as streamer:
        model(inputs())
        before = sum(unit.misses for unit in streamer.stats().units)
        _ = model.blocks[1].up.weight + 1
        assert sum(unit.misses for unit in streamer.stats().units) == before + 1
