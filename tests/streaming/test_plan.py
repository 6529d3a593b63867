"""Plans: by hand where few units make them obvious, by property where they do not."""

from __future__ import annotations

import itertools
import pickle
import random
import time
from dataclasses import replace
from statistics import mean, median
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lowbits.errors import InsufficientMemoryError, StreamError
from lowbits.streaming.plan import StreamPlan, UnitCost, make_plan
from lowbits.streaming.simulate import simulate

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096


def plan_of(
    sizes: list[int],
    budget_bytes: int,
    *,
    depth: int | None = None,
    compute: list[float] | None = None,
    order: list[int] | None = None,
    bandwidth: float = 1.0,
    prefetch: bool = True,
) -> StreamPlan:
    """Plan units of some sizes, 7 bytes fixed besides; they compute a second per byte."""
    times = compute or [float(size) for size in sizes]
    costs = [UnitCost(size, seconds) for size, seconds in zip(sizes, times, strict=True)]
    return make_plan(
        costs,
        list(range(len(sizes))) if order is None else order,
        bandwidth=bandwidth,
        budget_bytes=budget_bytes + 7,
        fixed_bytes=7,
        depth=depth,
        prefetch=prefetch,
        device="cuda:0",
    )


def chance(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - blocks, not keys


def refusal(make: Callable[[], StreamPlan]) -> InsufficientMemoryError | None:
    try:
        make()
    except InsufficientMemoryError as error:
        return error
    return None


def uneven_blocks(random_: random.Random, count: int) -> tuple[list[int], list[float]]:
    """Return sizes that differ by four at most, and times in proportion up to 30 %."""
    least = random_.randint(10, 10_000)
    sizes = [random_.randint(least, 4 * least) for _ in range(count)]
    return sizes, [size * random_.uniform(0.7, 1.3) for size in sizes]


def streamed(plan: StreamPlan) -> list[int]:
    return [unit for unit in dict.fromkeys(plan.order) if unit in plan.slot_of]


def ratio(plan: StreamPlan) -> float:
    return plan.predicted_s / max(plan.compute_s, plan.transfer_s)


def test_everything_is_resident_where_it_fits() -> None:
    plan = plan_of([5, 3, 4], 12)
    assert plan.residents == {0, 1, 2}
    assert (plan.depth, plan.slot_bytes, dict(plan.slot_of)) == (0, (), {})
    assert (plan.device_bytes, plan.resident_bytes, plan.fixed_bytes) == (19, 12, 7)
    assert (plan.predicted_s, plan.compute_s, plan.transfer_s) == (12.0, 12.0, 0.0)


def test_no_units_need_what_is_fixed() -> None:
    assert plan_of([], 0).device_bytes == 7
    with pytest.raises(InsufficientMemoryError, match="7 that are always there, 0 of slots"):
        plan_of([], -1)


def test_residents_are_spread_over_the_order() -> None:
    plan = plan_of([1] * 12, 6, depth=2, bandwidth=0.5)
    assert len(plan.residents) == 4
    gaps = {b - a for a, b in itertools.pairwise(sorted(plan.residents))}
    assert gaps <= {2, 3}
    assert ratio(plan) == 1.0


def test_residents_follow_compute_time_not_index() -> None:
    # The first six compute four times as long: the link has time for all of them then.
    compute = [4.0] * 6 + [1.0] * 6
    plan = plan_of([1] * 12, 6, depth=2, bandwidth=0.5, compute=compute)
    assert plan.residents <= set(range(6, 12))
    assert ratio(plan) < 1.02


def test_each_slot_is_as_large_as_its_own_largest_unit() -> None:
    plan = plan_of([9, 4, 8, 3, 9, 2], 13, depth=2)
    assert not plan.residents
    assert plan.slot_bytes == (9, 4)
    assert dict(plan.slot_of) == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0, 5: 1}


def test_no_slot_is_reused_at_once_where_a_pass_meets_the_next() -> None:
    plan = plan_of([1] * 57, 4, depth=4)
    slots = [plan.slot_of[unit] for unit in streamed(plan)]
    assert slots[:4] == [0, 1, 2, 3]
    assert all(a != b for a, b in itertools.pairwise([*slots, slots[0]]))
    in_turn = {unit: [unit % 4] for unit in range(57)}
    found = simulate(range(57), [1.0] * 57, [1.0] * 57, in_turn)
    assert found.wall_s / plan.predicted_s == pytest.approx(58 / 57)


