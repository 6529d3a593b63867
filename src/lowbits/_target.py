"""A target: its models, what was asked for each of them, and whether that may be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from lowbits.core.handle import find_handle
from lowbits.core.interception import interceptor_of
from lowbits.core.scheme import NATIVE
from lowbits.core.select import Component, Selection, is_left_by_default, select
from lowbits.core.surgery import journal_of
from lowbits.errors import AlreadyPatchedError, ConfigError, NoCapableBackendError, suggestion
from lowbits.integrations.configs import component_requests, is_pipeline_config, request_of
from lowbits.integrations.diffusers import (
    components_of,
    default_reasons,
    is_pipeline,
    kept_in_fp32,
)
from lowbits.streaming.engine import refuse_streamed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbits.config import LowbitsConfig
    from lowbits.core.handle import Handle
    from lowbits.core.select import Decision


def modules_of(target: Any) -> dict[str, nn.Module]:
    """Return the models of a pipeline by name, or a module under the name ``""``.

    What `torch.compile` has wrapped is what is inside: calls of the wrapper see all that is done.

    Raises:
        ConfigError: it is neither.
    """
    if is_pipeline(target):
        return {name: unwrapped(module) for name, module in components_of(target).items()}
    if isinstance(target, nn.Module):
        return {"": unwrapped(target)}
    loads = "; load it first" if isinstance(target, str | PathLike) else ""
    raise ConfigError(
        f"target: got {type(target).__name__}, expected a torch.nn.Module or a diffusers pipeline"
        f"{loads}"
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what `torch.compile` has made a wrapper of, or the module itself."""
    while (inner := module._modules.get("_orig_mod")) is not None:
        module = inner
    return module


def components_for(modules: Mapping[str, nn.Module], config: LowbitsConfig) -> list[Component]:
    """Say for each module of the target which scheme was asked for."""
    wanted: Mapping[str, Any] | None = None
    if is_pipeline_config(config.scheme):
        wanted = component_requests(config.scheme)
    elif isinstance(config.components, Mapping):
        wanted = config.components
    elif config.components is not None:
        wanted = dict.fromkeys(config.components, config.scheme)
    reasons: dict[str, str] = {}
    if wanted is None:
        reasons = default_reasons(modules) if "" not in modules else {}
        wanted = {name: config.scheme for name in modules if name not in reasons}
    for name in wanted:
        if name not in modules:
            if "" in modules:
                kind = type(modules[""]).__name__
                raise ConfigError(f"components: a {kind} is no pipeline, and has no {name!r}")
            raise ConfigError(
                f"components: the target has no {name!r}{suggestion(name, modules)}; "
                f"it has {', '.join(modules) or 'none'}"
            )
    return [
        _component(
            name, module, wanted.get(name), reasons.get(name, "not among the components"), config
        )
        for name, module in modules.items()
    ]


def _component(
    name: str, module: nn.Module, scheme: Any, reason: str, config: LowbitsConfig
) -> Component:
    if scheme is None:
        return Component(name, module, None, reason, compute_dtype=config.compute_dtype)
    request = request_of(scheme)
    dtype = config.compute_dtype or request.compute_dtype
    return Component(name, module, request.scheme, "", request.skip, dtype, kept_in_fp32(module))


def applied_alike(components: Sequence[Component], selection: Selection) -> Handle | None:
    """Return the handle of components that are packed as asked already, every layer of them."""
    handles = {id(c.module): find_handle(c.module) for c in components if c.scheme}
    owned = next(iter(handles.values()), None)
    if owned is None or any(other is not owned for other in handles.values()):
        return None
    decisions = select(components, replace(selection, sees_packed=True))
    # Who leaves layers out, or names some, does not want those packed that are none of them.
    is_choosy = bool(selection.rules or selection.skip)
    is_other = any(
        d.scheme or (is_choosy and d.is_packed and not d.is_in_scheme) for d in decisions
    )
    return None if is_other else owned


def placed_elsewhere(components: Sequence[Component]) -> set[str]:
    """Return the names of components that another handle streams, and that are to stay as is."""
    return {
        c.name
        for c in components
        if c.scheme is None and find_handle(c.module) and interceptor_of(c.module)
    }


def refuse_patched(components: Sequence[Component]) -> None:
    """Raise where what would be packed is packed already, or streamed by somebody else."""
    for component in components:
        if component.scheme is None:
            continue
        name = component.name or type(component.module).__name__
        if find_handle(component.module) is not None:
            raise AlreadyPatchedError(
                f"{name} is packed already: lowbits.handle(target).switch(scheme) packs it in "
                "another scheme, .reconfigure(gpu_weights=...) places it elsewhere, "
                "lowbits.restore(target) undoes it; components=[...] leaves it out"
            )
        if any(journal_of(module) for module in component.module.modules()):
            raise AlreadyPatchedError(
                f"{name} holds packed layers already (a part of it was applied, or it is a part of "
                "an applied module): restore that, or call lowbits.dequantize(target) first"
            )
    for component in components:
        refuse_streamed(component.module)


def require_one(components: Sequence[Component], decisions: Sequence[Decision]) -> None:
    """Raise where a scheme was asked for and nothing would be packed."""
    if any(d.scheme or d.is_in_scheme for d in decisions) or all(
        c.scheme in (None, NATIVE) for c in components
    ):
        return
    asked = {c.name for c in components if c.scheme not in (None, NATIVE)}
    named = [d for d in decisions if d.component in asked and d.kind != "buffer"]
    matrices = {d.path: d.reason for d in named if len(d.shape) > 1}
    listed = "; ".join(
        f"{path or 'weight'}: {reason}" for path, reason in list(matrices.items())[:3]
    )
    hint = "; rules={'*': scheme} packs what is left alone by default"
    can_help = any(map(is_left_by_default, matrices.values()))
    raise NoCapableBackendError(
        f"no layer would be packed ({listed or 'the target has no matrices'})"
        f"{hint if can_help else ''}",
        matrices,
    )
