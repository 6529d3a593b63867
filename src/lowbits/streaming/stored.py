"""A unit and its master: what modules hold while its bytes are away, and what was measured.

[Note: what modules hold]
Originals are the objects that the model had. While it is streamed nobody but a place holds them,
and their bytes are the master's. The base's modules hold the device's tensors from activation until
the model is parked; a unit's do so during its own forward. At all other times they hold stand-ins.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.errors import StreamError
from lowbits.streaming.proxy import StreamedTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lowbits.streaming.layout import Holder, Place, Unit
    from lowbits.streaming.masters import Master

#: Of tensors that are compared on the device, at once.
_PIECE_BYTES: Final = 16 << 20


@final
class Stored:
    """A unit whose bytes are in its master.

    Attributes:
        unit: what it is.
        is_base: whether it is what no unit of its model holds.
        master: its bytes for good.
        has_buffers: whether its forward may write into one of its tensors.
        compute_s: seconds of its forward, a running mean; 0 until it was called.
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
        self.copies = self.misses = 0
        self._outside = [
            StreamedTensor(place, master, device, self._count_miss) for place in unit.places
        ]
        # The unit's holders, for the loops that run at every use.
        self._spots = [
            (holder.module.__dict__, holder.kind, holder.name, number)
            for holder, number in unit.holders()
        ]
        self.has_buffers = any(not place.holders[0].is_parameter for place in unit.places)
        self._uses = 0
        # Originals at first: `hide` takes them away.
        self._held: Sequence[Tensor] = [place.original for place in unit.places]
        self._seen: list[Tensor | None] = []

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
        """Let modules hold the originals."""
        self.show([place.original for place in self.unit.places])

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
        """Hide for a moment, inside a use."""
        held = self._held
        self.hide()
        try:
            yield
        finally:
            self.show(held)

    def check(self, *, at_end: bool = False) -> None:
        """Accept what somebody has put in the place of what modules held.

        A tensor that is new is used as it is, once: ``torch.func.functional_call`` takes its away
        again. One that is still there at the next look, or is on another device, becomes the
        unit's.

        Args:
            at_end: accept new ones too, for there is no next look.

        Raises:
            StreamError: a tensor is gone, or of another shape or dtype.
        """
        if self._uses:
            return
        seen, self._seen = self._seen, []
        held = self._held
        for module, kind, name, number in self._spots:  # a third faster than `all`
            if module[kind].get(name) is not held[number]:
                break
        else:
            return
        for holder, number in self.unit.holders():
            found = holder.slots.get(holder.name)
            if found is self._held[number]:
                continue
            is_elsewhere = found is not None and found.device != self._outside[number].device
            if at_end or is_elsewhere or any(found is tensor for tensor in seen):
                self._take_over(number)
            else:
                self._require_alike(holder, found, self.unit.places[number])
                self._seen.append(found)

    def _take_over(self, number: int) -> None:
        """Accept a new tensor; all holders of a tied one must have been given the same values."""
        place = self.unit.places[number]
        found: list[Tensor] = []
        for holder in place.holders:
            value = holder.slots.get(holder.name)
            self._require_alike(holder, value, place)
            found.append(value)  # type: ignore[arg-type] # it is there, and alike
            if not _is_same(found[-1], found[0]):
                raise self._replaced(holder, "but not where it is tied to")
        first = found[0]
        self.master.write(place, first.detach())
        if self._held is not self._outside:
            self._held[number].detach().copy_(first.detach())  # a base's, which is on the device
        for holder in place.holders:
            holder.slots[holder.name] = self._held[number]
        if not isinstance(first, StreamedTensor):  # another unit's is not given away
            place.adopt(first)
            place.let_go()

    def _require_alike(self, holder: Holder, found: Tensor | None, place: Place) -> None:
        if found is None or found.shape != place.shape or found.dtype != place.dtype:
            raise self._replaced(holder, "by another shape or dtype")
        if found.is_meta:
            raise self._replaced(holder, "by one without bytes (on the meta device)")

    def _replaced(self, holder: Holder, how: str) -> StreamError:
        return StreamError(
            f"{holder.fqn} was replaced {how} while it was streamed: undo the streaming first "
            "(lowbits.restore, or LayerStreamer.detach)",
            self.unit.name,
            "replaced",
        )

    def keep_changes(self) -> bool:
        """Write to the master what was changed in the device's tensors; return whether any was.

        The base's are in the open: whoever merges an adapter writes into them; a unit's own forward
        may write into its buffers. They are compared where they lie, so that nothing unchanged is
        copied back.
        """
        has_changed = False
        for place, held in zip(self.unit.places, self._held, strict=True):
            is_buffer = not place.holders[0].is_parameter
            if self.is_base and held.requires_grad != place.original.requires_grad:
                place.original.requires_grad_(held.requires_grad)
            if isinstance(held, StreamedTensor) or not (self.is_base or is_buffer):
                continue
            if not _is_same(held, self.master.tensor(place)):
                self.master.write(place, held.detach())
                has_changed = True
        return has_changed

    @property
    def storages(self) -> set[int]:
        """Addresses of the device memory that modules hold now; none while they hold stand-ins."""
        held = (tensor for tensor in self._held if not isinstance(tensor, StreamedTensor))
        return {tensor.untyped_storage().data_ptr() for tensor in held}

    @property
    def wants_grad(self) -> bool:
        """Whether an original requires a gradient."""
        return any(place.original.requires_grad for place in self.unit.places)


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """Compare two tensors alike bit for bit, so that NaN equals itself, where the first one is.

    In pieces: what the other one takes there for a moment is in nobody's budget.
    """
    if tensor is other:
        return True
    pieces = zip(_bits(tensor), _bits(other), strict=True)
    return all(torch.equal(mine, theirs.to(mine.device)) for mine, theirs in pieces)


def _bits(tensor: Tensor) -> Sequence[Tensor]:
    """Return a tensor's bytes in pieces."""
    return torch.split(tensor.detach().contiguous().view(-1).view(torch.uint8), _PIECE_BYTES)