def test_few_units_leave_slots_to_single_ones() -> None:
    plan = plan_of([1] * 5, 4, depth=4)
    assert [plan.slot_of[unit] for unit in range(5)] == [0, 1, 2, 0, 3]
    assert plan.transfer_s == 2.0


def test_a_large_unit_that_stays_does_not_make_slots_large() -> None:
    plan = plan_of([2] * 10 + [12] + [2] * 10, 18, depth=3)
    assert plan.residents == {10}
    assert plan.slot_bytes == (2, 2, 2)


def test_the_minimum_is_one_slot_for_the_largest_unit() -> None:
    plan = plan_of([4, 9, 3], 9)
    assert (plan.depth, plan.slot_bytes, plan.device_bytes) == (1, (9,), 16)
    assert not plan.residents
    with pytest.raises(InsufficientMemoryError) as caught:
        plan_of([4, 9, 3], 8)
    assert str(caught.value) == (
        "the weights on cuda:0 need at least 16 bytes (16 B): 7 that are always there, 9 of slots "
        "that the other units are copied into; the budget is 15 bytes (15 B); allow 16 bytes or "
        "more, or store the weights in a smaller scheme"
    )
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.needed_bytes, error.available_bytes, error.device) == (16, 15, "cuda:0")


def test_a_depth_that_does_not_fit_is_refused_with_what_it_needs() -> None:
    assert plan_of([4, 9, 3, 3], 16, depth=3).slot_bytes == (4, 9, 3)
    message = (
        "23 bytes.*7 that are always there, 4 . 9 . 3 of slots.*22 bytes.*23 bytes or more, few"
    )
    with pytest.raises(InsufficientMemoryError, match=message) as caught:
        plan_of([4, 9, 3, 3], 15, depth=3)
    assert caught.value.needed_bytes == 23


def test_a_resident_may_make_the_slots_smaller() -> None:
    # In turn 9 and 9 would need both slots; with the 1 between them resident, one.
    sizes = [9, 1, 1, 9]
    plan = plan_of(sizes, 11, depth=2)
    assert len(plan.residents) == 1
    assert (plan.depth, plan.device_bytes) == (2, 18)
    with pytest.raises(InsufficientMemoryError, match="always there, 1 of units that stay, 9 "):
        plan_of(sizes, 10, depth=2)


def test_no_more_slots_than_units_that_use_them() -> None:
    with pytest.raises(InsufficientMemoryError) as caught:
        plan_of([5, 5, 5], 14, depth=8)
    assert caught.value.needed_bytes == 7 + 15
    assert plan_of([5, 5, 5], 10, order=[1], depth=8).depth == 1


def test_without_prefetch_one_slot_is_enough() -> None:
    for depth in (None, 4):
        plan = plan_of([2] * 8, 8, depth=depth, prefetch=False)
        assert (plan.depth, len(plan.residents)) == (1, 3)
        assert plan.predicted_s == plan.compute_s + plan.transfer_s == 26.0


def test_other_depths_than_three_have_to_be_worth_it() -> None:
    assert plan_of([1] * 30, 6, bandwidth=1.0).depth == 3
    assert plan_of([1] * 30, 2, bandwidth=1.0).depth == 2
    # Copies slower than their units in the first half, faster in the second: the more slots, the
    # longer the lead.
    compute = [1.0] * 19 + [1.5] * 19
    found = [plan_of([1] * 38, 6, compute=compute, bandwidth=0.85, depth=d) for d in (2, 3, 4)]
    best = plan_of([1] * 38, 6, compute=compute, bandwidth=0.85)
    assert best.predicted_s <= min(plan.predicted_s for plan in found) * 1.01


def test_unknown_times_are_in_proportion_to_bytes() -> None:
    sizes = [2, 5, 1, 4, 3, 2, 2]
    unknown = plan_of(sizes, 10, compute=[0.0] * 7, bandwidth=4.0)
    known = plan_of(sizes, 10, compute=[size / 4 for size in sizes], bandwidth=4.0)
    assert unknown == known


def test_units_that_are_never_called_have_a_slot_too() -> None:
    plan = plan_of([3, 4, 4, 9, 2, 5], 18, order=[0, 1, 2, 5], depth=2)
    assert {3, 4}.isdisjoint(plan.residents)
    assert max(plan.slot_bytes) == plan.slot_bytes[plan.slot_of[3]] == 9
    # Nothing is called: one slot for all of them.
    plan = plan_of([3, 9, 2], 10, order=[])
    assert (dict(plan.slot_of), plan.slot_bytes) == ({0: 0, 1: 0, 2: 0}, (9,))
    assert (plan.predicted_s, plan.compute_s) == (0.0, 0.0)


