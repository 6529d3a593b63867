"""Weights of a checkpoint put into a module: packed ones as they are stored, all or none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor, nn

from lowbits.core.backend import Packed
from lowbits.core.foreign import is_of
from lowbits.core.names import dotted, modules_beside_adapters
from lowbits.core.packed import PackedLayer, storage_form
from lowbits.core.packing import are_finite
from lowbits.core.report import LayerReport, Report
from lowbits.core.scheme import NATIVE, rows_of
from lowbits.core.select import tensor_kind, unsuitable_module
from lowbits.core.source import NoSource
from lowbits.core.surgery import Journal, PackedParameters, all_or_none, packed_parameters
from lowbits.errors import AlreadyPatchedError, FormatError, PatchError
from lowbits.files.rows import RowReader, in_float32
from lowbits.progress import CancelToken, ProgressCallback, ProgressEvent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lowbits.core.registry import BackendRegistry
    from lowbits.files.rows import KeyMap, Segment
    from lowbits.files.weights import Weight


@final
@dataclass(frozen=True)
class LoadOptions:
    """How to load.

    Attributes:
        registry: of the schemes.
        component: name of the module in its pipeline, for the report.
        kept_in_fp32: names in the dotted names of layers that float16 is too narrow for.
        dtype: of floating weights; None: the module's, on the meta device the file's.
        knows_dtypes: whether the file says which dtypes its model is in. GGUF does not: what is
            there in float16 and float32 are types like others, chosen for each tensor.
        allow_nonfinite: whether Parameters may be NaN or infinite; buffers may, as masks are.
    """

    registry: BackendRegistry
    component: str = ""
    kept_in_fp32: Sequence[str] = ()
    dtype: torch.dtype | None = None
    knows_dtypes: bool = True
    allow_nonfinite: bool = False
    progress: ProgressCallback | None = None
    cancel: CancelToken | None = None


@final
@dataclass(frozen=True)
class _Holder:
    """A module that holds a tensor, by this name."""

    module: nn.Module
    name: str
    fqn: str

    @property
    def slots(self) -> dict[str, Tensor | None]:
        """The module's own dictionary."""
        module = self.module
        return cast(
            "dict[str, Tensor | None]",
            module._parameters if self.name in module._parameters else module._buffers,
        )


@final
@dataclass(frozen=True)
class _Target:
    """A Parameter or persistent buffer of the module; tied ones have several holders."""

    tensor: Tensor
    holders: tuple[_Holder, ...]

    @property
    def fqn(self) -> str:
        return self.holders[0].fqn

    @property
    def kind(self) -> str:
        first = self.holders[0]
        return tensor_kind(first.module, first.name, self.tensor)

    @property
    def device(self) -> torch.device:
        """Where it will be: on the host, where it has no data yet."""
        return torch.device("cpu") if self.tensor.is_meta else self.tensor.device


@final
@dataclass(frozen=True)
class _Loaded:
    """What a target will hold: Parameters of a packed weight, or a Parameter or buffer."""

    target: _Target
    value: PackedParameters | Tensor
    report: LayerReport


@final
@dataclass(frozen=True)
class Staged:
    """Everything that a module will hold, read and ready; the module is as it was."""

    loaded: tuple[_Loaded, ...]
    component: str
    unused: frozenset[str]


@torch.no_grad()
@torch.inference_mode(mode=False)
def stage(
    module: nn.Module, weights: Mapping[str, Weight], key_map: KeyMap, options: LoadOptions
) -> Staged:
    """Read what a module will hold; nothing is changed.

    Packed weights stay as they are stored where the layer can hold them, and are decoded where it
    cannot (a norm, a bias); those that others hold are copied. What the module holds now is kept
    until `install`: a module on the meta device costs nothing beside the file's bytes.

    Args:
        module: not packed.
        weights: of the checkpoint, by name.
        key_map: what each Parameter and persistent buffer is made of; ties need one name only.
        options: how.

    Raises:
        FormatError: something is missing, of another shape, or not what it claims to be.
        AlreadyPatchedError: the module is packed.
        PatchError: it has a buffer without values that no file holds, an adapter is merged, or a
            layer is another library's.
    """
    if any(isinstance(part, PackedLayer) for part in module.modules()):
        raise AlreadyPatchedError(
            f"{options.component or type(module).__name__} holds packed layers: call "
            "lowbits.restore(target) or lowbits.dequantize(target) before loading into it"
        )
    _refuse_foreign(module, options.registry)
    _refuse_empty_buffers(module)
    _refuse_merged(module)
    targets = _targets(module)
    sources = _sources(targets, key_map, weights)
    loader = _Loader(weights, options)
    total = sum(_nbytes(segments, weights) for segments in sources)
    loaded, done = [], 0
    for target, segments in zip(targets, sources, strict=True):
        if options.cancel:
            options.cancel.raise_if_cancelled("loading")
        loaded.append(loader.load(target, segments))
        done += _nbytes(segments, weights)
        if options.progress:
            options.progress(ProgressEvent("load", target.fqn, done, total))
    # By identity: a tied weight has several names.
    used = {id(weights[s.source]) for segments in sources for s in segments}
    unused = frozenset(name for name, weight in weights.items() if id(weight) not in used)
    return Staged(tuple(loaded), options.component, unused)


