"""Which unit's bytes lie where on the device: residents for good, the others in slots in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lowbits.core.interception import mark_streamed, unmark_streamed
from lowbits.core.memory import storage_address
from lowbits.errors import StreamError
from lowbits.streaming.transfer import Route

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from lowbits.streaming.device_ops import DeviceOps
    from lowbits.streaming.plan import StreamPlan
    from lowbits.streaming.stored import Stored
    from lowbits.streaming.transfer import Load, Transfer


@final
class _Slot:
    """A buffer on the device, made at its first use: costs its bytes from then on.

    Attributes:
        nbytes: of the buffer.
        buffer: None before its first use.
        homes: of the units that it is for.
        users: forwards that are using one of them now.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.buffer: Tensor | None = None
        self.users = 0
        self.homes: list[_Home] = []

    @property
    def address(self) -> int:
        """Where the buffer lies now: sending a weight to another process moves it."""
        assert self.buffer is not None
        return self.buffer.untyped_storage().data_ptr()


@final
class _Home:
    """Where the bytes of one unit lie when they are on the device.

    Attributes:
        entry: the unit.
        number: of the unit.
        slot: a resident's own, or one that it shares.
        start: of its first byte in the slot.
        stop: behind its last byte.
        is_present: whether its bytes are there, or will be when `load` is done.
        version: of the unit's master when the copy was asked for.
        load: the last copy.
        has_arrived: whether that copy is known to be over.
        users: forwards that are using it now.
        freed: event behind its last use; None: copies are behind it already, it had none, or it
            is a resident's.
        tensors: by place; made at the first use.
        buffers: those of them that are no Parameters. Each has a count of writes of its own: a
            forward that counts its calls does not write to the weights that autograd has saved.
        frozen: for which mode of autograd, and which choice of what wants gradients, its tensors
            are.
        rivals: the other homes whose bytes this one's overwrite.
    """

    def __init__(self, entry: Stored, number: int, slot: _Slot, start: int) -> None:
        self.entry, self.number = entry, number
        self.slot, self.start, self.stop = slot, start, start + entry.unit.nbytes
        self.is_present = False
        self.version = 0
        self.load: Load | None = None
        self.has_arrived = False
        self.users = 0
        self.freed: Any = None
        self._route: Route | None = None
        self.tensors: list[Tensor] | None = None
        self.buffers: list[Tensor] = []
        self.frozen: tuple[bool, int] | None = None
        self.rivals: list[_Home] = []
        for other in slot.homes:
            if other.start < self.stop and self.start < other.stop:
                self.rivals.append(other)
                other.rivals.append(self)
        slot.homes.append(self)

    @property
    def is_fresh(self) -> bool:
        """Whether the unit's bytes, as they are now, are on the device, or on their way."""
        return self.is_present and self.version == self.entry.master.version

    @property
    def is_blocked(self) -> bool:
        """Whether a unit whose bytes it would overwrite is in use."""
        is_idle = self.slot.users == self.users  # mostly: it may have dozens of rivals
        return not is_idle and any(rival.users for rival in self.rivals)

    def route(self) -> Route:
        """Return the way from the unit's master to its bytes in the slot.

        Views share a count of writes. A copy to another unit in the slot must not look like a write
        to this one: autograd refuses a weight that changes while it is saved.
        """
        if self._route is None:
            assert self.slot.buffer is not None
            with torch.inference_mode(mode=False):
                target = self.slot.buffer[self.start : self.stop].data
                self._route = Route(self.entry.unit.name, self.entry.master, target)
        return self._route

    def flat(self) -> Tensor:
        """Return its bytes in the slot, 1-D uint8."""
        return self.route().target

    def forget(self) -> None:
        """Let go of all that holds the slot's memory."""
        for tensor in self.tensors or ():
            unmark_streamed(tensor)
        self._route = self.tensors = self.load = None
        self.buffers = []

    def go(self) -> None:
        """Leave the slot, which somebody else's home is in."""
        self.slot.homes.remove(self)
        for rival in self.rivals:
            rival.rivals.remove(self)
        self.rivals = []


