"""The functions of `import lowbits` that read and write files: wiring only."""

from __future__ import annotations

import logging
from contextlib import ExitStack, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbits._target import modules_of
from lowbits.config import parse_size, require_dtype
from lowbits.core.adopt import adopt_layers
from lowbits.core.guards import saved_by
from lowbits.core.handle import find_handle, guard, settle_adapters
from lowbits.core.registry import DEFAULT
from lowbits.errors import (
    AlreadyPatchedError,
    BackendUnavailableError,
    ConfigError,
    FormatError,
    located,
)
from lowbits.files.checkpoint import (
    FILE_SUFFIXES,
    GGUF,
    OpenOptions,
    open_checkpoint,
    refuse_adapters,
)
from lowbits.files.folders import BESIDE_SAVED, atomic_folder, refuse_other_weights
from lowbits.files.forms.quanto import fitted
from lowbits.files.load import LoadOptions, install, stage
from lowbits.files.own import OWN_FILE, own_file_in, versions, weights_of
from lowbits.files.own_writer import WriteOptions, write_own
from lowbits.files.safetensors_writer import SHARD_BYTES
from lowbits.files.sharded import SUFFIX, files_of
from lowbits.integrations.diffusers import (
    forget_quantizer,
    is_modular,
    is_pipeline,
    kept_in_fp32,
)
from lowbits.integrations.keymaps import map_for
from lowbits.integrations.models import (
    components_in,
    folders_of,
    load_rest,
    refuse_pipeline,
    save_config,
    skeleton,
    wrapper_class,
)
from lowbits.integrations.module_tensors import tensors_of
from lowbits.streaming.engine import refuse_streamed

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from lowbits.core.report import Report
    from lowbits.files.checkpoint import Checkpoint
    from lowbits.files.rows import KeyMap
    from lowbits.files.weights import Weight
    from lowbits.progress import CancelToken, ProgressCallback

logger = logging.getLogger("lowbits.files")


