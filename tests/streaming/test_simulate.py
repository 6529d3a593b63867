"""The simulator against schedules worked out by hand, and the figures that the design rests on."""

from __future__ import annotations

import random
import time
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbits.streaming.simulate import simulate


def ring(units: list[int], depth: int) -> dict[int, list[int]]:
    return {unit: [number % depth] for number, unit in enumerate(units)}


def test_residents_are_computed_one_after_the_other() -> None:
    found = simulate([0, 1, 0], [1.0, 2.0], [9.0, 9.0], {})
    assert found.wall_s == found.first_pass_s == 4.0
    assert found.stall_s == found.copy_s == 0.0


def test_two_slots_hide_copies_behind_the_unit_before() -> None:
    # Copies of 2 s, uses of 3 s: the first pass waits for its first copy, later ones for none.
    found = simulate([0, 1], [3.0, 3.0], [2.0, 2.0], {0: [0], 1: [0]}, passes=1)
    assert (found.first_pass_s, found.stalls) == (10.0, {0: 2.0, 1: 2.0})
    found = simulate(range(4), [3.0] * 4, [2.0] * 4, ring([0, 1, 2, 3], 2))
    assert (found.first_pass_s, found.wall_s, found.copy_s) == (14.0, 12.0, 8.0)
    assert found.stalls == {}


def test_one_slot_hides_copies_behind_residents_alone() -> None:
    # The copy of 2 begins at 2, when 0 has ended, and 1 computes meanwhile.
    found = simulate([0, 1, 2], [1.0, 1.0, 1.0], [1.0, 1.0, 3.0], {0: [0], 2: [0]}, passes=1)
    assert found.wall_s == 6.0
    assert found.stalls == {0: 1.0, 2: 2.0}


def test_without_prefetch_a_copy_starts_when_its_unit_is_entered() -> None:
    found = simulate([0, 1, 2], [1.0] * 3, [1.0, 1.0, 3.0], {0: [0], 2: [0]}, prefetch=False)
    assert (found.wall_s, found.stall_s) == (7.0, 4.0)


def test_what_is_still_in_its_slot_is_not_copied_again() -> None:
    assert simulate([0, 0, 1], [1.0, 1.0], [5.0, 5.0], {0: [0]}).copy_s == 0.0
    found = simulate([0, 0, 1], [1.0, 1.0], [5.0, 5.0], {0: [0], 1: [0]})
    assert (found.copy_s, found.wall_s) == (10.0, 13.0)
    # Called three times, thrown out once by each of the others that share its slot.
    found = simulate([0, 1, 0, 2, 0], [1.0] * 3, [1.0] * 3, {0: [0], 1: [0], 2: [1]})
    assert found.copy_s == 2.0


def test_copies_keep_the_order_of_uses() -> None:
    # Unit 2 has a slot of its own, but its copy is after that of 1, which waits for the slot of 0.
    found = simulate([0, 1, 2], [4.0, 1.0, 1.0], [1.0] * 3, {0: [0], 1: [0], 2: [1]}, passes=1)
    assert found.stalls == {0: 1.0, 1: 1.0}
    assert found.wall_s == 8.0


def test_a_copy_waits_for_all_that_it_overwrites() -> None:
    # Unit 0 takes what 1 and 2 take half of each: 1 may come when 0 has ended, 0 when both have.
    cells = {0: [0, 1], 1: [0], 2: [1]}
    found = simulate([0, 1, 2], [4.0, 1.0, 3.0], [2.0, 1.0, 1.0], cells, passes=1)
    assert found.stalls == {0: 2.0, 1: 1.0}
    assert found.wall_s == 11.0
    found = simulate([0, 1, 2], [4.0, 1.0, 3.0], [2.0, 1.0, 1.0], cells, passes=2)
    assert (found.stalls, found.wall_s) == ({0: 2.0, 1: 1.0}, 11.0)
    # In two halves one is copied while the other computes.
    halves = simulate([1, 2, 3, 4], [1.0] * 5, [1.0] * 5, {1: [0], 2: [1], 3: [0], 4: [1]})
    assert halves.wall_s == 4.0
    assert simulate([1, 2, 3, 4], [1.0] * 5, [1.0] * 5, ring([1, 2, 3, 4], 1)).wall_s == 8.0


def test_what_was_overwritten_in_part_is_copied_again() -> None:
    found = simulate([0, 1, 0, 2, 1], [1.0] * 3, [4.0, 1.0, 1.0], {0: [0, 1], 1: [1], 2: [0]})
    # Unit 0 twice, once for each neighbour; 1 is whole after 2 alone, but not after 0.
    assert found.copy_s == 4.0 + 1.0 + 4.0 + 1.0 + 1.0
    found = simulate([0, 1, 2, 1], [1.0] * 3, [4.0, 1.0, 1.0], {0: [0, 1], 1: [1], 2: [0]})
    assert found.copy_s == 4.0 + 1.0 + 1.0


def test_times_may_differ_from_pass_to_pass() -> None:
    found = simulate([0], lambda number: [float(number + 1)], [1.0], {}, passes=3)
    assert (found.first_pass_s, found.wall_s) == (1.0, 3.0)


