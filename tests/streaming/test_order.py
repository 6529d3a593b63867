"""The order in which units are called: traced, kept, and changed; never a wrong result."""

from __future__ import annotations

import gc
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming.models import WIDTH, inputs, same, smallest_budget, stage_of, streamer_of
from torch import nn

from lowbits.errors import StreamError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

COUNT = 6


class Ordered(nn.Module):
    """Layers that are called in an order of choice; each is one unit, however small the budget."""

    def __init__(self, count: int = COUNT) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))
        self.order: Sequence[int] = range(count)

    def forward(self, x: Tensor) -> Tensor:
        for number in self.order:
            x = torch.tanh(self.blocks[number](x))
        return x

    def encode(self, x: Tensor) -> Tensor:
        """Call the blocks without calling the root."""
        return self.forward(x)


def run(model: Ordered, order: Sequence[int]) -> Tensor:
    model.order = order
    out: Tensor = model(inputs())
    return out


def expectations(model: Ordered, orders: Sequence[Sequence[int]]) -> list[Tensor]:
    return [run(model, order) for order in orders]


ASYNC = [{"depth": 1}, {"depth": 2}, {"depth": 3}, {"depth": "auto"}]
OPTIONS = [*ASYNC, {"method": "queue"}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("order", [range(COUNT), [5, 4, 3, 2, 1, 0], [2, 0, 4], [0, 0, 1, 5, 1, 0]])
def test_any_order_is_traced_by_the_first_pass(order: Sequence[int], options: Any) -> None:
    model = Ordered()
    expected = run(model, order)
    with streamer_of(model, **options) as streamer:
        for _ in range(5):
            assert same(run(model, order), expected)
        assert streamer.stats().misses == 0


@pytest.mark.parametrize("options", ASYNC)
@pytest.mark.parametrize("other", [[5, 4, 3, 2, 1, 0], [0, 2, 1, 3, 5, 4], [3, 4, 5, 0, 1, 2]])
def test_a_changed_order_is_right_and_costs_misses_twice(
    other: Sequence[int], options: Any
) -> None:
    model = Ordered()
    first, second = expectations(model, [range(COUNT), other])
    with streamer_of(model, **options) as streamer:
        for _ in range(3):
            assert same(run(model, range(COUNT)), first)
        assert streamer.stats().misses == 0
        for _ in range(2):
            assert same(run(model, other), second)
        misses = streamer.stats().misses
        assert misses > 0
        for _ in range(3):
            assert same(run(model, other), second)
        assert streamer.stats().misses == misses


@pytest.mark.parametrize("options", OPTIONS)
def test_one_odd_pass_changes_nothing(options: Any) -> None:
    model = Ordered()
    usual, odd = expectations(model, [range(COUNT), [1, 3]])
    with streamer_of(model, **options) as streamer:
        for _ in range(3):
            assert same(run(model, range(COUNT)), usual)
        assert same(run(model, [1, 3]), odd)
        # The pass after it may find the ring elsewhere; those after that may not.
        assert same(run(model, range(COUNT)), usual)
        misses = streamer.stats().misses
        for _ in range(3):
            assert same(run(model, range(COUNT)), usual)
        assert streamer.stats().misses == misses


@pytest.mark.parametrize("options", OPTIONS)
def test_conditional_blocks(options: Any) -> None:
    """As ControlNet's, or a refiner's: called on some passes only; first of all on none."""
    model = Ordered()
    orders = ([0, 1, 2], range(COUNT), [0, 1, 2], [0, 5], range(COUNT))
    expected = expectations(model, orders)
    with streamer_of(model, **options):
        for _ in range(3):
            for order, out in zip(orders, expected, strict=True):
                assert same(run(model, order), out)


@settings(max_examples=25)
@given(
    orders=st.lists(st.lists(st.integers(0, COUNT - 1), max_size=12), min_size=1, max_size=5),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 1000),
    location=st.sampled_from(["cpu", "disk"]),
)
def test_every_order_is_right(
    orders: list[list[int]], options: Any, seed: int, location: str
) -> None:
    model = Ordered()
    expected = expectations(model, orders)
    turns = random.Random(seed)  # noqa: S311 - nothing secret
    with streamer_of(model, location=location, **options) as streamer:
        for _ in range(8):
            which = turns.randrange(len(orders))
            assert same(run(model, orders[which]), expected[which])
        stats = streamer.stats()
        assert stats.peak_device_bytes <= stats.budget_bytes


