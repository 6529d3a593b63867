"""One model whose weights are streamed: its units, its base, and what came to it later."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from lowbits.core.memory import write_count
from lowbits.streaming.layout import Holder, ModelLayout, Unit, held_tensors, loose_bytes, relaid
from lowbits.streaming.proxy import StreamedTensor
from lowbits.streaming.stored import Stored

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lowbits.streaming.tiers import Tier


@final
class Component:
    """A model that is streamed.

    Attributes:
        root: the model.
        name: of the model in a pipeline, for messages; may be empty.
        tier: where its masters are.
        units: in the order in which they are registered.
        base: what no unit holds.
        is_ring_only: whether none of its units may stay on the device.
    """

    def __init__(
        self, name: str, root: nn.Module, layout: ModelLayout, tier: Tier, device: torch.device
    ) -> None:
        """Prepare; nothing is changed before `attach`."""
        self.name, self.root, self.tier = name, root, tier
        self.units: list[Stored] = []
        self.base: Stored
        self.is_ring_only = False
        self._device, self._layout = device, layout
        self._loose = [_Loose(holder, tensor) for holder, tensor in layout.loose]
        # Packed layers have markers without bytes, in hundreds, which never get any.
        self._sized = [loose for loose in self._loose if loose.tensor.numel()]
        self._extras: list[_Loose] = []
        self._is_settled = False
        self._tree = _Tree(root)

    @property
    def entries(self) -> tuple[Stored, ...]:
        """The units, then the base."""
        return (*self.units, self.base)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, without the padding between them."""
        places = (place for entry in self.entries for place in entry.unit.places)
        return sum(place.nbytes for place in places) + self.loose_bytes

    def is_cut_as(self, layout: ModelLayout) -> bool:
        """Say whether it is streamed in the units of a layout, with what came since in its place.

        Adapters that nobody trains stay on the device until the model is cut anew.
        """
        units = [(entry.unit.name, entry.unit.nbytes) for entry in self.units]
        fixed_bytes = self.base.unit.nbytes + self.loose_bytes
        is_like = units == [(unit.name, unit.nbytes) for unit in layout.units]
        return is_like and fixed_bytes == layout.fixed_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that masters take."""
        return sum(entry.master.host_bytes for entry in self.entries)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of those that are page-locked."""
        return sum(e.master.host_bytes for e in self.entries if e.master.is_pinned)

    @property
    def loose_bytes(self) -> int:
        """Bytes on the device that are neither a unit's nor the base's."""
        held = [loose.held() for loose in (*self._sized, *self._extras)]
        return loose_bytes(tensor for tensor in held if tensor is not None)

    def writes(self) -> list[int | None]:
        """Return how often each tensor was written that is neither a unit's nor the base's."""
        held = (loose.held() for loose in (*self._sized, *self._extras))
        return [None if tensor is None else write_count(tensor) for tensor in held]

    def attach(self) -> None:
        """Move all bytes into masters, and let modules hold stand-ins.

        Whatever is raised, the model is as it was. Needs one unit's bytes on top of the masters'.
        """
        done: list[Stored] = []
        try:
            for unit in (*self._layout.units, self._layout.base):
                done.append(self._stored(unit, is_base=unit is self._layout.base))
                done[-1].let_go()
            for loose in self._loose:
                loose.move(self._device)
            for entry in done:
                entry.hide()
        except BaseException:
            for entry in done:
                entry.take_back()
            for entry in done:
                entry.reveal()
                entry.retire()
            for loose in self._loose:
                loose.give_back()
            raise
        self.units, self.base = done[:-1], done[-1]
        del self._layout  # it knows adapters, which may go

    def _stored(self, unit: Unit, *, is_base: bool) -> Stored:
        return Stored(unit, self.tier.store(unit), self._device, is_base=is_base)

    def detach(self) -> None:
        """Give every original its bytes back, bit for bit, and modules their originals.

        Raises:
            FormatError: a file cannot be read any more; the model is streamed still.
        """
        done: list[Stored] = []
        self.notice_new()
        try:
            for entry in self.entries:
                entry.accept_all()
            for entry in self.entries:
                done.append(entry)
                entry.take_back()
        except BaseException:
            for entry in done:
                entry.let_go()
            raise
        for entry in self.entries:
            entry.reveal()
            entry.retire()
        for loose in self._loose:
            loose.give_back()
        homes = [place.device for entry in self.entries for place in entry.unit.places]
        for extra in self._extras if homes else ():
            extra.move(homes[0])

    def notice_new(self) -> None:
        """Move what was added to the model since the last look, and let go of what was taken away.

        A LoRA's factors stay on the device: they are small, and an optimizer may hold them.
        """
        if not self._tree.has_changed():
            return
        for entry in self.entries:
            entry.find_mergers()
        held = {
            (id(holder.module), holder.name): (holder, t) for holder, t in held_tensors(self.root)
        }
        for loose in self._loose:
            if loose.key not in held:
                loose.give_back()
        self._loose = [loose for loose in self._loose if loose.key in held]
        self._sized = [loose for loose in self._sized if loose.key in held]
        holders = [holder for entry in self.entries for holder, _ in entry.unit.holders()]
        known = {(id(holder.module), holder.name) for holder in holders}
        known |= {loose.key for loose in self._loose}
        lent = self.base.storages  # units hold stand-ins between two passes
        self._extras = [
            _Loose(holder, _owned(holder, tensor, lent))
            for key, (holder, tensor) in held.items()
            if key not in known
        ]
        for extra in self._extras:
            extra.move(self._device)

    def settle(self) -> None:
        """Bring to the host what is moved one by one, where all the rest is, until `unsettle`.

        While it is trained, what has bytes stays: a backward pass, and an optimizer, want it where
        it is.
        """
        self._is_settled = True
        for loose in (*self._loose, *self._extras):
            is_free = not (self.root.training and loose.tensor.numel())
            if is_free and loose.tensor.grad is None:
                loose.move_shown(torch.device("cpu"))

    def unsettle(self) -> None:
        """Bring it to the device again."""
        if self._is_settled:
            self._is_settled = False
            for loose in (*self._loose, *self._extras):
                loose.move_shown(self._device)

    def dtypes(self) -> set[torch.dtype]:
        """Return the dtypes of all tensors."""
        return {place.dtype for entry in self.entries for place in entry.unit.places} | {
            loose.tensor.dtype for loose in (*self._loose, *self._extras)
        }

    def cast(self, dtypes: Mapping[torch.dtype, torch.dtype], module: nn.Module) -> None:
        """Convert the tensors of a module, in their masters; units that change are laid out anew.

        The device holds nothing of the component while this runs.

        Args:
            dtypes: the new dtype for each old one.
            module: the root, or a part of it: other modules keep theirs.
        """
        parts = {id(part) for part in module.modules()}

        def is_cast(holder: Holder, dtype: torch.dtype) -> bool:
            return id(holder.module) in parts and dtypes.get(dtype, dtype) != dtype

        for number, entry in enumerate(self.entries):
            changed = [p for p in entry.unit.places if is_cast(p.holders[0], p.dtype)]
            if not changed:
                continue
            entry.check(at_end=True)
            entry.take_back()
            entry.reveal()
            for place in changed:
                place.cast(dtypes[place.dtype])
            unit = relaid(entry.unit)
            new = self._stored(unit, is_base=entry.is_base)
            new.let_go()
            new.hide()
            entry.retire()
            if number < len(self.units):
                self.units[number] = new
            else:
                self.base = new
        for loose in (*self._loose, *self._extras):
            if is_cast(loose.holder, loose.tensor.dtype):
                loose.cast(dtypes[loose.tensor.dtype])


