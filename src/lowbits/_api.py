"""The functions of `import lowbits`: wiring only."""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import nn

from lowbits._files import save_component
from lowbits._target import (
    applied_alike,
    components_for,
    modules_of,
    placed_elsewhere,
    refuse_patched,
    require_one,
)
from lowbits.config import LowbitsConfig
from lowbits.core.backend import QuantBackend
from lowbits.core.convert import ConvertOptions, convert, stored_bytes_of
from lowbits.core.device import default_device, usable_device
from lowbits.core.handle import Handle, find_handle
from lowbits.core.homes import homes_of, same_device
from lowbits.core.interception import streamed_part
from lowbits.core.memory import storage_bytes
from lowbits.core.packed import workspace_bytes
from lowbits.core.registry import DEFAULT
from lowbits.core.requantize import requantized
from lowbits.core.scheme import NATIVE, SchemeInfo
from lowbits.core.select import Component, Selection, select
from lowbits.core.source import SourceFiles
from lowbits.core.surgery import Journal, undo
from lowbits.errors import ConfigError, SourceUnavailableError
from lowbits.integrations.adapters import Adapters
from lowbits.integrations.configs import Request, request_of
from lowbits.integrations.diffusers import announce_device, denoisers_of
from lowbits.integrations.vae import GuardedModels
from lowbits.streaming.activations import Activations
from lowbits.streaming.budget import BUDGETS
from lowbits.streaming.device_ops import free_bytes, is_unified
from lowbits.streaming.engine import refuse_streamed
from lowbits.streaming.layout import loose_bytes
from lowbits.streaming.models import (
    PlacedModels,
    Placement,
    ResidentModels,
    StreamedModels,
)
from lowbits.streaming.stats import tensors_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from lowbits.core.seams import Placed
    from lowbits.progress import CancelToken, ProgressCallback

logger = logging.getLogger("lowbits.api")

_OPTIONS: Final = {item.name for item in fields(LowbitsConfig)}