@final
class Residency:
    """The device's buffers, as a plan lays them out.

    Every unit has one home, so that its device tensors are made once; where its place is in use by
    the unit that calls it, another one for as long as that takes.
    """

    def __init__(
        self,
        stored: Sequence[Stored],
        plan: StreamPlan,
        ops: DeviceOps,
        transfer: Transfer,
        note_peak: Callable[[], None],
    ) -> None:
        """Lay out the buffers; each is made at its first use, on the stream current then.

        Args:
            stored: by number; those that the plan does not know are residents.
            plan: says who shares which slot.
            ops: makes buffers.
            transfer: fills them.
            note_peak: called whenever a buffer was made.
        """
        self._note_peak = note_peak
        self._ops, self._transfer = ops, transfer
        self._ring = [_Slot(nbytes) for nbytes in plan.slot_bytes]
        self._homes: list[_Home] = []
        for number, entry in enumerate(stored):
            if number in plan.slot_of:
                slot, start = self._ring[plan.slot_of[number]], plan.offset_of[number]
            else:
                slot, start = _Slot(entry.unit.nbytes), 0
            self._homes.append(_Home(entry, number, slot, start))
        self._streamed = frozenset(plan.slot_of)
        self._held: dict[int, _Home] = {}
        self._left: set[_Slot] = set()
        self._under_way: list[tuple[int, Load]] = []
        self.copied_bytes = 0

    @property
    def device_bytes(self) -> int:
        """Bytes of the buffers that were made, and of those before them that are in use still."""
        slots = self._slots() | self._left
        return sum(slot.nbytes for slot in slots if slot.buffer is not None)

    def _slots(self) -> set[_Slot]:
        return {home.slot for home in self._homes}

    def used_bytes(self, numbers: Iterable[int]) -> int:
        """Return the bytes of the buffers that some units are using now."""
        used = {self._held[number].slot for number in numbers if number in self._held}
        return sum(slot.nbytes for slot in used)

    def inherit(self, old: Residency) -> None:
        """Take over those residents of another residency of the same units that stay residents.

        The other one is spent: its other buffers are let go, those in use as soon as they are not.
        """
        old.drain()
        for number, home in enumerate(old._homes):
            if number not in old._streamed and number not in self._streamed:
                old._finish(home)
                self._homes[number] = home
        self._held = old._held
        self._left = {home.slot for home in self._held.values()} - self._slots()
        self.copied_bytes = old.copied_bytes
        old.let_go(self._homes)

    def _finish(self, home: _Home) -> None:
        """Forget how a unit was copied, by a transfer that may not be the next residency's."""
        if home.load is not None:
            home.has_arrived = self._transfer.is_over(home.load)
            home.is_present = home.is_present and home.has_arrived
            home.load = None

    def let_go(self, kept: Iterable[_Home] = ()) -> None:
        """Let go of all buffers now, but those of some homes, and those in use.

        Homes and slots know each other: else their memory would wait for the garbage collector.
        """
        known = set(map(id, kept))
        for home in self._homes:
            if id(home) not in known and not home.slot.users:
                home.slot.buffer = None
                home.forget()
                home.go()

    def finished_copies(self) -> list[tuple[int, float]]:
        """Return bytes and seconds of the copies that were finished since the last call."""
        timed = [
            (n, load, self._transfer.seconds(load)) for n, load in self._under_way if not load.error
        ]
        self._under_way = [(n, load) for n, load, seconds in timed if seconds is None]
        return [(n, seconds) for n, _, seconds in timed if seconds is not None]

    def forget_unfinished(self) -> None:
        """Ask again for copies that failed, or are under way: whoever made them may be gone."""
        for home in self._homes:
            if home.load is not None and not self._transfer.is_over(home.load):
                home.is_present = False
                home.load = None

    def drain(self) -> None:
        """Wait until no copy is under way: before buffers are let go."""
        for home in self._homes:
            if home.load is not None:
                self._transfer.settle(home.load)

    def holds(self, number: int) -> bool:
        """Say whether a unit's bytes are on the device, or on their way."""
        return self._homes[number].is_fresh

    def has_arrived(self, number: int) -> bool:
        """Say whether nobody has to wait for the bytes of a unit that it `holds`."""
        home = self._homes[number]
        if not home.has_arrived and home.load is not None:
            home.has_arrived = self._transfer.is_over(home.load)
        return home.has_arrived

    def is_streamed(self, number: int) -> bool:
        """Say whether a unit's bytes may be overwritten after its use."""
        return number in self._streamed

    def acquire(self, number: int) -> list[Tensor]:
        """Return a unit's device tensors, by place; compute waits for their bytes.

        Raises:
            StreamError: its bytes could not be copied; or every slot is in use by units whose
                forward calls this one.
        """
        home = self._held.get(number) or self._homes[number]
        if home.is_blocked:
            home = self._spare(home)
        # Inside a transform of torch.func, too: its tensors have no memory to copy to.
        with torch._C._DisableFuncTorch():
            if not home.is_fresh:
                self._start(home)
            if not home.has_arrived:
                self._wait(home)
            home.users += 1
            home.slot.users += 1
            self._held[number] = home
            return self._tensors(home)

    def _wait(self, home: _Home) -> None:
        assert home.load
        try:
            self._transfer.wait(home.load)
        except BaseException:
            home.is_present = False  # asked for again at the next use
            self.forget_unfinished()
            raise

    def detached(self, number: int, result: Any) -> Any:
        """Return what a forward returned, with copies in place of views of a slot.

        A module may return its Parameter, or a part of it: the slot's next unit would overwrite it.
        """
        if number not in self._streamed:
            return result
        address = self._held[number].slot.address

        def own(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                is_view = value.layout == torch.strided and not value.is_meta
                is_view = is_view and storage_address(value) == address
                return value.clone() if is_view else value
            # What blocks return, before what may be nested: a tree costs ten times as much.
            if value is None:
                return None
            if type(value) is tuple:
                return tuple(map(own, value))
            return tree_map_only(torch.Tensor, own, value)

        return own(result)

    def flat(self, number: int) -> Tensor:
        """Return the bytes of a unit in use."""
        return self._held[number].flat()

    def versions(self, number: int) -> list[int]:
        """Return what tells of writes to a unit in use, as `Stored.keep_writes` takes it."""
        home = self._held[number]
        counts = [home.entry.count_merged(), home.flat()._version]
        if home.buffers:
            counts += [buffer._version for buffer in home.buffers]
        return counts

    def keep_writes(self, number: int, before: Sequence[int]) -> None:
        """Write to the master what a unit's forward has written since it had these versions."""
        home = self._held[number]
        entry = home.entry
        if not entry.keep_writes(before, self.versions(number)):
            return
        # Else the tensors would be copied anew, although they have the newest bytes.
        address = home.slot.address
        if all(t.untyped_storage().data_ptr() == address for t in home.tensors or ()):
            home.version = entry.master.version
        else:
            home.tensors = None  # one was given other memory: all are made, and copied, anew

    def release(self, number: int, freed: Any) -> None:
        """Say that a unit's forward is over, or has failed; nothing where it was not acquired.

        Args:
            number: of the unit.
            freed: event behind it; None where it is a resident, or none is needed.
        """
        if number not in self._held:
            return
        home = self._held[number]
        home.users -= 1
        home.slot.users -= 1
        if not home.users:
            home.freed = freed
            del self._held[number]
            if home.slot in self._left:
                self._leave(home.slot)
            elif home is not self._homes[number]:
                home.go()
                # Who comes into this slot next has to wait for this use, too.
                for other in home.slot.homes:
                    other.freed = home.freed

    def _leave(self, slot: _Slot) -> None:
        """Let go of a buffer that another residency made, unless it is in use still."""
        if not slot.users:
            self._left.remove(slot)
            slot.buffer = None
            for home in slot.homes:
                home.forget()

    def prefetch(self, upcoming: Iterable[int]) -> None:
        """Ask for copies of the units that come next, as far as slots are free.

        A place in a slot is free when its last user is done, and nothing that comes earlier is in
        it. None is while buffers from before are in use.
        """
        if self._left:
            return
        expected: set[_Home] = set()
        for number in upcoming:
            home = self._homes[number]
            if not home.is_fresh:
                if home.users or home.is_blocked or not expected.isdisjoint(home.rivals):
                    return
                with torch._C._DisableFuncTorch():
                    self._start(home)
            expected.add(home)

    def _start(self, home: _Home) -> None:
        entry, slot = home.entry, home.slot
        overwritten = (home, *home.rivals)
        freed = [each.freed for each in overwritten if each.freed is not None]
        is_new = slot.buffer is None
        if is_new:
            self._make_buffer(slot, entry)
        if is_new or home.number not in self._streamed:
            # Whoever had this memory before may be computing with it still, or who used this
            # resident last: such uses are not marked.
            freed.append(self._ops.mark_computed(is_timed=False))
            # A copy is a write to Parameters, which views of one buffer are; autograd may have
            # saved others.
            torch.autograd.graph.increment_version(home.buffers)
        # First: whatever is raised from here on, the old bytes count as overwritten.
        for each in overwritten:
            each.is_present = each.has_arrived = False
        home.version = entry.master.version
        home.load = self._transfer.start(home.route(), freed)
        # Copies are made in order: what this one waits for, no later one has to wait for.
        for each in overwritten:
            each.freed = None
        home.is_present = True
        if self._transfer.is_timed:
            self._under_way.append((entry.unit.nbytes, home.load))
        entry.copies += 1
        self.copied_bytes += entry.unit.nbytes

    def _make_buffer(self, slot: _Slot, entry: Stored) -> None:
        capacity_bytes = sum(each.nbytes for each in self._slots())
        if self._left and self.device_bytes + slot.nbytes > capacity_bytes:
            raise self._no_slot(entry)
        slot.buffer = self._ops.empty(slot.nbytes)
        self._note_peak()

    def _spare(self, wanted: _Home) -> _Home:
        """Return a home in a slot that nobody is using, for a unit whose own is in use."""
        entry = wanted.entry
        for slot in self._ring:
            if not slot.users and slot.nbytes >= entry.unit.nbytes:
                return _Home(entry, wanted.number, slot, 0)
        raise self._no_slot(entry)

    def _no_slot(self, entry: Stored) -> StreamError:
        users = ", ".join(
            repr(home.entry.unit.name)
            for number, home in self._held.items()
            if self.is_streamed(number)
        )
        return StreamError(
            f"{entry.unit.name!r} was called inside {users}, and there is no slot left for it: "
            "stream with a larger budget, or a larger depth",
            entry.unit.name,
            "waiting for a slot",
        )

    def _tensors(self, home: _Home) -> list[Tensor]:
        if home.tensors is None:
            with torch.inference_mode(mode=False), torch.no_grad():
                entry, flat = home.entry, home.flat()
                places = entry.unit.places
                home.tensors = [_like(place.original, place.view(flat)) for place in places]
                home.frozen = None
                pairs = zip(places, home.tensors, strict=True)
                home.buffers = [tensor for place, tensor in pairs if entry.is_buffer(place)]
        self._freeze(home, home.tensors)
        return home.tensors

    def _freeze(self, home: _Home, tensors: Sequence[Tensor]) -> None:
        """Freeze a unit's tensors while gradients are enabled, and only then.

        They would be given gradients that nobody sees. Without gradients they say what the
        originals say: `torch.matmul` chooses by that how it multiplies, and with it how it rounds.
        """
        entry = home.entry
        frozen = (torch.is_grad_enabled() and not entry.is_base, entry.master.flag_changes)
        if home.frozen == frozen:
            return
        with torch.inference_mode(mode=False):
            for place, tensor in zip(entry.unit.places, tensors, strict=True):
                # Not by `requires_grad_`, which transforms of torch.func refuse.
                tensor.requires_grad = place.original.requires_grad and not frozen[0]
        home.frozen = frozen


def _like(original: Tensor, view: Tensor) -> Tensor:
    """Return a Parameter, or a plain tensor, as the original is, that says whose it is."""
    if isinstance(original, nn.Parameter):
        view = nn.Parameter(view, requires_grad=False)
    else:
        view = view.data
    view.__dict__.update(original.__dict__)  # what others have hung there
    mark_streamed(view)
    return view
