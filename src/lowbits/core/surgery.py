"""The only place that changes modules, and the journal that takes every change back."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast, final

import torch
from torch import nn

from lowbits.core.foreign import drop_hooks
from lowbits.core.packed import (
    Layout,
    Layouts,
    PackedLayer,
    dequantized,
    marker_name,
    packed_class,
    storage_form,
    stored_names,
)
from lowbits.core.source import MemorySource, NoSource, PackedSource, Source
from lowbits.errors import PatchError, SourceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from lowbits.core.backend import Packed
    from lowbits.core.foreign import Foreign

LAYOUTS: Final = "lowbits_layouts"
_OWNER: Final = "_lowbits_owner"


@final
@dataclass(frozen=True)
class PackedParameters:
    """What takes a weight's place in a layer.

    Attributes:
        layout: how it is stored.
        parameters: the marker, then the stored tensors, by Parameter name. Tied layers share them.
        source: the way back.
    """

    layout: Layout
    parameters: Mapping[str, nn.Parameter]
    source: Source

    def renamed(self, old: str, new: str) -> PackedParameters:
        """Return the same Parameters for a layer that calls the tied weight by another name."""

        def name_of(key: str) -> str:
            return new + key.removeprefix(old)

        fields = tuple(replace(f, parameter=name_of(f.parameter)) for f in self.layout.fields)
        parameters = {name_of(key): value for key, value in self.parameters.items()}
        return PackedParameters(replace(self.layout, fields=fields), parameters, self.source)


def packed_parameters(
    name: str,
    layout: Layout,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    source: Source,
) -> PackedParameters:
    """Wrap stored tensors, and make the marker that stands for the weight.

    Args:
        name: of the weight in its layer.
        layout: of the weight.
        tensors: stored tensors by Parameter name; kept.
        dtype: of the marker; its device is that of the tensors.
        source: the way back.
    """
    device = next(iter(tensors.values())).device
    marker = torch.empty(0, dtype=dtype, device=device)
    frozen = {
        key: nn.Parameter(tensor, requires_grad=False)
        for key, tensor in {marker_name(name): marker, **tensors}.items()
    }
    return PackedParameters(layout, frozen, source)


@dataclass
class _Change:
    """What was done to one module; ``is_begun`` from just before the first statement on.

    `base` and `before` are what it was: packed itself, where weights are packed once more.
    """

    module: nn.Module
    fqn: str
    base: type[nn.Module]
    order: tuple[str, ...]
    packed: dict[str, PackedParameters]
    layouts: Layouts
    before: dict[str, Any]
    markers: dict[str, tuple[torch.dtype, torch.device]]
    is_begun: bool = False


@final
class Journal:
    """What was done to the modules of one component, in order.

    Entries hold modules themselves, not dotted names: an adapter library may rename those. Owned by
    the component's root; holding it keeps `MemorySource` originals alive.
    """

    def __init__(self) -> None:
        self._changes: list[_Change] = []
        self._places: dict[int, int] = {}

    def install(self, module: nn.Module, packed: Mapping[str, PackedParameters], fqn: str) -> None:
        """Pack some weights of one module: sets its class, replaces the weights by packed ones.

        The entry is written before anything is changed, so that an interrupt between any two
        statements can be undone.
        """
        parameters = _new_parameters(module, packed, fqn)
        before: dict[str, Any] = {}
        before |= {key: module.__dict__[key] for key in (LAYOUTS, _OWNER) if key in module.__dict__}
        layouts = Layouts(before.get(LAYOUTS, {}))
        if LAYOUTS in before:
            before[LAYOUTS].proxies.clear()  # they keep what the layer held
        layouts.update((name, weight.layout) for name, weight in packed.items())
        order = tuple(module._parameters)
        markers = {name: weight.parameters[marker_name(name)] for name, weight in packed.items()}
        places = {name: (marker.dtype, marker.device) for name, marker in markers.items()}
        change = _Change(module, fqn, type(module), order, dict(packed), layouts, before, places)
        self._changes.append(change)
        change.is_begun = True
        module.__dict__.update(
            {"_parameters": parameters, LAYOUTS: layouts, _OWNER: _Owner(weakref.ref(self))}
        )
        try:
            module.__class__ = _class_after(change)
        except TypeError as error:  # as of `class Layer(ABC, nn.Linear)`
            name = type(module).__name__
            raise PatchError(
                f"{fqn}: a {name} cannot become a packed layer: {error}; skip= leaves it alone"
            ) from error
        for weight in packed.values():
            weight.source.settle()

    def sources(self) -> Iterator[Source]:
        """Yield the source of each packed weight."""
        for change in self._changes:
            for weight in change.packed.values():
                yield weight.source

    def find(self, module: nn.Module) -> tuple[str, Source] | None:
        """Return the dotted name that a packed layer had, and the source of its weight.

        None where it is not in this journal. Tied layers share a source.
        """
        if len(self._places) != len(self._changes):
            self._places = {id(change.module): n for n, change in enumerate(self._changes)}
        number = self._places.get(id(module))
        if number is None or "weight" not in self._changes[number].packed:
            return None
        change = self._changes[number]
        return change.fqn, change.packed["weight"].source

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the packed modules with the names that they had."""
        for change in self._changes:
            yield change.fqn, change.module

    def forget_originals(self) -> None:
        """Let go of the originals that are only kept in case the operation fails."""
        self._changes = [
            replace(
                change,
                packed={
                    name: replace(weight, source=NoSource())
                    if isinstance(weight.source, (MemorySource, PackedSource))
                    else weight
                    for name, weight in change.packed.items()
                },
            )
            for change in self._changes
        ]

    def require_untouched(self) -> None:
        """Raise where others changed a layer so that its original would be wrong in it."""
        for change in self._changes:
            _require_untouched(change)

    def undo(self, originals: dict[int, Mapping[str, nn.Parameter]]) -> None:
        """Take every change back, the last one first.

        Args:
            originals: those of tied weights by their source, shared by all journals of a target.
        """
        while self._changes:
            if self._changes[-1].is_begun:
                _uninstall(self._changes[-1], originals)
            self._changes.pop()


