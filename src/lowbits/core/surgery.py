"""The only place that changes modules, and the journal that takes every change back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast, final

import torch
from torch import nn

from lowbits.core.packed import Layout, PackedLayer, dequantized, marker_name, packed_class
from lowbits.core.source import MemorySource, NoSource, Source
from lowbits.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

LAYOUTS = "lowbits_layouts"


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


def packed_parameters(
    name: str,
    layout: Layout,
    tensors: Mapping[str, torch.Tensor],
    like: torch.Tensor,
    source: Source,
) -> PackedParameters:
    """Wrap stored tensors, and make the marker that stands for the weight.

    Args:
        name: of the weight in its layer.
        layout: of the weight.
        tensors: stored tensors by Parameter name; kept.
        like: gives the marker's dtype; its device is that of the tensors.
        source: the way back.
    """
    device = next(iter(tensors.values())).device
    with torch.inference_mode(mode=False):
        marker = torch.empty(0, dtype=like.dtype, device=device)
        frozen = {
            key: nn.Parameter(tensor, requires_grad=False)
            for key, tensor in {marker_name(name): marker, **tensors}.items()
        }
    return PackedParameters(layout, frozen, source)


@dataclass
class _Change:
    module: nn.Module
    base: type[nn.Module]
    order: tuple[str, ...]
    packed: dict[str, PackedParameters]
    markers: dict[str, tuple[torch.dtype, torch.device]] = field(default_factory=dict)


@final
class Journal:
    """What was done to which module object, in order.

    Entries name modules by object, not by dotted name: an adapter library may rename them. Owned by
    the handle; holding it keeps `MemorySource` originals alive.
    """

    def __init__(self) -> None:
        self._changes: list[_Change] = []

    def install(self, module: nn.Module, packed: Mapping[str, PackedParameters]) -> None:
        """Pack some weights of one module: sets its class, replaces the weights by packed ones.

        The entry is written before anything is changed, so that an interrupt between any two
        statements can be undone.
        """
        taken = {key for weight in packed.values() for key in weight.parameters}
        clash = taken & (
            module._parameters.keys() | module._buffers.keys() | module.__dict__.keys()
        )
        if clash:
            raise PatchError(f"{type(module).__name__} has a {min(clash)!r} of its own")
        parameters: dict[str, nn.Parameter | None] = {}
        for name, parameter in module._parameters.items():
            parameters.update(packed[name].parameters if name in packed else {name: parameter})
        change = _Change(module, type(module), tuple(module._parameters), dict(packed))
        for name, weight in packed.items():
            marker = weight.parameters[marker_name(name)]
            change.markers[name] = (marker.dtype, marker.device)
        self._changes.append(change)
        layouts = {name: weight.layout for name, weight in packed.items()}
        module.__dict__.update({"_parameters": parameters, LAYOUTS: layouts})
        module.__class__ = packed_class(change.base, tuple(packed))
        for weight in packed.values():
            weight.source.settle()

    def sources(self) -> Iterator[Source]:
        """Yield the source of each packed weight."""
        for change in self._changes:
            for weight in change.packed.values():
                yield weight.source

    def forget_originals(self) -> None:
        """Let go of the originals that are only kept in case the operation fails."""
        self._changes = [
            replace(
                change,
                packed={
                    name: replace(weight, source=NoSource())
                    if isinstance(weight.source, MemorySource)
                    else weight
                    for name, weight in change.packed.items()
                },
            )
            for change in self._changes
        ]

    def undo(self) -> None:
        """Take every change back, the last one first.

        Every source is verified before the first layer is touched. A file that fails after that
        leaves the layers that were not yet restored packed and working, and in the journal.

        Raises:
            SourceUnavailableError: naming the way out.
        """
        for source in {id(source): source for source in self.sources()}.values():
            source.verify()
        originals: dict[int, nn.Parameter] = {}
        while self._changes:
            _uninstall(self._changes[-1], originals)
            self._changes.pop()


def _uninstall(change: _Change, originals: dict[int, nn.Parameter]) -> None:
    module = change.module
    live = dict(module._parameters)
    if not isinstance(module, PackedLayer) and LAYOUTS not in module.__dict__:
        return  # interrupted before anything was changed
    restored: dict[str, nn.Parameter | None] = {}
    for name in change.order:
        if name not in change.packed:
            restored[name] = live.get(name)
            continue
        source = change.packed[name].source
        if id(source) not in originals:
            originals[id(source)] = source.parameter()
        marker = live.get(marker_name(name))
        restored[name] = _follow(originals[id(source)], marker, change.markers[name])
    stored = {key for weight in change.packed.values() for key in weight.parameters}
    added = {k: v for k, v in live.items() if k not in restored and k not in stored}
    module.__class__ = change.base
    module.__dict__["_parameters"] = {**restored, **added}
    module.__dict__.pop(LAYOUTS, None)


def _follow(
    parameter: nn.Parameter, marker: torch.Tensor | None, was: tuple[torch.dtype, torch.device]
) -> nn.Parameter:
    """Do to an original what the caller did to the model since: a cast, a move."""
    if marker is not None and (marker.dtype, marker.device) != was:
        dtype = marker.dtype if marker.dtype != was[0] else parameter.dtype
        device = marker.device if marker.device != was[1] else parameter.device
        parameter.data = parameter.data.to(device, dtype)
    return parameter


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


def _dense_parameters(
    layer: PackedLayer, dense: dict[int, nn.Parameter]
) -> dict[str, nn.Parameter | None]:
    """Return a layer's Parameters with its packed weights dequantized, in the original order."""
    parameters: dict[str, nn.Parameter | None] = {}
    stored = set()
    for layout in layer.lowbits_layouts.values():
        stored |= {f.parameter for f in layout.fields}
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