@torch.no_grad()
@torch.inference_mode(mode=False)
def install(staged: Sequence[Staged]) -> Report:
    """Put what was read into its modules: all of it, or nothing.

    There is no way back to full precision: modules have no handle, as copies of packed ones.
    """
    journal, before = Journal(), []
    try:
        with all_or_none() as note:
            for part in staged:
                for item in part.loaded:
                    before += _put_plain(item)
                for module, (fqn, packed) in _packed_by_module(part).items():
                    note(module)
                    journal.install(module, packed, fqn)
    except BaseException:
        for holder, tensor in before:
            holder.slots[holder.name] = tensor
        raise
    layers = tuple(item.report for part in staged for item in part.loaded)
    unused = frozenset.intersection(*(part.unused for part in staged))
    return Report(layers, (f"not used: {_some(sorted(unused))}",) if unused else ())


def _targets(module: nn.Module) -> list[_Target]:
    """Return what can be loaded, tied tensors once; adapters stay as they are."""
    found: dict[int, _Target] = {}
    for fqn, part in modules_beside_adapters(module):
        passing = part._non_persistent_buffers_set
        buffers = {name: t for name, t in part._buffers.items() if name not in passing}
        for name, tensor in (*part._parameters.items(), *buffers.items()):
            if tensor is not None:
                known = found.get(id(tensor), _Target(tensor, ()))
                holder = _Holder(part, name, dotted(fqn, name))
                found[id(tensor)] = replace(known, holders=(*known.holders, holder))
    return list(found.values())


def _refuse_foreign(module: nn.Module, registry: BackendRegistry) -> None:
    """Raise where a layer of another library would go on computing with what it has no more."""
    found = (backend.foreign for backend in registry.all().values())
    packages = [foreign.package for foreign in found if foreign]
    for fqn, part in module.named_modules():
        if any(is_of(part, package) for package in packages):
            raise PatchError(
                f"{fqn or 'the module'} is a {type(part).__name__} of {type(part).__module__}: "
                "load into a model of ordinary layers (lowbits.adopt takes over what that one has)"
            )


def _refuse_empty_buffers(module: nn.Module) -> None:
    """Raise where what no file holds has no values: a pass would read whatever lies there."""
    for fqn, part in module.named_modules():
        for name in sorted(part._non_persistent_buffers_set):
            buffer = part._buffers.get(name)
            if buffer is not None and buffer.is_meta:
                raise PatchError(
                    f"{dotted(fqn, name)} has no values (meta device), and files do not hold it: "
                    "make the model under accelerate.init_empty_weights(include_buffers=False)"
                )


def _refuse_merged(module: nn.Module) -> None:
    """Raise where an adapter would be taken out, later, of weights that it is not in."""
    for fqn, part in module.named_modules():
        merged = getattr(part, "merged_adapters", None)
        if isinstance(merged, list) and merged:
            raise PatchError(
                f"{fqn}: {', '.join(map(repr, merged))} is merged into what would be replaced: "
                "unmerge it first (peft's unmerge_adapter, diffusers' unfuse_lora)"
            )


