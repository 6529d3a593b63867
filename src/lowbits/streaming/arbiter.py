"""Who may use the device's weight budget now: the models of one pipeline take turns.

[Note: one forward at a time]
All models of an arbiter share one lock, which is held for the whole of a model's forward: buffers
belong to one forward, and a second thread waits for its turn. Arbiters that have a cap in common
share it. Order of locks: the arbiter's, then a transfer's queue; a transfer's thread never takes
the arbiter's.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final, final

from lowbits.core.report import format_bytes
from lowbits.errors import InsufficientMemoryError
from lowbits.streaming.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbits.streaming.budget import DeviceBudget
    from lowbits.streaming.component import Component
    from lowbits.streaming.device_ops import DeviceOps

#: Turns that are looked at for models that alternate: twice each.
_TURNS: Final = 4
#: Forwards in a turn, at most, of models that alternate within a step: guidance makes two.
_SHORT_TURN: Final = 2


@final
class Arbiter:
    """The weight budget of one device, and the stages that take turns in it.

    Whoever is called has the whole budget: the others give way, unless all fit together. Two that
    alternate step by step become one stage, and share one ring.

    Attributes:
        budget_bytes: what all weights on the device may take, at any time.
        ops: of the device.
        method: ``"queue"``, ``"async"`` or ``"auto"``.
        depth: slots of a ring; None: what the simulator finds best.
        peak_bytes: the most weight bytes that were on the device.
    """

    def __init__(
        self,
        ops: DeviceOps,
        budget_bytes: int,
        *,
        method: str,
        depth: int | None,
        shared: DeviceBudget | None = None,
    ) -> None:
        """Prepare; the device is not touched.

        Args:
            ops: of the device.
            budget_bytes: as the attribute.
            method: as the attribute.
            depth: as the attribute.
            shared: what all pipelines may take together, if there is such a cap.
        """
        self.lock = shared.lock if shared else threading.RLock()
        self.peak_bytes = 0
        self.budget_bytes = min(budget_bytes, shared.budget_bytes) if shared else budget_bytes
        self.ops, self.method, self.depth = ops, method, depth
        self._shared = shared
        if shared:
            shared.join(self)
        self._stages: dict[Component, Stage] = {}
        self._turns: deque[tuple[Stage, int]] = deque(maxlen=_TURNS)

    @property
    def is_ahead(self) -> bool:
        """Whether units are copied ahead of their use."""
        return self.method != "queue"

    def add(self, component: Component) -> None:
        """Let a component take part; it is attached."""
        self._stages[component] = self._stage(component)

    def _stage(self, *components: Component) -> Stage:
        return Stage(components, self.ops, self.method, self.depth, self._note_peak)

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.device_bytes)
        if self._shared:
            self._shared.note_peak()

    @property
    def device_bytes(self) -> int:
        """Bytes on the device now."""
        return sum(stage.device_bytes for stage in self.stages())

    @property
    def reserved_bytes(self) -> int:
        """Bytes on the device once every unit of what is there was used."""
        return sum(stage.reserved_bytes for stage in self.stages())

    def park(self) -> None:
        """Take everything off the device, but for models whose forward is under way."""
        for stage in self.stages():
            if not stage.uses:
                stage.park()

    @property
    def is_in_use(self) -> bool:
        """Whether a forward of its models is under way."""
        return any(stage.uses for stage in self.stages())

    def resize(self, budget_bytes: int) -> None:
        """Have another budget: everything leaves the device, and comes back as planned then."""
        self.park()
        for stage in self.stages():
            stage.forget_limit(self.depth)
        self.budget_bytes, self.peak_bytes = budget_bytes, self.device_bytes

    def remove(self, component: Component) -> None:
        """Take a component off the device for good; others of its stage stay as they are."""
        stage = self._stages.get(component)
        if stage is None:
            return  # it was interrupted before it was added
        stage.close()
        del self._stages[component]
        self._turns.clear()
        rest = [other for other in stage.components if other is not component]
        for other in rest:
            self.add(other)

    def stage_of(self, component: Component) -> Stage:
        """Return the stage that a component belongs to."""
        return self._stages[component]

    def enter(self, component: Component) -> Stage:
        """Bring a component's stage to the device, and return it; others may give way.

        Raises:
            InsufficientMemoryError: the budget is too small for it.
        """
        for known in [part for stage in self.stages() for part in stage.components]:
            known.notice_new()
        stage = self.stage_of(component)
        if stage.plan is None:
            stage = self._join(stage)
        others = [other for other in self.stages() if other is not stage]
        own = stage.wanted_bytes if stage.plan is None else stage.reserved_bytes
        wanted = own + sum(other.reserved_bytes for other in others)
        budget = self._budget_now(wanted)
        if wanted > budget:
            for other in others:
                if not other.uses:  # else it is its forward that calls this one
                    other.park()
        room = budget - sum(other.reserved_bytes for other in others)
        if stage.plan is None or own > room or stage.is_outgrown:
            if room < stage.minimum_bytes and len(stage.components) > 1 and not stage.uses:
                self._part(stage)
                return self.enter(component)
            if room < stage.minimum_bytes:
                room = self._share(stage, [other for other in others if other.uses], budget)
            stage.activate(room)
        else:
            stage.allow(room)  # others may have come since
        return stage

    def _budget_now(self, wanted_bytes: int) -> int:
        """Return what its models may take now; other pipelines give way."""
        if self._shared is None:
            return self.budget_bytes
        wanted = min(wanted_bytes, self.budget_bytes)
        return min(self.budget_bytes, self._shared.make_room(self, wanted))

    def _share(self, stage: Stage, callers: Sequence[Stage], budget: int) -> int:
        """Let stages whose forwards call another one give way; return what there is for that one.

        Raises:
            InsufficientMemoryError: the budget is too small for it, and for what cannot give way.
        """
        apart = sum(s.reserved_bytes for s in self.stages() if s is not stage and s not in callers)
        busy = sum(caller.busy_bytes for caller in callers)
        above = budget - (apart + stage.minimum_bytes + busy)
        if above < 0:
            raise self._too_small(stage, apart, busy, missing=-above, left=budget)
        for caller in callers:
            caller.give_way(caller.busy_bytes + above // (len(callers) + 1))
        self.ops.release_cached()
        return budget - apart - sum(caller.reserved_bytes for caller in callers)

    def _part(self, stage: Stage) -> None:
        """Make several stages of one that has outgrown the budget: an adapter came."""
        stage.close()
        self._turns.clear()
        for component in stage.components:
            self.add(component)

    def _too_small(
        self, stage: Stage, apart: int, busy: int, *, missing: int, left: int
    ) -> InsufficientMemoryError:
        """Say what would do: of what all pipelines share, where they leave too little of it."""
        budget, whose = self.budget_bytes, ""
        if self._shared is not None and left < budget:
            budget, whose = self._shared.budget_bytes, " (lowbits.device_budget)"
        own = budget + missing
        needed = max(own, self._least_bytes() + budget - left)
        more = f", and others up to {needed}" if needed > own else ""
        beside = {
            "that it takes alone": stage.minimum_bytes,
            "of what calls it, inside another's forward": busy,
            "of adapters of other models, which stay there": apart,
            "of other pipelines": budget - left,
        }
        parts = " + ".join(f"{nbytes} {what}" for what, nbytes in beside.items() if nbytes)
        names = ", ".join(type(component.root).__name__ for component in stage.components)
        has = f"the budget is {budget} bytes ({format_bytes(budget)})"
        return InsufficientMemoryError(
            f"the weights of {names} need at least {own} bytes ({format_bytes(own)}) on "
            f"{self.ops.device}: {parts}{more}; {has}; allow {needed} bytes or "
            f"more{whose}, or store the weights in a smaller scheme",
            needed,
            budget,
            str(self.ops.device),
        )

    def _least_bytes(self) -> int:
        """Return the budget that would do for any of the models alone, and what the others keep."""
        return max(stage.minimum_bytes + self._kept_beside(stage) for stage in self.stages())

    def _kept_beside(self, stage: Stage) -> int:
        """Return what models of other stages keep on the device, parked too."""
        return sum(c.loose_bytes for c in self._stages if c not in stage.components)

    def stages(self) -> list[Stage]:
        """Return the stages, each once."""
        return list(dict.fromkeys(self._stages.values()))

    def _join(self, stage: Stage) -> Stage:
        """Note whose turn it is; make one stage of two whose turns are short and alternate."""
        self._turns.append((stage, stage.timing.passes))
        if len(self._turns) < _TURNS:
            return stage
        (a, a_passes), (b, b_passes), (a_again, a_now), (b_again, b_now) = self._turns
        if a is not a_again or b is not b_again or a is b:
            return stage
        joined = self._stage(*a.components, *b.components)
        is_free = not (a.uses or b.uses)
        is_short = max(a_now - a_passes, b_now - b_passes) <= _SHORT_TURN
        needed = joined.minimum_bytes + self._kept_beside(joined)
        if not (is_short and is_free) or needed > self.budget_bytes:
            return stage
        for old in (a, b):
            old.close()
        for component in joined.components:
            self._stages[component] = joined
        self._turns.clear()
        return joined
