"""How long a pass takes when some units have to be copied first: one link, one compute stream.

Discrete events in plain arithmetic; nothing here knows torch, a device or a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

#: Seconds of each unit, or what gives them for a pass of some number.
Times: TypeAlias = Sequence[float] | Callable[[int], Sequence[float]]


@final
@dataclass(frozen=True)
class Simulated:
    """What the simulator found; all but the last field are about the last pass that it ran.

    Attributes:
        wall_s: from the end of the pass before to the end of this one.
        copy_s: that the link was busy with the copies for this pass.
        stalls: seconds that the compute stream waited for a unit's copy, by the unit; units that it
            never waited for are not in it.
        first_pass_s: of the first pass, which begins with empty slots.
    """

    wall_s: float
    copy_s: float
    stalls: Mapping[int, float]
    first_pass_s: float

    @property
    def stall_s(self) -> float:
        """Seconds that the compute stream waited in all."""
        return sum(self.stalls.values())


def simulate(
    order: Sequence[int],
    compute_s: Times,
    load_s: Sequence[float],
    slot_of: Mapping[int, int],
    *,
    passes: int = 4,
    prefetch: bool = True,
) -> Simulated:
    """Run some passes over a model whose streamed units are copied into slots.

    Copies follow each other in the order of the uses they are for. One may start when the link is
    free and the last use of what its slot holds has ended, in the pass before too; a unit that is
    still in its slot is not copied again.

    Args:
        order: units in the order of a pass; one may come more than once.
        compute_s: of one use of each unit, by its number.
        load_s: of one copy of each unit, by its number.
        slot_of: slot of each streamed unit; the other units are resident.
        passes: at least 1. Four are enough for the lead of the copies to settle.
        prefetch: False: a copy starts only when its unit is entered.
    """
    steps = [(unit, slot_of.get(unit), load_s[unit]) for unit in order]
    slots = set(slot_of.values())
    holds: dict[int, int | None] = dict.fromkeys(slots)
    freed = dict.fromkeys(slots, 0.0)
    clock = link = first_end = start = copied = 0.0
    stalls: dict[int, float] = {}
    for number in range(passes):
        compute = compute_s(number) if callable(compute_s) else compute_s
        start, copied, stalls = clock, 0.0, {}
        for unit, slot, load in steps:
            if slot is None:
                clock += compute[unit]
                continue
            if holds[slot] != unit:
                holds[slot] = unit
                copied += load
                begin = freed[slot] if prefetch else clock
                link = (link if link > begin else begin) + load  # noqa: FURB136 - the hot loop
                if link > clock:
                    stalls[unit] = stalls.get(unit, 0.0) + link - clock
                    clock = link
            clock += compute[unit]
            freed[slot] = clock
        if number == 0:
            first_end = clock
    return Simulated(clock - start, copied, stalls, first_end)
