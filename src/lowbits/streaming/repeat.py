"""Whether a pass that ran out of memory can run again as if it had not run before."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch.utils._pytree import tree_flatten

from lowbits.core.memory import same_bits, write_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lowbits.streaming.stage import Stage

#: Inputs that cannot be changed.
_VALUES: Final = (
    *(type(None), bool, int, float, complex, str, bytes),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)


@final
class RandomState:
    """Which random numbers come next: the host's, a device's, and those of generators."""

    def __init__(self, leaves: Iterable[Any], device: torch.device) -> None:
        """Remember it.

        Args:
            leaves: of the inputs of a call, of which some may be generators.
            device: whose random numbers the call may draw, beside the host's.
        """
        self._states: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (leaf.set_state, (leaf.get_state(),))
            for leaf in leaves
            if isinstance(leaf, torch.Generator)
        ]
        self._states.append((torch.set_rng_state, (torch.get_rng_state(),)))
        module: Any = None if device.type == "meta" else torch.get_device_module(device)
        if device.type != "cpu" and hasattr(module, "get_rng_state"):
            where = () if device.type == "mps" else (device,)  # there is one of that
            state = module.get_rng_state(*where)
            self._states.append((module.set_rng_state, (state, *where)))

    def return_to(self) -> None:
        """Let the same random numbers be drawn again."""
        for put, arguments in self._states:
            put(*arguments)


@final
class Moment:
    """What a pass finds as it begins, and what it must find if it runs again."""

    def __init__(self, stage: Stage, inputs: Any, device: torch.device) -> None:
        """Remember it.

        Args:
            stage: that the pass runs on.
            inputs: of the pass, nested in any way. Tensors of torch's inference mode do not count
                writes: they are copied.
            device: whose random numbers the pass may draw, beside the host's.
        """
        self._stage, self._inputs = stage, inputs
        self._leaves, self._form = tree_flatten(inputs)
        self._versions = list(map(_version, self._leaves))
        self._values = [
            (leaf, leaf.clone())
            for leaf, version in zip(self._leaves, self._versions, strict=True)
            if version is None and isinstance(leaf, torch.Tensor)
        ]
        self._writes = stage.writes()
        self._random = RandomState(self._leaves, device)

    @property
    def is_over(self) -> bool:
        """Whether something was changed since, or may have been, that a pass cannot take back."""
        known = (*_VALUES, torch.Tensor, torch.Generator)
        leaves, form = tree_flatten(self._inputs)
        is_same = form == self._form and all(map(operator.is_, leaves, self._leaves))
        is_same = is_same and all(isinstance(leaf, known) for leaf in leaves)
        is_same = is_same and list(map(_version, leaves)) == self._versions
        is_same = is_same and all(same_bits(leaf, value) for leaf, value in self._values)
        return not is_same or self._stage.writes() != self._writes

    def return_to(self) -> None:
        """Let the same random numbers be drawn again."""
        self._random.return_to()


def _version(leaf: Any) -> int | None:
    return write_count(leaf) if isinstance(leaf, torch.Tensor) else None
