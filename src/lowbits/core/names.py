"""Dotted names of modules and tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

#: What adapter libraries put between a layer and its name, and how they call the layer then.
WRAPPED: Final = "base_layer"

#: What peft's model keeps prompts in that are tuned, and what makes them.
_PROMPTS: Final = "prompt_encoder"


def dotted(*parts: str) -> str:
    """Join the parts of a name; empty ones (the target itself, a layer's own weight) leave no dot.

    Example:
        >>> dotted("", "blocks.0", "weight")
        'blocks.0.weight'
    """
    return ".".join(part for part in parts if part)


def adapter_fqns(module: nn.Module, *, remove_duplicate: bool = True) -> Iterator[str]:
    """Yield the dotted prefixes of adapters: LoRA factors, as peft's layers list them, prompts.

    Args:
        module: with or without adapters.
        remove_duplicate: as for ``named_modules``.
    """
    for fqn, child in module.named_modules(remove_duplicate=remove_duplicate):
        if hasattr(child, "peft_config") and _PROMPTS in child._modules:
            yield dotted(fqn, _PROMPTS)
        names = getattr(child, "adapter_layer_names", None)
        if isinstance(names, tuple):
            for name in names:
                yield dotted(fqn, name)


def modules_beside_adapters(
    module: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules by the names that they have without adapters, which are left out.

    Args:
        module: with or without adapters.
        remove_duplicate: as for ``named_modules``.
    """
    prefixes = list(adapter_fqns(module, remove_duplicate=remove_duplicate))
    adapters = tuple(f"{fqn}." for fqn in prefixes)
    wrapped = {fqn.rpartition(".")[0] for fqn in prefixes}
    names = {"": ""}
    for fqn, part in module.named_modules(remove_duplicate=remove_duplicate):
        parent, _, name = fqn.rpartition(".")
        is_wrapped = name == WRAPPED and parent in wrapped
        names[fqn] = names[parent] if is_wrapped else dotted(names[parent], name)
        if not f"{fqn}.".startswith(adapters):
            yield names[fqn], part
