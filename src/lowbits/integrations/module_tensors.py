"""The tensors of a module by name, as if nothing in it were packed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from lowbits.core.names import dotted, modules_beside_adapters
from lowbits.core.packed import PackedLayer, marker_name

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

    from torch import nn

    from lowbits.integrations.row_tracing import Shape, Shapes


@final
@dataclass(frozen=True)
class ModuleTensors:
    """The Parameters and persistent buffers of a module.

    Attributes:
        shapes: by name; of a tensor that has several names, by the first.
        aliases: the other names of such, and the first of each.
    """

    shapes: Shapes
    aliases: Mapping[str, str]

    def names_in(self, names: Shapes) -> dict[str, str]:
        """Return by which of its names each tensor is there; those that are not are not in it."""
        found = {first: alias for alias, first in self.aliases.items() if alias in names}
        return found | {name: name for name in self.shapes if name in names}

    def are_in(self, names: Shapes) -> bool:
        """Say whether each tensor is there."""
        return len(self.names_in(names)) == len(self.shapes)

    def fit(self, shapes: Shapes) -> bool:
        """Say whether each tensor is there, with as many elements."""
        found = self.names_in(shapes)
        return self.are_in(shapes) and all(
            math.prod(self.shapes[name]) == math.prod(shapes[there])
            for name, there in found.items()
        )


def tensors_of(module: nn.Module) -> ModuleTensors:
    """Return a module's tensors, as if nothing were packed, and without adapters."""
    shapes: dict[str, Shape] = {}
    firsts: dict[Hashable, str] = {}
    aliases: dict[str, str] = {}
    for prefix, part in modules_beside_adapters(module, remove_duplicate=False):
        for name, identity, shape in _tensors_in(part):
            fqn = dotted(prefix, name)
            first = firsts.setdefault(identity, fqn)
            if first == fqn:
                shapes[fqn] = shape
            else:
                aliases[fqn] = first
    return ModuleTensors(shapes, aliases)


def _tensors_in(module: nn.Module) -> Iterator[tuple[str, Hashable, Shape]]:
    layouts = module.lowbits_layouts if isinstance(module, PackedLayer) else {}
    stored = {field.parameter for layout in layouts.values() for field in layout.fields}
    stored.update(marker_name(name) for name in layouts)
    for name, layout in layouts.items():
        yield name, (id(module), name), tuple(layout.shape)
    persistent = module._buffers.keys() - module._non_persistent_buffers_set
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or name in stored:
            continue
        if name in module._parameters or name in persistent:
            yield name, id(tensor), tuple(tensor.shape)
