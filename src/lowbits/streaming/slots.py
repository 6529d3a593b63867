"""Where in the slots each streamed unit lies: slots in turn, one unit in each or side by side."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

#: What offsets are multiples of: files are read straight into slots.
ALIGNMENT: Final = 4096


def turns(count: int, depth: int, *, is_short_last: bool = True) -> list[int]:
    """Return the slots of what takes one in turn, again and again.

    Number i in slot i mod depth would, where count mod depth is 1, have the last of a pass and the
    first of the next in one slot, and no copy under way between them: 2.5 % of a pass for 57 units
    in four slots. So some rounds leave out the last slot, such that they end with the pass. Where
    all rounds would, each slot that is left over goes to one of the last units.

    Args:
        count: of what takes a slot.
        depth: number of slots.
        is_short_last: which of the rounds that a round without the last slot is spread over that
            is: the last one, or the one in the middle. Neither is always better.
    """
    depth = min(depth, count)
    if not depth:
        return []
    rounds = -(-count // depth)
    shift = rounds - 1 if is_short_last else rounds // 2
    ends = [(number * count + shift) // rounds for number in range(rounds + 1)]
    slots = [slot for start, end in itertools.pairwise(ends) for slot in range(end - start)]
    for slot in range(max(slots) + 1, depth):
        slots[slot - depth] = slot
    return slots


def side_by_side(
    units: Sequence[int], nbytes: Sequence[int], slot_bytes: Sequence[int]
) -> Iterator[tuple[dict[int, int], dict[int, int]]]:
    """Lay units that follow each other into one slot as long as they fit; each lies at one place.

    Args:
        units: numbers, in the order of their uses.
        nbytes: of each unit, by its number.
        slot_bytes: sizes of the slots, one of them at least as large as the largest unit.

    Yields:
        Slots of all units, and offsets of those that are not at the start of one, multiples of
        `ALIGNMENT`; nothing if there are none of those, or if a slot would be left empty.
    """
    depth = len(slot_bytes)
    _, offset_of = _lay(units, nbytes, slot_bytes, range(depth))
    if not offset_of:
        return
    # How many slots are entered in a pass is known now, and with it whose turns it is.
    count = len(units) - len(offset_of)
    for is_short_last in (False, True):
        entered = turns(count, depth, is_short_last=is_short_last)
        slot_of, offset_of = _lay(units, nbytes, slot_bytes, entered)
        if offset_of and len(set(slot_of.values())) == depth:
            yield slot_of, offset_of


def _lay(
    units: Sequence[int], nbytes: Sequence[int], slot_bytes: Sequence[int], entered: Iterable[int]
) -> tuple[dict[int, int], dict[int, int]]:
    """Return slots and offsets; slots are entered in some order, after its end in turn."""
    slots = itertools.chain(entered, itertools.cycle(range(len(slot_bytes))))
    slot_of: dict[int, int] = {}
    offset_of: dict[int, int] = {}
    slot = end = 0
    for unit in units:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        if slot_of and offset + nbytes[unit] <= slot_bytes[slot]:
            offset_of[unit] = offset
        else:
            slot = next(slot for slot in slots if slot_bytes[slot] >= nbytes[unit])
            offset = 0
        slot_of[unit] = slot
        end = offset + nbytes[unit]
    return slot_of, offset_of


def cells(
    slot_of: Mapping[int, int], offset_of: Mapping[int, int], nbytes: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """Return the cells of each unit: two units have one in common exactly if their bytes overlap.

    The places where a unit begins are cells enough: of two that overlap, one begins in the other.

    Args:
        slot_of: slots of the units.
        offset_of: where they lie there, as far as that is not the start.
        nbytes: of each unit, by its number.
    """
    if not offset_of:
        return {unit: (slot,) for unit, slot in slot_of.items()}
    begin_of = {unit: (slot, offset_of.get(unit, 0)) for unit, slot in slot_of.items()}
    begins = sorted(set(begin_of.values()))
    cells_of = {}
    for unit, begin in begin_of.items():
        end = (begin[0], begin[1] + nbytes[unit])
        cells_of[unit] = tuple(range(bisect_left(begins, begin), bisect_left(begins, end)))
    return cells_of
