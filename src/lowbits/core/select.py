"""Which weights are packed, in which scheme, and why the others are not.

What is left alone by default is chosen by reason, the same for every scheme: norms, biases and
other vectors, weights too small to matter, and the first and last projections, which carry the data
itself in few channels. A rule that names a layer overrides those; nothing overrides what cannot be
packed.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, final

import torch
from torch import nn

from lowbits.core.memory import held_bytes
from lowbits.core.names import adapter_fqns, dotted
from lowbits.core.packed import PackedLayer, marker_name, stored_bytes, stored_names
from lowbits.core.report import already
from lowbits.core.scheme import EMBEDDING, LINEAR, NATIVE, PARAMETER, Override, Scheme, rows_of
from lowbits.core.surgery import journal_of
from lowbits.core.ties import settle_ties
from lowbits.errors import ConfigError, PatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lowbits.core.backend import QuantBackend
    from lowbits.core.registry import BackendRegistry

#: Smaller weights save less than 8 KB each at 16 bits: not worth a dequantization per call.
TINY_WEIGHTS: Final = 4096
#: A layer outside of the repeated blocks that widens or narrows this much is a first or last
#: projection.
PROJECTION_RATIO: Final = 8

#: What reasons begin with that a rule overrides.
_TINY: Final = "tiny:"
_OUTER: Final = "first or last projection:"

_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Weights in these are packed as well: their values are known exactly, if not what they were.
_FLOAT8S: Final = (
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)
_LAYERS: Final[Mapping[str, type[nn.Module]]] = {
    LINEAR: nn.Linear,
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
    EMBEDDING: nn.Embedding,
}
_CONTAINERS: Final = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@final
@dataclass(frozen=True)
class Component:
    """A module of the target, by its name there.

    Attributes:
        name: e.g. ``"transformer"``; empty for a target that is itself a module.
        module: the component.
        scheme: asked for; None to leave it alone.
        reason: why it is left alone.
        skip: globs from a foreign config, which may match nothing.
        compute_dtype: that its packed layers multiply in; None: what is fast on their device.
        kept_in_fp32: names in the dotted names of layers that float16 is too narrow for.
    """

    name: str
    module: nn.Module
    scheme: str | None
    reason: str = ""
    skip: tuple[str, ...] = ()
    compute_dtype: torch.dtype | None = None
    kept_in_fp32: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Decision:
    """What happens to one parameter or buffer.

    Attributes:
        component: name of its component.
        fqn: dotted name in the component; a layer's weight goes by the layer's name.
        module: that holds it.
        name: in that module.
        kind: of the layer, e.g. ``"Linear"``; for the rest what it is, e.g. ``"bias"``.
        shape: of the tensor.
        tie: identity of the tensor: the same for tied ones.
        stored_as: scheme, or float8 dtype, that it is in already; empty in full precision.
        is_in_scheme: whether that is the scheme asked for.
        dtype: of the layer once it is packed; None: the tensor's own.
        scheme: that it will be packed in; None where it is left alone.
        backend: of the scheme.
        compute_dtype: as in `Component`.
        keeps_fp32: whether the component lists it in `Component.kept_in_fp32`.
        reason: why it is left alone, or why it is not in the scheme asked for.
    """

    component: str
    fqn: str
    module: nn.Module
    name: str
    kind: str
    shape: torch.Size
    tie: int
    stored_as: str = ""
    is_in_scheme: bool = False
    dtype: torch.dtype | None = None
    scheme: Scheme | None = None
    backend: QuantBackend | None = None
    compute_dtype: torch.dtype | None = None
    keeps_fp32: bool = False
    reason: str = ""

    @property
    def path(self) -> str:
        """The dotted name with the component in front."""
        return dotted(self.component, self.fqn)

    @property
    def tensor(self) -> torch.Tensor:
        """The parameter or buffer as it is now; decisions keep no reference to it.

        Of a packed weight, its marker: the same dtype and device, and no values.
        """
        name = marker_name(self.name) if self.is_packed else self.name
        module = self.module
        tensor = module._parameters[name] if name in module._parameters else module._buffers[name]
        assert tensor is not None
        return tensor

    @property
    def is_packed(self) -> bool:
        """Whether it is a packed weight now."""
        layer = self.module
        return isinstance(layer, PackedLayer) and self.name in layer.lowbits_layouts

    @property
    def nbytes(self) -> int:
        """Bytes of what holds it now."""
        if isinstance(self.module, PackedLayer) and self.is_packed:
            return stored_bytes(self.module, self.name)
        return held_bytes(self.tensor)

    @property
    def full_bytes(self) -> int:
        """Bytes of the full-precision tensor."""
        return self.shape.numel() * self.tensor.itemsize if self.is_packed else self.nbytes

    @property
    def is_low_bit(self) -> bool:
        """Whether fewer than 16 bits are left of each value."""
        return bool(self.stored_as) and 8 * self.nbytes < 16 * self.shape.numel()


@final
class Patterns:
    """Glob patterns over dotted names; a pattern that names a module means all below it."""

    def __init__(self, patterns: Iterable[str], option: str) -> None:
        self._compiled = {p: re.compile(fnmatch.translate(p)) for p in patterns}
        self._unused = set(self._compiled)
        self._option = option

    def last_match(
        self, decision: Decision, *, is_raw: bool = False, only_component: bool = False
    ) -> str | None:
        """Return the last pattern that names this tensor.

        Args:
            decision: of the tensor.
            is_raw: a raw parameter: the pattern must name it, not only a module around it.
            only_component: the pattern must begin with the component's own name.
        """
        found = None
        names = [*_prefixes(decision.path), *_prefixes(decision.fqn)]
        for pattern, compiled in self._compiled.items():
            if is_raw and not _names_parameter(pattern):
                continue
            if only_component and pattern.split(".")[0] != decision.component:
                continue
            if any(compiled.match(name) for name in names):
                self._unused.discard(pattern)
                found = pattern
        return found

    def require_all_used(self, paths: Sequence[str], raw: Sequence[str]) -> None:
        """Raise `ConfigError` where a pattern named nothing.

        Args:
            paths: of layers, and raw Parameters.
            raw: those of raw Parameters.
        """
        for pattern in sorted(self._unused):
            if near := next(filter(self._compiled[pattern].match, raw), None):
                raise ConfigError(
                    f"{self._option}: pattern {pattern!r} matches raw Parameters alone, each of "
                    f"which has to be named itself, as {near!r}"
                )
            names = sorted({re.sub(r"\d+", "*", path) for path in paths})
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"close to it: {', '.join(map(repr, close))}" if close else f"e.g. {names[:3]}"
            raise ConfigError(f"{self._option}: pattern {pattern!r} matches no layer; {hint}")


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _names_parameter(pattern: str) -> bool:
    return any(c.isalnum() for c in pattern.rsplit(".", 1)[-1])


@final
@dataclass(frozen=True)
class Selection:
    """What a caller asks for beside the components' schemes.

    Attributes:
        rules: scheme by glob.
        skip: globs.
        registry: of the schemes.
        sees_packed: whether weights count that a handle is responsible for; else they are left.
        sees_meta: whether weights without data are to be packed; else they are refused.
    """

    rules: Mapping[str, str]
    skip: Sequence[str]
    registry: BackendRegistry
    sees_packed: bool = False
    sees_meta: bool = False


def select(components: Sequence[Component], selection: Selection) -> list[Decision]:
    """Decide for every parameter and buffer of the target; changes nothing.

    Raises:
        ConfigError: a pattern matches no layer.
        UnknownSchemeError: with the closest name.
        BackendUnavailableError: a scheme cannot be used here.
        PatchError: a weight to be packed has no data (meta device).
    """
    rules = Patterns(selection.rules, "rules")
    skip = Patterns(selection.skip, "skip")
    decisions = []
    unique: dict[int, Component] = {}
    for component in components:
        known = unique.get(id(component.module))
        if known is None or (known.scheme is None and component.scheme is not None):
            unique[id(component.module)] = component  # of several names the one that was asked for
    for component in unique.values():
        decide = _Decider(component, rules, skip, selection)
        decisions += [decide(tensor) for tensor in _tensors(component)]
    paths = [d.path for d in decisions if _is_layer(d)]
    raw = [d.path for d in decisions if d.kind == PARAMETER]
    rules.require_all_used(paths, raw)
    skip.require_all_used(paths, raw)
    decisions = settle_ties(decisions)
    for decision in decisions:
        if decision.scheme and decision.tensor.is_meta and not selection.sees_meta:
            raise PatchError(
                f"{decision.path or 'weight'} has no data (meta device): load the weights first, "
                "and remove offload hooks (accelerate, enable_*_offload), which keep them elsewhere"
            )
    return decisions


def _tensors(component: Component) -> Iterator[Decision]:
    for module_fqn, module in component.module.named_modules():
        stored: set[str] = set()
        if isinstance(module, PackedLayer):
            stored = {key for name in module.lowbits_layouts for key in stored_names(module, name)}
            yield from _packed_weights(component.name, module_fqn, module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in stored:
                continue
            if nn.parameter.is_lazy(tensor):
                path = dotted(component.name, module_fqn, name)
                raise PatchError(f"{path} has no shape yet (lazy): run the model once before")
            kind = tensor_kind(module, name, tensor)
            form = str(tensor.dtype).removeprefix("torch.") if tensor.dtype in _FLOAT8S else ""
            fqn = _fqn(module_fqn, name)
            yield Decision(component.name, fqn, module, name, kind, tensor.shape, id(tensor), form)


def _packed_weights(component: str, fqn: str, module: PackedLayer) -> Iterator[Decision]:
    for name, layout in module.lowbits_layouts.items():
        kind = _layer_kind(module) if name == "weight" else PARAMETER
        tie = id(module._parameters[marker_name(name)])
        yield Decision(
            component, _fqn(fqn, name), module, name, kind, layout.shape, tie, layout.scheme
        )


def _fqn(module_fqn: str, name: str) -> str:
    return dotted(module_fqn, "" if name == "weight" else name)


def _layer_kind(module: nn.Module) -> str:
    kind = next((k for k, cls in _LAYERS.items() if isinstance(module, cls)), None)
    return kind or type(module).__name__


def tensor_kind(module: nn.Module, name: str, tensor: torch.Tensor) -> str:
    """Return the kind of a layer, e.g. ``"Linear"``; for other tensors what they are."""
    if name in module._buffers:
        return "buffer"
    if name == "weight":
        return _layer_kind(module)
    if tensor.dim() < 2:
        return "bias" if name == "bias" else "vector"
    return PARAMETER


def _is_layer(decision: Decision) -> bool:
    return decision.kind in _LAYERS or decision.kind == PARAMETER


class _Decider:
    """Decides for the tensors of one component."""

    def __init__(
        self, component: Component, rules: Patterns, skip: Patterns, selection: Selection
    ) -> None:
        self._component, self._rules, self._skip = component, rules, skip
        self._component_skip = Patterns(component.skip, "skip")
        self._selection = selection
        self._blocks = [
            fqn
            for fqn, module in component.module.named_modules()
            if isinstance(module, _CONTAINERS)
        ]
        self._adapters = set(adapter_fqns(component.module))
        self._dtype = component.compute_dtype or _precision(component.module)
        self._taken: Counter[Override] = Counter()
        self._mixed: dict[int, str] = {}

    def __call__(self, decision: Decision) -> Decision:
        is_raw = decision.kind == PARAMETER and not isinstance(
            decision.module, nn.MultiheadAttention
        )
        rule = None
        if _is_layer(decision):
            # A general pattern does not reach into a component that was left out.
            rule = self._rules.last_match(
                decision, is_raw=is_raw, only_component=self._component.scheme is None
            )
        skipped = self._skipped(decision)
        reason = self._impossible(decision)
        if not reason and skipped is not None:
            reason = f"skipped by {skipped!r}"
        if not reason and rule is None:
            reason = self._default_reason(decision, is_raw=is_raw)
        if reason:
            return replace(decision, reason=reason)
        name = self._selection.rules[rule] if rule is not None else self._component.scheme
        return self._in_scheme(decision, NATIVE if name is None else name)

    def _skipped(self, decision: Decision) -> str | None:
        if not _is_layer(decision):
            return None
        pattern = self._skip.last_match(decision)
        return pattern or self._component_skip.last_match(decision)

    def _impossible(self, decision: Decision) -> str:
        """Say why a tensor cannot be packed whatever the caller asks for."""
        if decision.is_packed and journal_of(decision.module) and not self._selection.sees_packed:
            return "already packed"
        if not _is_layer(decision):
            return _not_a_layer(decision)
        if any(decision.fqn.startswith(prefix + ".") for prefix in self._adapters):
            return "adapter factor"
        if decision.is_packed:
            return ""
        return unsuitable_module(decision.module) or _unsuitable_tensor(decision.tensor)

    def _default_reason(self, decision: Decision, *, is_raw: bool) -> str:
        """Say why a tensor is left alone where no rule names it."""
        if self._component.scheme is None:
            return self._component.reason
        if is_raw:
            return "raw parameter: name it in rules to pack it"
        # A target that is one layer is meant, whatever its size.
        return self._small_or_outer(decision) if decision.fqn else ""

    def _small_or_outer(self, decision: Decision) -> str:
        numel = decision.shape.numel()
        if numel < TINY_WEIGHTS:
            return f"{_TINY} {numel} weights"
        in_block = any(not fqn or decision.fqn.startswith(fqn + ".") for fqn in self._blocks)
        narrow, wide = sorted(decision.shape[:2])
        is_even = narrow * PROJECTION_RATIO > wide
        if decision.kind in (EMBEDDING, PARAMETER) or in_block or is_even:
            return ""
        return f"{_OUTER} {narrow} channels on one side, {wide} on the other"

    def _in_scheme(self, decision: Decision, name: str) -> Decision:
        """Give a tensor its scheme, or the first of its fallbacks that takes it."""
        backend, scheme = self._selection.registry.require(name)
        if backend is None:
            stored = already(decision.stored_as) if decision.is_packed else ""
            return replace(decision, reason=stored or "native: kept in its own precision")
        kept = set(decision.fqn.split(".")) & set(self._component.kept_in_fp32)
        decision = replace(
            decision, compute_dtype=self._component.compute_dtype, keeps_fp32=bool(kept)
        )
        if scheme.mix:
            chosen = self._in_scheme(decision, self._of_mix(scheme, decision))
            return replace(chosen, reason=f"{name}; {chosen.reason}".removesuffix("; "))
        _, row_length = rows_of(decision.shape, decision.kind)
        refusal = scheme.refusal(decision.kind, row_length)
        if refusal is None:
            return self._stored(decision, scheme, backend)
        for fallback in scheme.fallbacks:
            backend, scheme = self._selection.registry.require(fallback)
            if backend and scheme.refusal(decision.kind, row_length) is None:
                reason = f"instead of {name}: {refusal}"
                return self._stored(replace(decision, reason=reason), scheme, backend)
        return replace(decision, reason=refusal)

    def _stored(self, decision: Decision, scheme: Scheme, backend: QuantBackend) -> Decision:
        """Let a weight be packed, unless it is in that scheme already."""
        if decision.stored_as == scheme.name:
            return replace(decision, is_in_scheme=True, reason=already(scheme.name))
        dtype = self._dtype if decision.tensor.dtype in _FLOAT8S else None
        reason = f"stored as {decision.stored_as} before" if decision.stored_as else ""
        reason = "; ".join(part for part in (reason, decision.reason) if part)
        return replace(decision, scheme=scheme, backend=backend, dtype=dtype, reason=reason)

    def _of_mix(self, mix: Scheme, decision: Decision) -> str:
        """Return the scheme that a mix has for a layer; tied ones get that of the first."""
        if decision.tie not in self._mixed:
            rules = (r for r in mix.mix if re.search(r.pattern, decision.fqn))
            rule = next(r for r in rules if self._taken[r] != r.first)
            self._taken[rule] += 1
            self._mixed[decision.tie] = rule.scheme
        return self._mixed[decision.tie]


def is_left_by_default(reason: str) -> bool:
    """Say whether a rule for all layers packs what was left alone for this reason."""
    return reason.startswith((_TINY, _OUTER))


def _not_a_layer(decision: Decision) -> str:
    if decision.kind in ("bias", "buffer", "vector"):
        return decision.kind
    if "norm" in decision.kind.lower():
        return "norm"
    if decision.tensor.dim() < 2:
        return "vector"
    return f"no scheme holds {decision.kind} layers"


def _precision(module: nn.Module) -> torch.dtype:
    """Return the dtype of a model some of whose weights are in float8."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in tensors if t.dtype in _FLOATS), torch.bfloat16)


def unsuitable_module(module: nn.Module) -> str:
    """Say why no weight of a module can be packed, or return an empty string."""
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its max_norm rewrites the weight at each call"
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return "parametrized weight"
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit lets nobody exchange its weights"
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        return "its module has extra state of its own"
    if "layerwise_casting" in getattr(module.__dict__.get("_diffusers_hook"), "hooks", ()):
        return "diffusers casts it at each call (enable_layerwise_casting): remove that hook first"
    return ""


def _unsuitable_tensor(tensor: torch.Tensor) -> str:
    for kind in (type(tensor), type(tensor.data)):
        if kind not in (nn.Parameter, torch.Tensor):
            return f"already stored by another library as {kind.__name__} (see lowbits.adopt)"
    if tensor.dtype not in (*_FLOATS, *_FLOAT8S):
        return f"its dtype {str(tensor.dtype).removeprefix('torch.')} is not a full precision"
    return "" if tensor.numel() else "empty"
