"""Which unit's bytes lie where on the device: residents for good, the others in slots in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from lowbits.errors import StreamError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from lowbits.streaming.device_ops import DeviceOps
    from lowbits.streaming.plan import StreamPlan
    from lowbits.streaming.stored import Stored
    from lowbits.streaming.transfer import Load, Transfer


@final
class _Slot:
    """A buffer on the device: costs its bytes there from its first use on.

    Attributes:
        unit: number of the unit whose bytes it holds, or will hold when `load` is done.
        version: of that unit's master when the copy was asked for.
        users: forwards that are using it now.
        freed: event behind its last use.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.buffer: Tensor | None = None
        self.unit: int | None = None
        self.version = 0
        self.load: Load | None = None
        self.users = 0
        self.freed: Any = None


@final
class Residency:
    """The device's buffers, as a plan lays them out.

    Every unit has one slot of its own choice: a resident its own, a streamed one that of its turn.
    Its device tensors are made once, so that their addresses never change.
    """

    def __init__(
        self, stored: Sequence[Stored], plan: StreamPlan, ops: DeviceOps, transfer: Transfer
    ) -> None:
        """Lay out the buffers; each is made at its first use, on the stream current then.

        Args:
            stored: by number; those that the plan does not know are residents.
            plan: says who shares which slot.
            ops: makes buffers.
            transfer: fills them.
        """
        self._stored, self._ops, self._transfer = stored, ops, transfer
        self._ring = [_Slot(nbytes) for nbytes in plan.slot_bytes]
        self._own = {
            number: _Slot(entry.unit.nbytes)
            for number, entry in enumerate(stored)
            if number not in plan.slot_of
        }
        self._slots = self._own | {n: self._ring[slot] for n, slot in plan.slot_of.items()}
        self._tensors: dict[tuple[int, int], list[Tensor]] = {}
        self._held: dict[int, _Slot] = {}
        self.copied_bytes = 0
        self._under_way: list[tuple[int, Load]] = []

    @property
    def device_bytes(self) -> int:
        """Bytes of the buffers that were made."""
        return sum(s.nbytes for s in (*self._ring, *self._own.values()) if s.buffer is not None)

    def inherit(self, old: Residency) -> None:
        """Take over those residents of another residency of the same units that stay residents.

        The other one is spent: its other buffers are let go.
        """
        old.drain()
        for number, slot in old._own.items():
            if number in self._own:
                self._own[number] = self._slots[number] = slot
                key = (number, id(slot))
                if key in old._tensors:
                    self._tensors[key] = old._tensors[key]
        self._held = {n: slot for n, slot in old._held.items() if n in self._own}
        self.copied_bytes = old.copied_bytes

    def finished_copies(self) -> list[tuple[int, float]]:
        """Return bytes and seconds of the copies that were finished since the last call."""
        timed = [(n, load, self._transfer.seconds(load)) for n, load in self._under_way]
        self._under_way = [(n, load) for n, load, seconds in timed if seconds is None]
        return [(n, seconds) for n, _, seconds in timed if seconds is not None]

    def drain(self) -> None:
        """Wait until no copy is under way: before buffers are let go."""
        for slot in (*self._ring, *self._own.values()):
            if slot.load is not None:
                self._transfer.settle(slot.load)

    def acquire(self, number: int) -> list[Tensor]:
        """Return a unit's device tensors, by place; compute waits for their bytes.

        Raises:
            StreamError: its bytes could not be copied; or every slot is in use by units whose
                forward calls this one.
        """
        slot = self._slots[number]
        if slot.users and slot.unit != number:
            slot = self._spare(number)
        if not self._is_fresh(slot, number):
            self._start(slot, number)
        assert slot.load
        try:
            self._transfer.wait(slot.load)
        except BaseException:
            slot.unit = None  # asked for again at the next use
            raise
        slot.users += 1
        self._held[number] = slot
        return self._views(number, slot)

    def release(self, number: int) -> None:
        """Say that a unit's forward is over, or has failed."""
        slot = self._held[number]
        slot.users -= 1
        if not slot.users:
            slot.freed = self._ops.mark_computed()
            del self._held[number]

    def prefetch(self, upcoming: Iterable[int]) -> None:
        """Ask for copies of the units that come next, as far as slots are free.

        A slot is free when its last user is done, and nothing that comes earlier is in it.
        """
        claimed: set[int] = set()
        for number in upcoming:
            slot = self._slots[number]
            if number in self._own:
                if not self._is_fresh(slot, number):
                    self._start(slot, number)
                continue
            if not self._is_fresh(slot, number):
                if slot.users or id(slot) in claimed:
                    return
                self._start(slot, number)
            claimed.add(id(slot))
            if len(claimed) == len(self._ring):
                return

    def holds(self, number: int) -> bool:
        """Say whether a unit's bytes are on the device, or on their way."""
        return self._is_fresh(self._slots[number], number)

    def _is_fresh(self, slot: _Slot, number: int) -> bool:
        return slot.unit == number and slot.version == self._stored[number].master.version

    def _start(self, slot: _Slot, number: int) -> None:
        entry = self._stored[number]
        if slot.buffer is None:
            slot.buffer = self._ops.empty(slot.nbytes)
        # First: whatever is raised from here on, the old bytes count as overwritten.
        slot.unit = None
        slot.version = entry.master.version
        slot.load = self._transfer.start(
            entry.unit.name, entry.master, slot.buffer[: entry.unit.nbytes], slot.freed
        )
        slot.unit = number
        self._under_way.append((entry.unit.nbytes, slot.load))
        entry.copies += 1
        self.copied_bytes += entry.unit.nbytes

    def _spare(self, number: int) -> _Slot:
        """Return a slot that nobody is using, for a unit whose own one is in use."""
        needed = self._stored[number].unit.nbytes
        for slot in self._ring:
            if not slot.users and slot.nbytes >= needed:
                return slot
        users = ", ".join(repr(self._stored[n].unit.name) for n in self._held)
        raise StreamError(
            f"{self._stored[number].unit.name!r} was called inside {users}, and there is no slot "
            "left for it: stream with a larger budget, or a larger depth",
            self._stored[number].unit.name,
            "waiting for a slot",
        )

    def _views(self, number: int, slot: _Slot) -> list[Tensor]:
        key = (number, id(slot))
        if key not in self._tensors:
            assert slot.buffer is not None
            with torch.inference_mode(mode=False), torch.no_grad():
                self._tensors[key] = [
                    _like(place.original, place.view(slot.buffer))
                    for place in self._stored[number].unit.places
                ]
        return self._tensors[key]


def _like(original: Tensor, view: Tensor) -> Tensor:
    """Return a Parameter, which is frozen, or a plain tensor, as the original is."""
    return nn.Parameter(view, requires_grad=False) if isinstance(original, nn.Parameter) else view
