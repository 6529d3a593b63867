"""What others would do to a streamed model's weights, and refusing it before anything moves.

accelerate and diffusers move weights, or convert them, in hooks around forwards. Neither is
imported here: their hooks can only come where somebody else did that.
"""

from __future__ import annotations

import sys
import weakref
from functools import cache
from typing import TYPE_CHECKING, Any, Final, final

from lowbits.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import nn

#: Where diffusers keeps a module's hooks.
_REGISTRY: Final = "_diffusers_hook"

_CASTING: Final = "layerwise_casting"
#: Hooks of diffusers that move or convert weights themselves.
_HOOKS: Final = ("group_offloading", "lazy_prefetch_group_offloading", _CASTING)


def refuse_foreign(module: nn.Module, where: str) -> None:
    """Raise where hooks of another library move a module's weights.

    Raises:
        PatchError: naming the hooks, and the way out.
    """
    foreign = [hook for hook in _hooks_of(module) if hook in _HOOKS]
    hook = module.__dict__.get("_hf_hook")
    if _CASTING in foreign:
        raise PatchError(
            f"{where} is stored in float8 by enable_layerwise_casting, and to remove its hooks "
            "does not bring the weights back: load the model without it. "
            'lowbits.apply(target, "float8-e4m3fn-raw", gpu_weights=...) stores the same bytes'
        )
    if foreign or not (hook is None or getattr(hook, "is_lowbits", False)):
        raise PatchError(
            f"{where} has hooks of accelerate or diffusers that move its weights "
            f"({', '.join(foreign) or '_hf_hook'}): remove them (pipe.remove_all_hooks(), "
            "accelerate.hooks.remove_hook_from_module), or undo the streaming "
            "(lowbits.restore; handle.reconfigure changes it): two cannot decide where they are"
        )


def refuse_hook(module: nn.Module, what: str) -> None:
    """Refuse a hook that is about to come.

    Raises:
        PatchError: always.
    """
    instead = "change how it is streamed with handle.reconfigure(gpu_weights=..., location=...)"
    if what == _CASTING:
        instead = (
            'store it in float8 with handle.switch("float8-e4m3fn-raw"), the same bytes as '
            "enable_layerwise_casting makes, or " + instead
        )
    raise PatchError(
        f"this {type(module).__name__} is streamed by lowbits: hooks of accelerate or diffusers "
        f"({what}) cannot move or convert its weights too. Instead, {instead}; or undo the "
        "streaming first (lowbits.restore, LayerStreamer.detach)"
    )


def has_cache_hook(model: nn.Module) -> bool:
    """Say whether a hook of diffusers remembers something of earlier passes: caches do."""
    registries = (module.__dict__.get(_REGISTRY) for module in model.modules())
    hooks = (hook for found in registries if found is not None for hook in found.hooks.values())
    return any(getattr(hook, "_is_stateful", False) for hook in hooks)


def _hooks_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's hooks in diffusers' registry."""
    registry = module.__dict__.get(_REGISTRY)
    return tuple(registry.hooks) if registry is not None else ()


@final
class HookGuard:
    """Lets every module of a streamed model refuse diffusers' hooks that move or convert weights.

    They would be put on layers, which nothing else of lowbits stands before, one by one and at
    once. Other hooks, caches and guidance, are accepted, and outlive the guard.
    """

    def __init__(self, root: nn.Module) -> None:
        """Prepare; nothing is changed before `install`."""
        self._root = root
        # Adapters may go meanwhile, and their modules with them.
        self._guarded: list[tuple[weakref.ref[nn.Module], weakref.ref[Any], bool]] = []

    def install(self) -> None:
        """Give every module a registry that refuses; nothing where diffusers has none, or twice.

        Raises:
            PatchError: a module has such a hook already; nothing is changed.
        """
        base: Any = getattr(sys.modules.get("diffusers.hooks"), "HookRegistry", None)
        if base is None or self._guarded:
            return
        for name, module in self._root.named_modules():
            refuse_foreign(module, name or type(module).__name__)  # while it was removed
        for module in self._root.modules():
            is_new = _REGISTRY not in module.__dict__
            registry = module.__dict__.setdefault(_REGISTRY, base(module) if is_new else None)
            is_plain = type(registry) is base
            if is_plain:
                registry.__class__ = _guarding(base)
                self._guarded.append((weakref.ref(module), weakref.ref(registry), is_new))

    def remove(self) -> None:
        """Take the registries away that nobody else has used."""
        while self._guarded:
            owner, guarding, is_new = self._guarded.pop()
            module, registry = owner(), guarding()
            if module is None or registry is None:
                continue
            registry.__class__ = type(registry).__mro__[1]
            if is_new and not registry.hooks and module.__dict__.get(_REGISTRY) is registry:
                del module.__dict__[_REGISTRY]


@cache
def _guarding(base: Hashable) -> type[Any]:
    """Return a subclass of diffusers' registry that refuses some hooks."""

    class Guarding(base):  # type: ignore[misc, valid-type]
        def register_hook(self, hook: Any, name: str) -> None:
            if name in _HOOKS:
                refuse_hook(self._module_ref, name)
            super().register_hook(hook, name)

        def __reduce__(self) -> tuple[Any, ...]:
            """Copies and pickles are ordinary ones."""
            return base, (self._module_ref,), dict(self.__dict__)

    return Guarding
