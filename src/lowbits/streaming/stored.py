"""A unit and its master: what modules hold while its bytes are away, and what was measured.

[Note: what modules hold]
Originals are the objects that the model had. While it is streamed nobody but a place holds them,
and their bytes are the master's. The base's modules hold the device's tensors from activation until
the model is parked; a unit's do so during its own forward. At all other times they hold stand-ins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch

from lowbits.errors import StreamError
from lowbits.streaming.proxy import StreamedTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lowbits.streaming.layout import Holder, Unit
    from lowbits.streaming.masters import Master


@final
class Stored:
    """A unit whose bytes are in its master.

    Attributes:
        unit: what it is.
        master: its bytes for good.
        compute_s: seconds of its forward, a running mean; 0 until it was called.
        stall_s: seconds that compute has waited for its bytes.
        copies: how often it was copied to the device.
        misses: how often its bytes were not on their way when they were needed.
    """

    def __init__(self, unit: Unit, master: Master, device: torch.device) -> None:
        """Make the stand-ins; nothing is changed.

        Args:
            unit: its bytes are in the master.
            master: kept.
            device: that the unit computes on.
        """
        self.unit, self.master = unit, master
        self.compute_s = self.stall_s = 0.0
        self.copies = self.misses = 0
        self._outside = [
            StreamedTensor(place, master, device, self._count_miss) for place in unit.places
        ]
        self._holders = list(unit.holders())
        self._uses = 0
        self._held: Sequence[Tensor] = self._outside

    def _count_miss(self) -> None:
        self.misses += 1

    def let_go(self) -> None:
        """Take the originals' bytes away: the master has them."""
        for place in self.unit.places:
            place.let_go(self.master.remains(place))

    def take_back(self) -> None:
        """Give the originals their bytes back, where they were; modules do not hold them yet."""
        for place in self.unit.places:
            place.give_back(self.master.copy(place))

    def reveal(self) -> None:
        """Let modules hold the originals."""
        for holder, number in self._holders:
            holder.slots[holder.name] = self.unit.places[number].original

    def hide(self) -> None:
        """Let modules hold stand-ins."""
        self.show(self._outside)

    def show(self, tensors: Sequence[Tensor]) -> None:
        """Let modules hold some tensors, given by place: the device's, or stand-ins."""
        self._held = tensors
        for holder, number in self._holders:
            holder.slots[holder.name] = tensors[number]

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

    def check(self) -> None:
        """Accept what somebody has put in the place of what modules held since the last use.

        Raises:
            StreamError: it is gone, or of another shape or dtype.
        """
        if self._uses:
            return
        for holder, number in self._holders:
            if holder.slots.get(holder.name) is not self._held[number]:
                self._take_over(number)

    def _take_over(self, number: int) -> None:
        """Accept a new tensor; all holders of a tied one must have been given the same values."""
        place = self.unit.places[number]
        found: list[Tensor] = []
        for holder in place.holders:
            value = holder.slots.get(holder.name)
            if value is None or value.shape != place.shape or value.dtype != place.dtype:
                raise self._replaced(holder, "by another shape or dtype")
            found.append(value)
            if value is not found[0] and not torch.equal(_bits(value), _bits(found[0])):
                raise self._replaced(holder, "but not where it is tied to")
        first = found[0]
        self.master.write(place, first.detach())
        place.adopt(first)
        if self._held is not self._outside:
            self._held[number].copy_(first.detach())  # a base's, which is on the device
        place.let_go(self.master.remains(place))
        for holder in place.holders:
            holder.slots[holder.name] = self._held[number]

    def _replaced(self, holder: Holder, how: str) -> StreamError:
        return StreamError(
            f"{holder.fqn} was replaced {how} while it was streamed: undo the streaming first "
            "(lowbits.restore, or LayerStreamer.detach)",
            self.unit.name,
            "replaced",
        )

    def keep_changes(self) -> None:
        """Write to the master what others changed in the tensors that modules hold now.

        The base's are in the open: whoever merges an adapter writes into them. They are compared
        where they lie, so that nothing unchanged is copied back.
        """
        for number, place in enumerate(self.unit.places):
            holder = place.holders[0]
            held = holder.slots.get(holder.name)
            if held is None or held is self._outside[number]:
                continue
            if held.shape != place.shape or held.dtype != place.dtype:
                raise self._replaced(holder, "by another shape or dtype")
            before = self.master.tensor(place).to(held.device)
            if not torch.equal(_bits(held), _bits(before)):
                self.master.write(place, held.detach())


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, so that NaN equals itself."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
