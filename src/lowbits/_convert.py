"""The functions of `import lowbits` that turn files into others: wiring only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from torch import Tensor, nn

from lowbits._target import require_one, unwrapped
from lowbits.backends.gguf.backend import PREFIX
from lowbits.config import LowbitsConfig, require_choice
from lowbits.core.device import default_device
from lowbits.core.handle import settle_adapters
from lowbits.core.names import dotted, modules_beside_adapters
from lowbits.core.registry import DEFAULT
from lowbits.core.report import LayerReport, Report
from lowbits.core.requantize import twice_text
from lowbits.core.scheme import NATIVE
from lowbits.core.select import Component, Selection, select
from lowbits.errors import ConfigError, SourceUnavailableError
from lowbits.files.checkpoint import (
    FILE_SUFFIXES,
    GGUF,
    OpenOptions,
    open_checkpoint,
    read_config,
    refuse_adapters,
)
from lowbits.files.convert import (
    converted,
    source_of,
    stored_name,
    twice_quantized,
    untied,
    widened,
)
from lowbits.files.folders import BESIDE_SAVED, atomic_folder, copy, refuse_other_weights
from lowbits.files.gguf_export import ExportOptions, export, planned
from lowbits.files.inspection import Inspection, inspected
from lowbits.files.own import OWN_FILE, versions, weights_of
from lowbits.files.own_writer import WriteOptions, write_own
from lowbits.files.pickles import memory_weights
from lowbits.files.rows import rearranged
from lowbits.files.sharded import SUFFIX
from lowbits.files.skeleton import skeleton_of
from lowbits.integrations.architectures import recognized
from lowbits.integrations.configs import Request, request_of
from lowbits.integrations.keymaps import classes_of, to_reference
from lowbits.integrations.models import (
    INDEX,
    components_in,
    copy_config,
    empty_model,
    folders_of,
    packed_by_default,
    refuse_pipeline,
    wrapper_class,
)
from lowbits.progress import CancelToken, ProgressCallback, ProgressEvent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbits.core.select import Decision
    from lowbits.files.weights import Weight

logger = logging.getLogger("lowbits.convert")

_GGUF: Final = ".gguf"
_UNKNOWN: Final = (
    "the architecture is not known by its names: no layer is kept in high precision for its place, "
    "and ComfyUI-GGUF does not load the file"
)
_NAMES: Final = ("reference", "diffusers")


def inspect(path: str | Path, *, allow_pickle: bool = False) -> Inspection:
    """Say what is in a checkpoint; its tensors are not read.

    Args:
        path: a file, an index of shards, or a folder.
        allow_pickle: let torch unpickle it, harmless types only; that reads all of it.

    Raises:
        FormatError: it is not what it claims to be.
        ConfigError: it is a pickle, or the folder of a pipeline of several models.
        OSError: the system refuses to open it.
    """
    refuse_pipeline(Path(path))
    opened = open_checkpoint(path, OpenOptions(DEFAULT, allow_pickle=allow_pickle))
    found = recognized(_shapes(opened.weights), opened.architecture)
    if found is None:
        return inspected(opened, None, None)
    classes = classes_of(found.name)
    own = (read_config(opened.path) or {}).get("_class_name")
    classes = (own,) if own in classes else classes
    kind = f"a {found.part.replace('_', ' ')} of transformers"
    return inspected(opened, found.name, " or ".join(classes) or kind)


def convert(
    src: str | Path,
    dst: str | Path,
    scheme: Any,
    *,
    rules: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
    on_requantize: str = "warn",
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> Report:
    """Write a checkpoint in another scheme, a weight at a time.

    Takes as much memory as the largest weight needs, whatever the model's size, on the accelerator
    if there is one. What was at `dst` stays until the new file is whole; that may be `src` itself,
    whose weights in full precision are gone then.

    Args:
        src: a safetensors or GGUF file, an index of shards, or the folder of a model or pipeline.
        dst: a ``.safetensors`` file, which `load` reads; a ``.gguf`` file, for a scheme of GGUF,
            in which a model's folder goes by the reference's names; or a folder, for a folder:
            `load_pipeline` reads a pipeline's.
        scheme: as for `apply`, but no `LowbitsConfig`.
        rules: a scheme, or ``"native"``, for each glob over layer names; not for GGUF files.
        skip: globs of layers that are left alone; not for GGUF files.
        on_requantize: ``"warn"``, ``"error"`` or ``"allow"`` where weights are in low bits already.
        progress: called after each weight; of GGUF files also after each that is checked first.
        cancel: stops between two weights when set.

    Returns:
        What each weight is stored as now, and why some were left alone.

    Raises:
        FormatError: a file is not what it claims to be.
        ConfigError: a value, a pattern or a pair of paths that means nothing here.
        NoCapableBackendError: no layer would be packed; why not.
        SourceUnavailableError: of ``on_requantize="error"``.
        NonFiniteWeightError: a weight that is to be packed holds NaN or infinity.
        OSError: the system refuses to write.
    """
    # Says what these may not be.
    LowbitsConfig(
        rules=rules, skip=skip, on_requantize=on_requantize, progress=progress, cancel=cancel
    )
    src, dst, request = Path(src), Path(dst), request_of(scheme)
    chosen = {glob: request_of(value).scheme for glob, value in (rules or {}).items()}
    how = _How(request, chosen, tuple(skip), on_requantize, progress, cancel)
    is_file = src.is_file() or dst.suffix.lower() in FILE_SUFFIXES
    if is_file and dst.suffix not in ("", SUFFIX, _GGUF) and not dst.is_dir():
        raise ConfigError(f"dst: {dst.name} ends with neither {SUFFIX} nor {_GGUF}")
    if (src / INDEX).is_file():
        return _convert_pipeline(src, dst, how)
    if dst.suffix == _GGUF:
        return _convert_to_gguf(src, dst, how)
    return _convert_models([_part(src, dst, how)], how)


@final
@dataclass(frozen=True)
class _How:
    """What `convert` was asked for."""

    request: Request
    rules: Mapping[str, str]
    skip: Sequence[str]
    on_requantize: str
    progress: ProgressCallback | None
    cancel: CancelToken | None


@final
@dataclass(frozen=True)
class _Part:
    """A model that is converted; its modules are empty.

    Attributes:
        component: what is asked for.
        weights: tied ones by one of their names.
        ties: the other names, and that one.
        folder: that it comes from, or its file.
        dst: file or folder that it goes to.
    """

    component: Component
    weights: Mapping[str, Weight]
    ties: Mapping[str, str]
    folder: Path
    dst: Path

    @property
    def file(self) -> Path:
        return self.dst if self.dst.suffix == SUFFIX else self.dst / OWN_FILE

    @property
    def named(self) -> dict[str, Weight]:
        """The weights by names with the component in front."""
        return {dotted(self.component.name, name): w for name, w in self.weights.items()}


def _part(src: Path, dst: Path, how: _How, name: str = "", *, is_asked: bool = True) -> _Part:
    opened = open_checkpoint(src, OpenOptions(DEFAULT))
    refuse_adapters(opened)
    weights, ties = untied(widened(opened.weights) if opened.format == GGUF else opened.weights)
    model = empty_model(src, _shapes(weights))
    asked = how.request
    component = Component(
        name,
        model or skeleton_of(weights),
        asked.scheme if is_asked else None,
        skip=asked.skip,
        compute_dtype=asked.compute_dtype,
    )
    return _Part(component, weights, ties, src, dst)


def _convert_models(parts: Sequence[_Part], how: _How) -> Report:
    """Convert models: all that can be refused is, before the first is written."""
    selection = Selection(how.rules, how.skip, DEFAULT, sees_meta=True)
    components = [part.component for part in parts]
    decisions = select(components, selection)
    require_one(components, decisions)
    by_part = [[d for d in decisions if d.component == part.component.name] for part in parts]
    results = [
        replace(part, weights=converted(part.weights, chosen, default_device(), DEFAULT))
        for part, chosen in zip(parts, by_part, strict=True)
    ]
    before = {name: weight for part in parts for name, weight in part.named.items()}
    after = {name: weight for part in results for name, weight in part.named.items()}
    schemes = {name: weight.scheme for name, weight in after.items()}
    is_kept = {part.component.name: _is_kept(part.folder, part.dst) for part in parts}
    notes = _requantized(before, schemes, how.on_requantize)
    for part in results:
        if part.file != part.dst:
            refuse_other_weights(part.dst, BESIDE_SAVED)
    done, total = 0, sum(weight.nbytes for weight in after.values())
    for part in results:
        _write(part, how, done, total)
        done += sum(weight.nbytes for weight in part.weights.values())
    return _report(before, after, decisions, is_kept).noting(notes)


def _write(part: _Part, how: _How, done_bytes: int, total_bytes: int) -> None:
    """Write one model of several; tell of it as a part of all that is written."""

    def progress(event: ProgressEvent) -> None:
        assert how.progress
        fqn = dotted(part.component.name, event.fqn)
        how.progress(ProgressEvent(event.stage, fqn, done_bytes + event.done_bytes, total_bytes))

    if part.file != part.dst:
        part.dst.mkdir(parents=True, exist_ok=True)
    options = WriteOptions(
        versions(part.weights.values()),
        stage="convert",
        progress=progress if how.progress else None,
        cancel=how.cancel,
    )
    write_own(part.file, part.weights, part.ties, options)
    if part.file != part.dst and part.folder.resolve() != part.dst.resolve():
        copy_config(part.folder, part.dst)


def _convert_pipeline(src: Path, dst: Path, how: _How) -> Report:
    """Convert what is packed by default, or named; the rest is copied."""
    if dst.suffix in (SUFFIX, _GGUF):
        raise ConfigError(f"dst: {src} is a pipeline of several models: name a folder, not {dst}")
    if dst.resolve().is_relative_to(src.resolve()):
        raise ConfigError(f"dst: {dst} is the pipeline's own folder, or in it: name another one")
    listed = components_in(src)
    for name, first in list(listed.items()):
        behind = [path.name for path, _ in folders_of(src / name)][1:]
        if behind and wrapper_class(*first):
            listed |= dict.fromkeys(behind, first)
    named = {glob.split(".")[0] for glob in how.rules}
    with atomic_folder(dst) as new:
        parts, others = [], []
        for path in sorted(src.iterdir()):
            is_asked = packed_by_default(path.name, listed.get(path.name))
            if is_asked or (path.name in named and path.name in listed):
                refuse_other_weights(dst / path.name, BESIDE_SAVED)
                parts.append(_part(path, new / path.name, how, path.name, is_asked=is_asked))
            else:
                others.append(path)
        report = _convert_models(parts, how)
        for path in others:
            copy(path, new / path.name)
    return report


def _convert_to_gguf(src: Path, dst: Path, how: _How) -> Report:
    if how.rules or how.skip:
        raise ConfigError("rules, skip: the types of a GGUF file go by rules of its architecture")
    scheme = how.request.scheme
    if not scheme.startswith(PREFIX):
        raise ConfigError(f"scheme: a GGUF file holds schemes of GGUF, not {scheme!r}")
    DEFAULT.require(scheme)
    opened = open_checkpoint(src, OpenOptions(DEFAULT))
    stored, _ = untied(opened.weights)
    weights, linear, notes = _reference_named(src, stored)
    arch = opened.architecture or _architecture(weights)
    options = ExportOptions(
        scheme.removeprefix(PREFIX),
        arch,
        "comfy" if arch else "sdcpp",  # which tells by names, and asks for no architecture
        linear,
        DEFAULT,
        default_device(),
        is_kept=_is_kept(src, dst),
        progress=how.progress,
        cancel=how.cancel,
    )
    report = _export(dst, weights, options, how.on_requantize)
    return report.noting(notes if arch else (_UNKNOWN, *notes))


def _reference_named(
    src: Path, weights: Mapping[str, Weight]
) -> tuple[Mapping[str, Weight], set[str] | None, tuple[str, ...]]:
    """Return the weights of a folder by the names that GGUF readers know, where there are such.

    Returns:
        The weights; the names of those of Linear layers, None where that is not known; notes.
    """
    model = empty_model(src, _shapes(weights))
    if model is None:
        return weights, None, ()
    linear = _linear_weights(model)
    try:
        return *_in_reference_names(model, weights, linear), ()
    except ConfigError as error:
        return weights, linear, (f"written with the model's own names: {error}",)


def _in_reference_names(
    model: nn.Module, weights: Mapping[str, Weight], linear: set[str]
) -> tuple[dict[str, Weight], set[str]]:
    key_map = to_reference(model)
    named = {name for name, rows in key_map.items() if rows[0].source in linear}
    return rearranged(weights, key_map, DEFAULT), named


def _linear_weights(model: nn.Module) -> set[str]:
    modules = modules_beside_adapters(model)
    return {dotted(fqn, "weight") for fqn, part in modules if isinstance(part, nn.Linear)}


def save_gguf(
    model: Any,
    path: str | Path,
    type_or_mix: str,
    *,
    arch: str | None = "auto",
    names: str = "reference",
    target: str = "comfy",
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> Report:
    """Write a model as a GGUF file that others read, a weight at a time.

    Weights that are packed in the type that they are to have keep their bytes; others are made of
    what the model computes with now.

    Args:
        model: a module, packed or not; or a state dict, whose names are written as they are.
        path: of the file; what was there stays until the new one is whole.
        type_or_mix: ggml's name, as ``"Q8_0"``, ``"Q4_K"`` or ``"Q4_K_M"``; ``"Q4_K-best"``: the
            same type, searched longer for less error; or a scheme's, as ``"gguf-q4_k"``.
        arch: value of ``general.architecture``; ``"auto"``: what the names tell; None: none.
        names: ``"reference"``: those of the original implementation, which most programs read;
            ``"diffusers"``: the model's own.
        target: who reads it: ``"comfy"`` (ComfyUI-GGUF, Forge), ``"sdcpp"`` (stable-diffusion.cpp)
            or ``"diffusers"``.
        progress: called after each weight, once it is checked and once it is written.
        cancel: stops between two weights when set.

    Returns:
        The type of each tensor, and why it is not the one asked for.

    Raises:
        ConfigError: a value that means nothing here, a path that is called as a file of another
            kind, or a model without names of the reference.
        NonFiniteWeightError: a weight that is to be packed holds NaN or infinity.
        OSError: the system refuses to write.
    """
    path = Path(path)
    _require_gguf(path, type_or_mix, arch, names)
    linear = None
    if isinstance(model, nn.Module):
        model = unwrapped(model)
        settle_adapters(model.modules(), takes_out=True)
        weights, _ = weights_of(model)
        linear = _linear_weights(model)
        if names == "reference":
            weights, linear = _in_reference_names(model, weights, linear)
    elif isinstance(model, Mapping) and all(isinstance(t, Tensor) for t in model.values()):
        weights = memory_weights(model)
    else:
        raise ConfigError(f"model: got {type(model).__name__}, expected a module or a state dict")
    if arch == "auto":
        arch = _architecture(weights)
    device = default_device()
    asked = type_or_mix.removeprefix(PREFIX)
    options = ExportOptions(
        asked, arch, target, linear, DEFAULT, device, progress=progress, cancel=cancel
    )
    return _export(path, weights, options, "warn")


def _require_gguf(path: Path, type_or_mix: Any, arch: Any, names: Any) -> None:
    """Raise where a value has no chance of being one of `save_gguf`."""
    require_choice("names", names, _NAMES)
    is_other = path.suffix.lower() in FILE_SUFFIXES and path.suffix.lower() != _GGUF
    if is_other or path.is_dir():
        raise ConfigError(f"path: {path} is no {_GGUF} file, or not called as one")
    for option, value in (("type_or_mix", type_or_mix), ("arch", arch or "auto")):
        if not isinstance(value, str):
            raise ConfigError(f"{option}: got {value!r}, expected a string")


def _export(
    path: Path, weights: Mapping[str, Weight], options: ExportOptions, on_requantize: str
) -> Report:
    notes = _requantized(weights, planned(weights, options), on_requantize)
    return export(path, weights, options).noting(notes)


def _architecture(weights: Mapping[str, Weight]) -> str | None:
    found = recognized(_shapes(weights), None)
    return found.name if found else None


def _shapes(weights: Mapping[str, Weight]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _requantized(
    before: Mapping[str, Weight], after: Mapping[str, str | None], policy: str
) -> tuple[str, ...]:
    """Return what to tell of weights that are quantized a second time.

    Args:
        before: as they are stored.
        after: the scheme that each will be in.
        policy: one of `lowbits.LowbitsConfig.on_requantize`.
    """
    steps = twice_quantized(before, after)
    if policy == "allow" or not steps:
        return ()
    sizes = {step: (len(group), sum(w.nbytes for w in group)) for step, group in steps.items()}
    text = f"{twice_text(sizes)}. Better: convert the original checkpoint, in 16 or 32 bits"
    if policy == "error":
        raise SourceUnavailableError(f"some weights would be {text}")
    logger.warning("%s", text)
    return (text,)


def _report(
    before: Mapping[str, Weight],
    after: Mapping[str, Weight],
    decisions: Sequence[Decision],
    is_kept: Mapping[str, bool],
) -> Report:
    layers = []
    for decision in decisions:
        name = dotted(decision.component, stored_name(decision))
        if name not in after:
            continue
        weight, numel = after[name], decision.shape.numel()
        layers.append(
            LayerReport(
                fqn=decision.fqn,
                component=decision.component,
                kind=decision.kind,
                shape=tuple(decision.shape),
                scheme=weight.scheme or NATIVE,
                bytes_before=before[name].nbytes,
                bytes_after=weight.nbytes,
                bits_per_weight=weight.nbytes * 8 / numel if numel else 0.0,
                source=source_of(before[name], is_kept=is_kept[decision.component])
                if weight.scheme
                else "-",
                reason=decision.reason,
            )
        )
    return Report(tuple(layers))


def _is_kept(src: Path, dst: Path) -> bool:
    """Say whether what is converted is there afterwards, and not written over."""
    return not (dst.exists() and dst.samefile(src))
