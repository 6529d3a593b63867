"""The streamer on a clock that only counts: what it takes is what the simulator says."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import mean
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from streaming.clocked import BANDWIDTH, PAGE, Case, Some, Timed, plan_of
from streaming.devices import faked
from torch import nn

from lowbits import LayerStreamer
from lowbits.errors import InsufficientMemoryError
from lowbits.streaming.timing import MethodTrial, Timing
from lowbits.testing.streams import VirtualOps

if TYPE_CHECKING:
    from lowbits.streaming.plan import StreamPlan


def simulated(case: Case, plan: StreamPlan) -> float:
    loads = [size / case.bandwidth for size in case.sizes]
    is_ahead = case.method == "async"
    return plan.simulate(plan.order, case.compute, loads, prefetch=is_ahead).wall_s


def equal(count: int, ratio: float, part: float, **options: object) -> Case:
    """Return equal blocks whose copies take ratio times their compute; part of them fits."""
    seconds = 10 * PAGE / BANDWIDTH / ratio
    budget = max(3, int(count * part)) * 10 * PAGE
    return Case([10 * PAGE] * count, [seconds] * count, budget, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("ratio", [0.4, 1.0, 2.0, 4.0])
def test_equal_blocks_take_what_is_predicted(ratio: float, part: float) -> None:
    case = equal(24, ratio, part)
    found = case.run()
    assert found.walls[-1] == pytest.approx(simulated(case, found.plan), rel=1e-6)
    assert found.walls[-1] == pytest.approx(found.predicted_s, rel=0.03)
    assert found.walls[-1] <= 1.05 * max(found.busy[-1], found.loads)


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(6, 40),
    depth=st.sampled_from([3, 4, 6, "auto"]),
    method=st.sampled_from(["async", "async", "queue"]),
)
def test_the_streamer_keeps_to_its_plan(
    seed: int, count: int, depth: int | str, method: str
) -> None:
    random_ = random.Random(seed)  # noqa: S311 - blocks, not keys
    sizes = [random_.randint(1, 64) * 1024 for _ in range(count)]
    compute = [n / BANDWIDTH * random_.uniform(0.2, 5.0) for n in sizes]
    slots = sum(sorted(sizes)[-(depth if isinstance(depth, int) else 1) :])
    budget = max(slots, int(sum(sizes) * random_.uniform(0.05, 0.99)))
    case = Case(sizes, compute, budget, method, depth)
    found = case.run()
    assume(found.plan.depth)
    if method == "async":
        assert found.walls[-1] == pytest.approx(simulated(case, found.plan), rel=1e-6)
    else:  # the host is ahead: a copy runs beside the residents that come before its unit
        assert simulated(replace(case, method="async"), found.plan) <= found.walls[-1] * (1 + 1e-9)
        assert found.walls[-1] <= simulated(case, found.plan) * (1 + 1e-9)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), count=st.integers(12, 40), depth=st.sampled_from([3, "auto"]))
def test_copies_are_hidden_where_that_is_promised(seed: int, count: int, depth: int | str) -> None:
    """As the planner promises: four streamed units for each slot, and residents to choose."""
    random_ = random.Random(seed)  # noqa: S311 - blocks, not keys
    least = random_.randint(1, 16)
    sizes = [random_.randint(least, 4 * least) * 1024 for _ in range(count)]
    scale = 10 ** random_.uniform(-1, 1)
    compute = [n / BANDWIDTH * scale * random_.uniform(0.7, 1.3) for n in sizes]
    budget = max(int(sum(sizes) * random_.uniform(0.05, 0.95)), 3 * max(sizes))
    found = Case(sizes, compute, budget, depth=depth).run()
    streamed, residents = len(found.plan.slot_of), len(found.plan.residents)
    assume(found.plan.depth >= 3 and streamed >= 4 * found.plan.depth)
    ratio = found.walls[-1] / max(found.busy[-1], found.loads)
    assert ratio <= (1.05 if residents * 5 >= streamed else 1.15)


def test_two_sizes_with_jitter() -> None:
    sizes = [36 * 8 * 1024] * 19 + [15 * 8 * 1024] * 38
    compute = [n / BANDWIDTH / 1.2 for n in sizes[:19]] + [n / BANDWIDTH / 0.96 for n in sizes[19:]]
    case = Case(sizes, compute, 3 * sizes[0], depth=3, passes=40, jitter=0.3)
    found = case.run()
    assert (found.plan.depth, len(found.plan.residents)) == (3, 0)
    walls, busy = found.walls[3:], found.busy[3:]
    bounds = [max(seconds, found.loads) for seconds in busy]
    assert mean(w / b for w, b in zip(walls, bounds, strict=True)) <= 1.02


#: Squares of 3072 x 3072 weights, and milliseconds without their decoding, of the parts of a block
#: of FLUX.1-dev: two modulations, attention, and what the picture and the prompt are fed through.
DOUBLE = ((6, 0.13), (6, 0.06), (8, 1.8), (8, 0.85), (8, 0.13))
SINGLE = (15, 2.95)


@pytest.mark.parametrize("slow", [(), (0,), (0, 1)])
@pytest.mark.parametrize("budget_gb", [2, 4, 6, 8])
@pytest.mark.parametrize(
    ("scheme", "bits", "decode_ms"), [("float8", 8, 0.056), ("nf4", 4.5, 0.0124)]
)
def test_flux_is_as_fast_as_the_slower_of_both(
    scheme: str, bits: float, decode_ms: float, budget_gb: int, slow: tuple[int, ...]
) -> None:
    """FLUX.1-dev, whose first passes may be slow: kernels are loaded, and the host is behind.

    Seconds and bandwidth are about those of an H100 (docs/streaming.md), where a trace shows them.
    """
    square, scale = 3072 * 3072, 1 / 2304  # of bytes and seconds: a page for each square
    timed = [tuple((n, ms + n * decode_ms) for n, ms in block) for block in (DOUBLE, (SINGLE,))]
    blocks = [timed[0]] * 19 + [timed[1]] * 38
    found = Case(
        [int(sum(n for n, _ in parts) * square * bits / 8 * scale) for parts in blocks],
        [sum(ms for _, ms in parts) / 1e3 * scale for parts in blocks],
        int((budget_gb - 0.14) * 1e9 * scale),
        bandwidth=54.1e9,
        shares=[parts if len(parts) > 1 else () for parts in blocks],
        passes=14,
        jitter=0.1,
        slow=slow,
    ).run()
    walls = found.walls[9:]
    bounds = [max(seconds, found.loads) for seconds in found.busy[9:]]
    assert mean(w / b for w, b in zip(walls, bounds, strict=True)) <= 1.02


def test_queue_takes_compute_and_copies_one_after_the_other() -> None:
    found = Case([10 * PAGE] * 12, [5 * PAGE / BANDWIDTH] * 12, 10 * PAGE, "queue").run()
    assert (found.plan.depth, len(found.plan.slot_of)) == (1, 12)
    expected = found.busy[-1] + found.loads
    assert found.walls[-1] == pytest.approx(expected) == pytest.approx(found.predicted_s)


def test_auto_takes_the_faster_method() -> None:
    found = equal(12, 1.0, 0.3, method="auto", passes=9).run()
    assert found.walls[-1] <= 1.05 * max(found.busy[-1], found.loads)


def test_the_next_pass_is_fetched_ahead() -> None:
    found = equal(8, 1.0, 0.0, depth=3).run()
    load = 10 * PAGE / BANDWIDTH
    assert found.walls[0] == pytest.approx(9 * load)
    assert found.walls[1:] == pytest.approx([8 * load] * 5)


def test_a_slow_link_is_measured() -> None:
    """A link that is much slower than the first guess, and few copies to measure it by."""
    sizes = [10 * PAGE] * 6
    found = Case(sizes, [4 * PAGE / 1e6] * 6, 4 * 10 * PAGE, bandwidth=1e6, depth=3).run()
    assert found.predicted_s == pytest.approx(found.walls[-1], rel=0.05)


@pytest.mark.parametrize(("slow", "counted"), [((), 0), ((4,), 1), ((4, 9), 2), ((1,), 0)])
def test_slow_passes_are_counted(slow: tuple[int, ...], counted: int) -> None:
    """A pass is slow beside those before it: two are not enough to know what is usual."""
    found = equal(8, 1.0, 0.3, passes=12, slow=slow).run()
    assert found.slow_passes == counted


@pytest.mark.parametrize("host", [0.0, 0.5, 1.5])
def test_every_wait_is_counted_and_every_seventh_pass_measured(host: float) -> None:
    """Between them, a unit that takes longer than before is not noticed."""
    ops, factor = VirtualOps(bandwidth=BANDWIDTH), 1.0
    seconds = 5 * PAGE / BANDWIDTH
    times: tuple[Any, ...] = (lambda: seconds * factor, ops, host * seconds)
    model = nn.Sequential(*(Timed(10 * PAGE, *times) for _ in range(8)))
    streamer = LayerStreamer(
        model, device="cpu", budget=30 * PAGE, method="async", depth=3, location="shared"
    )
    means = []
    with faked(ops), streamer:
        for index in range(16):
            factor = 1.0 if index < 5 else 1.5
            before = ops.stall_s - streamer.stats().stall_s
            model(torch.zeros(1))
            stats = streamer.stats()
            assert ops.stall_s - stats.stall_s == pytest.approx(before, abs=1e-12) or not index
            means.append(stats.units[0].compute_s)
    assert stats.stall_s > 10 * seconds
    factors = [1.0] * 7 + [1.25] * 7 + [1.375] * 2
    assert means == pytest.approx([means[0] * factor for factor in factors])


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_residents_stay_while_both_methods_are_tried(ratio: float) -> None:
    """Measured times choose the residents: those that a plan and the next one have stay put."""
    ops, seconds = VirtualOps(bandwidth=BANDWIDTH), 10 * PAGE / BANDWIDTH / ratio
    model = nn.Sequential(*(Timed(10 * PAGE, lambda: seconds, ops) for _ in range(8)))
    streamer = LayerStreamer(
        model, device="cpu", budget=60 * PAGE, method="auto", location="shared"
    )
    with faked(ops), streamer:
        passes = []
        for _ in range(8):
            model(torch.zeros(1))
            units = streamer.stats().units
            passes.append({unit.name: unit.copies for unit in units if unit.is_resident})
    # What the plan behind a pass has as a resident is there once the next pass is over.
    stays = [
        (copied[name], later[name])
        for planned, copied, later in zip(passes, passes[1:], passes[2:], strict=False)
        for name in planned.keys() & copied.keys() & later.keys()
    ]
    assert len(stays) >= 15
    assert all(copied == later for copied, later in stays)


def test_a_way_that_takes_more_than_there_is_ends_the_trial() -> None:
    """A cast since has made the ring larger than the budget, one slot of it not."""
    ops, seconds = VirtualOps(bandwidth=BANDWIDTH), 10 * PAGE / BANDWIDTH
    blocks = [Timed(10 * PAGE, lambda: seconds, ops) for _ in range(6)]
    for block in blocks:
        block.weight.data = torch.zeros(10 * PAGE // 2, dtype=torch.float16)
    model = nn.Sequential(*blocks)
    streamer = LayerStreamer(
        model, device="cpu", budget=20 * PAGE, method="auto", depth=2, location="shared"
    )
    with faked(ops), streamer:
        for number in range(8):
            if number == 3:  # when copies are not made ahead
                assert streamer.stats().method == "queue"
                model.float()
            model(torch.zeros(1))
        assert streamer.stats().method == "queue"
        assert streamer.stats().passes == 8


def test_passes_of_a_trial_are_measured_alike() -> None:
    """Else the method that comes last has less to do."""
    timing, trial = Timing(VirtualOps(bandwidth=BANDWIDTH)), MethodTrial()
    measured = []
    for _ in range(22):
        timing.begin_pass(has_end=True)
        measured.append(timing.times_uses)
        timing.end_pass()
        if not trial.is_over:
            trial.next(1.0)
            assert timing.times_uses
    assert [index for index, is_so in enumerate(measured) if is_so] == [0, 1, 2, 3, 4, 7, 14, 21]


@pytest.mark.parametrize("known", [3, 6, 9])
def test_units_that_are_called_late_are_measured_at_once(known: int) -> None:
    """The plan for the order that has them is made in the second pass of it."""
    ops, seconds = VirtualOps(bandwidth=BANDWIDTH), 5 * PAGE / BANDWIDTH
    blocks = (Timed(10 * PAGE, lambda: seconds, ops) for _ in range(24))
    model = Some(nn.ModuleList(blocks))
    streamer = LayerStreamer(model, device="cpu", budget=140 * PAGE, location="shared")
    with faked(ops), streamer:
        for index in range(known + 6):
            model(torch.zeros(1), range(8 if index < known else 24))
        stats, plan = streamer.stats(), plan_of(streamer)
    assert plan.compute_s == pytest.approx(24 * seconds)
    assert stats.predicted_s == pytest.approx(stats.actual_s) == pytest.approx(24 * seconds)


def test_one_byte_less_is_refused() -> None:
    case = equal(8, 1.0, 0.0, depth=3)
    case.run()
    small = Case(case.sizes, case.compute, case.budget - 1, depth=3)
    with pytest.raises(InsufficientMemoryError) as caught:
        small.run()
    assert caught.value.needed_bytes == case.budget
