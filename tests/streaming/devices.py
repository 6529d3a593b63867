"""Devices that do not exist here, given to the streamer in place of real ones."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, final
from unittest import mock

import torch
from torch import nn

from lowbits.errors import InsufficientMemoryError
from lowbits.streaming.engine import cut, require_fit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from lowbits.streaming.arbiter import Arbiter
    from lowbits.streaming.device_ops import DeviceOps

PLACES = ("lowbits.streaming.streamer.device_ops", "lowbits.streaming.models.device_ops")
PINNED = ("lowbits.streaming.tiers.pinned_empty", "lowbits.streaming.transfer.pinned_empty")


@final
class PlainSlab:
    """Host memory that is page-locked as far as the streamer knows."""

    def __init__(self, nbytes: int, settle: Callable[[], None] | None = None) -> None:
        with torch.inference_mode(mode=False):
            self.tensor = torch.empty(nbytes, dtype=torch.uint8)

    def release(self) -> None:
        """Nothing to give back."""


@contextmanager
def faked(ops: DeviceOps, slab: Callable[..., Any] = PlainSlab) -> Iterator[None]:
    """Let the streamer use these operations, and page-lock memory without a driver."""
    with ExitStack() as stack:
        for place in PLACES:
            stack.enter_context(mock.patch(place, return_value=ops))
        for place in PINNED:
            stack.enter_context(mock.patch(place, slab))
        yield


class Block(nn.Module):
    """A residual block of two linear layers, and a buffer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.register_buffer("scale", torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.scale * self.down(torch.relu(self.up(x)))
        return x + added


class Net(nn.Module):
    """Blocks of some sizes between a first and a last layer that belong to no block."""

    def __init__(self, hidden: Sequence[int], width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, size) for size in hidden)
        self.last = nn.LayerNorm(width)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.last(x)
        return normed


def least_budget(model: nn.Module, arbiter: Arbiter) -> int:
    """Return the smallest budget that a model can be streamed in by an arbiter of budget 0."""
    try:
        require_fit(cut(model, arbiter), arbiter)
    except InsufficientMemoryError as error:
        return error.needed_bytes
    return 0


def unit_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's tensors, each padded as in a unit."""
    return sum(-(-t.nbytes // 256) * 256 for t in (*model.parameters(), *model.buffers()))