def _owned(holder: Holder, tensor: Tensor, lent: set[int]) -> Tensor:
    """Return a new module's tensor, in memory of its own from now on.

    Who puts a module in another one's place may give it that one's tensors: stand-ins, or parts of
    a buffer that goes back. A LoRA of FLUX Control does so with the first layer's bias.
    """
    is_lent = isinstance(tensor, StreamedTensor)
    if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided:
        is_lent = tensor.untyped_storage().data_ptr() in lent
    if not is_lent:
        return tensor
    own: Tensor = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        own = nn.Parameter(own, requires_grad=tensor.requires_grad)
    holder.slots[holder.name] = own
    return own


@final
class _Loose:
    """A tensor that is moved by itself, and stays where it is moved to."""

    def __init__(self, holder: Holder, tensor: Tensor) -> None:
        self.holder, self.tensor, self._device = holder, tensor, tensor.device
        self._shown = tensor  # what the module was given: another one where that cannot be moved
        self.key = id(holder.module), holder.name

    def held(self) -> Tensor | None:
        """Return the tensor that the module has now."""
        return self.holder.slots.get(self.holder.name)

    def move(self, device: torch.device) -> None:
        """Move it; the object stays the same where torch can do that.

        What has no bytes fails where it is used: an adapter whose loading was interrupted.
        """
        if not self.tensor.is_meta:
            self._set(self.tensor.detach().to(device))

    def move_shown(self, device: torch.device) -> None:
        """Move what the module was given, and its gradient, unless it is somebody else's."""
        shown = self._shown
        if self.held() is not shown or shown.device == device or shown.is_meta:
            return
        grad, shown.grad = shown.grad, None
        self._set(shown.detach().to(device))
        self._shown.grad = None if grad is None else grad.to(device)

    def cast(self, dtype: torch.dtype) -> None:
        """Convert it; where it was replaced on its device, there too."""
        held = self.held()
        self.tensor.data = self.tensor.data.to(dtype)
        if held is None or held is self.tensor:
            return
        if held is self._shown:
            self._set(held.detach().to(dtype))
        else:
            held.data = held.data.to(dtype)  # somebody else's

    def give_back(self) -> None:
        """Move it back to where it was, or what somebody has put in its place since."""
        held = self.held()
        if held is None:
            return  # taken away since
        if held is self._shown or held.is_meta or isinstance(held, StreamedTensor):
            if self._shown is not self.tensor:
                self.tensor.data = self._shown.detach().to(self._device)
            self.holder.slots[self.holder.name] = self.tensor
        else:
            self.tensor = held
        self._shown = self.tensor
        if self.tensor.device != self._device:
            self._set(self.tensor.detach().to(self._device))

    @torch.inference_mode(mode=False)
    def _set(self, value: Tensor) -> None:
        if value.is_inference():
            value = value.clone()  # it outlives the caller's inference mode
        if torch._has_compatible_shallow_copy_type(self.tensor, value):
            self.tensor.data = value
            return
        if isinstance(self.tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=self.tensor.requires_grad)
        self.holder.slots[self.holder.name] = self._shown = value


@final
class _Tree:
    """Notices that modules, or tensors, were added to a model or taken away."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._look()

    def _look(self) -> None:
        modules = list(self._root.modules())
        children = [module._modules for module in modules]
        self._parents = [found for found in children if found]  # the others are counted
        self._counted: list[dict[str, Any]] = [*children]
        for module in modules:
            self._counted += (module._parameters, module._buffers)
        self._seen = self._now()

    def _now(self) -> tuple[list[nn.Module | None], list[int]]:
        """Return every module's children, and how many children and tensors each has."""
        children = chain.from_iterable(map(dict.values, self._parents))
        return list(children), list(map(len, self._counted))

    def has_changed(self) -> bool:
        """Say whether the model is another one than at the last call."""
        # Modules compare by identity, so that nearly all of it runs in C: the device waits for it
        # before every pass.
        is_same = self._now() == self._seen
        if not is_same:
            self._look()
        return not is_same
