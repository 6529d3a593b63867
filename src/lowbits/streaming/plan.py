"""Which units stay on the device, and which slot each of the others is copied into.

A pure function of sizes, times, bandwidth and budget. Residents are spread over the order, so that
the link is busy all the time; then single exchanges are tried against the simulator.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple, final

from lowbits.core.report import format_bytes
from lowbits.errors import InsufficientMemoryError
from lowbits.streaming import slots
from lowbits.streaming.simulate import Simulated, simulate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lowbits.streaming.simulate import Times

#: Slots that are tried where no depth is given: the usual number first, then as many as this. Any
#: other number must be so much faster.
_USUAL_DEPTH: Final = 3
DEEPEST: Final = 6
_WORTHWHILE: Final = 1.01
#: Wall over the longer of compute and transfer at which exchanging residents stops.
_GOOD_ENOUGH: Final = 1.02
#: Exchanges that are simulated for one depth, at most, and the uses simulated in them: 5 ms.
_TRIALS: Final = 40
_TRIAL_USES: Final = 2400
#: Units waited for longest that are relieved, and residents near each that may go for it.
_AWAITED: Final = 3
_NEAR: Final = 6
#: Sizes this much apart are classes: it may pay to keep the larger ones, which make slots large.
_CLASS_GAP: Final = 1.25
_CLASSES: Final = 3


@final
@dataclass(frozen=True)
class UnitCost:
    """What one unit costs.

    Attributes:
        nbytes: that its copy moves, and that it takes on the device.
        compute_s: seconds of one use, copy not counted; 0 for all units where it is not known.
    """

    nbytes: int
    compute_s: float


@final
@dataclass(frozen=True)
class StreamPlan:
    """Where each unit is, and what that costs.

    Attributes:
        order: units in the order of a pass.
        residents: units that stay on the device.
        slot_of: slot of each unit that is copied before its use.
        offset_of: where it lies there, in bytes from the start; 0 or a multiple of 4096.
        cells_of: the same for the simulator: two units have one in common exactly if their bytes
            overlap, that is if one cannot be copied while the other is in use.
        slot_bytes: size of each slot: of the largest unit that uses it where none share it.
        fixed_bytes: what is on the device besides units.
        resident_bytes: of all residents.
        predicted_s: of a pass once it is under way, by the simulator; never below the two others.
        compute_s: of a pass without copies; assumed where no unit's time is known.
        transfer_s: that the link is busy for a pass.
    """

    order: tuple[int, ...]
    residents: frozenset[int]
    slot_of: Mapping[int, int]
    offset_of: Mapping[int, int]
    cells_of: Mapping[int, tuple[int, ...]]
    slot_bytes: tuple[int, ...]
    fixed_bytes: int
    resident_bytes: int
    predicted_s: float
    compute_s: float
    transfer_s: float

    @property
    def depth(self) -> int:
        """Number of slots; 0 where all units are resident."""
        return len(self.slot_bytes)

    @property
    def device_bytes(self) -> int:
        """Everything on the device: what is fixed, residents and slots."""
        return self.fixed_bytes + self.resident_bytes + sum(self.slot_bytes)

    def simulate(
        self,
        order: Sequence[int],
        compute_s: Times,
        load_s: Sequence[float],
        *,
        passes: int = 4,
        prefetch: bool = True,
    ) -> Simulated:
        """Run passes with these residents and slots in the simulator; arguments as there."""
        return simulate(order, compute_s, load_s, self.cells_of, passes=passes, prefetch=prefetch)


def make_plan(
    costs: Sequence[UnitCost],
    order: Sequence[int],
    *,
    bandwidth: float,
    budget_bytes: int,
    fixed_bytes: int,
    depth: int | range | None,
    prefetch: bool,
    device: str = "device",
) -> StreamPlan:
    """Choose residents and slots: all units resident if they fit, else the fastest ring found.

    Args:
        costs: of each unit.
        order: numbers of the units in the order of a pass; one may come more than once. A unit that
            never comes is streamed last: it costs no time, but a slot that is large enough.
        bandwidth: of the link in bytes per second, above 0.
        budget_bytes: that fixed bytes, residents and slots may take together.
        fixed_bytes: on the device besides units.
        depth: number of slots, at least 1; a range: one of these, three where no other one is worth
            1 % more; None: of all. No more are made than there are units to use them.
        prefetch: False: a copy starts only when its unit is entered, so one slot is all it takes,
            or as many as a range begins with: for units that are called inside others.
        device: whose memory it is, for messages.

    Raises:
        InsufficientMemoryError: if one slot, or the depth that was asked for, does not fit.
    """
    search = _Search(costs, order, bandwidth, budget_bytes - fixed_bytes, prefetch=prefetch)
    if search.fits(everything := search.layout(frozenset(range(len(costs))), 1)):
        return _plan(search, search.candidate(everything), fixed_bytes)
    depths = range(1, DEEPEST + 1) if depth is None else depth
    if isinstance(depths, range):
        exact = search.slots_at_most(depths.start)
        best = search.fastest(depths) if prefetch else search.best(exact)
    else:
        exact = search.slots_at_most(depths) if prefetch else 1
        best = search.best(exact)
    if best is None:
        raise _too_small(search.smallest(exact), budget_bytes, fixed_bytes, device)
    return _plan(search, best, fixed_bytes)


def least_bytes(nbytes: Sequence[int], order: Sequence[int], depth: int) -> int:
    """Return the bytes of the smallest ring with so many slots, and of residents that go with it.

    Args:
        nbytes: of each unit.
        order: as `make_plan` takes it.
        depth: number of slots; no more than there are units to use them.
    """
    search = _Search([UnitCost(each, 0.0) for each in nbytes], order, 1.0, 0, prefetch=True)
    return search.smallest(search.slots_at_most(depth)).nbytes


class _Layout(NamedTuple):
    """Residents and slots, and the bytes of both together."""

    residents: frozenset[int]
    slot_of: dict[int, int]
    slot_bytes: tuple[int, ...]
    nbytes: int
    offset_of: Mapping[int, int] = MappingProxyType({})


class _Candidate(NamedTuple):
    """A layout and what the simulator says about it."""

    layout: _Layout
    simulated: Simulated
    wall_s: float
    bound_s: float


def _plan(search: _Search, found: _Candidate, fixed_bytes: int) -> StreamPlan:
    layout = found.layout
    return StreamPlan(
        order=tuple(search.order),
        residents=layout.residents,
        slot_of=layout.slot_of,
        offset_of={unit: layout.offset_of.get(unit, 0) for unit in layout.slot_of},
        cells_of=search.cells(layout),
        slot_bytes=layout.slot_bytes,
        fixed_bytes=fixed_bytes,
        resident_bytes=layout.nbytes - sum(layout.slot_bytes),
        predicted_s=found.wall_s,
        compute_s=search.pass_s,
        transfer_s=found.simulated.copy_s,
    )


def _too_small(
    least: _Layout, budget_bytes: int, fixed_bytes: int, device: str
) -> InsufficientMemoryError:
    needed = fixed_bytes + least.nbytes
    sizes = " + ".join(map(str, least.slot_bytes)) or "0"
    kept = least.nbytes - sum(least.slot_bytes)
    residents = f", {kept} of units that stay" if kept else ""
    fewer = ", fewer slots" if len(least.slot_bytes) > 1 else ""
    return InsufficientMemoryError(
        f"the weights on {device} need at least {needed} bytes ({format_bytes(needed)}): "
        f"{fixed_bytes} that are always there{residents}, {sizes} of slots that the other units "
        f"are copied into; the budget is {budget_bytes} bytes ({format_bytes(budget_bytes)}); "
        f"allow {needed} bytes or more{fewer}, or store the weights in a smaller scheme",
        needed,
        budget_bytes,
        device,
    )


def _wall(found: _Candidate) -> float:
    return found.wall_s


def _from_both_ends(units: Sequence[int]) -> list[int]:
    """Return them in the order first, last, second, last but one, ..."""
    pairs = zip(units, reversed(units), strict=True)
    return list(dict.fromkeys(itertools.chain.from_iterable(pairs)))


@final
class _Search:
    """The inputs of one plan in the form that is fast to try layouts with."""

    def __init__(
        self,
        costs: Sequence[UnitCost],
        order: Sequence[int],
        bandwidth: float,
        room: int,
        *,
        prefetch: bool,
    ) -> None:
        self.order = order
        self.room = room
        self.prefetch = prefetch
        self.nbytes = [cost.nbytes for cost in costs]
        self.load_s = [nbytes / bandwidth for nbytes in self.nbytes]
        self.compute_s = [cost.compute_s for cost in costs]
        if not any(self.compute_s[unit] for unit in order):
            self.compute_s = self.load_s
        self.pass_s = sum(self.compute_s[unit] for unit in order)
        self.weightless = frozenset(i for i, nbytes in enumerate(self.nbytes) if not nbytes)
        self.called = [unit for unit in dict.fromkeys(order) if unit not in self.weightless]
        self.uncalled = sorted(set(range(len(costs))) - set(order) - self.weightless)
        self._count_uses()

    def slots_at_most(self, depth: int) -> int:
        """Return how many slots of those wanted there are units for."""
        return min(depth, max(1, len(self.called)))

    def _count_uses(self) -> None:
        """Sum up what each unit computes in a pass, and how much must be copied for it."""
        self.used_s = [0.0] * len(self.nbytes)
        self.moved = [0] * len(self.nbytes)
        before = None
        for unit in self.order:
            self.used_s[unit] += self.compute_s[unit]
            self.moved[unit] += self.nbytes[unit] if unit != before else 0
            before = unit
        self.dearest = sorted(self.called, key=lambda unit: (-self.moved[unit], unit))

    def layout(self, residents: frozenset[int], depth: int) -> _Layout:
        """Give the other units slots: in turn those that are called, then the others."""
        nbytes = self.nbytes
        streamed = [unit for unit in self.called if unit not in residents]
        slot_of = dict(zip(streamed, slots.turns(len(streamed), depth), strict=True))
        waiting = [unit for unit in self.uncalled if unit not in residents]
        sizes = [0] * (max(slot_of.values()) + 1 if streamed else min(1, len(waiting)))
        for unit, slot in slot_of.items():
            if nbytes[unit] > sizes[slot]:  # noqa: PLR1730 - the hot loop
                sizes[slot] = nbytes[unit]
        for unit in waiting:
            wide = [slot for slot, size in enumerate(sizes) if size >= nbytes[unit]]
            slot = wide[0] if wide else sizes.index(max(sizes))
            slot_of[unit] = slot
            sizes[slot] = max(sizes[slot], nbytes[unit])
        kept = sum(nbytes[unit] for unit in residents)
        return _Layout(residents, slot_of, tuple(sizes), kept + sum(sizes))

    def cells(self, layout: _Layout) -> dict[int, tuple[int, ...]]:
        """Return what each streamed unit takes of the slots, as the simulator wants it."""
        return slots.cells(layout.slot_of, layout.offset_of, self.nbytes)

    def fits(self, layout: _Layout) -> bool:
        """Tell whether it takes no more than there is room for."""
        return layout.nbytes <= self.room

    def candidate(self, layout: _Layout) -> _Candidate:
        """Simulate a layout."""
        simulated = simulate(
            self.order, self.compute_s, self.load_s, self.cells(layout), prefetch=self.prefetch
        )
        bound_s = max(self.pass_s, simulated.copy_s)
        return _Candidate(layout, simulated, max(bound_s, simulated.wall_s), bound_s)

    def fastest(self, depths: range) -> _Candidate | None:
        """Return the best candidate of some depths, beginning with the usual one.

        Times that vary from pass to pass cost 7 % with two slots where three lose 2 %, which the
        simulation of equal passes does not see: fewer than three have to gain something in it.
        """
        best: _Candidate | None = None
        possible = range(self.slots_at_most(depths.start), self.slots_at_most(depths.stop - 1) + 1)
        for depth in (*range(_USUAL_DEPTH, DEEPEST + 1), *range(_USUAL_DEPTH - 1, 0, -1)):
            is_enough = best is not None and best.wall_s <= best.bound_s * _WORTHWHILE
            if depth not in possible or (depth > _USUAL_DEPTH and is_enough):
                continue
            found = self.best(depth)
            if found and (best is None or found.wall_s * _WORTHWHILE < best.wall_s):
                best = found
        return best

    def best(self, depth: int) -> _Candidate | None:
        """Return the best candidate of a depth; None if no layout with so many slots fits."""
        starts = [self._spread_to_fit(depth, pinned) for pinned in self._pinned()]
        layouts = [start for start in starts if start]
        if not layouts and self.fits(least := self.smallest(depth)):
            layouts = [self._fill(least, depth)]
        if not layouts:
            return None
        best = min(map(self.candidate, layouts), key=_wall)
        return self._share(self._exchange(best, depth))

    def _share(self, whole: _Candidate) -> _Candidate:
        """Let units lie side by side in the same slots if the pass is shorter then."""
        layout = whole.layout
        streamed = [unit for unit in self.called if unit in layout.slot_of]
        found = [whole]
        for slot_of, offset_of in slots.side_by_side(streamed, self.nbytes, layout.slot_bytes):
            placed = layout._replace(slot_of=layout.slot_of | slot_of, offset_of=offset_of)
            found.append(self.candidate(placed))
        return min(found, key=_wall)

    def smallest(self, depth: int) -> _Layout:
        """Return the smallest layout of a depth: everything streamed, or nearly.

        A resident changes whose turn each slot is. It can pay where sizes alternate.
        """
        best = self.layout(self.weightless, depth)
        while True:
            streamed = [unit for unit in self.called if unit in best.slot_of]
            tried = [self.layout(best.residents | {unit}, depth) for unit in streamed]
            found = min(tried, key=lambda layout: layout.nbytes, default=best)
            if found.nbytes >= best.nbytes or len(found.slot_bytes) < depth:
                return best
            best = found

    def _pinned(self) -> Iterator[frozenset[int]]:
        """Yield sets of the largest units, from none to all of the largest classes of sizes."""
        yield self.weightless
        sizes = sorted({self.nbytes[unit] for unit in self.called}, reverse=True)
        gaps = [a for a, b in itertools.pairwise(sizes) if a > b * _CLASS_GAP]
        for size in gaps[:_CLASSES]:
            yield self.weightless.union(u for u in self.called if self.nbytes[u] >= size)

    def _spread_to_fit(self, depth: int, pinned: frozenset[int]) -> _Layout | None:
        """Find the lowest rate of streaming whose layout fits, by bisection, and fill it up."""
        low, high = 0.0, sum(self.moved) / self.pass_s if self.pass_s else 0.0
        best = None
        for _ in range(18):
            rate = (low + high) / 2 if best else high
            layout = self.layout(self._spread(rate, pinned), depth)
            if self.fits(layout):
                best, high = layout, rate
            else:
                low, high = rate, high if best else 2 * high
        return self._fill(best, depth) if best else None

    def _spread(self, rate: float, pinned: frozenset[int]) -> frozenset[int]:
        """Return residents such that what is streamed grows with compute time at some rate.

        Credit grows with compute time and pays for copies. It is bounded, since the link, too, can
        be ahead by no more than a few slots.
        """
        most = max(self.moved, default=0)
        credit = most / 2
        residents = set(pinned)
        for unit in self.called:
            credit = min(2 * most, credit + rate * self.used_s[unit])
            if unit in pinned:
                continue
            if credit >= self.moved[unit]:
                credit -= self.moved[unit]
            else:
                residents.add(unit)
        return frozenset(residents)

    def _fill(self, layout: _Layout, depth: int) -> _Layout:
        """Make resident what still fits, the units first that are copied most."""
        for unit in self.dearest:
            spare = self.room - layout.nbytes
            if self.nbytes[unit] <= spare and unit not in layout.residents:
                larger = self.layout(layout.residents | {unit}, depth)
                if self.fits(larger):
                    layout = larger
        return layout

    def _exchange(self, best: _Candidate, depth: int) -> _Candidate:
        """Exchange single residents while that makes the pass shorter."""
        trials = min(_TRIALS, _TRIAL_USES // len(self.order)) if self.order else 0
        while best.wall_s > best.bound_s * _GOOD_ENOUGH:
            for layout in itertools.islice(self._exchanges(best, depth), trials):
                trials -= 1
                found = self.candidate(layout)
                if found.wall_s < best.wall_s:
                    best = found
                    break
            else:
                return best
        return best

    def _exchanges(self, best: _Candidate, depth: int) -> Iterator[_Layout]:
        """Yield layouts with a resident more where the pass waits, and one near it fewer."""
        called = self.called
        residents = best.layout.residents
        stalls = best.simulated.stalls
        streamed = [unit for unit in called if unit not in residents]
        for awaited in sorted(stalls, key=lambda unit: (-stalls[unit], unit))[:_AWAITED]:
            spot = streamed.index(awaited)
            for entering in dict.fromkeys(streamed[spot - back] for back in range(depth)):
                place = called.index(entering)
                around = called[place:] + called[:place]
                near = [unit for unit in _from_both_ends(around) if unit in residents]
                for leaving in near[:_NEAR]:
                    layout = self.layout(residents - {leaving} | {entering}, depth)
                    if self.fits(layout):
                        yield self._fill(layout, depth)