@final
class _Owner:
    """What a packed layer knows of its journal; copies and pickles of the layer know of none."""

    def __init__(self, journal: weakref.ref[Journal] | None = None) -> None:
        self.journal = journal

    def __reduce__(self) -> tuple[type[_Owner], tuple[()]]:
        return _Owner, ()


def journal_of(module: nn.Module) -> Journal | None:
    """Return what holds the way back to what a packed layer was before, if anything does."""
    owner = module.__dict__.get(_OWNER)
    return owner.journal() if isinstance(owner, _Owner) and owner.journal else None


def _new_parameters(
    module: nn.Module, packed: Mapping[str, PackedParameters], fqn: str
) -> dict[str, nn.Parameter | None]:
    """Return a module's Parameters with packed weights in the places of those they stand for."""
    markers = {name: name for name in packed}
    gone: set[str] = set()
    if isinstance(module, PackedLayer):
        again = [name for name in packed if name in module.lowbits_layouts]
        markers |= {marker_name(name): name for name in again}
        gone = {key for name in again for key in stored_names(module, name)}
    taken = {key for weight in packed.values() for key in weight.parameters} - gone
    names = (module._parameters, module._buffers, module._modules, module.__dict__)
    clash = taken & {name for group in names for name in group}
    if clash:
        raise PatchError(f"{fqn} has a {min(clash)!r} of its own; leave it alone with skip=")
    parameters: dict[str, nn.Parameter | None] = {}
    for key, parameter in module._parameters.items():
        if key in markers:
            parameters.update(packed[markers[key]].parameters)
        elif key not in gone:
            parameters[key] = parameter
    return parameters


def _plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    return cls.lowbits_base if issubclass(cls, PackedLayer) else cls


def _class_after(change: _Change) -> type[nn.Module]:
    return packed_class(_plain_class(change.base), tuple(change.layouts))


def undo(journals: Sequence[Journal]) -> None:
    """Take back what some journals of one target hold: all of it is verified first.

    Raises:
        SourceUnavailableError: naming the way out.
        PatchError: somebody changed a packed layer in a way that cannot be kept.
    """
    verify_sources(journals)
    take_back(journals)


def verify_sources(journals: Sequence[Journal]) -> None:
    """Raise `SourceUnavailableError` where an original cannot be had; reads files, once each."""
    sources = (source for journal in journals for source in journal.sources())
    for source in {id(source): source for source in sources}.values():
        source.verify()


