"""Plans that are made anew in the middle of a run, because times, or orders, are others by then."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch
from streaming.clocked import BANDWIDTH, PAGE, Case, Some, Timed
from streaming.devices import faked
from torch import nn

from lowbits import LayerStreamer
from lowbits.streaming.models import Placement, StreamedModels
from lowbits.testing.streams import VirtualOps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

CPU = torch.device("cpu")


class Chain(nn.Module):
    """Blocks in a row, of which one may be called by the next one, inside."""

    def __init__(self, blocks: Sequence[nn.Module], inner: int = -1) -> None:
        super().__init__()
        self.blocks, self.inner = nn.ModuleList(blocks), inner

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x) if number != self.inner else x
        return x


class Caller(Timed):
    """A block that calls another one."""

    called: Timed | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.called is None else self.called(x)


def timed(nbytes: int, ops: VirtualOps, factor: float) -> Caller:
    """Return a block that computes for so many times as long as its copy takes."""
    return Caller(nbytes, lambda: nbytes / BANDWIDTH * factor, ops)


def change(block: Timed, factor: float) -> None:
    seconds = block.weight.nbytes / BANDWIDTH * factor
    block.seconds = lambda: seconds


@pytest.mark.parametrize(("budget", "copies"), [(4, 9.2), (6, 7.2), (9, 4.1)])
def test_a_slow_link_is_given_less_to_do(budget: int, copies: float) -> None:
    """Slots for copies ahead gain nothing where nobody computes: residents are there instead."""
    load_s = 10 * PAGE / BANDWIDTH
    found = Case([10 * PAGE] * 12, [0.02 * load_s] * 12, budget * 10 * PAGE, passes=12).run()
    assert found.walls[-1] <= copies * load_s


@pytest.mark.parametrize("seed", [46, 104])
@torch.no_grad()
def test_a_unit_that_calls_another_keeps_the_plan_that_has_room_for_both(seed: int) -> None:
    """With both seeds, the plan for the times from the tenth pass on has not."""
    random_, ops = random.Random(seed), VirtualOps(bandwidth=BANDWIDTH)  # noqa: S311 - blocks
    blocks: list[Caller] = []
    for _ in range(12):
        nbytes = random_.choice([4, 8, 16, 40]) * PAGE
        blocks.append(timed(nbytes, ops, 10 ** random_.uniform(-0.5, 0.7)))
    blocks[7].__dict__["called"] = blocks[6]
    model = Chain(blocks, inner=6)
    budget = int(sum(block.weight.nbytes for block in blocks) * random_.uniform(0.3, 0.8))
    with faked(ops), LayerStreamer(model, device="cpu", budget=budget, location="shared"):
        for number in range(40):
            for block in blocks if number == 10 else ():
                change(block, 10 ** random_.uniform(-2, 0.5))
            model(torch.zeros(1))
    assert ops.peak_bytes <= budget


class Coder(nn.Module):
    """A model that is never called itself."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.decoder = Chain(blocks)


@torch.no_grad()
def test_a_new_plan_leaves_room_for_what_has_come_since() -> None:
    """A pass is over where the next one begins, inside a call, when others were counted."""
    random_, ops = random.Random(396), VirtualOps(bandwidth=BANDWIDTH)  # noqa: S311 - blocks
    sizes = [random_.choice([5, 7, 10, 16, 23]) * PAGE for _ in range(random_.randint(6, 14))]
    blocks = [timed(nbytes, ops, random_.uniform(0.3, 3)) for nbytes in sizes]
    budget = max(int(sum(sizes) * random_.uniform(0.5, 0.9)) // PAGE * PAGE, 3 * max(sizes))
    coder, small = Coder(blocks), Chain([timed(PAGE, ops, 1.0)])
    place = Placement(CPU, budget, method="async", location="shared")
    with faked(ops):
        streamed = StreamedModels({"coder": coder, "small": small}, place, budget)
        streamed.attach()
        for number in range(30):
            for block in blocks if number == 10 else ():
                change(block, random_.uniform(0.05, 8))
            coder.decoder(torch.zeros(1))
            if number == 8:
                small(torch.zeros(1))
        assert ops.peak_bytes <= budget
        streamed.detach()


@torch.no_grad()
def test_slots_that_do_not_fit_another_order_stay_as_they_are() -> None:
    """The large ones take turns in one slot; in the other order each would have one."""
    ops = VirtualOps(bandwidth=BANDWIDTH)
    blocks = [timed(pages * PAGE, ops, 1.0) for pages in (100, 1, 1, 100, 1, 1)]
    model, x = Some(nn.ModuleList(blocks)), torch.ones(1)
    with faked(ops), LayerStreamer(
        model, device="cpu", budget=102 * PAGE, depth=3, location="shared"
    ) as streamer:  # fmt: skip
        for number, order in enumerate([range(6)] * 2 + [[0, 3, 1, 2, 4, 5]] * 20):
            for block in blocks if number == 6 else ():
                change(block, 0.1)
            assert model(x, order) is x
        assert streamer.stats().depth == 3
