"""The adapters on a handle's packed layers: beside the weights, or merged into them.

Merging quantizes W + what an adapter adds, from W's source, on the device that computes, one layer
at a time; only layers whose adapters changed are written. See [Note: adapters] in `peft`.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast, final

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lowbits.core.interception import put_in_front, take_away
from lowbits.core.names import WRAPPED
from lowbits.core.packed import PackedLayer, marker_name, packed_weight
from lowbits.core.registry import DEFAULT
from lowbits.core.surgery import rewrite
from lowbits.errors import PatchError, SourceUnavailableError
from lowbits.integrations.peft import (
    KEY,
    NO_HANDLE,
    AdapterLayer,
    Scales,
    State,
    acting,
    acting_otherwise,
    delta_of,
    is_mergeable,
    note_merged,
    settled,
    state_of,
    wants_grad,
)
from lowbits.lora.merge import Delta, MergedWeight, Survival

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from lowbits.core.backend import Packed
    from lowbits.core.handle import Handle
    from lowbits.core.source import Source

logger = logging.getLogger("lowbits.lora")

#: Schemes of fewer bits lose so much of a merged LoRA that it is worth a warning.
_FEW_BITS: Final = 4.0

#: Each choice of ``lora`` merges into weights of so many bits or more: auto does as Forge.
_LEAST_BITS: Final = {"fp16": None, "auto": 16.0, "merge": 0.0}

_WHOLE_COMPILE: Final = (
    "lowbits merges adapters into this model's weights before a pass (lora='merge', or 'auto' "
    "where weights have 16 bits): compile its blocks (model.compile_repeated_blocks("
    "fullgraph=True), or block.compile(fullgraph=True) for each), or apply it with lora='fp16'"
)

#: What is packed of a layer that adapters are merged into.
WEIGHT: Final = ("weight",)


class _Fused(NamedTuple):
    """What was merged into a layer on request: what peft has let go of since, and what it has."""

    deltas: tuple[Delta, ...]
    scales: Scales


@final
class Adapters:
    """The adapters on a handle's packed layers."""

    def __init__(self, lora: str) -> None:
        """Prepare; nothing is changed before `attach`.

        Args:
            lora: the option of `lowbits.apply`.
        """
        self._least_bits, self._is_lenient = _LEAST_BITS[lora], lora == "auto"
        self._owned: weakref.ref[Handle] | None = None
        self._wrappers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        #: Layers whose codes are not those of their weight alone.
        self._merged: weakref.WeakKeyDictionary[nn.Module, State] = weakref.WeakKeyDictionary()
        self._hooks: list[RemovableHandle] = []
        self._has_warned = False
        #: Whether a layer was ever wrapped: before that, passes leave nothing to compilers to see.
        self.is_used = False
        #: Whether one was wrapped by what cannot be merged: it is refused where it is to be.
        self.has_others = False
        # Held while codes are written: a pass of another thread waits for all of them.
        self._lock = threading.RLock()

    def attach(self, owned: Handle) -> None:
        """Come before peft's classes, of layers that are wrapped later too."""
        self._owned = weakref.ref(owned)
        wrapped = _Wrapped(self)
        self._hooks.append(register_module_module_registration_hook(wrapped))
        weakref.finalize(owned, self._hooks[0].remove)
        for root in owned.components.values():
            for module in root.modules():
                if WRAPPED in module._modules:
                    wrapped(module, WRAPPED, module._modules[WRAPPED])
            if any(self._is_automatic(module) for module in root.modules()):
                self._hooks.append(root.register_forward_pre_hook(_BeforePass(self)))

    def _handle(self) -> Handle | None:
        return self._owned() if self._owned else None

    def _find(self, layer: nn.Module) -> tuple[str, Source] | None:
        owned = self._handle()
        return owned.find(layer) if owned else None

    def detach(self) -> None:
        """Leave peft's layers as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for wrapper in list(self._wrappers):
            take_away(wrapper, AdapterLayer)
            del wrapper.__dict__[KEY]
        self._wrappers.clear()
        self._merged.clear()

    def forget(self) -> None:
        """Let merged adapters act beside their layers again, whose weights are the originals."""
        for wrapper in self._wrappers:
            state = state_of(wrapper)
            note_merged(wrapper, state, state.inside, {})
            state.is_dirty = False

    def merge(self) -> None:
        """Merge the adapters that act, with their strengths now.

        Raises:
            SourceUnavailableError: a weight's original was not kept; nothing is changed.
            PatchError: an adapter cannot be merged into a packed weight; nothing is changed.
            NonFiniteWeightError: a sum holds NaN or infinity; that layer is as it was.
        """
        with self._lock:
            self._refuse_others()
            wanted = [(wrapper, acting(wrapper)) for wrapper in self._present()]
            self.write((w, scales) for w, scales in wanted if not state_of(w).holds(scales))
            for wrapper, scales in wanted:
                state = state_of(wrapper)
                state.asked = state.asked.union(scales)

    def _refuse_others(self, *, is_asked: bool = True) -> None:
        """Raise where an adapter acts on a packed layer that it cannot be merged into.

        Args:
            is_asked: of all layers; else of those that are merged into before a pass.
        """
        for module in self._modules():
            layer = module._modules.get(WRAPPED)
            if not isinstance(layer, PackedLayer) or KEY in module.__dict__:
                continue
            if (others := acting_otherwise(module)) and (is_asked or self._is_automatic(layer)):
                raise PatchError(
                    f"cannot merge adapter {others[0]!r} into {self._name_of(layer)}: peft's "
                    f"{type(module).__name__} is none of those that add to a weight (LoRA, DoRA, "
                    "LoHa, LoKr). Beside the weights (lora='fp16') it works"
                )
            if is_asked and is_mergeable(module) and acting(module):
                raise SourceUnavailableError(NO_HANDLE)

    def _name_of(self, layer: PackedLayer) -> str:
        found = self._find(layer)
        return found[0] if found else f"a {type(layer).__name__}"

    def unmerge(self) -> None:
        """Take out of the codes what was merged, of layers that peft has unwrapped too.

        Raises:
            SourceUnavailableError: a weight's original was not kept.
        """
        with self._lock:
            for state in self._merged.values():
                state.baked = ()
            changed = [w for w in self._present() if w.base_layer in self._merged]
            self.write((w, state_of(w).inside) for w in changed)
            for layer, state in list(self._merged.items()):
                self._reset(layer, state)

    def fused(self) -> dict[nn.Module, _Fused]:
        """Return what was merged on request into each layer, and is there still."""
        wrapped = {id(wrapper.base_layer) for wrapper in self._present()}
        found = {}
        for layer, state in self._merged.items():
            is_wrapped = id(layer) in wrapped
            found[layer] = (
                _Fused(state.baked, state.kept) if is_wrapped else _Fused(state.lasting, {})
            )
        return found

    @torch.no_grad()
    @torch.inference_mode(mode=False)
    def fuse_again(self, fused: Mapping[nn.Module, _Fused]) -> None:
        """Merge that into layers that were packed anew.

        Raises:
            NonFiniteWeightError: a sum holds NaN or infinity.
            PatchError: an adapter cannot be merged into a packed weight.
        """
        with self._lock:
            wrappers = {id(wrapper.base_layer): wrapper for wrapper in self._present()}
            lost = 0
            for layer, (deltas, scales) in fused.items():
                if not isinstance(layer, PackedLayer) or layer.lowbits_names != WEIGHT:
                    lost += bool(deltas)
                    continue
                wrapper = wrappers.get(id(layer))
                state = State(self) if wrapper is None else state_of(wrapper)
                if deltas:
                    state.baked = deltas
                    self._rewrite(layer, state, (*deltas, *state.deltas.values()))
                if wrapper is not None and scales:
                    self.write([(wrapper, scales)])
                    state.asked = state.asked.union(scales)
        if lost:
            logger.warning(
                "a LoRA that was fused and unloaded is gone from %d layers, which are not packed "
                "any more: load it again", lost,
            )  # fmt: skip

    def before_pass(self, *, trains: bool = False) -> None:
        """Merge what acts now where that is asked for; take out what is gone.

        Args:
            trains: gradients are recorded: adapters that want them act beside the weights.
        """
        with self._lock:
            if self.has_others and not self._is_lenient:
                self._refuse_others(is_asked=False)
            present = self._present()
            changed = []
            for wrapper in present:
                scales = {} if trains and wants_grad(wrapper) else acting(wrapper)
                is_there = state_of(wrapper).holds(scales)
                if not is_there and self._is_automatic(wrapper.base_layer):
                    changed.append((wrapper, scales))
            if self._is_lenient:
                changed = [change for change in changed if self._can_write(*change)]
            self.write(changed)
            wrapped = {id(wrapper.base_layer) for wrapper in present}
            for layer in list(self._merged):
                if id(layer) not in wrapped:
                    self.let_go(layer)

    def let_go(self, layer: nn.Module) -> None:
        """Take out of a layer that is not wrapped any more what nobody has asked to merge."""
        with self._lock:
            state = self._merged.get(layer)
            if state is not None and state.has_unasked:
                state.baked = state.lasting
                self._reset(layer, state)

    def settle(self, *, takes_out: bool = False) -> None:
        """Let codes hold what adapters say now, for those who look at nothing else.

        Args:
            takes_out: what was merged unasked is not to be in them, until the next pass.
        """
        with self._lock:
            changed = []
            for wrapper in self._present():
                state = state_of(wrapper)
                is_taken = takes_out and state.has_unasked
                scales = {**state.inside, **state.kept} if is_taken else settled(wrapper)
                if wrapper.base_layer in self._merged and not state.holds(scales):
                    changed.append((wrapper, scales))
            self.write(changed)

    def _can_write(self, wrapper: Any, scales: Scales) -> bool:
        try:
            self._deltas(wrapper, scales)
        except PatchError as error:
            logger.debug("%s", error)
            return False
        return True

    def adopt(self, wrapper: Any, layer: PackedLayer) -> None:
        """Come before peft's class of a layer that wraps a packed one of this handle."""
        if KEY in wrapper.__dict__ or self._find(layer) is None:
            return
        # One that was deleted since has no strength any more: it is part of the weight for good.
        merged = [name for name in wrapper.merged_adapters if name in wrapper.scaling]
        inside = {name: wrapper.scaling[name] for name in merged}
        state = State(self, inside)
        self.let_go(layer)
        if (before := self._merged.get(layer)) is not None:
            # Merged for good and unwrapped since: it stays, whatever comes.
            state.baked = before.lasting
            self._merged[layer] = state
        wrapper.__dict__[KEY] = state
        put_in_front(wrapper, AdapterLayer)
        self._wrappers.add(wrapper)
        self.is_used = True

    @torch.no_grad()
    @torch.inference_mode(mode=False)
    def write(self, changes: Iterable[tuple[Any, Scales]]) -> None:
        """Let layers' codes hold some adapters, with these strengths, and no others.

        Raises:
            SourceUnavailableError: a weight's original was not kept; nothing is changed.
            PatchError: an adapter cannot be merged into a packed weight; nothing is changed.
        """
        with self._lock:
            todo = list(changes)
            for wrapper, scales in todo:
                self._deltas(wrapper, scales)
            survival = Survival()
            for wrapper, scales in todo:
                self._write(wrapper, scales, survival)
            if survival.has_counted and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "%.0f %% of the LoRA survives in weights of fewer than %g bits: beside them "
                    "(lora='fp16') all of it acts",
                    100 * survival.share,
                    _FEW_BITS,
                )

    def _present(self) -> list[Any]:
        """Return the wrappers that are in the target now, but for those of another handle."""
        wrappers = [module for module in self._modules() if KEY in module.__dict__]
        return [wrapper for wrapper in wrappers if state_of(wrapper).adapters() is self]

    def _modules(self) -> Collection[nn.Module]:
        owned = self._handle()
        roots = owned.components.values() if owned else ()
        return {id(module): module for root in roots for module in root.modules()}.values()

    def _is_automatic(self, module: nn.Module) -> bool:
        least = self._least_bits
        if least is None or not isinstance(module, PackedLayer):
            return False
        return module.lowbits_names == WEIGHT and _bits(module) >= least

    def _source(self, layer: nn.Module) -> tuple[str, Source]:
        """Return a packed layer's dotted name, and where its original weight can be had."""
        found = self._find(layer)
        if found is None:
            raise SourceUnavailableError(NO_HANDLE)
        if found[1].kind == "none":
            _read(*found)  # says why there is none
        return found

    def _deltas(self, wrapper: Any, scales: Scales) -> dict[str, Delta]:
        """Return what has to be added to a layer's source; raise where that cannot be done."""
        fqn, _ = self._source(wrapper.base_layer)
        self._refuse_tied(wrapper.base_layer, fqn)
        inside = state_of(wrapper).inside
        change = {n: scales.get(n, 0.0) - inside.get(n, 0.0) for n in {**inside, **scales}}
        return {
            name: delta_of(wrapper, name, scale, fqn, is_inside=name in inside)
            for name, scale in change.items()
            if scale
        }

    def _refuse_tied(self, layer: PackedLayer, fqn: str) -> None:
        owned = self._handle()
        if owned is not None and owned.is_tied(layer):
            raise PatchError(
                f"cannot merge a LoRA into {fqn}: its weight is tied to another layer's, which "
                "would change with it. Beside the weights (lora='fp16') it acts on this one alone"
            )

    def _write(self, wrapper: Any, scales: Scales, survival: Survival) -> None:
        state, layer = state_of(wrapper), wrapper.base_layer
        deltas = self._deltas(wrapper, scales)
        before = None if layer in self._merged else packed_weight(layer)
        merged, parts = self._quantize(layer, (*state.baked, *deltas.values()))
        if before is not None and deltas and _bits(layer) < _FEW_BITS:
            survival.add(merged, before, parts, layer.lowbits_layouts["weight"].backend)
        # Noted first: what an interrupt leaves half written is written again.
        self._merged[layer] = state
        state.is_dirty = True
        note_merged(wrapper, state, scales, deltas)
        rewrite(layer, parts)
        state.is_dirty = False
        if not state.baked and not deltas:
            del self._merged[layer]

    def _quantize(
        self, layer: PackedLayer, deltas: Sequence[Delta]
    ) -> tuple[MergedWeight, list[Packed]]:
        fqn, source = self._source(layer)
        layout = layer.lowbits_layouts["weight"]
        scheme = DEFAULT.require(layout.scheme)[1]
        marker = cast("Tensor", layer._parameters[marker_name("weight")])
        merged = MergedWeight(_read(fqn, source).reshape(layout.rows), deltas, marker.device)
        logger.debug("%s: quantizing the sum of the weight and %d adapters", fqn, len(deltas))
        return merged, merged.pack(scheme, layout.backend)

    @torch.inference_mode(mode=False)
    def _reset(self, layer: Any, state: State) -> None:
        """Give a layer that no adapter wraps any more the codes of its weight and what is baked."""
        self._rewrite(layer, state, state.baked)
        state.merged, state.deltas = dict(state.inside), {}
        state.asked = frozenset(state.inside)
        state.factors, state.is_dirty = [], False

    def _rewrite(self, layer: Any, state: State, deltas: Sequence[Delta]) -> None:
        """Give a layer the codes of its weight, and what is added to it."""
        _, parts = self._quantize(layer, deltas)
        self._merged[layer] = state
        rewrite(layer, parts)
        if not deltas:
            del self._merged[layer]