@torch.inference_mode(mode=False)
def take_back(journals: Sequence[Journal]) -> None:
    """Take back what some journals of one target hold, whose sources were verified.

    A file that fails after that leaves the layers that were not yet restored packed and working,
    and in their journals.

    Raises:
        PatchError: somebody changed a packed layer in a way that cannot be kept; nothing changes.
    """
    for journal in journals:
        journal.require_untouched()
    originals: dict[int, Mapping[str, nn.Parameter]] = {}
    for journal in reversed(journals):
        journal.undo(originals)


def _require_untouched(change: _Change) -> None:
    """Raise where others changed a layer so that its original would be wrong in it."""
    module = change.module
    layouts = module.__dict__.get(LAYOUTS)
    is_as_before = type(module) is change.base and layouts is change.before.get(LAYOUTS)
    is_dequantized = type(module) is _plain_class(change.base)
    if not change.is_begun or is_as_before or is_dequantized:
        return  # not packed yet, or dequantized since: the original is right
    if type(module) is not _class_after(change):
        raise PatchError(
            f"cannot restore {change.fqn}: it became a {type(module).__name__} while it was packed "
            "(torch.nn.utils.parametrize?); undo that first"
        )
    if layouts is not change.layouts:
        raise SourceUnavailableError(
            f"cannot restore {change.fqn}: other weights were loaded into it while it was packed, "
            "and the originals are not theirs; lowbits.dequantize(target) gives ordinary layers"
        )
    for name, (_, device) in change.markers.items():
        marker = module._parameters[marker_name(name)]
        if marker is not None and marker.is_meta and device.type != "meta":
            raise PatchError(
                f"cannot restore {change.fqn}: it is on the meta device (an offload hook keeps its "
                "weights elsewhere); remove the hook first"
            )


def _uninstall(change: _Change, originals: dict[int, Mapping[str, nn.Parameter]]) -> None:
    module = change.module
    live = dict(module._parameters)
    held: dict[str, nn.Parameter] = {}
    for name, weight in change.packed.items():
        source = weight.source
        if id(source) not in originals:
            originals[id(source)] = source.parameters()
        # Dequantized since, the layer has no marker: its weight says what the caller did.
        marker = live.get(marker_name(name), live.get(name))
        for suffix, original in originals[id(source)].items():
            held[name + suffix] = _follow(original, marker, change.markers[name])
    restored = {key: held.get(key, live.get(key)) for key in change.order}
    stored = {key for weight in change.packed.values() for key in weight.parameters}
    added = {k: v for k, v in live.items() if k not in restored and k not in stored}
    module.__class__ = change.base
    module.__dict__["_parameters"] = {**restored, **added}
    for key in (LAYOUTS, _OWNER):
        module.__dict__.pop(key, None)
    module.__dict__.update(change.before)


def _follow(
    parameter: nn.Parameter, marker: torch.Tensor | None, was: tuple[torch.dtype, torch.device]
) -> nn.Parameter:
    """Do to an original what the caller did to the model since: a cast, a move."""
    if marker is not None and (marker.dtype, marker.device) != was:
        is_cast = marker.dtype != was[0] and parameter.is_floating_point()
        dtype = marker.dtype if is_cast else parameter.dtype
        device = marker.device if marker.device != was[1] else parameter.device
        parameter.data = parameter.data.to(device, dtype)
    return parameter


@torch.no_grad()
@torch.inference_mode(mode=False)
def rewrite(layer: PackedLayer, parts: Sequence[Packed]) -> None:
    """Replace what a layer's weight is stored as, in the Parameters that hold it.

    They stay the same objects; what is streamed is written to where it is kept.

    Args:
        layer: whose weight is stored in the scheme of the parts.
        parts: its rows, in order; copied.
    """
    layout = layer.lowbits_layouts["weight"]
    stored = [storage_form("weight", part, layout.backend, layout.shape)[1] for part in parts]
    for field in layout.fields:
        held = cast("nn.Parameter", layer._parameters[field.parameter])
        pieces = [tensors[field.parameter] for tensors in stored]
        if type(held) is not nn.Parameter:
            held.data = _joined(pieces)  # a streamed one's stand-in hands it on
        elif len(pieces) == 1:
            held.copy_(pieces[0])
        else:
            assert len(held) == sum(len(piece) for piece in pieces)
            torch.cat(pieces, out=held)


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return parts as one tensor; a single one, which may be a scalar, as it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


