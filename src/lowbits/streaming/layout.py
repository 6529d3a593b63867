"""What is moved at once, and where each of its tensors lies in one flat run of bytes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, final

import torch
from torch import Tensor, nn

from lowbits.core.interception import mark_streamed, unmark_streamed
from lowbits.core.memory import held_bytes, is_dense
from lowbits.core.names import dotted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

#: Start of each tensor in a unit: what kernels read fastest, and as aligned as torch's own memory.
ALIGNMENT: Final = 256

#: Classes of tensors that are nothing but their bytes.
_PLAIN: Final = (Tensor, nn.Parameter, nn.Buffer)


@final
@dataclass(frozen=True)
class Holder:
    """Where a module keeps a tensor: in its Parameters, or in its buffers.

    Attributes:
        module: the module.
        name: of the tensor there.
        is_parameter: or a buffer.
        fqn: dotted name of the tensor in the model.
    """

    module: nn.Module
    name: str
    is_parameter: bool
    fqn: str

    @property
    def kind(self) -> str:
        """Name of the module's dictionary that it is in."""
        return "_parameters" if self.is_parameter else "_buffers"

    @property
    def slots(self) -> dict[str, Tensor | None]:
        """The module's own dictionary; another one after a packed layer was restored."""
        slots: dict[str, Tensor | None] = self.module.__dict__[self.kind]
        return slots


@final
@dataclass
class Place:
    """One tensor of a unit.

    Attributes:
        original: the object that the model had; given back at the end, the same object.
        device: it lay there.
        shape: of the tensor.
        stride: of the tensor, holes included: kernels may round differently in other strides.
        dtype: of the tensor.
        offset: of its first byte in the unit, a multiple of `ALIGNMENT`.
        holders: the modules that hold it; tied weights have several.
        is_inference: whether the original was made in torch's inference mode.
    """

    original: Tensor
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    holders: list[Holder]
    is_inference: bool

    def give_back(self, values: Tensor) -> None:
        """Give the original its bytes: the same object, device and strides as before.

        Args:
            values: of the tensor; kept.
        """
        unmark_streamed(self.original)
        values = values.to(self.device)
        # An inference tensor stays one: others have a version that it must not have.
        with torch.inference_mode(self.is_inference):
            self.original.data = values.clone() if self.is_inference else values

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the original, which has its bytes, to another dtype."""
        with torch.inference_mode(self.is_inference):
            self.original.data = self.original.data.to(dtype)

    def let_go(self) -> None:
        """Take the original's bytes away, for others have them.

        What is left takes no memory: whoever kept the object reads NaN, and cannot write into it. A
        graph that has saved it raises, as where it was written.
        """
        with torch.inference_mode(self.is_inference):
            poison = torch.full((self.dtype.itemsize,), 0xFF, dtype=torch.uint8, device="cpu")
            self.original.data = poison.view(self.dtype)[0].expand(self.shape)
        if not self.is_inference:
            torch.autograd.graph.increment_version(self.original)
        mark_streamed(self.original)  # another model may hold it, too

    def outline(self) -> Tensor:
        """Return a tensor on the meta device that is laid out as the original was."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        if isinstance(self.original, nn.Parameter):
            return nn.Parameter(made, requires_grad=self.original.requires_grad)
        return made

    def adopt(self, tensor: Tensor, before: Tensor, device: torch.device) -> None:
        """Take another tensor of this shape and dtype for the original; its bytes are let go.

        Args:
            tensor: becomes the original.
            before: values of the one so far, which somebody may hold, and put in again; kept.
            device: that it will lie on.
        """
        self.device = before.device
        self.give_back(before)
        self.original, self.device = tensor, device
        self.is_inference = tensor.is_inference()
        self.let_go()

    @property
    def nbytes(self) -> int:
        """Bytes from its first element to its last one, without padding."""
        return _span(self.shape, self.stride) * self.dtype.itemsize

    def bytes_in(self, flat: Tensor) -> Tensor:
        """Return the bytes at this place of a unit's; shares their memory."""
        return flat[self.offset : self.offset + self.nbytes]

    def view(self, flat: Tensor) -> Tensor:
        """Return the tensor that lies at this place of a unit's bytes; shares their memory."""
        return self.tensor_of(self.bytes_in(flat))

    def tensor_of(self, run: Tensor) -> Tensor:
        """Return the tensor that some bytes are; shares their memory."""
        return run.view(self.dtype).as_strided(self.shape, self.stride)

    def write(self, run: Tensor, values: Tensor) -> None:
        """Write values to the bytes of the tensor: expanded ones, which share memory, once."""
        parts = tuple(slice(0, 1) if step == 0 else slice(None) for step in self.stride)
        self.tensor_of(run)[parts].copy_(values[parts])

    def run_of(self, values: Tensor) -> Tensor:
        """Return the bytes of values on the CPU, as they lie at this place; may share memory."""
        values = values.resolve_conj().resolve_neg()  # marks on a view, which bytes do not have
        if values.stride() == self.stride and is_dense(values):
            return values.as_strided((values.numel(),), (1,)).cpu().view(torch.uint8)
        run = torch.zeros(self.nbytes, dtype=torch.uint8, device="cpu")
        self.write(run, values)
        return run


