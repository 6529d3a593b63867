"""Modules that write into their own buffers and Parameters as they run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from streaming.models import WIDTH, inputs, same, streamer_of
from torch import nn

from lowbits.errors import LowbitsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Counting(nn.Module):
    """Writes into its own buffers in its forward: in place, and by a new tensor."""

    calls: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.proj(x) + self.last + self.calls
        self.last = x.detach().mean(0, keepdim=True)
        return x


class CountingBase(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Counting()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(40))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def normed() -> nn.Module:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in "abcd")
    )


def spectral() -> nn.Module:
    norm: Any = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(*(nn.Sequential(norm(nn.Linear(WIDTH, WIDTH))) for _ in "abcd"))


@pytest.mark.parametrize("budget", [None, 10**6])
@pytest.mark.parametrize(
    "make",
    [
        CountingBase,
        lambda: nn.Sequential(*(Counting() for _ in "abc")),
        normed,
        spectral,
    ],
)
def test_buffers_that_forward_writes_into(
    make: Callable[[], nn.Module], budget: int | None
) -> None:
    """As without streaming, pass by pass and afterwards; or an error."""
    torch.manual_seed(0)
    twin = make().train()
    torch.manual_seed(0)
    model = make().train()
    if budget is None and isinstance(model, CountingBase):
        budget = 20_000
    try:
        with torch.no_grad(), streamer_of(model, budget=budget):
            for _ in range(4):
                assert same(model(inputs()), twin(inputs()))
        twin_state, state = twin.state_dict(), model.state_dict()
        assert all(same(state[key], twin_state[key]) for key in twin_state)
    except LowbitsError:
        return
