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
    cells_of: Mapping[int, Sequence[int]],
    *,
    passes: int = 4,
    prefetch: bool = True,
) -> Simulated:
    """Run some passes over a model whose streamed units are copied into slots.

    Copies follow each other in the order of the uses they are for. One may start when the link is
    free and the last uses of all that it overwrites have ended, in the pass before too; a unit that
    nothing was copied over since is not copied again.

    Args:
        order: units in the order of a pass; one may come more than once.
        compute_s: of one use of each unit, by its number.
        load_s: of one copy of each unit, by its number.
        cells_of: what each streamed unit takes of the slots, in cells of any numbers: two units
            overwrite each other exactly if they have one in common. Other units are resident.
        passes: at least 1. Four are enough for the lead of the copies to settle.
        prefetch: False: a copy starts only when its unit is entered.
    """
    first, later = _schedule(order, cells_of)
    ends = [0.0]
    clock = link = start = 0.0
    stalls: dict[int, float] = {}
    for number in range(passes):
        compute = compute_s(number) if callable(compute_s) else compute_s
        start, stalls = clock, {}
        for unit, back in later if number else first:
            if back:
                begin = ends[-back] if prefetch else clock
                link = (link if link > begin else begin) + load_s[unit]  # noqa: FURB136 - hot loop
                if link > clock:
                    stalls[unit] = stalls.get(unit, 0.0) + link - clock
                    clock = link
            clock += compute[unit]
            ends.append(clock)
    copied = sum(load_s[unit] for unit, back in (later if passes > 1 else first) if back)
    return Simulated(clock - start, copied, stalls, ends[len(first)])


def _schedule(
    order: Sequence[int], cells_of: Mapping[int, Sequence[int]]
) -> list[list[tuple[int, int]]]:
    """Return the uses of the first pass and of any later one.

    Which uses need a copy, and which use it has to wait for, is not a matter of times: of those
    that it overwrites, the latest ends last. After a pass each cell has the same holder as after
    any other.

    Returns:
        Unit of each use, and how many uses back the one is that its copy waits for: before all of
        them where there is none, 0 where nothing is copied.
    """
    holder: dict[int, int] = {}
    last: dict[int, int] = {}
    scheduled = []
    for number in range(2):
        steps = []
        for use, unit in enumerate(order, 1 + number * len(order)):
            awaited, is_whole = 0, True
            for cell in cells_of.get(unit, ()):
                if holder.get(cell) != unit:
                    holder[cell] = unit
                    is_whole = False
                if cell in last and last[cell] > awaited:
                    awaited = last[cell]
                last[cell] = use
            steps.append((unit, 0 if is_whole else use - awaited))
        scheduled.append(steps)
    return scheduled