def _sources(
    targets: Sequence[_Target], key_map: KeyMap, weights: Mapping[str, Weight]
) -> list[Sequence[Segment]]:
    """Return what each target is made of, and raise where something is not there, or too short."""
    sources, missing = [], []
    for target in targets:
        name = next((h.fqn for h in target.holders if h.fqn in key_map), None)
        if name is None:
            missing.append(target.fqn)
            continue
        sources.append(key_map[name])
        _require_shape(target, key_map[name], weights)
    if missing:
        raise FormatError(f"{len(missing)} weights of the model are not in it: {_some(missing)}")
    return sources


def _require_shape(
    target: _Target, segments: Sequence[Segment], weights: Mapping[str, Weight]
) -> None:
    """Raise where the rows do not make the shape; ggml drops leading dimensions of one."""
    rows = sum(segment.rows for segment in segments)
    tails = {tuple(weights[s.source].shape[1:]) for s in segments}
    numel = rows * torch.Size(next(iter(tails))).numel()
    if len(tails) > 1 or numel != target.tensor.numel():
        tail = next(iter(tails))
        raise FormatError(
            f"has shape {(rows, *tail)}, the model's {target.fqn} "
            f"{tuple(target.tensor.shape)}: is it of another size of this model?",
            tensor=segments[0].source,
        )


def _nbytes(segments: Sequence[Segment], weights: Mapping[str, Weight]) -> int:
    """Return the bytes of rows in the file."""
    return sum(
        weights[s.source].nbytes * s.rows // max((1, *weights[s.source].shape[:1]))
        for s in segments
    )


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:3])
    return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"


@final
class _Loader:
    """Makes what takes the place of a Parameter or buffer."""

    def __init__(self, weights: Mapping[str, Weight], options: LoadOptions) -> None:
        self._reader = RowReader(weights, options.registry)
        self._weights, self._options = weights, options
        self._usual = _usual_dtype(weights.values()) if options.knows_dtypes else None

    def load(self, target: _Target, segments: Sequence[Segment]) -> _Loaded:
        """Read what a target will hold."""
        value, weight = self._reader.read(segments), self._weights[segments[0].source]
        dtype = self._dtype(target, weight)
        if isinstance(value, Packed):
            reason = self._why_not_packed(target, value)
        else:
            reason = _why_decoded([self._weights[segment.source] for segment in segments])
        if isinstance(value, Packed) and not reason:
            return self._packed(target, value, dtype, weight)
        source = in_float32(value, self._options.registry).reshape(target.tensor.shape)
        _require_kept(source, dtype, weight)
        tensor = source.to(target.device, dtype, copy=weight.is_shared)
        if isinstance(target.tensor, nn.Parameter):
            self._require_finite(tensor, weight, source)
            tensor = nn.Parameter(tensor, requires_grad=target.tensor.requires_grad)
        reason = reason or _why_plain(target.kind, weight)
        return _Loaded(target, tensor, self._report(target, NATIVE, tensor.nbytes, "-", reason))

    def _require_finite(self, tensor: Tensor, weight: Weight, source: Tensor) -> None:
        is_checked = tensor.is_floating_point() and not self._options.allow_nonfinite
        if is_checked and not are_finite(tensor):
            is_cast = are_finite(source)
            problem = (
                f"it has values beyond {tensor.dtype}" if is_cast else "it holds NaN or infinity"
            )
            raise FormatError(
                f"{problem}; allow_nonfinite=True reads it all the same", tensor=weight.name
            )

    def _dtype(self, target: _Target, weight: Weight) -> torch.dtype:
        """Return the dtype that a target gets; a module without data has none of its own yet."""
        own = target.tensor.dtype
        if not own.is_floating_point:
            return own
        stored = None
        if target.tensor.is_meta and self._options.knows_dtypes:
            stored = weight.dtype if _is_precision(weight.dtype) else self._usual
        dtype = self._options.dtype or stored or own
        # Who asks for float16 does not ask for overflows: `from_pretrained` does it too.
        is_too_narrow = self._options.dtype == torch.float16 and self._is_kept(target)
        return torch.float32 if is_too_narrow else dtype

    def _is_kept(self, target: _Target) -> bool:
        """Say whether the model wants a target in float32 where others are in float16."""
        return not set(self._options.kept_in_fp32).isdisjoint(target.fqn.split("."))

    def _packed(
        self, target: _Target, packed: Packed, dtype: torch.dtype, weight: Weight
    ) -> _Loaded:
        backend, _ = self._options.registry.find(packed.scheme)
        assert backend
        name = target.holders[0].name
        layout, tensors = storage_form(name, packed, backend, target.tensor.shape)
        layout = replace(
            layout, compute_dtype=weight.compute_dtype, keeps_fp32=self._is_kept(target)
        )
        tensors = {
            key: tensor.to(target.device, copy=weight.is_shared) for key, tensor in tensors.items()
        }
        value = packed_parameters(name, layout, tensors, dtype, NoSource())
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        return _Loaded(target, value, self._report(target, packed.scheme, nbytes, "none", ""))

    def _why_not_packed(self, target: _Target, packed: Packed) -> str:
        """Say why a layer cannot hold a weight as it is stored."""
        _, scheme = self._options.registry.find(packed.scheme)
        for holder in target.holders:
            kind = tensor_kind(holder.module, holder.name, target.tensor)
            reason = unsuitable_module(holder.module)
            if kind not in scheme.kinds:
                reason = kind
            elif packed.shape != rows_of(target.tensor.shape, kind):
                reason = "its rows are not those of the layer"
            if reason:
                return f"decoded from {packed.scheme}: {reason}"
        return ""

    def _report(
        self, target: _Target, scheme: str, nbytes: int, source: str, reason: str
    ) -> LayerReport:
        numel = target.tensor.numel()
        return LayerReport(
            fqn=target.fqn.removesuffix(".weight"),
            component=self._options.component,
            kind=target.kind,
            shape=tuple(target.tensor.shape),
            scheme=scheme,
            bytes_before=target.tensor.nbytes,
            bytes_after=nbytes,
            bits_per_weight=nbytes * 8 / numel if numel else 0.0,
            source=source,
            reason=reason,
        )