def test_a_block_called_alone_between_passes() -> None:
    model = Ordered()
    expected, alone = run(model, range(COUNT)), model.blocks[4](inputs())
    with streamer_of(model, depth=2) as streamer:
        for _ in range(4):
            assert same(model(inputs()), expected)
            assert same(model.blocks[4](inputs()), alone)
        assert streamer.stats().passes == 4


@pytest.mark.parametrize("options", OPTIONS)
def test_a_root_that_is_never_called(options: Any) -> None:
    model = Ordered()
    expected = model.encode(inputs())
    with streamer_of(model, **options) as streamer:
        for _ in range(4):
            assert same(model.encode(inputs()), expected)
        assert streamer.stats().peak_device_bytes <= streamer.stats().budget_bytes


def test_a_root_that_is_never_called_has_passes_too() -> None:
    """Else its order is never learnt, and what is noted of each call is kept for ever."""
    model = Ordered()
    model.order = list(reversed(range(COUNT)))
    with streamer_of(model, depth=2) as streamer:
        for _ in range(20):
            model.encode(inputs())
        stage = stage_of(streamer)
        assert len(stage.timing._spans) <= 2 * COUNT
        assert len(stage._order._trace) <= 2 * COUNT
        assert stage._order.expected == tuple(reversed(range(COUNT)))
        assert streamer.stats().passes > 0


def test_a_root_that_is_never_called_and_a_part_that_is_called_once() -> None:
    """As a VAE that encodes one picture, and decodes from then on: its passes end, too."""
    model, x = Ordered(), inputs()
    with streamer_of(model, depth=2) as streamer:
        model.blocks[0](x)
        model.order = range(1, COUNT)
        expected = model.encode(x)
        for _ in range(60):
            assert same(model.encode(x), expected)
        stage = stage_of(streamer)
        assert len(stage.timing._spans) <= 9 * COUNT
        assert len(stage._order._trace) <= 9 * COUNT
        assert stage._residency is not None
        assert len(stage._residency._under_way) <= 9 * COUNT
        assert streamer.stats().passes > 0


class Nesting(nn.Module):
    """A unit that calls another one in its own forward, and is called in it again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(Calling() for _ in range(4))
        blocks: list[Any] = list(self.blocks)
        for number, block in enumerate(blocks):
            block.others = (self.blocks[(number + 1) % 4], block)  # a tuple: no submodules

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, 2)
        return x


class Calling(nn.Module):
    others: tuple[nn.Module, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, deep: int) -> Tensor:
        x = torch.tanh(x @ self.weight)
        for other in self.others if deep else ():
            x = other(x, deep - 1)
        return x + self.bias


@pytest.mark.parametrize("location", ["cpu", "disk"])
def test_units_inside_units(location: str) -> None:
    model = Nesting()
    expected = model(inputs())
    for depth in (3, 4):
        with streamer_of(model, depth=depth, location=location) as streamer:
            for _ in range(4):
                assert same(model(inputs()), expected)
            assert streamer.stats().peak_device_bytes <= streamer.stats().budget_bytes


@pytest.mark.parametrize("method", ["queue", "async", "auto"])
@pytest.mark.parametrize("count", [3, 3.5])
def test_units_inside_units_have_the_slots_that_they_take(method: str, count: float) -> None:
    """Passes after a trial of both methods included."""
    model = Nesting()
    expected = model(inputs())
    budget = int(count * smallest_budget(model, depth=1))
    with streamer_of(model, budget=budget, method=method, depth="auto") as streamer:
        for _ in range(8):
            assert same(model(inputs()), expected)
        stats = streamer.stats()
    assert stats.depth == 3
    assert stats.peak_device_bytes <= stats.budget_bytes


def test_a_unit_inside_a_unit_without_a_slot_is_told() -> None:
    model = Nesting()
    expected = model(inputs())
    streamer = streamer_of(model, depth=1).attach()
    with pytest.raises(StreamError, match=r"blocks\.1.*larger") as caught:
        model(inputs())
    assert caught.value.unit == "blocks.1"
    streamer.detach()
    with streamer_of(model, depth=4):
        assert same(model(inputs()), expected)
    assert same(model(inputs()), expected)


def test_units_inside_units_leave_nothing_behind() -> None:
    model = Nesting()
    expected = model(inputs())
    with streamer_of(model, depth=3) as streamer:
        counts = []
        for _ in range(6):
            assert same(model(inputs()), expected)
            gc.collect()
            residency = stage_of(streamer)._residency
            assert residency is not None
            counts.append(sum(len(home.rivals) for home in residency._homes))
        assert counts[-1] == counts[1]
