"""Layers that other libraries quantized become packed ones: the same codes, the same objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import nn

from lowbits.core.foreign import can_become, class_without, is_of
from lowbits.core.packed import PackedLayer, storage_form
from lowbits.core.report import LayerReport, Report
from lowbits.core.select import Component, Decision, Selection, select
from lowbits.core.source import NoSource
from lowbits.core.surgery import PackedParameters, Takeover, packed_parameters, take_over
from lowbits.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lowbits.core.backend import Packed, QuantBackend
    from lowbits.core.foreign import Foreign
    from lowbits.core.registry import BackendRegistry

#: What stands on a layer whose forward somebody else replaced: it calls the library's.
_FORWARDS = ("forward", "_old_forward")


@final
@dataclass(frozen=True)
class Adoption:
    """What was found, and done.

    Attributes:
        report: of every parameter and buffer.
        components: names of those that hold layers that were taken over; whether these are all
            that a library quantized in it.
    """

    report: Report
    components: Mapping[str, bool]


@torch.no_grad()
@torch.inference_mode(mode=False)
def adopt_layers(modules: Mapping[str, nn.Module], registry: BackendRegistry) -> Adoption:
    """Turn layers that other libraries quantized into packed ones, in place: all that can, or none.

    Nothing is quantized again, and where a scheme is stored as the library stores it, nothing is
    copied. What cannot be taken over stays as it is, with the reason in the report. Layers stay the
    same objects, but where Python cannot set their class (quanto's): there a new one takes the
    layer's place in all modules of the target, with its hooks.

    Args:
        modules: components by name.
        registry: of the backends that are asked.
    """
    adopter = _Adopter(modules, registry)
    for name, module in modules.items():
        for fqn, layer in module.named_modules():
            adopter.consider(name, fqn, layer)
    takeovers = {id(takeover.module): takeover for takeover in adopter.takeovers}
    take_over(adopter.takeovers)
    for takeover in adopter.takeovers:
        _match_bias(takeover.module)
    components = {
        name: not any(id(part) in adopter.reasons for part in module.modules())
        for name, module in modules.items()
        if any(id(part) in takeovers for part in module.modules())
    }
    return Adoption(_report(modules, takeovers, adopter), components)


@final
class _Adopter:
    """Decides what becomes of each layer; changes none."""

    def __init__(self, modules: Mapping[str, nn.Module], registry: BackendRegistry) -> None:
        self._modules, self.registry = modules, registry
        self._seen: set[int] = set()
        self._parameters: dict[int, PackedParameters] = {}
        self.takeovers: list[Takeover] = []
        #: Why layers of a library's stay as they are, by their identity.
        self.reasons: dict[int, str] = {}
        #: What else becomes of those that are taken over.
        self.remarks: dict[int, str] = {}

    def consider(self, component: str, fqn: str, layer: nn.Module) -> None:
        """Look at one layer."""
        if id(layer) in self._seen or isinstance(layer, PackedLayer):
            return
        self._seen.add(id(layer))
        try:
            found = _found(layer, self.registry)
            if found is not None:
                self.takeovers.append(self._takeover(component, fqn, layer, *found))
        except FormatError as error:
            self.reasons[id(layer)] = str(error)

    def _takeover(
        self, component: str, fqn: str, layer: nn.Module, backend: QuantBackend, packed: Packed
    ) -> Takeover:
        _require_changeable(layer, backend)
        foreign = backend.foreign
        base = class_without(layer, foreign.package) if foreign else type(layer)
        module = layer
        places: tuple[tuple[nn.Module, str], ...] = ()
        if not can_become(type(layer), base):
            if not fqn:
                raise FormatError(f"a {type(layer).__name__} can only be taken over in a module")
            module, places = object.__new__(base), tuple(self._places(layer))
            module.__dict__.update(layer.__dict__)
        weights = {"weight": self._packed(layer, packed, foreign, self._modules[component])}
        is_dynamic = packed.scheme.endswith("-dynamic")
        if foreign and foreign.quantizes_inputs(layer) and not is_dynamic:
            self.remarks[id(module)] = "; inputs are not quantized any more: no scheme does it so"
        return Takeover(module, base, weights, foreign, fqn, places)

    def _places(self, layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        parents = {id(part): part for root in self._modules.values() for part in root.modules()}
        for parent in parents.values():
            yield from ((parent, name) for name, part in parent._modules.items() if part is layer)

    def _packed(
        self, layer: nn.Module, packed: Packed, foreign: Foreign | None, component: nn.Module
    ) -> PackedParameters:
        """Return what takes a weight's place; tied weights stay tied."""
        weight = layer._parameters["weight"]
        assert weight is not None
        if id(weight) not in self._parameters:
            backend, _ = self.registry.find(packed.scheme)
            assert backend is not None
            layout, tensors = storage_form("weight", packed, backend, _shape(layer, packed))
            dtype = foreign.dtype_of(layer) if foreign else None
            dtype = dtype or _dtype(weight, layout.shape, layer, component)
            made = packed_parameters("weight", layout, tensors, dtype, NoSource())
            self._parameters[id(weight)] = made
        return self._parameters[id(weight)]


def _found(layer: nn.Module, registry: BackendRegistry) -> tuple[QuantBackend, Packed] | None:
    for backend in registry.all().values():
        packed = backend.adopt(layer)
        if packed is not None:
            return backend, packed
    return None


def _require_changeable(layer: nn.Module, backend: QuantBackend) -> None:
    """Raise `FormatError` where a layer's class or forward cannot be changed."""
    package = backend.foreign.package if backend.foreign else ""
    if not package or not is_of(layer, package):
        return
    if not f"{type(layer).__module__}.".startswith(f"{package}."):
        raise FormatError(f"its class {type(layer).__name__} inherits from one of {package}")
    if any(name in layer.__dict__ for name in _FORWARDS):
        raise FormatError("somebody wraps its forward (accelerate?): remove that hook first")


def _shape(layer: nn.Module, packed: Packed) -> torch.Size:
    """Return the weight's shape as its layer sees it; a library may hold flat bytes instead."""
    if isinstance(layer, nn.Conv2d):
        channels = layer.in_channels // layer.groups
        return torch.Size((layer.out_channels, channels, *layer.kernel_size))
    return torch.Size(packed.shape)


def _dtype(
    weight: nn.Parameter, shape: torch.Size, layer: nn.Module, component: nn.Module
) -> torch.dtype:
    """Return the dtype that a weight seems to have had: its tensor's, or that of what is beside."""
    # Of another shape, it is bytes, whatever they are said to be.
    own = (weight if weight.shape == shape else None, layer._parameters.get("bias"))
    for tensor in (*own, *component.parameters(), *component.buffers()):
        if tensor is not None and tensor.is_floating_point() and tensor.element_size() > 1:
            return tensor.dtype
    return torch.bfloat16


def _match_bias(layer: nn.Module) -> None:
    """Give a bias its weight's dtype: bitsandbytes casts it to what it computes in, in a pass."""
    weight, bias = layer.weight, layer._parameters.get("bias")
    assert isinstance(weight, torch.Tensor)
    if bias is not None and bias.dtype != weight.dtype:
        bias.data = bias.data.to(weight.dtype)


def _report(
    modules: Mapping[str, nn.Module], takeovers: Mapping[int, Takeover], adopter: _Adopter
) -> Report:
    components = [Component(name, module, None) for name, module in modules.items()]
    decisions = select(components, Selection({}, (), adopter.registry, sees_packed=True))
    layers, counted = [], set()
    for decision in decisions:
        is_again = decision.tie in counted
        counted.add(decision.tie)
        key = id(decision.module)
        reason = adopter.reasons.get(key, "") if decision.name == "weight" else ""
        takeover = takeovers.get(key) if decision.is_packed else None
        if takeover and takeover.foreign:
            remark = adopter.remarks.get(key, "")
            reason = f"as {takeover.foreign.package} quantized it{remark}"
        reason = f"tied; {reason}".strip("; ") if is_again else reason or decision.reason
        layers.append(_row(decision, reason, "none" if takeover else "-", is_again=is_again))
    return Report(tuple(layers))


def _row(decision: Decision, reason: str, source: str, *, is_again: bool) -> LayerReport:
    numel, nbytes = decision.shape.numel(), decision.nbytes
    return LayerReport(
        fqn=decision.fqn,
        component=decision.component,
        kind=decision.kind,
        shape=tuple(decision.shape),
        scheme=decision.stored_as if decision.is_packed else "native",
        bytes_before=0 if is_again else decision.full_bytes,
        bytes_after=0 if is_again else nbytes,
        bits_per_weight=nbytes * 8 / numel if numel else 0.0,
        source=source,
        reason=reason,
    )
