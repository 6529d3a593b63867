"""What tests of streamed pipelines share: the smallest budget, and what a pipeline was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowbits
from lowbits import errors
from lowbits.integrations.diffusers import components_of

#: One way through each part: copies in place and ahead, masters in memory and in a file.
QUEUE_CPU: dict[str, Any] = {"swap": "queue", "location": "cpu"}
ASYNC_DISK: dict[str, Any] = {"swap": "async", "location": "disk"}
MODES = (QUEUE_CPU, ASYNC_DISK)


def mode_name(mode: dict[str, Any]) -> str:
    return "-".join(mode.values())


def smallest_budget(target: Any, scheme: str = "native", **options: Any) -> int:
    """Return the bytes below which `lowbits.apply` refuses; the target is as before."""
    with pytest.raises(errors.InsufficientMemoryError) as caught:
        lowbits.apply(target, scheme, device="cpu", gpu_weights=0, **options)
    assert caught.value.needed_bytes > 0
    assert caught.value.available_bytes == 0
    assert caught.value.device == "cpu"
    return caught.value.needed_bytes


def stream(target: Any, scheme: str = "native", *, times: float = 1, **options: Any) -> Any:
    """Stream in so many times the smallest budget."""
    budget = int(times * smallest_budget(target, scheme))
    return lowbits.apply(target, scheme, device="cpu", gpu_weights=budget, **options)


class Anatomy:
    """Everything about a pipeline's modules that streaming might leave behind."""

    def __init__(self, target: Any) -> None:
        parts = {"": target} if isinstance(target, nn.Module) else components_of(target)
        self.parts = parts
        self.tensors = {
            (part, name): tensor
            for part, model in parts.items()
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        self.bits = {key: _bits(tensor) for key, tensor in self.tensors.items()}
        self.modules = self._modules()

    def _modules(self) -> list[Any]:
        return [
            (
                part,
                name,
                id(module),
                type(module),
                sorted(module.__dict__),
                list(module._parameters),
                list(module._buffers),
                len(module._forward_pre_hooks) + len(module._forward_hooks),
                len(module._state_dict_hooks),
            )
            for part, model in self.parts.items()
            for name, module in model.named_modules()
        ]

    def check(self) -> None:
        """Raise unless it is what it was: the same objects with the same bits."""
        assert self._modules() == self.modules
        for (part, name), tensor in self.tensors.items():
            owner, _, leaf = name.rpartition(".")
            module = self.parts[part].get_submodule(owner)
            held = {**module._parameters, **module._buffers}[leaf]
            assert held is tensor, f"{part}.{name}"
            assert torch.equal(_bits(tensor), self.bits[part, name]), f"{part}.{name}"
        assert all(lowbits.handle(part) is None for part in self.parts.values())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).clone()
