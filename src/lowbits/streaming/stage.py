"""The models that are on the device together: what is there, and what comes next."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, final

import torch

from lowbits.errors import InsufficientMemoryError
from lowbits.streaming.autograd import refuse_training, reread_for_backward
from lowbits.streaming.order import CallOrder
from lowbits.streaming.plan import DEEPEST, StreamPlan, UnitCost, least_bytes, make_plan
from lowbits.streaming.residency import Residency
from lowbits.streaming.timing import MethodTrial, Timing
from lowbits.streaming.transfer import Transfer, make_transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lowbits.streaming.component import Component
    from lowbits.streaming.device_ops import DeviceOps
    from lowbits.streaming.stored import Stored

#: A plan for what was measured replaces another one where it is better by more than this.
_GAIN: Final = 0.02

#: Wall over compute up to which no other plan is looked for.
_GOOD_ENOUGH: Final = 1.01


@final
class Stage:
    """Some models on the device, as one order of units.

    Costs, on the device, at most the budget that it was activated with.

    Attributes:
        components: the models.
        last_plan: what is resident and what is streamed, or was when something was on the device.
        method: ``"queue"`` or ``"async"``.
        timing: what was measured.
        uses: forwards of its models that are under way.
    """

    def __init__(
        self,
        components: Sequence[Component],
        ops: DeviceOps,
        method: str,
        depth: int | None,
        note_peak: Callable[[], None],
    ) -> None:
        """Prepare; the device is not touched before `activate`.

        Args:
            components: attached ones.
            ops: of the device.
            method: ``"queue"``, ``"async"`` or ``"auto"``.
            depth: of the ring; None: what is fastest.
            note_peak: called whenever more is on the device than before.
        """
        self.components = tuple(components)
        self.last_plan: StreamPlan | None = None
        self.timing = Timing(ops)
        self.uses = 0
        self._is_in_pass = False
        self._last_called: Component | None = None
        self._pid = os.getpid()
        self._note_peak = note_peak
        self._ops, self._depth = ops, depth
        self._trial = MethodTrial() if method == "auto" else None
        self.method = "async" if method == "auto" else method
        self._parked_bytes = self._budget_bytes = self._running = 0
        self._limit_bytes: int | None = None
        self._is_warm = False
        # How many units were in use at once: plans do not know which must not share.
        self._nesting = 1
        self._transfer: Transfer | None = None
        self._residency: Residency | None = None
        self._number_entries()
        self._order = CallOrder(range(len(self._units)))

    def _number_entries(self) -> None:
        self._units = [entry for component in self.components for entry in component.units]
        self._entries: list[Stored] = [*self._units, *(c.base for c in self.components)]
        self._numbers = {entry: number for number, entry in enumerate(self._entries)}

    @property
    def plan(self) -> StreamPlan | None:
        """What is resident and what is streamed; None while nothing is on the device."""
        return self.last_plan if self._residency else None

    @property
    def fixed_bytes(self) -> int:
        """Bytes that stay on the device while the stage is active."""
        loose = sum(component.loose_bytes for component in self.components)
        bases = sum(component.base.unit.nbytes for component in self.components)
        return bases + loose

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return self.fixed_bytes + sum(e.unit.nbytes for e in self._units)

    @property
    def wanted_bytes(self) -> int:
        """Bytes that it takes of a device where there is room for everything."""
        is_ring_only = any(component.is_ring_only for component in self.components)
        return self.minimum_bytes if is_ring_only else self.nbytes

    @property
    def device_bytes(self) -> int:
        """Bytes on the device now."""
        loose = sum(component.loose_bytes for component in self.components)
        return loose + (self._residency.device_bytes if self._residency else 0)

    @property
    def reserved_bytes(self) -> int:
        """Bytes on the device once every unit was used: buffers are made at their first use."""
        if self.plan is None:
            return sum(component.loose_bytes for component in self.components)
        return self.plan.device_bytes - self.plan.fixed_bytes + self.fixed_bytes

    @property
    def copied_bytes(self) -> int:
        """Bytes that were copied to the device so far."""
        return self._parked_bytes + (self._residency.copied_bytes if self._residency else 0)

    @property
    def staging_bytes(self) -> int:
        """Bytes of host memory that copies pass through."""
        return self._transfer.staging_bytes if self._transfer else 0

    def streamed_of(self, component: Component) -> set[int]:
        """Return which of a component's units are streamed, by their numbers there."""
        slot_of = self.last_plan.slot_of if self.last_plan else {}
        return {n for n, e in enumerate(component.units) if self._numbers[e] in slot_of}

    def is_begun_by(self, component: Component) -> bool:
        """Note that a component was called; say whether a pass begins with that.

        Guidance calls each of two that share a ring twice in its turn: their pass begins where the
        first one is called after another.
        """
        is_again = self._last_called is component
        self._last_called = component
        is_alone = len(self.components) == 1
        return self.components[0] is component and (is_alone or not is_again)

    @property
    def is_outgrown(self) -> bool:
        """Whether other bytes stay on the device than are planned for: an adapter came, or went."""
        return self.plan is not None and self.plan.fixed_bytes != self.fixed_bytes

    @property
    def can_shrink(self) -> bool:
        """Whether less of the device would do."""
        return self.plan is not None and self.plan.device_bytes > self._bytes_of(self._nesting)

    def writes(self) -> list[int | None]:
        """Return how often each weight was written, wherever that is counted."""
        counts: list[int | None] = [entry.master.version for entry in self._entries]
        for component in self.components:
            counts += component.writes()
            if self._residency is not None:
                counts += self._residency.versions(self._numbers[component.base])
        return counts

    def shrink(self) -> None:
        """Halve what is above the smallest budget, for good; what goes returns to the device."""
        assert self.plan
        self._depth = None
        above = self.plan.device_bytes - self.minimum_bytes
        self._budget_bytes = self._limit_bytes = self.minimum_bytes + above // 2
        self.replan()
        self._ops.release_cached()

    def forget_limit(self, depth: int | None) -> None:
        """Forget that memory ran out: the budget, and a ring of this depth, are tried again."""
        self._limit_bytes, self._depth = None, depth

    def give_way(self, budget_bytes: int) -> None:
        """Take less of the device from now on, inside a forward; not below `busy_bytes`."""
        if self.reserved_bytes > budget_bytes:
            self._budget_bytes = budget_bytes
            self.replan()

    @property
    def busy_bytes(self) -> int:
        """The smallest budget that the stage can go on in, with the units that are in use now."""
        used = self._residency.used_bytes(range(len(self._units))) if self._residency else 0
        return max(self.minimum_bytes, self.fixed_bytes + used)

    @property
    def minimum_bytes(self) -> int:
        """The smallest budget that the stage can run in, with the slots that were asked for."""
        is_free = self._depth is None or self.method == "queue"
        return self._bytes_of(self._nesting if is_free else self._depth or 1)

    def _bytes_of(self, depth: int) -> int:
        nbytes = [entry.unit.nbytes for entry in self._units]
        if depth == 1:
            return self.fixed_bytes + max(nbytes, default=0)
        return self.fixed_bytes + least_bytes(nbytes, self._order.expected, depth)

    def activate(self, budget_bytes: int) -> None:
        """Make a plan, and bring the bases to the device.

        Raises:
            InsufficientMemoryError: the budget is below `minimum_bytes`.
        """
        self.allow(budget_bytes)
        self.replan()

    def allow(self, budget_bytes: int) -> None:
        """Say what plans may take from now on."""
        limit = max(self._limit_bytes or budget_bytes, self.minimum_bytes)
        self._budget_bytes = min(budget_bytes, limit)

    def _make_plan(self) -> StreamPlan:
        if self._transfer is None:
            masters = [entry.master for entry in self._entries]
            self._transfer = make_transfer(self._ops, masters, is_ahead=self.method == "async")
        return make_plan(
            [UnitCost(e.unit.nbytes, e.compute_s) for e in self._units],
            self._order.expected,
            bandwidth=self.timing.bandwidth,
            budget_bytes=min(self._budget_bytes, self.wanted_bytes),
            fixed_bytes=self.fixed_bytes,
            depth=self._depth or range(self._nesting, DEEPEST + 1),
            prefetch=self.method == "async",
            device=str(self._ops.device),
        )

    def _use_plan(self, plan: StreamPlan) -> None:
        assert self._transfer
        residency = Residency(self._entries, plan, self._ops, self._transfer, self._note_peak)
        if self._residency is not None:
            residency.inherit(self._residency)
        is_new = self._residency is None
        self._is_warm = False
        self.last_plan, self._residency = plan, residency
        if is_new:
            try:
                self._show_bases(residency)
            except BaseException:
                self._leave(residency)
                raise
        self._note_peak()

    def _show_bases(self, residency: Residency) -> None:
        for component in self.components:
            base = component.base
            base.check(at_end=True)
            base.show_copy(residency.acquire(self._numbers[base]))

    def _leave(self, residency: Residency) -> None:
        """Take everything off the device."""
        self._note_peak()
        for component in self.components:
            component.base.hide()
            residency.release(self._numbers[component.base], None)
        residency.drain()
        residency.let_go()
        self._parked_bytes += residency.copied_bytes
        self._residency = None
        self._is_warm = False

    def park(self) -> None:
        """Take everything off the device; what others wrote into the bases is kept."""
        if self._residency is None:
            return
        try:
            for component in self.components:
                component.base.accept_all()
                component.base.keep_changes()
        except BaseException:
            # What keeps a base from being read may have kept the next pass's units from it too.
            self._residency.drain()
            self._residency.forget_unfinished()
            raise
        self._leave(self._residency)
        self.timing.forget_marks()
        self._ops.release_cached()

    def close(self) -> None:
        """Park, and end the transfer's thread."""
        self.park()
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None

    def renumber(self) -> None:
        """Look at the components' units again, which have changed; only while parked."""
        self._number_entries()

    def set_method(self, method: str) -> None:
        """Transfer in another way from now on; residents of both plans stay.

        Raises:
            InsufficientMemoryError: the other way takes more than there is; this one stays.
        """
        if method == self.method:
            return
        before = self._transfer, self.method
        self._transfer, self.method = None, method
        left = before[0]
        try:
            self.replan()  # waits for the copies that are under way
        except BaseException:
            left, (self._transfer, self.method) = self._transfer, before
            raise
        finally:
            if left is not None:
                left.close()
        self._ops.release_cached()

    def look(self) -> None:
        """See what happened since the last pass: a fork, a new tensor in a base, or new values."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            if self._residency is not None:
                self._residency.forget_unfinished()
        for component in self.components:
            component.base.check()
            component.base.refresh()

    def begin_pass(self) -> None:
        """Begin a pass: the order starts again.

        A pass of several models ends where the next one begins.
        """
        if len(self.components) > 1 and self._order.is_under_way:
            self.end_pass()
        self._order.begin()
        self._begin_timing(has_end=len(self.components) == 1)
        self._is_in_pass = True

    def _begin_timing(self, *, has_end: bool) -> None:
        self.timing.begin_pass(has_end=has_end)
        if self._transfer is not None:
            self._transfer.is_timed = self.timing.times_uses

    def finish_pass(self) -> None:
        """End a pass of one model, which was completed."""
        if len(self.components) == 1:
            self.end_pass()

    def leave_pass(self) -> None:
        """Forget a pass of one model that did not come to its end."""
        if self._is_in_pass and len(self.components) == 1:
            self._is_in_pass = False
            self._order.begin()

    def end_pass(self) -> None:
        """End a pass; see whether another plan is better now."""
        self._is_in_pass = False
        is_other_order = self._order.end()
        self.timing.end_pass()
        self._is_warm = True
        assert self._residency
        for nbytes, seconds in self._residency.finished_copies():
            self.timing.note_copy(nbytes, seconds)
        if self._trial is not None and self.plan and self.plan.slot_bytes:
            self._try_methods(self._trial)
        # The pass is complete. Where the slots that were asked for do not fit this order, the plan
        # stays; where memory runs out, the next pass makes room.
        with suppress(InsufficientMemoryError, torch.OutOfMemoryError):
            if is_other_order:
                self.replan()
                self._prefetch()
            elif self.plan and self.plan.slot_bytes:
                self._improve()

    def _try_methods(self, trial: MethodTrial) -> None:
        """Transfer in the way that is to be timed next, or has won."""
        self.timing.resolve(wait=True)
        method = trial.next(self.timing.walls[-1])
        if trial.is_over:
            self._trial = None
        try:
            self.set_method(method)
        except InsufficientMemoryError:
            self._trial = None  # then there is nothing to choose

    def _improve(self) -> None:
        """Plan again with what was measured, where that is worth moving residents."""
        assert self.plan
        order, costs = self._order.expected, [entry.compute_s for entry in self._units]
        compute_s = sum(costs[unit] for unit in order)
        if not self.timing.has_news(compute_s):
            return
        loads = [e.unit.nbytes / self.timing.bandwidth for e in self._units]
        now = self.plan.simulate(order, costs, loads, prefetch=self.method == "async")
        # Where copies take longer, fewer slots, and more residents, may leave less to be copied.
        if now.wall_s > _GOOD_ENOUGH * compute_s and self._nesting == 1:
            better = self._make_plan()
            if better.predicted_s < (1 - _GAIN) * now.wall_s:
                self._use_plan(better)
                return
        # The same units in the same slots, but what was predicted is known better now.
        self.last_plan = replace(
            self.plan,
            predicted_s=max(now.wall_s, compute_s, now.copy_s),
            compute_s=compute_s,
            transfer_s=now.copy_s,
        )

    def replan(self) -> None:
        """Plan, or plan again: for another budget, another order, more that is fixed."""
        self._use_plan(self._make_plan())

    def run_unit(self, entry: Stored, forward: Callable[[], Any]) -> Any:
        """Run a unit's forward with its bytes on the device."""
        number = self._numbers[entry]
        entry.check()
        if self._running >= self._nesting:
            self._nest()
        residency = self._residency
        assert residency is not None
        if not self._is_in_pass:
            self._see_pass(number)
            residency = self._residency or residency
        is_due, is_held = self._order.enter(number), residency.holds(number)
        if self._is_warm and self.method == "async" and not is_held:
            entry.misses += 1
        # An event costs the host microseconds: none that nobody needs.
        has_arrived = is_held and residency.has_arrived(number)
        is_timed = self.timing.times_uses or not entry.compute_s
        called = self._ops.mark_computed() if is_timed or not has_arrived else None
        tensors = residency.acquire(number)
        started = called if has_arrived else self._ops.mark_computed()
        entry.begin_use(tensors)
        versions = residency.versions(number)
        self._running += 1
        try:
            if not (self._is_warm and is_held and is_due):
                self._prefetch()  # else all was asked for when the unit before was done
            is_streamed = residency.is_streamed(number)
            with reread_for_backward(entry, residency.flat(number), is_streamed=is_streamed):
                result = forward()
            residency.keep_writes(number, versions)
            return refuse_training(entry, residency.detached(number, result))
        except BaseException as error:
            error.add_note(f"lowbits: raised in {entry.unit.name!r}, while it was streamed")
            self._keep_failed(residency, number, versions, error)
            raise
        finally:
            self._running -= 1
            # Who keeps the traceback of an error would keep a slot's memory with it.
            del tensors
            entry.end_use()
            # Another one where a model that was called inside has made this one give way.
            residency = self._residency or residency
            is_freed = residency.is_streamed(number)
            done = self._ops.mark_computed(is_timed=is_timed) if is_timed or is_freed else None
            residency.release(number, done if is_freed else None)
            if called is not None:
                self.timing.note(entry, called, started, done if is_timed else None)
            if is_freed or not (self._is_warm and is_held and is_due):
                self._prefetch()  # behind a resident nothing has become free

    def _nest(self) -> None:
        """Have a slot more, for one more unit that is called inside others."""
        before, self._nesting = self._nesting, min(self._running + 1, DEEPEST)
        if self._depth is None and self.plan and 0 < self.plan.depth < self._nesting:
            try:
                self.replan()
            except InsufficientMemoryError:
                self._nesting = before  # who is to get the slot says so

    @staticmethod
    def _keep_failed(
        residency: Residency, number: int, versions: Sequence[int], error: BaseException
    ) -> None:
        """Keep what a forward had written before it failed; an error of that is told beside."""
        try:
            residency.keep_writes(number, versions)
        except Exception as second:  # noqa: BLE001 - the first one is raised
            error.add_note(f"lowbits: what it had written by then is lost: {second}")

    def _see_pass(self, number: int) -> None:
        """See where a pass ends and begins, where the model itself is never called."""
        if self._order.closes(number):
            self.end_pass()
        if not self._order.is_under_way:
            self._begin_timing(has_end=False)

    def _prefetch(self) -> None:
        if self.method != "async" or self._residency is None or self.last_plan is None:
            return
        # Where nothing is streamed, all of it is there after the first pass.
        if self.last_plan.slot_bytes or not self._is_warm:
            self._residency.prefetch(self._order.upcoming())