def _require_kept(tensor: Tensor, dtype: torch.dtype, weight: Weight) -> None:
    """Raise where a cast would lose more than precision; GGUF files hold integers as float32."""
    is_lost = tensor.dtype.is_complex and not dtype.is_complex
    if not (is_lost or dtype.is_floating_point or dtype.is_complex or tensor.dtype == dtype):
        is_lost = not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
    if is_lost:
        raise FormatError(f"is {tensor.dtype}, and the model's is {dtype}", tensor=weight.name)


def _is_precision(dtype: torch.dtype | None) -> bool:
    """Say whether models are in a dtype; codes and float8 are not what they compute in."""
    return dtype is not None and dtype.is_floating_point and dtype.itemsize > 1


def _usual_dtype(weights: Iterable[Weight]) -> torch.dtype | None:
    """Return the dtype that most weights of a file are in, None where it has no such."""
    found = Counter(weight.dtype for weight in weights if _is_precision(weight.dtype))
    return max(found, key=lambda dtype: found[dtype], default=None)


def _why_decoded(parts: Sequence[Weight]) -> str:
    """Say why parts that are stored in low bits make no packed weight; empty where none is."""
    schemes = ", ".join(dict.fromkeys(part.scheme for part in parts if part.scheme))
    return f"decoded from {schemes}: its parts are stored differently" if schemes else ""


def _why_plain(kind: str, weight: Weight) -> str:
    """Say why a weight is not packed, as other reports do."""
    if kind in ("bias", "buffer", "vector"):
        return kind
    if "norm" in kind.lower():
        return "norm"
    return f"stored as {str(weight.dtype).removeprefix('torch.')}"


def _put_plain(item: _Loaded) -> list[tuple[_Holder, Tensor | None]]:
    """Put what is not packed into its holders; return what they held."""
    if isinstance(item.value, PackedParameters):
        return []
    before = [(holder, holder.slots[holder.name]) for holder in item.target.holders]
    for holder, _ in before:
        holder.slots[holder.name] = item.value
    return before


def _packed_by_module(
    part: Staged,
) -> dict[nn.Module, tuple[str, dict[str, PackedParameters]]]:
    found: dict[nn.Module, tuple[str, dict[str, PackedParameters]]] = {}
    for item in part.loaded:
        if not isinstance(item.value, PackedParameters):
            continue
        first = item.target.holders[0]
        for holder in item.target.holders:
            fqn = dotted(part.component, holder.fqn)
            _, weights = found.setdefault(holder.module, (fqn, {}))
            weights[holder.name] = item.value.renamed(first.name, holder.name)
    return found