def test_units_without_bytes_are_resident() -> None:
    plan = plan_of([3, 0, 3, 0], 3, order=[0, 1, 2])
    assert plan.residents == {1, 3}
    assert (plan.depth, plan.device_bytes) == (1, 10)


def test_a_unit_that_is_called_often_stays() -> None:
    plan = plan_of([1, 1, 1, 1, 1], 3, order=[0, 1, 0, 2, 0, 3, 0, 4], depth=2)
    assert plan.residents == {0}
    # Called twice in a row, it is copied once.
    assert plan_of([1, 1, 1], 1, order=[0, 0, 1, 1, 2]).transfer_s == 3.0


def test_exchanges_find_what_spreading_misses() -> None:
    """Against the best of all residents: as good on average; 15 % worse once among few units."""
    random_ = chance(5)
    losses = []
    for _ in range(25):
        count = random_.randint(6, 9)
        sizes = [random_.randint(10, 40) for _ in range(count)]
        compute = [size * random_.uniform(0.7, 1.3) for size in sizes]
        room = random_.randint(sum(sorted(sizes)[-2:]), sum(sizes) - 1)
        bandwidth = random_.choice([0.3, 0.8, 1.0, 1.5])
        plan = plan_of(sizes, room, depth=2, compute=compute, bandwidth=bandwidth)
        loads = [size / bandwidth for size in sizes]
        best = plan.predicted_s
        for mask in range(1 << count):
            left = [unit for unit in range(count) if mask >> unit & 1]
            kept = sum(sizes) - sum(sizes[unit] for unit in left)
            slots = sum(max((sizes[u] for u in left[j::2]), default=0) for j in (0, 1))
            if kept + slots <= room:
                cells_of = {unit: [number % 2] for number, unit in enumerate(left)}
                found = simulate(range(count), compute, loads, cells_of)
                best = min(best, max(found.wall_s, found.copy_s, plan.compute_s))
        losses.append(plan.predicted_s / best)
    assert mean(losses) < 1.02
    assert max(losses) < 1.2


def check_places(plan: StreamPlan, sizes: list[int]) -> None:
    """Units lie inside slots, at pages; two have a cell in common exactly if they overlap."""
    assert set(plan.slot_of) == set(plan.offset_of) == set(plan.cells_of)
    ends = {unit: offset + sizes[unit] for unit, offset in plan.offset_of.items()}
    assert all(end <= plan.slot_bytes[plan.slot_of[unit]] for unit, end in ends.items())
    assert all(offset % PAGE == 0 for offset in plan.offset_of.values())
    for one, other in itertools.combinations(plan.slot_of, 2):
        is_apart = plan.slot_of[one] != plan.slot_of[other]
        begin = max(plan.offset_of[one], plan.offset_of[other])
        overlaps = not is_apart and begin < min(ends[one], ends[other])
        assert overlaps != set(plan.cells_of[one]).isdisjoint(plan.cells_of[other])