def save(
    target: Any,
    path: str | Path,
    *,
    max_shard_size: int | str = SHARD_BYTES,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> None:
    """Write a module or pipeline as it is stored now; `load` and `load_pipeline` read it.

    Weights are written one at a time, packed ones in their scheme, tied ones once, adapters not at
    all. What was at `path` stays until all of it is written.

    Args:
        target: a module, packed or not, streamed or not; or a diffusers pipeline, whose own
            ``save_pretrained`` writes the same, but one model after the other into its place.
        path: a ``.safetensors`` file, or a folder: ``lowbits.safetensors`` and ``config.json`` of a
            module, a pipeline's own layout.
        max_shard_size: bytes of a file's tensors; what is larger is split, with an index beside it.
        progress: called after each weight; of a pipeline, of its packed models.
        cancel: stops between two weights when set.

    Raises:
        PatchError: a weight is another library's tensor: see `adopt`; or a module has a state
            that is no tensor.
        ConfigError: the folder holds other weights that would be read in place of these; the
            path is called as a file of another kind; or it holds the target's originals.
        OSError: the system refuses to write; what was there before stays.
    """
    path = Path(path)
    is_file = path.suffix == SUFFIX and not is_pipeline(target)
    if path.suffix.lower() in FILE_SUFFIXES and not is_file and not path.is_dir():
        raise ConfigError(
            f"path: {path.name} is called as a file of another kind. A module is saved into a "
            f"{SUFFIX} file or a folder, a pipeline into a folder; lowbits.save_gguf writes .gguf"
        )
    if is_pipeline(target):
        _save_pipeline(target, path, max_shard_size, progress, cancel)
        return
    (target,) = modules_of(target).values()
    shard_bytes = parse_size(max_shard_size, "max_shard_size")
    if not shard_bytes:
        raise ConfigError(f"max_shard_size: got {max_shard_size!r}, expected more than nothing")
    file = path
    if not is_file:
        refuse_other_weights(path, BESIDE_SAVED)
        file = path / OWN_FILE
    _refuse_originals(target, file)
    settle_adapters(target.modules(), takes_out=True)
    weights, ties = weights_of(target)
    if not is_file:
        path.mkdir(parents=True, exist_ok=True)
    options = WriteOptions(versions(weights.values()), shard_bytes, "save", progress, cancel)
    with nullcontext() if is_file else atomic_folder(path) as new:
        if new is not None:
            save_config(target, new)
        write_own(file, weights, ties, options)


def _refuse_originals(target: nn.Module, file: Path) -> None:
    """Raise where a file, or a shard of it, is the only place that a model's originals are in."""
    owned = find_handle(target)
    sources = [path for path in owned.source_files() if path.exists()] if owned else []
    for path in files_of(file) if sources else ():
        if path.exists() and any(map(path.samefile, sources)):
            raise ConfigError(
                f"path: {path} holds the originals that keep_source='file' restores from, which "
                "would be gone: save into another file"
            )


def _save_pipeline(
    pipe: Any,
    folder: Path,
    max_shard_size: int | str,
    progress: ProgressCallback | None,
    cancel: CancelToken | None,
) -> None:
    """Let a pipeline save itself, its packed models as they are stored, copies too."""
    if is_modular(pipe):
        raise ConfigError(
            "target: a modular pipeline is not saved as a whole: lowbits.save(pipe.transformer, "
            "folder) saves one of its models, and lowbits.load(folder, into=model) reads it"
        )

    def save_part(module: nn.Module, part: Path, size: int | str | None) -> None:
        refuse_other_weights(folder / part.name, BESIDE_SAVED)
        _refuse_originals(module, folder / part.name / OWN_FILE)
        save(module, part, max_shard_size=size or SHARD_BYTES, progress=progress, cancel=cancel)

    with ExitStack() as stack:
        for module in modules_of(pipe).values():
            stack.enter_context(saved_by(module, save_part))
        new = stack.enter_context(atomic_folder(folder))
        pipe.save_pretrained(new, max_shard_size=max_shard_size)


def save_component(module: nn.Module, folder: Path, max_shard_size: int | str | None) -> None:
    """Write a packed component of a pipeline: what its ``save_pretrained`` does."""
    save(module, folder, max_shard_size=max_shard_size or SHARD_BYTES)


def load(
    path: str | Path,
    *,
    into: Any,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> Report:
    """Give a module or pipeline the weights of a checkpoint, in place: all of them, or none.

    Low-bit weights become packed layers that hold the same bytes, whoever wrote them. Names may be
    diffusers' or the reference's. Nothing is quantized, and there is no way back to full precision:
    the result is as a copy of a packed module. `apply` with ``"native"`` places it.

    Args:
        path: a file, an index of shards, or a folder; for a pipeline, a file of its models.
        into: changed in place; costs least on the meta device, but for buffers that no file holds
            (``accelerate.init_empty_weights(include_buffers=False)``).
        dtype: of floating weights, but in float16 of those that the model keeps in float32; None:
            that of the module, on the meta device the file's, which GGUF files do not tell.
        verify: compare the checksum that lowbits' own files have first.
        allow_pickle: let torch unpickle ``.pt``, ``.bin`` and the like, harmless types only.
        allow_nonfinite: take scales and weights that are NaN or infinite.
        progress: called after each weight.
        cancel: stops between two weights when set; nothing has changed then.

    Returns:
        What each weight is stored as now; its warnings name what was not used.

    Raises:
        FormatError: the file is not what it claims to be, or not of this model.
        AlreadyPatchedError: the module is packed, has a handle, or is streamed.
        PatchError: a buffer that no file holds is on the meta device.
        ConfigError: it is a pickle, a LoRA, a pipeline's folder, or one that holds weights twice;
            there is no checksum to verify, or `dtype` is none that weights can be in.
        OSError: the system refuses to open it.
    """
    modules = modules_of(into)
    require_dtype("dtype", dtype, "a floating one, as torch.bfloat16")
    refuse_pipeline(Path(path), "; or lowbits.load_pipeline(path), where lowbits wrote it")
    opened = open_checkpoint(path, OpenOptions(DEFAULT, verify, allow_pickle, allow_nonfinite))
    refuse_adapters(opened)
    staged = []
    with located(path):
        for name, (weights, key_map) in _key_maps(modules, opened).items():
            module = modules[name]
            _refuse_applied(name, module)
            options = LoadOptions(
                DEFAULT, name, kept_in_fp32(module), dtype, opened.format != GGUF, allow_nonfinite,
                progress, cancel,
            )  # fmt: skip
            staged.append(stage(module, weights, key_map, options))
    report = install(staged)
    for part in staged:
        guard(modules[part.component], save_component)
        forget_quantizer(modules[part.component])  # made of its config; layers are ordinary ones
    return report.noting(opened.problems)


def _key_maps(
    modules: Mapping[str, nn.Module], opened: Checkpoint
) -> dict[str, tuple[Mapping[str, Weight], KeyMap]]:
    """Return weights, and what each model is made of; of a pipeline, of models in the file."""
    if "" in modules:
        return {"": _key_map(modules[""], opened)}
    found, failures = {}, []
    for name, module in modules.items():
        try:
            found[name] = _key_map(module, opened)
        except FormatError as error:
            failures.append(f"{name}: {error}")
    if not found:
        raise FormatError(f"none of the pipeline's models is in it ({'; '.join(failures)})")
    return found


def _key_map(module: nn.Module, opened: Checkpoint) -> tuple[Mapping[str, Weight], KeyMap]:
    weights = fitted(opened.weights, tensors_of(module).shapes)
    shapes = {name: weight.shape for name, weight in weights.items()}
    return weights, map_for(module, shapes, opened.architecture)


def _refuse_applied(name: str, module: nn.Module) -> None:
    """Raise where a handle, or a streamer, would not know what a model holds from now on."""
    if find_handle(module) is not None:
        raise AlreadyPatchedError(
            f"{name or type(module).__name__} was applied: lowbits.restore(target), or "
            "lowbits.dequantize(target), first"
        )
    refuse_streamed(module)


def adopt(target: Any) -> Report:
    """Take over layers that bitsandbytes, torchao, quanto or diffusers' GGUF quantized, in place.

    Nothing is quantized again: they become packed layers with the codes and scales that they have.
    The target has no handle then, as a copy of an applied one has none: ``lowbits.apply(target)``
    places, or streams, it as it is; ``lowbits.dequantize`` gives ordinary layers. All layers that
    can be taken over are, or, where anything raises, none.

    Args:
        target: a `torch.nn.Module` or a diffusers pipeline.

    Returns:
        Each layer with its scheme and bytes; what stays as it was, with the reason.

    Raises:
        AlreadyPatchedError: the target has a handle, or is streamed.
    """
    modules = modules_of(target)
    for name, module in modules.items():
        _refuse_applied(name, module)
    adoption = adopt_layers(modules, DEFAULT)
    for name, is_complete in adoption.components.items():
        guard(modules[name], save_component)
        if is_complete:
            forget_quantizer(modules[name])
    return adoption.report


def load_pipeline(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
    **options: Any,
) -> Any:
    """Return the diffusers pipeline of a folder that a packed one was saved into.

    Packed components are read as they are stored; the others by diffusers. It is on the CPU and
    has no handle: `apply` with ``"native"`` places or streams it.

    Args:
        path: what ``pipe.save_pretrained`` or `save` wrote.
        dtype: of floating weights; None: the file's.
        progress: called after each weight of packed components.
        cancel: stops between two weights when set.
        options: of ``DiffusionPipeline.from_pretrained``; a component by its name is taken as is.

    Raises:
        BackendUnavailableError: diffusers is not installed.
        ConfigError: the folder is no pipeline's, or a model's weights are there twice.
        FormatError: a file is not what it claims to be.
    """
    if find_spec("diffusers") is None:
        raise BackendUnavailableError(
            "load_pipeline needs diffusers: pip install 'lowbits[diffusers]'"
        )
    folder = Path(path)
    parts = {}

    def read(part: Path, library: str, class_name: str) -> nn.Module:
        model = skeleton(part, library, class_name)
        report = load(part, into=model, dtype=dtype, progress=progress, cancel=cancel)
        for warning in report.warnings:
            logger.warning("%s: %s", part.name, warning)
        return model

    for name, (library, class_name) in components_in(folder).items():
        if not own_file_in(folder / name) or name in options:
            continue
        if (wrapper := wrapper_class(library, class_name)) is None:
            parts[name] = read(folder / name, library, class_name)
        else:
            parts[name] = wrapper([read(p, library, kind) for p, kind in folders_of(folder / name)])
    if not parts:
        raise ConfigError(
            f"{folder} has no component that lowbits wrote: load it with "
            "DiffusionPipeline.from_pretrained, and lowbits.apply(pipe, scheme)"
        )
    return load_rest(folder, parts, dtype, **options)