@final
class _Wrapped:
    """Called by torch whenever a module is given a child: sees peft wrap and unwrap layers."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = weakref.ref(adapters)

    def __call__(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        if not isinstance(child, PackedLayer) or child.lowbits_names != WEIGHT:
            return
        adapters = self._adapters()
        if adapters is None:
            return
        if name != WRAPPED:
            adapters.let_go(child)  # peft has unwrapped it
        elif is_mergeable(module):
            adapters.adopt(module, child)
        else:
            adapters.is_used = adapters.has_others = True


@final
class _BeforePass:
    """Called by torch before a model's forward; copies and pickles of the model do nothing."""

    def __init__(self, adapters: Adapters | None = None) -> None:
        self._adapters = weakref.ref(adapters) if adapters is not None else lambda: None

    def __call__(self, *_: Any) -> None:
        adapters = self._adapters()
        if adapters is not None and adapters.is_used:
            _before_pass(adapters, trains=torch.is_grad_enabled())

    def __reduce__(self) -> tuple[type[_BeforePass], tuple[()]]:
        return _BeforePass, ()


def _read(fqn: str, source: Source) -> Tensor:
    """Return a layer's original weight."""
    try:
        return source.weight()
    except SourceUnavailableError as error:
        raise SourceUnavailableError(
            f"cannot merge a LoRA into {fqn}, or take it out: {error}. Beside the weights "
            "(lora='fp16') a LoRA needs no originals"
        ) from error


#: `Adapters.before_pass`, out of graphs.
_before_pass: Final[Callable[..., None]] = torch.compiler.disable(  # type: ignore[no-untyped-call]
    Adapters.before_pass, reason=_WHOLE_COMPILE
)


def _bits(layer: PackedLayer) -> float:
    """Return the bits per weight of a packed layer."""
    layout = layer.lowbits_layouts["weight"]
    stored = (cast("Tensor", layer._parameters[field.parameter]) for field in layout.fields)
    return sum(tensor.nbytes for tensor in stored) * 8 / layout.shape.numel()
