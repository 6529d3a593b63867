"""Layers and tensors of other libraries, told by where their classes are; imports none of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from typing import Any

    from torch import Tensor, nn

#: Where a module keeps the hooks that its own class registers.
_HOOKS: Final = ("_load_state_dict_pre_hooks", "_state_dict_hooks")


@final
@dataclass(frozen=True)
class Foreign:
    """How a library's own layers differ from those of torch that packed layers are made of.

    Attributes:
        package: that the classes of its layers are in, or below.
        attributes: what such a layer has beside torch's: attributes, buffers and Parameters.
        dtypes: where a layer may say what dtype its weight had, e.g. ``"weight.state.dtype"``.
        inputs: where a layer says how its inputs are quantized, if they are.
    """

    package: str
    attributes: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    inputs: str = ""

    def quantizes_inputs(self, layer: nn.Module) -> bool:
        """Say whether a layer quantizes what it multiplies its weight with."""
        return bool(self.inputs) and self._at(layer, self.inputs) is not None

    def dtype_of(self, layer: nn.Module) -> torch.dtype | None:
        """Return the dtype that a layer's weight had, if the library keeps it."""
        found = (self._at(layer, path) for path in self.dtypes)
        return next((value for value in found if isinstance(value, torch.dtype)), None)

    @staticmethod
    def _at(value: object, path: str) -> object:
        for name in path.split("."):
            value = getattr(value, name, None)
        return value


def is_of(value: object, package: str) -> bool:
    """Say whether a value's class, or one that it inherits from, is in a package or below it."""
    return any(_is_in(cls, package) for cls in type(value).__mro__)


def _is_in(cls: type, package: str) -> bool:
    return f"{cls.__module__}.".startswith(f"{package}.")


def class_without(layer: nn.Module, package: str) -> type[nn.Module]:
    """Return the class that a layer has without a library: the first one without its classes."""
    return next(
        cls
        for cls in type(layer).__mro__
        if issubclass(cls, torch.nn.Module)
        and not any(_is_in(base, package) for base in cls.__mro__)
    )


def can_become(cls: type[nn.Module], other: type[nn.Module]) -> bool:
    """Say whether an object of one class may have its class set to another one.

    Python refuses where layouts differ: those of classes that were mixed with an `abc.ABC` do.
    """
    probe = object.__new__(cls)
    try:
        object.__setattr__(probe, "__class__", other)
    except TypeError:
        return False
    return True


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor of a subclass as an ordinary one that shares its memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def drop_hooks(state: MutableMapping[str, Any], package: str) -> None:
    """Replace a module's dictionaries of hooks by ones without those of a package.

    Args:
        state: the module's ``__dict__``.
        package: that the hooks' functions are in, or below.
    """
    for name in _HOOKS:
        hooks = state[name]
        mine = [key for key, hook in hooks.items() if _is_from(hook, package)]
        if mine:
            kept = ((key, hook) for key, hook in hooks.items() if key not in mine)
            state[name] = type(hooks)(kept)


def _is_from(hook: Any, package: str) -> bool:
    function = getattr(hook, "hook", hook)
    return f"{getattr(function, '__module__', '')}.".startswith(f"{package}.")
