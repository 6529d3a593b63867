"""peft's layers around packed ones: what acts on them, and what that adds to their weights.

The only file that knows peft. It never imports it: an adapter can only exist where somebody else
did.

[Note: adapters]
peft wraps a packed layer as any other and computes ``base(x) + scale * up(down(x))``: the side
branch needs nothing from here. What peft cannot do is merge, for it adds to ``weight.data``, and a
packed weight has none. So `AdapterLayer` comes before peft's own class of every layer that wraps a
packed one: its `merge`, which `fuse_lora`, `merge_adapter` and `merge_and_unload` all call, writes
the codes of W + what the adapter adds, quantized from W.

What such a layer computes is always what peft's adapters say now. A merged one whose strength
changes computes the difference beside the codes until it is merged again; one that is switched off,
or deleted, is taken out of the codes at once.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import nn

from lowbits.core.capability import compute_dtype
from lowbits.core.interception import reduced
from lowbits.core.memory import write_count
from lowbits.core.names import WRAPPED
from lowbits.errors import PatchError, SourceUnavailableError
from lowbits.lora.merge import Decomposed, Delta, Dense, LowRank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lowbits.integrations.adapters import Adapters

#: Where peft's layers keep their `State`.
KEY: Final = "_lowbits_adapter"

NO_HANDLE: Final = (
    "this packed layer has no handle that knows its originals (it was loaded, is a copy, or was "
    "released): a LoRA cannot be merged into it, or taken out, but acts beside it (lora='fp16'). "
    "lowbits.dequantize(target) first makes ordinary layers, which peft merges into"
)

#: Strengths by adapter.
Scales = dict[str, float]


@final
class State:
    """What is in the codes of a wrapped layer; copies and pickles of it have nothing.

    Attributes:
        inside: adapters that were merged before the layer was packed, and are in its source.
        merged: adapters that are in the codes.
        asked: those of `merged` that were merged on request: they stay where peft lets go of them.
        deltas: what those of `merged` that are not `inside` add to the source, by name.
        baked: what adapters add that peft has let go of, after they were merged.
        is_dirty: whether writing the codes was begun and not finished.
        factors: tensors of what was merged: who holds each, by which name, and its count of writes.
    """

    def __init__(self, adapters: Adapters | None = None, inside: Scales | None = None) -> None:
        self.adapters = weakref.ref(adapters) if adapters is not None else lambda: None
        self.inside, self.merged = dict(inside or {}), dict(inside or {})
        self.asked = frozenset(self.inside)
        self.deltas: dict[str, Delta] = {}
        self.baked: tuple[Delta, ...] = ()
        self.is_dirty = False
        self.factors: list[tuple[dict[str, Any], str, Tensor, int | None]] = []

    def holds(self, scales: Scales) -> bool:
        """Say whether just that is in the codes, with the factors that adapters have now."""
        is_there = scales == self.merged and not self.is_dirty
        return is_there and all(
            slots.get(name) is tensor and write_count(tensor) == version
            for slots, name, tensor, version in self.factors
        )

    @property
    def has_unasked(self) -> bool:
        """Whether something was merged that nobody has asked for."""
        return not self.asked.issuperset(self.merged)

    @property
    def kept(self) -> Scales:
        """What was merged on request, with the strengths that it has."""
        return {name: scale for name, scale in self.merged.items() if name in self.asked}

    @property
    def lasting(self) -> tuple[Delta, ...]:
        """What stays in the codes where peft lets go of all adapters."""
        return *self.baked, *(delta for name, delta in self.deltas.items() if name in self.asked)

    def __reduce__(self) -> tuple[type[State], tuple[()]]:
        return State, ()


class AdapterLayer(nn.Module):
    """A mix-in in front of peft's class of a layer that wraps a packed one; see above."""

    merged_adapters: list[str]
    scaling: Scales

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the adapters say now."""
        _widen(self)
        if state_of(self).is_dirty and not torch.compiler.is_compiling():
            _write(self, state_of(self).merged)  # an interrupt came while it was written
        change = _change(self)
        if not change:
            return super().forward(*args, **kwargs)
        return _peft(_beside(self, change)).forward(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002, FBT001, FBT002 - peft's signature
        """Merge some adapters, by default those that act; what is not finite is always refused."""
        state = state_of(self)
        names = _active(self) if adapter_names is None else adapter_names
        scales = {name: self.scaling[name] for name in names if name in self.scaling}
        _write(self, {**state.merged, **scales})
        state.asked = state.asked.union(scales)

    def unmerge(self) -> None:
        """Take all adapters out of the codes."""
        if self.merged_adapters:
            _write(self, {})

    def enable_adapters(self, enabled: bool) -> None:  # noqa: FBT001 - peft's signature
        """Switch adapters on or off: what is merged is taken out, not computed away."""
        if not enabled:
            self.unmerge()
        _peft(self).enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, from the codes too."""
        merged = state_of(self).merged
        if adapter_name in merged:
            _write(self, {name: scale for name, scale in merged.items() if name != adapter_name})
        _peft(self).delete_adapter(adapter_name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state, scales = state_of(self), settled(self)
        # Copies have the codes, and nothing that computes a difference.
        if (state.merged or state.is_dirty) and not state.holds(scales):
            _write(self, scales)
        return reduced(super().__reduce_ex__(protocol), type(self), KEY)


def _peft(wrapper: AdapterLayer) -> Any:
    """Return peft's own methods of a layer."""
    return super(AdapterLayer, wrapper)


def _write(wrapper: AdapterLayer, scales: Scales) -> None:
    adapters = state_of(wrapper).adapters()
    if adapters is None:
        raise SourceUnavailableError(NO_HANDLE)
    adapters.write([(wrapper, scales)])


def state_of(wrapper: nn.Module) -> State:
    """Return what is in the codes under an `AdapterLayer`."""
    state: State = wrapper.__dict__[KEY]
    return state


def note_merged(wrapper: Any, state: State, scales: Scales, deltas: dict[str, Delta]) -> None:
    """Say which adapters are in the codes, to peft as well."""
    state.merged, state.deltas = dict(scales), deltas
    state.asked = state.asked.intersection(scales)
    state.factors = list(_factors(wrapper, scales))
    wrapper.merged_adapters = list(scales)


def _factors(
    wrapper: Any, names: Scales
) -> Iterator[tuple[dict[str, Any], str, Tensor, int | None]]:
    for kind, child in wrapper._modules.items():
        for fqn, module in child.named_modules() if kind != WRAPPED else ():
            for name, tensor in module._parameters.items():
                if tensor is not None and f"{fqn}.{name}".strip(".").split(".")[0] in names:
                    yield module._parameters, name, tensor, write_count(tensor)


def _active(wrapper: Any) -> list[str]:
    active: list[str] = wrapper.active_adapters
    return active


def acting(wrapper: Any) -> Scales:
    """Return the strengths of the adapters that act on a layer, as peft has them."""
    if wrapper.disable_adapters:
        return {}
    return {name: wrapper.scaling[name] for name in _active(wrapper) if name in wrapper.scaling}


def settled(wrapper: Any) -> Scales:
    """Return what is in the codes for those who look at nothing else.

    What acts, and what was merged by its name, acting or not.
    """
    return {**state_of(wrapper).kept, **acting(wrapper)}


def wants_grad(wrapper: nn.Module) -> bool:
    """Say whether an adapter of a layer is to be trained."""
    others = (child for name, child in wrapper.named_children() if name != WRAPPED)
    return any(p.requires_grad for child in others for p in child.parameters())


def _change(wrapper: Any) -> Scales:
    """Return by how much the strengths differ from those in the codes, where anything is merged.

    Adapters that are merged and do not act, for they were merged by name, stay as they are.
    """
    merged = state_of(wrapper).merged
    if not merged or wrapper.disable_adapters:
        return {}
    change = {name: scale - merged.get(name, 0.0) for name, scale in acting(wrapper).items()}
    return {name: scale for name, scale in change.items() if scale}


def _beside(wrapper: Any, change: Scales) -> Any:
    """Return a layer's twin that computes a difference of strengths beside what is merged.

    A twin, for other threads may compute with the layer meanwhile. It has the same modules.
    """
    for name in change:
        if name in state_of(wrapper).merged and _is_variant(wrapper, name):
            raise PatchError(
                f"the strength of {name!r} was changed while it was merged, and it is no plain "
                "LoRA (DoRA?): call lowbits.merge_lora(target), or unmerge_lora"
            )
    return _twin(
        wrapper,
        scaling={**wrapper.scaling, **change},
        _active_adapter=list(change),
        merged_adapters=[],
    )


def _twin(wrapper: Any, **changed: Any) -> Any:
    """Return another module with all that a layer has, but for some attributes."""
    kind: Any = type(wrapper)
    twin = kind.__new__(kind)
    twin.__dict__ = {**wrapper.__dict__, **changed}
    return twin


def _widen(wrapper: Any) -> None:
    """Hold LoRA's factors in float32 where 16 bits are slow: ten times or more on most CPUs."""
    for name in _active(wrapper):
        for factors in (wrapper._modules.get("lora_A"), wrapper._modules.get("lora_B")):
            factor: Any = factors._modules.get(name) if factors is not None else None
            if factor is None or factor.weight.itemsize > 2 or factor.weight.device.type != "cpu":
                continue
            weight = factor.weight
            dtype = compute_dtype(weight.device, weight.dtype, keeps_fp32=False)
            if weight.dtype != dtype and weight.grad is None:
                factor.to(dtype)


def _is_variant(wrapper: Any, name: str) -> bool:
    return name in wrapper.__dict__.get("lora_variant", {})


def delta_of(wrapper: Any, name: str, scale: float, fqn: str, *, is_inside: bool) -> Delta:
    """Return what an adapter adds to the weight of a layer, by rows of it.

    Raises:
        PatchError: it is not a sum with the weight, or peft cannot say which.
    """
    refusal = _refusal(wrapper, name, is_inside=is_inside)
    if refusal:
        raise PatchError(
            f"cannot merge adapter {name!r} into {fqn}: {refusal}. Beside the weights "
            "(lora='fp16') it works"
        )
    delta = _low_rank(wrapper, name, scale) or _dense(wrapper, name, scale)
    if _is_variant(wrapper, name):
        magnitude = wrapper.lora_magnitude_vector[name].weight
        return Decomposed(delta, magnitude.detach().flatten())
    return delta


def _refusal(wrapper: Any, name: str, *, is_inside: bool) -> str:
    """Say why an adapter cannot be merged, or return an empty string."""
    if wrapper.__dict__.get("lora_bias", {}).get(name):
        return "it has a bias of its own"
    if getattr(wrapper.base_layer, "groups", 1) > 1:
        return "peft does not merge into grouped convolutions"
    if _is_variant(wrapper, name):
        kind = type(wrapper.lora_variant[name]).__name__
        if not kind.startswith("Dora") or "Embedding" in kind:
            return f"its variant ({kind}) is no sum with the weight"
        if is_inside:
            return "it is a DoRA that was merged before the layer was packed"
    return ""


def _low_rank(wrapper: Any, name: str, scale: float) -> LowRank | None:
    """Return LoRA's factors; None where an adapter is of another kind."""
    modules, own = wrapper._modules, wrapper.__dict__
    if name in (modules.get("lora_embedding_A") or {}):
        up, down = wrapper.lora_embedding_A[name].T, wrapper.lora_embedding_B[name].T
    elif name in (modules.get("lora_A") or {}) and not own.get("fan_in_fan_out"):
        up = wrapper.lora_B[name].weight.flatten(1)
        down = wrapper.lora_A[name].weight.flatten(1)
    else:
        return None
    return LowRank(up.detach(), down.detach(), scale)


def _dense(wrapper: Any, name: str, scale: float) -> Dense:
    """Return the matrix that peft makes of an adapter's factors."""
    twin = _twin(wrapper, scaling={**wrapper.scaling, name: 1.0})
    matrix: Tensor = twin.get_delta_weight(name).detach()
    return Dense(matrix.reshape(wrapper.base_layer.lowbits_layouts["weight"].rows), scale)


def acting_otherwise(wrapper: Any) -> list[str]:
    """Return the adapters that act on a layer of peft, of a kind that is not `is_mergeable`."""
    tuner = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    if not isinstance(wrapper, tuner) or is_mergeable(wrapper) or wrapper.disable_adapters:
        return []
    held = [getattr(wrapper, kind) for kind in wrapper.adapter_layer_names]
    return [name for name in _active(wrapper) if any(name in names for names in held)]


def is_mergeable(module: nn.Module) -> bool:
    """Say whether a module is peft's, of a kind that adds to a weight: LoRA, LoHa, LoKr."""
    kinds = (("peft.tuners.lora.layer", "LoraLayer"), ("peft.tuners.lycoris_utils", "LycorisLayer"))
    classes = (getattr(sys.modules.get(home), name, ()) for home, name in kinds)
    return isinstance(module, tuple(cls for cls in classes if cls != ()))