@final
@dataclass(eq=False)
class Unit:
    """What is moved at once: one block, a part of a block, or what is left of the model.

    Attributes:
        name: dotted name of its module.
        module: is called to use the unit.
        places: its tensors, in the order of their modules.
        nbytes: of all places, padding included.
    """

    name: str
    module: nn.Module
    places: list[Place] = field(default_factory=list)
    nbytes: int = 0

    def place_at(self, offset: int) -> Place:
        """Return the place that a byte of the unit belongs to."""
        return next(p for p in self.places if p.offset <= offset < p.offset + p.nbytes)

    def holders(self) -> Iterator[tuple[Holder, int]]:
        """Yield each holder, and the number of its place."""
        for number, place in enumerate(self.places):
            for holder in place.holders:
                yield holder, number


@final
@dataclass(frozen=True)
class ModelLayout:
    """A model as units, and the base: what belongs to no unit and stays on the device.

    Attributes:
        units: in the order in which their modules are registered.
        base: all other tensors that are nothing but their bytes.
        loose: what is moved one by one, and never streamed: markers of packed layers, which have no
            bytes, adapters that are trained, and tensors of other libraries' classes.
    """

    units: tuple[Unit, ...]
    base: Unit
    loose: tuple[tuple[Holder, Tensor], ...]

    @property
    def fixed_bytes(self) -> int:
        """Bytes that stay on the device."""
        return self.base.nbytes + loose_bytes(tensor for _, tensor in self.loose)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, padding included."""
        return self.fixed_bytes + sum(unit.nbytes for unit in self.units)


def lay_out_units(root: nn.Module, units: Sequence[Unit]) -> ModelLayout:
    """Give every tensor of a model to the one unit that holds it, or to the base.

    Args:
        root: the model; not changed.
        units: without places; kept, but for those that nothing belongs to.
    """
    base = Unit("", root)
    owners: dict[int, Unit] = {}
    for unit in units:
        for module in unit.module.modules():
            # What two units hold is shared: it belongs to neither.
            owners[id(module)] = base if id(module) in owners else unit
    holders: dict[int, list[Holder]] = defaultdict(list)
    tensors: dict[int, Tensor] = {}
    loose = []
    adapters = _adapters(root)
    for holder, tensor in held_tensors(root):
        if _is_loose(tensor, adapters):
            loose.append((holder, tensor))
            continue
        tensors[id(tensor)] = tensor
        holders[id(tensor)].append(holder)
    for key, tensor in tensors.items():
        homes = {id(home): home for home in (owners.get(id(h.module), base) for h in holders[key])}
        _append(homes.popitem()[1] if len(homes) == 1 else base, tensor, holders[key])
    return ModelLayout(tuple(unit for unit in units if unit.places), base, tuple(loose))


def kept_bytes(root: nn.Module) -> int:
    """Return what a model keeps on the device for good, while others are called too."""
    adapters = _adapters(root)
    return loose_bytes(tensor for _, tensor in held_tensors(root) if _is_loose(tensor, adapters))


def loose_bytes(tensors: Iterable[Tensor]) -> int:
    """Return what tensors of any kind take, tied ones once."""
    return sum({id(tensor): held_bytes(tensor) for tensor in tensors}.values())


def relaid(unit: Unit) -> Unit:
    """Return a unit laid out anew, for originals whose dtype has changed."""
    new = Unit(unit.name, unit.module)
    for place in unit.places:
        _append(new, place.original, place.holders)
    return new


def held_tensors(root: nn.Module) -> Iterator[tuple[Holder, Tensor]]:
    """Yield every Parameter and buffer of a model with each module that holds it."""
    for path, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield Holder(module, name, True, dotted(path, name)), parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield Holder(module, name, False, dotted(path, name)), buffer


def _span(shape: torch.Size, stride: tuple[int, ...]) -> int:
    """Return the elements from a tensor's first one to its last one, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def padded(nbytes: int) -> int:
    """Round up to `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _adapters(root: nn.Module) -> set[int]:
    """Return the Parameters that are trained in a model that is frozen for the larger part.

    An optimizer holds them, so they stay on the device, and stay the same objects. What is trained
    in larger part is a model that somebody froze in part, or that was restored since peft did.
    """
    parameters = [p for p in root.parameters() if p.numel()]
    floating = [p for p in parameters if p.is_floating_point()]
    trained = [p for p in floating if p.requires_grad]
    is_small = 2 * sum(p.nbytes for p in trained) < sum(p.nbytes for p in parameters)
    return {id(p) for p in trained} if is_small and len(trained) < len(floating) else set()


def _is_loose(tensor: Tensor, adapters: set[int]) -> bool:
    return not tensor.numel() or not is_plain(tensor) or id(tensor) in adapters


def is_plain(tensor: Tensor) -> bool:
    """Say whether a tensor is nothing but its bytes."""
    is_strided = tensor.layout == torch.strided and not tensor.is_quantized
    return is_strided and type(tensor) in _PLAIN


def _append(unit: Unit, tensor: Tensor, holders: list[Holder]) -> None:
    place = Place(
        original=tensor,
        device=tensor.device,
        shape=tensor.shape,
        stride=tensor.stride(),
        dtype=tensor.dtype,
        offset=unit.nbytes,
        holders=holders,
        is_inference=tensor.is_inference(),
    )
    unit.places.append(place)
    unit.nbytes += padded(place.nbytes)
