"""A unit and its master: what modules hold while its bytes are away, and what was measured.

[Note: what modules hold]
Originals are the objects that the model had. While it is streamed nobody but a place holds them,
and their bytes are the master's. The base's modules hold the device's tensors from activation until
the model is parked; a unit's do so during its own forward. At all other times they hold stand-ins.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import nn
from torch.nn.utils import stateless

from lowbits.core.interception import is_streamed
from lowbits.core.memory import same_bits
from lowbits.core.proxy import owned
from lowbits.errors import StreamError
from lowbits.streaming.proxy import StreamedTensor
from lowbits.streaming.timing import running_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import FrameType

    from torch import Tensor

    from lowbits.streaming.layout import Holder, Place, Unit
    from lowbits.streaming.masters import Master

_FUNCTIONAL_CALL: Final = stateless._functional_call.__code__


@final
class Stored:
    """A unit whose bytes are in its master.

    Attributes:
        unit: what it is.
        is_base: whether it is what no unit of its model holds.
        master: its bytes for good.
        compute_s: seconds of its forward, a running mean; 0 until it was called. The first one
            counts until the second: kernels are loaded then, and the host is behind the device.
        stall_s: seconds that compute has waited for its bytes.
        copies: how often it was copied to the device.
        misses: how often its bytes were not on their way when they were needed.
    """

    def __init__(
        self, unit: Unit, master: Master, device: torch.device, *, is_base: bool = False
    ) -> None:
        """Make the stand-ins; nothing is changed.

        Args:
            unit: its bytes are in the master.
            master: kept.
            device: that the unit computes on.
            is_base: whether it is what no unit holds; else its tensors are frozen while in use.
        """
        self.is_base = is_base
        self.unit, self.master = unit, master
        self.compute_s = self.stall_s = 0.0
        self.copies = self.misses = self._timed_uses = 0
        self._device = device
        self._outside = list(map(self._stand_in, unit.places))
        # The unit's holders, for the loops that run at every use.
        self._spots = [
            (holder.module.__dict__, holder.kind, holder.name, number)
            for holder, number in unit.holders()
        ]
        # Buffers of theirs may be written without a count while they are in training.
        self._writers = {holder.module for holder, _ in unit.holders() if not holder.is_parameter}
        self.find_mergers()
        self._uses = 0
        # Originals at first: `hide` takes them away.
        self._held: Sequence[Tensor] = [place.original for place in unit.places]
        self._seen: list[Tensor | None] = []
        # What modules hold on the device, while stand-ins are in its place for a moment.
        self._aside: Sequence[Tensor] | None = None
        # What modules were left with that is no longer of its place's kind, by id.
        self._given: dict[int, Tensor] = {}
        self._copied: list[int] = []
        self._copied_version = -1

    @staticmethod
    def is_buffer(place: Place) -> bool:
        """Say whether a place is a buffer's, which a forward may write into."""
        return not place.holders[0].is_parameter

    def _stand_in(self, place: Place) -> StreamedTensor:
        return StreamedTensor(place, self.master, self._device, self._count_miss)

    def note_compute(self, seconds: float) -> None:
        """Note what its forward took."""
        self._timed_uses += 1
        is_first = self._timed_uses <= 2
        self.compute_s = seconds if is_first else running_mean(self.compute_s, seconds)

    def _count_miss(self) -> None:
        self.misses += 1

    def let_go(self) -> None:
        """Take the originals' bytes away: the master has them."""
        for place in self.unit.places:
            place.let_go()

    def take_back(self) -> None:
        """Give the originals their bytes back, where they were; modules do not hold them yet."""
        for place in self.unit.places:
            place.give_back(self.master.copy(place))

    def reveal(self) -> None:
        """Let modules hold the originals, though `hide` was interrupted."""
        originals = [place.original for place in self.unit.places]
        for module, kind, name, number in self._spots:
            slots = module[kind]
            if slots.get(name) is self._outside[number]:
                slots[name] = originals[number]
        self.show(originals)

    def retire(self) -> None:
        """Let stand-ins that others have kept raise from now on."""
        for proxy in self._outside:
            proxy.retire()

    @contextmanager
    def outlined(self) -> Iterator[None]:
        """Let modules hold tensors like the originals for a moment, but without bytes."""
        held = self._held
        self.show([place.outline() for place in self.unit.places])
        try:
            yield
        finally:
            self.show(held)

    def hide(self) -> None:
        """Let modules hold stand-ins."""
        self.show(self._outside)

    def show(self, tensors: Sequence[Tensor]) -> None:
        """Let modules hold some tensors, given by place: the device's, or stand-ins.

        What somebody else has put there stays there: see `check`.
        """
        held = self._held
        for module, kind, name, number in self._spots:
            slots = module[kind]
            if slots.get(name) is held[number]:
                slots[name] = tensors[number]
        self._held = tensors

    def begin_use(self, tensors: Sequence[Tensor]) -> None:
        """Show the device's tensors until `end_use`; a use may be inside another."""
        self._uses += 1
        if self._uses == 1:
            self.show(tensors)

    def end_use(self) -> None:
        """Hide them again, where no use is left."""
        self._uses -= 1
        if not self._uses:
            self.hide()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide for a moment, inside a use, or another such moment."""
        held, outer = self._held, self._aside
        if held is not self._outside:
            self._aside = held
        self.hide()
        try:
            yield
        finally:
            self.show(held)
            self._aside = outer

    def show_copy(self, tensors: Sequence[Tensor]) -> None:
        """Let a base's modules hold the device's tensors, which are as the master is now."""
        self.show(tensors)
        self._note_copied()

    def _note_copied(self) -> None:
        self._copied_version = self.master.version
        self._copied = list(map(self.master.version_of, self.unit.places))

    def refresh(self) -> None:
        """Copy to the device what was written to the master, by who kept a stand-in, or by savers.

        Nothing while modules hold stand-ins: the next copy has it.
        """
        if self._held is self._outside or self.master.version == self._copied_version:
            return
        for place, held, version in zip(self.unit.places, self._held, self._copied, strict=True):
            if self.master.version_of(place) != version:
                held.detach().copy_(self.master.tensor(place))
        self._note_copied()

    def check(self, *, at_end: bool = False) -> None:
        """Accept what somebody has put in the place of what modules held.

        A tensor that is new is used as it is, once. One that is still there at the next look, or is
        on another device, becomes the unit's. What ``torch.func.functional_call`` has put there is
        used as it is as long as that goes on: it takes it away again.

        Args:
            at_end: accept new ones too, for there is no next look.

        Raises:
            StreamError: a tensor is gone, or of another shape or dtype.
        """
        if self._uses:
            return
        held = self._held
        for module, kind, name, number in self._spots:  # a third faster than `all`
            if module[kind].get(name) is not held[number]:
                break
        else:
            self._seen = []
            return
        seen, self._seen = self._seen, []
        is_lent, taken = _is_functional_call(), list[int]()
        for holder, number in self.unit.holders():
            found = self._found(holder, number)
            if found is self._held[number]:
                continue
            is_elsewhere = found is not None and found.device != self._device
            is_kept = at_end or is_elsewhere or any(found is tensor for tensor in seen)
            if is_kept and not is_lent:
                taken.append(number)
            else:
                self._require_alike(holder, found, self.unit.places[number])
                self._seen += () if is_lent else (found,)
        self._take_over(taken)

    def _found(self, holder: Holder, number: int) -> Tensor | None:
        """Return what a module holds; what was its own and is put back is shown as it is now."""
        place, found = self.unit.places[number], holder.slots.get(holder.name)
        if self.is_base and found is self._held[number] and _is_other_kind(found, place):
            self._give_away(place, found)
            found = holder.slots.get(holder.name)
        if found is self._outside[number] or found is place.original:
            found = holder.slots[holder.name] = self._held[number]
        return found

    def _give_away(self, place: Place, held: Tensor) -> None:
        """Let a base's modules have for their own what somebody has made another tensor of.

        By ``.data``, which takes any shape and dtype; the streamer's tensor is as it was again.
        """
        with torch.inference_mode(mode=False):
            given, wants_grad = held.detach(), held.requires_grad
            for holder in place.holders:
                if holder.slots.get(holder.name) is held:
                    own = nn.Parameter(given, wants_grad) if holder.is_parameter else given
                    holder.slots[holder.name] = self._given[id(own)] = own
            held.data = self.master.tensor(place).to(self._device, copy=True)

    def accept_all(self) -> None:
        """Accept new tensors at the end.

        Where nobody can put back what was there, it stays as it is: what is gone, what was made
        another tensor of by ``.data``, and buffers of another shape, which forwards make.

        Raises:
            StreamError: a Parameter was replaced by one of another shape or dtype.
        """
        taken = []
        for number, place in enumerate(self.unit.places):
            found = [self._found(holder, number) for holder in place.holders]
            is_new = any(tensor is not self._held[number] for tensor in found)
            is_odd = any(_how_unlike(tensor, place, found[0]) for tensor in found)
            stays = self.is_buffer(place) or any(
                tensor is None or id(tensor) in self._given for tensor in found
            )
            if is_new and not (is_odd and stays) and not _is_functional_call():
                taken.append(number)
        self._take_over(taken)

    def _take_over(self, numbers: Iterable[int]) -> None:
        """Accept new tensors; all holders of a tied one must have been given the same values."""
        new = {number: self._alike(self.unit.places[number]) for number in numbers}
        # Weights may have changed places: all are read before one is written.
        values = {n: t.detach().clone() if is_streamed(t) else t.detach() for n, t in new.items()}
        for number, tensor in new.items():
            self._accept(number, tensor, values[number])

    def _alike(self, place: Place) -> Tensor:
        """Return what the holders of a place hold now."""
        found: list[Tensor] = []
        for holder in place.holders:
            value = holder.slots.get(holder.name)
            self._require_alike(holder, value, place, found[0] if found else None)
            found.append(value)  # type: ignore[arg-type] # it is there, and alike
        return found[0]

    def _accept(self, number: int, new: Tensor, values: Tensor) -> None:
        place = self.unit.places[number]
        before = self.master.copy(place)
        self.master.write(place, values)
        if not is_streamed(new):  # what is another place's is not given away
            # What was made where the model computes goes home with the rest.
            home = place.device if new.device == self._device else new.device
            place.adopt(owned(new), before, home)
        on_device = self._aside if self._held is self._outside else self._held
        if on_device is not None:
            on_device[number].detach().copy_(values)  # a base's
            self._copied[number] = self.master.version_of(place)  # not once more by `refresh`
        # Whoever kept the stand-in for the old values would have the new ones.
        self._outside[number].retire()
        self._outside[number] = self._stand_in(place)
        for holder in place.holders:
            holder.slots[holder.name] = self._held[number]

    def _require_alike(
        self, holder: Holder, found: Tensor | None, place: Place, tied: Tensor | None = None
    ) -> None:
        if how := _how_unlike(found, place, tied):
            raise StreamError(
                f"{holder.fqn} was replaced {how} while it was streamed: put back what was there, "
                "and undo the streaming first (lowbits.restore, or LayerStreamer.detach)",
                self.unit.name,
                "replaced",
            )

    def keep_changes(self) -> None:
        """Write to the master what others have changed in the base's tensors on the device.

        They are in the open: whoever merges an adapter writes into them.
        """
        self.refresh()
        for place, held in zip(self.unit.places, self._held, strict=True):
            if held.requires_grad != place.original.requires_grad:
                place.original.requires_grad_(held.requires_grad)
            self._keep(place, held)
        if self._held is not self._outside:
            self._note_copied()

    def buffer_versions(self) -> dict[int, int]:
        """Return how often each buffer that modules hold was written, by its place's offset."""
        pairs = zip(self.unit.places, self._held, strict=True)
        return {place.offset: held._version for place, held in pairs if self.is_buffer(place)}

    def find_mergers(self) -> None:
        """Look for layers of peft: they take what is merged out of a weight without a count."""
        modules = self.unit.module.modules()
        self._mergers: list[Any] = [each for each in modules if hasattr(each, "merged_adapters")]

    def count_merged(self) -> int:
        """Return how many adapters are merged into layers of the unit, as peft notes them."""
        return sum(len(layer.merged_adapters) for layer in self._mergers)

    def keep_writes(self, before: Sequence[int], after: Sequence[int]) -> bool:
        """Write to the master what a unit's forward has written; return whether it was anything.

        Torch counts most writes. Those by ``.data``, and those of `torch.batch_norm` to running
        statistics, it does not. They are made in training, where all buffers are looked at; and by
        peft, where a merged adapter is not to act any more, to weights.

        Args:
            before: `count_merged`, and how often its Parameters, and each buffer, were written.
            after: the same, after the forward.
        """
        is_training = any(module.training for module in self._writers)
        if after == before and not is_training:
            return False
        counts = zip(before, after, strict=True)
        is_merged, is_counted, *rest = [old != new for old, new in counts]
        buffers = iter(rest)
        has_changed = False
        for place, held in zip(self.unit.places, self._held, strict=True):
            is_buffer = self.is_buffer(place)
            is_written = next(buffers) if is_buffer else is_counted
            may_be_secret = is_merged
            if is_buffer:
                may_be_secret = any(holder.module.training for holder in place.holders)
            if is_written or may_be_secret:
                has_changed |= self._keep(place, held, is_counted=is_written)
        return has_changed

    def _keep(self, place: Place, held: Tensor, *, is_counted: bool = True) -> bool:
        """Compare where it lies, so that nothing unchanged is copied back.

        Raises:
            StreamError: it has been given another shape or dtype.
        """
        if isinstance(held, StreamedTensor):
            return False
        self._require_alike(place.holders[0], held, place)
        is_changed = not same_bits(held, self.master.tensor(place))
        if is_changed:
            self.master.write(place, held.detach(), is_counted=is_counted)
        return is_changed

    @property
    def storages(self) -> set[int]:
        """Addresses of the device memory that modules hold now; none while they hold stand-ins."""
        held = (tensor for tensor in self._held if not isinstance(tensor, StreamedTensor))
        return {tensor.untyped_storage().data_ptr() for tensor in held}

    @property
    def wants_grad(self) -> bool:
        """Whether an original requires a gradient."""
        return any(place.original.requires_grad for place in self.unit.places)


def _is_functional_call() -> bool:
    """Say whether this thread is inside ``torch.func.functional_call``, of any module."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _FUNCTIONAL_CALL:
            return True
        frame = frame.f_back
    return False


def _is_other_kind(found: Tensor, place: Place) -> bool:
    return found.shape != place.shape or found.dtype != place.dtype


def _how_unlike(found: Tensor | None, place: Place, tied: Tensor | None) -> str:
    """Say what keeps a tensor from being put at a place; nothing where it can be."""
    if found is None:
        return "by None"
    if _is_other_kind(found, place):
        return "by another shape or dtype"
    if found.is_meta:
        return "by one without bytes (on the meta device)"
    is_same = tied is None or found is tied or same_bits(found, tied)
    return "" if is_same else "but not where it is tied to"
