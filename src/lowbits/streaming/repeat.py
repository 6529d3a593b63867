"""Whether a pass that ran out of memory can run again as if it had not run before."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch.utils._pytree import tree_flatten

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowbits.streaming.stage import Stage

#: Inputs that cannot be changed.
_VALUES: Final = (
    *(type(None), bool, int, float, complex, str, bytes),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)


@final
class Moment:
    """What a pass finds as it begins, and what it must find if it runs again."""

    def __init__(self, stage: Stage, inputs: Any, device: torch.device) -> None:
        """Remember it.

        Args:
            stage: that the pass runs on.
            inputs: of the pass, nested in any way. Tensors of torch's inference mode do not count
                writes, and are taken to be as they were.
            device: whose random numbers the pass may draw, beside the host's.
        """
        self._stage, self._inputs = stage, inputs
        self._leaves, self._form = tree_flatten(inputs)
        self._versions = list(map(_version, self._leaves))
        self._writes = stage.writes()
        self._random: list[tuple[Callable[[Any], Any], Any]] = [
            (leaf.set_state, leaf.get_state())
            for leaf in self._leaves
            if isinstance(leaf, torch.Generator)
        ]
        self._random.append((torch.set_rng_state, torch.get_rng_state()))
        if device.type != "cpu":
            module: Any = torch.get_device_module(device)
            if hasattr(module, "get_rng_state"):
                state = module.get_rng_state(device)
                self._random.append((lambda state: module.set_rng_state(state, device), state))

    @property
    def is_over(self) -> bool:
        """Whether something was changed since, or may have been, that a pass cannot take back."""
        known = (*_VALUES, torch.Tensor, torch.Generator)
        leaves, form = tree_flatten(self._inputs)
        is_same = form == self._form and all(map(operator.is_, leaves, self._leaves))
        is_same = is_same and all(isinstance(leaf, known) for leaf in leaves)
        is_same = is_same and list(map(_version, leaves)) == self._versions
        return not is_same or self._stage.writes() != self._writes

    def return_to(self) -> None:
        """Let the same random numbers be drawn again."""
        for put, state in self._random:
            put(state)


def _version(leaf: Any) -> int | None:
    is_counted = isinstance(leaf, torch.Tensor) and not leaf.is_inference()
    return leaf._version if is_counted else None
