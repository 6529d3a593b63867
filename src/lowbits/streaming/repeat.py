"""Whether a pass that ran out of memory can run again as if it had not run before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowbits.streaming.stage import Stage


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
        self._stage = stage
        self._inputs = [
            (tensor, tensor._version)
            for tensor in tree_leaves(inputs)
            if isinstance(tensor, torch.Tensor) and not tensor.is_inference()
        ]
        self._writes = stage.writes()
        self._random: list[tuple[Callable[[Any], None], Any]] = [
            (torch.set_rng_state, torch.get_rng_state())
        ]
        module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
        if module is not torch and hasattr(module, "get_rng_state"):
            state = module.get_rng_state(device)
            self._random.append((lambda state: module.set_rng_state(state, device), state))

    @property
    def is_over(self) -> bool:
        """Whether something was written since that a pass cannot take back."""
        is_written = any(tensor._version != version for tensor, version in self._inputs)
        return is_written or self._stage.writes() != self._writes

    def return_to(self) -> None:
        """Let the same random numbers be drawn again."""
        for put, state in self._random:
            put(state)