@torch.no_grad()
@torch.inference_mode(mode=False)
def dequantize_layers(layers: Iterable[PackedLayer]) -> None:
    """Turn packed layers into ordinary ones with the weights as quantized, in place.

    All of them, or none: the packed weights are let go at the end. Tied weights stay tied.
    """
    done: list[tuple[nn.Module, type[nn.Module], dict[str, nn.Parameter | None], object]] = []
    dense: dict[int, nn.Parameter] = {}
    try:
        for layer in layers:
            parameters = _dense_parameters(layer, dense)
            module = cast("nn.Module", layer)
            done.append((module, type(module), module._parameters, layer.lowbits_layouts))
            module.__class__ = type(layer).lowbits_base
            module.__dict__["_parameters"] = parameters
            module.__dict__.pop(LAYOUTS)
    except BaseException:
        for module, cls, packed, layouts in reversed(done):
            module.__dict__.update({"_parameters": packed, LAYOUTS: layouts})
            module.__class__ = cls
        raise
    for module, *_ in done:
        module.__dict__.pop(_OWNER, None)


def _dense_parameters(
    layer: PackedLayer, dense: dict[int, nn.Parameter]
) -> dict[str, nn.Parameter | None]:
    """Return a layer's Parameters with its packed weights dequantized, in the original order."""
    parameters: dict[str, nn.Parameter | None] = {}
    stored = {key for name in layer.lowbits_layouts for key in stored_names(layer, name)}
    markers = {marker_name(name): name for name in layer.lowbits_layouts}
    for key, parameter in layer._parameters.items():
        if key in markers:
            tie = id(parameter)
            if tie not in dense:
                values = dequantized(layer, markers[key])
                dense[tie] = nn.Parameter(values, requires_grad=False)
            parameters[markers[key]] = dense[tie]
        elif key not in stored:
            parameters[key] = parameter
    return parameters


@final
@dataclass(frozen=True)
class Takeover:
    """What becomes of a layer that another library quantized.

    Attributes:
        module: the layer; where its class cannot be set, an object that takes its place.
        base: its class without the library.
        packed: its weights, by name.
        foreign: what else the library made of it.
        fqn: its dotted name.
        places: modules that are to hold the layer, and by what names, where it is another object.
    """

    module: nn.Module
    base: type[nn.Module]
    packed: Mapping[str, PackedParameters]
    foreign: Foreign | None
    fqn: str
    places: tuple[tuple[nn.Module, str], ...] = ()


@torch.no_grad()
@torch.inference_mode(mode=False)
def take_over(takeovers: Sequence[Takeover]) -> None:
    """Turn layers of other libraries into packed ones, in place: all of them, or none."""
    journal = Journal()
    moved: list[tuple[dict[str, nn.Module | None], str, nn.Module | None]] = []
    try:
        with all_or_none() as note:
            for takeover in takeovers:
                module = takeover.module
                note(module)
                module.__class__ = takeover.base
                if takeover.foreign:
                    _strip(module.__dict__, takeover.foreign)
                journal.install(module, takeover.packed, takeover.fqn)
            for takeover in takeovers:
                for parent, name in takeover.places:
                    moved.append((parent._modules, name, parent._modules[name]))
                    parent._modules[name] = takeover.module
    except BaseException:
        for modules, name, before in reversed(moved):
            modules[name] = before
        raise
    for takeover in takeovers:
        takeover.module.__dict__.pop(_OWNER, None)


@contextmanager
def all_or_none() -> Iterator[Callable[[nn.Module], None]]:
    """Give modules their classes and attributes back if what is done with them fails.

    Yields what has to be told of a module before it is changed. Unlike `undo`, it needs no sources.
    """
    noted: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    try:
        yield lambda module: noted.append((module, type(module), dict(module.__dict__)))
    except BaseException:
        for module, cls, state in reversed(noted):
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(state)
        raise


def _strip(state: dict[str, Any], foreign: Foreign) -> None:
    """Take what a library added out of a module's ``__dict__``; dictionaries in it are replaced."""
    held = {name: dict(state[name]) for name in ("_parameters", "_buffers")}
    state.update(held)
    for part in (state, *held.values()):
        for name in foreign.attributes:
            part.pop(name, None)
    drop_hooks(state, foreign.package)