def test_no_unit_takes_no_time() -> None:
    assert simulate([], [], [], {}).wall_s == 0.0


@pytest.mark.parametrize(
    ("streamed", "ratio", "prefix_2", "prefix_4", "even_1", "even_2"),
    [
        (40, 1.0, 1.000, 1.000, 2.000, 1.000),
        (30, 2.0, 1.133, 1.067, 1.500, 1.000),
        (20, 2.0, 1.450, 1.350, 1.500, 1.000),
        (10, 4.0, 1.600, 1.400, 1.250, 1.000),
    ],
)
def test_forty_equal_blocks_take_what_the_study_found(
    streamed: int, ratio: float, prefix_2: float, prefix_4: float, even_1: float, even_2: float
) -> None:
    prefix = list(range(40 - streamed, 40))
    even = [unit for unit in range(40) if (unit + 1) * streamed // 40 > unit * streamed // 40]

    def wall(units: list[int], depth: int) -> float:
        found = simulate(range(40), [1.0] * 40, [ratio] * 40, ring(units, depth))
        return round(found.wall_s / max(40, streamed * ratio), 3)

    assert (wall(prefix, 2), wall(prefix, 4)) == (prefix_2, prefix_4)
    assert (wall(even, 1), wall(even, 2)) == (even_1, even_2)


#: 19 blocks of size 2, then 38 of size 1; copies take 1.2 and 0.96 of the compute time.
FLUX = range(57)
FLUX_COMPUTE = [2.0] * 19 + [1.0] * 38
FLUX_LOAD = [2.4] * 19 + [0.96] * 38


@pytest.mark.parametrize(("depth", "expected"), [(1, 1.926), (2, 1.043), (3, 1.019)])
def test_blocks_of_two_sizes_want_three_slots(depth: int, expected: float) -> None:
    found = simulate(range(57), FLUX_COMPUTE, FLUX_LOAD, ring(list(range(57)), depth))
    assert found.wall_s / sum(FLUX_LOAD) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("depth", "expected"), [(2, 1.072), (3, 1.023)])
def test_blocks_of_uneven_duration_want_three_slots(depth: int, expected: float) -> None:
    random_ = random.Random(1)  # noqa: S311 - blocks, not keys
    jittered = [[s * random_.uniform(0.7, 1.3) for s in FLUX_COMPUTE] for _ in range(60)]
    slots = ring(list(range(57)), depth)

    def wall(passes: int) -> float:
        found = simulate(range(57), jittered.__getitem__, FLUX_LOAD, slots, passes=passes)
        return found.wall_s / max(sum(jittered[passes - 1]), sum(FLUX_LOAD))

    assert mean(map(wall, range(2, 61))) == pytest.approx(expected, abs=2e-3)


@given(data=st.data(), prefetch=st.booleans())
def test_a_pass_is_its_compute_and_its_stalls(data: st.DataObject, *, prefetch: bool) -> None:
    count = data.draw(st.integers(1, 8))
    times = st.lists(st.integers(0, 9).map(float), min_size=count, max_size=count)
    compute, load = data.draw(times), data.draw(times)
    order = data.draw(st.lists(st.integers(0, count - 1), max_size=20))
    taken = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True)
    cells_of = data.draw(st.dictionaries(st.integers(0, count - 1), taken))
    found = simulate(order, compute, load, cells_of, prefetch=prefetch)
    busy = sum(compute[unit] for unit in order)
    assert found.wall_s == busy + found.stall_s
    assert found.wall_s <= busy + found.copy_s
    assert found.first_pass_s >= found.wall_s - found.copy_s
    if not prefetch:
        assert found.stall_s == found.copy_s
        assert found.wall_s >= simulate(order, compute, load, cells_of).wall_s


def test_cells_are_as_good_as_what_they_stand_for() -> None:
    """The places where ranges begin, against every byte of them as a cell."""
    random_ = random.Random(4)  # noqa: S311 - blocks, not keys
    for _ in range(200):
        count = random_.randint(1, 8)
        begins = [random_.randint(0, 12) for _ in range(count)]
        ranges = [range(begin, begin + random_.randint(1, 8)) for begin in begins]
        cells = {
            unit: [begin for begin in set(begins) if begin in ranges[unit]] for unit in range(count)
        }
        compute, load = ([float(random_.randint(0, 5)) for _ in begins] for _ in range(2))
        order = [random_.randrange(count) for _ in range(12)]
        every_byte = simulate(order, compute, load, dict(enumerate(ranges)))
        assert simulate(order, compute, load, cells) == every_byte


def test_four_passes_of_sixty_units_take_no_time() -> None:
    shared = {unit: [unit % 6] if unit > 20 else [unit % 3 * 2, unit % 3 * 2 + 1] for unit in FLUX}
    start = time.process_time()
    for _ in range(20):
        simulate(FLUX, FLUX_COMPUTE, FLUX_LOAD, shared)
    # Ten times what is asked for on an idle machine: shared ones are noisy.
    assert (time.process_time() - start) / 20 < 10 * 0.001