@given(data=st.data(), prefetch=st.booleans())
def test_every_plan_keeps_its_promises(data: st.DataObject, *, prefetch: bool) -> None:
    count = data.draw(st.integers(1, 60), "units")
    sizes = data.draw(st.lists(st.integers(0, 1000), min_size=count, max_size=count), "sizes")
    random_ = chance(data.draw(st.integers(0, 2**31), "seed"))
    compute = [random_.choice([0.0, 1.0, float(size)]) for size in sizes]
    order = data.draw(st.sampled_from([1.0, 1.0, 0.8, 1.5]), "called")
    calls = list(range(count)) if order == 1.0 else random_.choices(range(count), k=count)
    depth = data.draw(st.sampled_from([None, 1, 2, 3, 6]), "depth")
    room = data.draw(st.integers(0, sum(sizes) + 1), "room")
    bandwidth = data.draw(st.sampled_from([0.1, 1.0, 3.0]), "bandwidth")
    scale = data.draw(st.sampled_from([1, PAGE]), "scale")
    sizes, room, bandwidth = [size * scale for size in sizes], room * scale, bandwidth * scale

    def make(scale: int = 1) -> StreamPlan:
        return plan_of(
            [size // scale for size in sizes],
            room // scale,
            depth=depth,
            compute=compute,
            order=calls,
            bandwidth=bandwidth / scale,
            prefetch=prefetch,
        )

    if error := refusal(make):
        assert error.available_bytes == room + 7 < error.needed_bytes
        if depth is None or depth == 1 or not prefetch:
            assert error.needed_bytes == max(sizes) + 7
        room = error.needed_bytes - 7
    plan = make()
    assert plan == make() == replace(plan)
    assert plan.device_bytes <= room + 7
    assert plan.residents.isdisjoint(plan.slot_of)
    assert plan.residents | set(plan.slot_of) == set(range(count))
    check_places(plan, sizes)
    assert set(plan.slot_of.values()) == set(range(plan.depth))
    assert plan.resident_bytes == sum(sizes[unit] for unit in plan.residents)
    assert plan.predicted_s >= max(plan.compute_s, plan.transfer_s)
    assert plan.depth <= (depth or 6 if prefetch else 1)
    if plan.depth == 1:  # with more, a resident may move a large unit to a small slot
        spare = room + 7 - plan.device_bytes
        assert not [unit for unit in streamed(plan) if sizes[unit] <= spare]
    if scale == PAGE and depth:
        whole = make(PAGE)  # no slot is larger than a page: none is shared
        assert whole.residents == plan.residents
        assert whole.device_bytes - 7 == (plan.device_bytes - 7) / PAGE
        assert whole.predicted_s >= plan.predicted_s


def uneven_plan(random_: random.Random, count: int, depth: int | None) -> StreamPlan | None:
    """Plan uneven blocks with any budget and bandwidth; None if it has fewer than 12 streamed.

    Twelve are four for each of three slots. With fewer than two for each, 36 % were lost.
    """
    sizes, compute = uneven_blocks(random_, count)
    room = max(int(sum(sizes) * random_.uniform(0.05, 0.95)), 3 * max(sizes))
    bandwidth = 10 ** random_.uniform(-1, 1)
    plan = plan_of(sizes, room, depth=depth, compute=compute, bandwidth=bandwidth)
    return plan if plan.depth >= 3 and len(plan.slot_of) >= 4 * plan.depth else None


@given(seed=st.integers(0, 2**31), count=st.integers(12, 60), depth=st.sampled_from([None, 3]))
def test_no_uneven_blocks_cost_much(seed: int, count: int, depth: int | None) -> None:
    plan = uneven_plan(chance(seed), count, depth)
    assume(plan is not None)
    assert plan is not None
    assert ratio(plan) <= 1.15  # seen in 28,000 plans: 1.126


def test_three_slots_hide_uneven_blocks() -> None:
    """Within 5 % of the longer of compute and transfer, in all but one plan of a hundred.

    Those have hardly a resident, or none, to choose: there the ring alone evens out what differs
    between blocks. And sizes are spread at random here. Where each is one of two that differ by
    four, and each time is one of 0.7 and 1.3 in proportion, three slots lose up to 30 %; the best
    residents that a long search found saved 2.5 % of the pass on average.
    """
    random_ = chance(3)
    plans = [uneven_plan(random_, random_.randint(12, 60), 3) for _ in range(300)]
    ratios = [ratio(plan) for plan in plans if plan]
    assert len(ratios) > 150
    assert sum(found > 1.05 for found in ratios) <= 0.02 * len(ratios)
    free = [ratio(p) for p in plans if p and len(p.residents) * 5 >= len(p.slot_of)]
    assert max(free) <= 1.05


def flux_plan(large: int, small: int, depth: int) -> StreamPlan:
    """Plan 19 blocks, then 38 smaller ones, all streamed; copies take 1.2 and 0.96 of compute."""
    sizes = [large] * 19 + [small] * 38
    compute = [large / 1.2] * 19 + [small / 0.96] * 38
    plan = plan_of(sizes, large * depth, depth=depth, compute=compute)
    assert (plan.depth, len(plan.residents)) == (depth, 0)
    return plan


def with_jitter(plan: StreamPlan, large: int, small: int) -> float:
    """Return the mean of passes over the longer of compute and transfer in each.

    Each block's time differs by up to 30 % from pass to pass.
    """
    loads = [float(large)] * 19 + [float(small)] * 38
    compute = [large / 1.2] * 19 + [small / 0.96] * 38
    random_ = chance(2)
    jittered = [[s * random_.uniform(0.7, 1.3) for s in compute] for _ in range(60)]
    ratios = []
    for passes in range(2, 61):
        found = plan.simulate(plan.order, jittered.__getitem__, loads, passes=passes)
        ratios.append(found.wall_s / max(sum(jittered[passes - 1]), sum(loads)))
    return mean(ratios)


#: Bytes of two sizes of blocks: the smaller ones cannot share a slot; they can; FLUX.1's weights in
#: a byte each.
APART = (2000, 1000)
HALVES = (2000 * PAGE, 1000 * PAGE)
FLUX_1 = (36 * 3072**2, 15 * 3072**2)


@pytest.mark.parametrize(
    ("blocks", "depth", "expected", "jittered"),
    [
        (APART, 2, 1.043, 1.074),
        (APART, 3, 1.015, 1.020),
        (APART, 5, 1.002, 1.007),
        (HALVES, 2, 1.016, 1.023),
        (HALVES, 3, 1.000, 1.003),
        (HALVES, 5, 1.000, 1.000),
        (FLUX_1, 2, 1.018, 1.023),
        (FLUX_1, 3, 1.000, 1.004),
        (FLUX_1, 5, 1.000, 1.000),
    ],
)
def test_blocks_of_two_sizes_with_jitter(
    blocks: tuple[int, int], depth: int, expected: float, jittered: float
) -> None:
    plan = flux_plan(*blocks, depth)
    assert ratio(plan) == pytest.approx(expected, abs=1e-3)
    found = with_jitter(plan, *blocks)
    assert found == pytest.approx(jittered, abs=1e-3)
    assert depth < 3 or found <= (1.025 if blocks == APART else 1.02)


def test_small_units_take_the_parts_of_slots_in_turn() -> None:
    plan = flux_plan(*HALVES, 3)
    places = [(plan.slot_of[unit], plan.offset_of[unit]) for unit in range(57)]
    assert all(offset == 0 for _, offset in places[:19])
    assert [offset for _, offset in places[19:]] == [0, HALVES[1]] * 19
    # A pair counts as a large one. 38 turns are 13 rounds, one of them without the last slot.
    turns = [slot for slot, offset in places if not offset]
    assert turns == [0, 1, 2] * 6 + [0, 1] + [0, 1, 2] * 6
    assert plan.slot_bytes == (HALVES[0],) * 3


def test_slots_are_shared_only_where_that_fits_and_pays() -> None:
    # A slot of two pages less one byte: twice a page less one byte fit, whole pages do not.
    for small, is_shared in ((PAGE - 1, True), (PAGE, False)):
        plan = plan_of([2 * PAGE - 1] * 4 + [small] * 8, 2 * PAGE - 1, depth=1)
        assert any(plan.offset_of.values()) is is_shared
    # Copies take half of the compute time: two slots hide them all, whole ones too.
    plan = plan_of([2 * PAGE] * 4 + [PAGE] * 8, 4 * PAGE, depth=2, bandwidth=2.0)
    assert ratio(plan) == 1.0
    assert not any(plan.offset_of.values())
    # One slot is larger than the others: it alone is shared.
    plan = plan_of([6 * PAGE] + [2 * PAGE] * 12, 8 * PAGE, depth=2, bandwidth=1.0)
    assert plan.slot_bytes == (6 * PAGE, 2 * PAGE)
    assert {plan.slot_of[unit] for unit, offset in plan.offset_of.items() if offset} == {0}


@pytest.mark.parametrize(("count", "limit_s"), [(60, 0.03), (200, 0.1)])
def test_plans_are_made_in_no_time(count: int, limit_s: float) -> None:
    random_ = chance(count)
    sizes, compute = uneven_blocks(random_, count)
    seconds = []
    for part in (0.15, 0.3, 0.5, 0.7, 0.9):
        start = time.process_time()
        plan_of(sizes, int(sum(sizes) * part), compute=compute)
        seconds.append(time.process_time() - start)
    # Ten times what is asked for on an idle machine: shared ones are noisy.
    assert median(seconds) < 10 * limit_s


def test_stream_errors_carry_their_unit_and_state() -> None:
    error = pickle.loads(pickle.dumps(StreamError("closed", "blocks.3", "LOADING")))
    assert (str(error), error.unit, error.state) == ("closed", "blocks.3", "LOADING")
    assert (StreamError("closed").unit, StreamError("closed").state) == ("", "")
    plain = InsufficientMemoryError("too much")
    assert (plain.needed_bytes, plain.available_bytes, plain.device) == (0, 0, "")
    assert isinstance(error, RuntimeError)