def apply(  # noqa: PLR0913 - one place for every option
    target: Any,
    scheme: Any = NATIVE,
    *,
    components: Mapping[str, Any] | Sequence[str] | None = None,
    rules: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
    device: torch.device | str | None = None,
    compute_dtype: torch.dtype | None = None,
    gpu_weights: int | str = "auto",
    reserve: int | str = "auto",
    swap: str = "auto",
    location: str = "auto",
    lora: str = "auto",
    keep_source: str = "auto",
    source: str | Path | None = None,
    never_oom: Collection[str] = (),
    on_requantize: str = "warn",
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> Handle:
    """Pack a module or pipeline in place, and place it on a device: all or nothing.

    Args:
        target: a `torch.nn.Module` or a diffusers pipeline; changed in place.
        scheme: a scheme's name, an entry of Forge's menu, a quantization config of diffusers or
            transformers, or a `LowbitsConfig`, which stands for all options.
        components: names to pack, or a scheme for each; None: denoiser and large text encoders.
        rules: a scheme, or ``"native"``, for each glob over layer names; the last match counts.
        skip: globs of layers that are left alone; they override rules.
        device: that the target runs on; None: the accelerator if there is one, else the CPU.
        compute_dtype: that packed layers multiply in; None: what is fast on their device.
        gpu_weights: a hard cap on weights on the device, as ``"6GB"``; ``"all"``: they fit, or it
            raises; ``"auto"``: what reserve leaves, on a CPU everything. The rest is streamed.
        reserve: left free by ``"auto"``: a size; ``"auto"``: 10 % or more, or what calls took.
        swap: how streamed weights are copied: `LayerStreamer`'s ``method``.
        location: where they wait, see `LayerStreamer`.
        lora: adapters act ``"fp16"`` beside packed weights, ``"merge"`` in them, or as ``"auto"``.
        keep_source: where originals are: ``"memory"``, source's ``"file"``, ``"none"``, ``"auto"``.
        source: safetensors file, or folder, that the weights were loaded from.
        never_oom: ``"denoiser"``: none of its blocks stays there; ``"vae"``: in tiles, always.
        on_requantize: ``"warn"``, ``"error"`` or ``"allow"`` where weights are in low bits already.
        progress: called after each packed layer.
        cancel: stops the operation between two layers when set.

    Raises:
        ConfigError: a value, a pattern or a name that means nothing here.
        BackendUnavailableError: the scheme's package does not work here.
        AlreadyPatchedError: the target is packed; use ``handle.switch`` or ``handle.restore``.
        NonFiniteWeightError: a weight holds NaN or infinity.
        SourceUnavailableError: of ``keep_source="file"`` or ``on_requantize="error"``.
        NoCapableBackendError: not one layer can be packed; `failures` says why.
        InsufficientMemoryError: ``gpu_weights`` is too small; `needed_bytes` says what would do.
    """
    config = _whole(LowbitsConfig(
        scheme, components, rules, skip, device, compute_dtype, gpu_weights, reserve, swap,
        location, lora, keep_source, source, never_oom, on_requantize, progress, cancel,
    ))  # fmt: skip
    return _apply(modules_of(target), config, _device_of(config))


def quantize(module: nn.Module, scheme: Any, **options: Any) -> Handle:
    """Pack a module in place where it is: as `apply`, but nothing is moved to another device.

    Where all of it is packed as asked already, nothing happens, and its handle is returned.

    Args:
        module: a `torch.nn.Module` or a diffusers pipeline; changed in place.
        scheme: as for `apply`, but no `LowbitsConfig`.
        options: those of `apply`, but ``device`` and what streams.
    """
    for option in options:
        if option in ("device", "gpu_weights", "reserve", "swap", "location", "never_oom"):
            raise ConfigError(f"{option}: quantize moves nothing; use lowbits.apply for that")
        if option not in _OPTIONS:
            raise TypeError(f"quantize() got an unexpected keyword argument {option!r}")
    return _apply(modules_of(module), LowbitsConfig(scheme, **options), None)


def schemes() -> tuple[SchemeInfo, ...]:
    """Return every scheme of every backend, and whether it can be used here."""
    return DEFAULT.schemes()


def backend(name: str) -> QuantBackend:
    """Return a backend by name.

    Raises:
        UnknownBackendError: with the closest name.
        BackendUnavailableError: the package that it comes from cannot be loaded.
    """
    return DEFAULT.backend(name)


def register_backend(backend: QuantBackend) -> None:
    """Add a backend to those that `apply` knows; packages use the entry point group instead.

    Raises:
        ConfigError: it is no `QuantBackend`.
        DuplicateBackendError: its name, or a scheme's, is taken.
    """
    if not isinstance(backend, QuantBackend):
        raise ConfigError(f"backend: got {backend!r}, expected an instance of lowbits.QuantBackend")
    DEFAULT.register(backend)


def _whole(given: LowbitsConfig) -> LowbitsConfig:
    """Return the config that stands for all options, where one was given for a scheme."""
    if not isinstance(config := given.scheme, LowbitsConfig):
        return given
    given.require_default("a LowbitsConfig stands for all options: set it in there")
    return config


def _device_of(config: LowbitsConfig) -> torch.device:
    return default_device() if config.device is None else usable_device(config.device)


def _apply(
    modules: Mapping[str, nn.Module],
    config: LowbitsConfig,
    device: torch.device | None,
    *,
    must_fit: bool = True,
) -> Handle:
    components = components_for(modules, config)
    rules = {glob: request_of(value).scheme for glob, value in (config.rules or {}).items()}
    selection = Selection(rules, config.skip, DEFAULT)
    if device is None and (applied := applied_alike(components, selection)):
        return applied
    elsewhere = placed_elsewhere(components)
    modules = {name: module for name, module in modules.items() if name not in elsewhere}
    refuse_patched([component for component in components if component.name in modules])
    decisions = select(components, selection)
    require_one(components, decisions)
    notes = requantized(decisions, config.on_requantize)
    files = _source_files(config)
    nbytes = stored_bytes_of([d for d in decisions if d.component in modules])
    target = _Target(modules, config, device)
    placed = target.choose(modules, config, nbytes, files)
    options = _options(config, files, device, is_streamed=placed.is_streamed)
    homes = [] if placed.is_streamed else homes_of(modules, device)
    packed = {decision.component for decision in decisions if decision.scheme}
    touched = {c.name: c.module for c in components if c.scheme or c.name in packed}
    journals: defaultdict[str, Journal] = defaultdict(Journal)
    owned = None
    try:
        conversion = convert(decisions, options, journals)
        for module, _ in homes:
            module.to(device)
        placed.attach(must_fit=must_fit)
        report = conversion.report.noting((*notes, *placed.stats().notes))
        adapters = Adapters(config.lora)
        parts = modules if placed.is_streamed else touched or modules
        owned = Handle(parts, report, target, placed, adapters)
        owned.came_from(homes)
        owned.attach(journals, save_component)
        adapters.before_pass()
        conversion.commit()
    except BaseException:
        placed.detach()
        undo(list(journals.values()))
        if owned is not None:
            owned.detach()
        for module, home in homes:
            module.to(home)
        raise
    if device is not None:
        BUDGETS.join(device, owned)
    # Who asked for it knows; what "auto" let go comes as a surprise.
    surprises = conversion.report.warnings if config.keep_source == "auto" else ()
    for warning in (*notes, *surprises):
        logger.warning("%s", warning)
    return owned


def _options(
    config: LowbitsConfig,
    files: SourceFiles | None,
    device: torch.device | None,
    *,
    is_streamed: bool,
) -> ConvertOptions:
    return ConvertOptions(
        keep_source=config.keep_source,
        source=files,
        device=device,
        hold=torch.device("cpu") if is_streamed else None,
        free_bytes=free_bytes,
        progress=config.progress,
        cancel=config.cancel,
    )


def _denoisers(modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the names of what runs at every step; a target that is a module runs as a whole."""
    names = [""] if "" in modules else denoisers_of(modules)
    if not names:
        raise ConfigError(f"never_oom: the target has no denoiser; it has {', '.join(modules)}")
    return frozenset(names)


def _source_files(config: LowbitsConfig) -> SourceFiles | None:
    return None if config.source is None else SourceFiles(config.source)


@final
class _Target:
    """What a handle does to its target; keeps no module alive."""

    def __init__(
        self, modules: Mapping[str, nn.Module], config: LowbitsConfig, device: torch.device | None
    ) -> None:
        self._modules = weakref.WeakValueDictionary(modules)
        self._config, self._device = config, device
        self._activations: defaultdict[str, Activations] = defaultdict(Activations)

    def modules(self) -> list[nn.Module]:
        """Return all of its models that still exist."""
        return list(self._modules.values())

    def choose(
        self,
        modules: Mapping[str, nn.Module],
        config: LowbitsConfig,
        nbytes: int,
        files: SourceFiles | None,
    ) -> PlacedModels:
        """Decide whether models of some bytes, as they will be stored, stay on the device.

        Args:
            modules: those that nobody else streams.
            config: says where they are to be.
            nbytes: of all their weights.
            files: that weights may come from.
        """
        device, everything = self._device, dict(self._modules)
        resident = ResidentModels(everything, device)
        if device is None:
            return resident
        placement = self._placement(device, modules, config)
        tensors = tensors_of(modules.values())
        here = [t for t in tensors if is_unified(device) or same_device(t.device, device)]
        budget = placement.budget(nbytes, storage_bytes(here))
        placed: PlacedModels = resident
        if budget is not None:
            announce = None if "" in everything else announce_device
            placed = StreamedModels(modules, placement, budget, announce, files)
        return GuardedModels(placed, everything, is_always_tiled="vae" in config.never_oom)

    def _placement(
        self, device: torch.device, modules: Mapping[str, nn.Module], config: LowbitsConfig
    ) -> Placement:
        is_ring = "denoiser" in config.never_oom
        return Placement(
            device, config.gpu_weights, config.reserve, config.swap, config.location,
            _denoisers(dict(self._modules)) if is_ring else frozenset(),
            BUDGETS.of(device), {name: self._activations[name] for name in modules},
            max(map(workspace_bytes, modules.values()), default=0),
        )  # fmt: skip

    def switch(self, owned: Handle, scheme: Any) -> Handle:
        """Pack the target in another scheme, with the options in force."""
        return _switch(owned, dict(self._modules), self._config, self._device, scheme)

    def place_again(
        self, owned: Handle, placed: Placed, changes: Mapping[str, Any], *, must_fit: bool
    ) -> Placed:
        """Place the target in another way, or as it was if that fails."""
        if self._device is None:
            if not changes:
                return placed
            raise ConfigError("lowbits.quantize never moves a module: use lowbits.apply for that")
        config = replace(self._config, **changes)
        files = _source_files(config)
        everything = dict(self._modules)
        with placed.turn():
            placement = self._placement(self._device, everything, config)
            if placed.resized(placement, everything, must_fit=must_fit):
                self._config = config
                return placed
            return self._place(
                owned, placed, config, files, is_asked=bool(changes), must_fit=must_fit
            )

    def _place(
        self,
        owned: Handle,
        placed: Placed,
        config: LowbitsConfig,
        files: SourceFiles | None,
        *,
        is_asked: bool,
        must_fit: bool,
    ) -> Placed:
        placed.detach()
        homes: list[tuple[nn.Module, torch.device]] = []
        try:
            left = _left_to_place(dict(self._modules), is_asked=is_asked)
            nbytes = loose_bytes(tensors_of(left.values()))
            new = self.choose(left, config, nbytes, files)
            if not new.is_streamed:
                homes = homes_of(left, self._device, is_ours=placed.is_streamed)
            for module, _ in homes:
                module.to(self._device)
            new.attach(must_fit=must_fit)
        except BaseException:
            for module, home in homes:
                module.to(home)
            placed.attach(must_fit=False)
            raise
        owned.came_from(homes)
        self._config = config
        return new


def _left_to_place(modules: Mapping[str, nn.Module], *, is_asked: bool) -> dict[str, nn.Module]:
    """Return the models that nobody else streams: what pipelines share, one of them does.

    Raises:
        AlreadyPatchedError: somebody asked for it, and others stream all of them.
    """
    left = {name: module for name, module in modules.items() if streamed_part(module) is None}
    for module in modules.values() if is_asked and not left else ():
        refuse_streamed(module)
    return left


class _Renamed(str):
    """The scheme of a rule that names what `switch` goes to, native weights included."""

    __slots__ = ()


def _carried(request: Request, before: Component) -> Request:
    """Return what is asked for of a component now, with what was left alone in it before."""
    skip = dict.fromkeys((*before.skip, *request.skip))
    return replace(
        request, skip=tuple(skip), compute_dtype=request.compute_dtype or before.compute_dtype
    )


def _switch(
    owned: Handle,
    modules: Mapping[str, nn.Module],
    config: LowbitsConfig,
    device: torch.device | None,
    scheme: Any,
) -> Handle:
    request = request_of(scheme)
    # What is mistyped, or missing, is not worth a restore.
    DEFAULT.require(request.scheme)
    _source_files(config)
    asked = {c.name: c for c in components_for(modules, config) if c.scheme}
    # What was to stay native does, where that was not asked for all.
    packed = {name: c for name, c in asked.items() if c.scheme != NATIVE}
    named = {c.scheme for c in packed.values()}
    rules = {
        glob: _Renamed(request.scheme)
        if isinstance(value, _Renamed) or request_of(value).scheme in named
        else value
        for glob, value in (config.rules or {}).items()
    }
    parts = {name: _carried(request, c) for name, c in (packed or asked).items()}
    new = replace(
        config,
        scheme=parts.get("", scheme),
        components=None if "" in modules else parts,
        rules=rules,
    )
    fused = owned.adapters.fused()
    owned.restore()
    try:
        return _apply_fused(modules, new, device, fused)
    except BaseException:
        # Interrupted when it was done: nobody has the new handle.
        made = next(filter(None, (find_handle(modules[name]) for name in asked)), None)
        if made is not None:
            made.restore()
        # The caller's callbacks may be what failed, or cancelled: they are not asked again.
        old = replace(config, progress=None, cancel=None)
        try:
            _apply_fused(modules, old, device, fused, must_fit=False)
        except SourceUnavailableError:  # a cast since: no file has what is packed now
            old = replace(old, keep_source="memory")
            _apply_fused(modules, old, device, fused, must_fit=False)
        raise


def _apply_fused(
    modules: Mapping[str, nn.Module],
    config: LowbitsConfig,
    device: torch.device | None,
    fused: Mapping[nn.Module, Any],
    *,
    must_fit: bool = True,
) -> Handle:
    """Apply, and merge what had been merged into the layers before."""
    owned = _apply(modules, config, device, must_fit=must_fit)
    try:
        owned.adapters.fuse_again(fused)
    except BaseException:
        owned.restore()
        raise
    return owned
