"""What the three trainings share: the learning-rate curve, one optimizer step, averaged weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    """Return the factor on the learning rate: linear warm-up times half a cosine, never quite 0."""
    return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-3


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take one step down the gradient of ``loss``, clipped to norm 1 over all parameters."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@final
class MovingAverage:
    """An exponential moving average of parameters; costs their bytes once more."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        """Start the average at the parameters' present values (copied)."""
        self._live = list(parameters)
        self._decay = decay
        self._mean = [parameter.detach().clone() for parameter in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters; early steps (from 0) weigh more."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        for mean, live in zip(self._mean, self._live, strict=True):
            mean.lerp_(live, weight)

    def exchange(self) -> None:
        """Exchange the parameters' values with the average's, in place; twice changes nothing."""
        for index, live in enumerate(self._live):
            live.data, self._mean[index] = self._mean[index], live.data
