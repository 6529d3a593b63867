"""Small models to stream, and what every test asks of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lowbits
from lowbits.errors import InsufficientMemoryError
from lowbits.streaming.layout import held_tensors
from lowbits.streaming.streamer import LayerStreamer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lowbits.streaming.stage import Stage
    from lowbits.streaming.stats import StreamStats

WIDTH = 16
#: Of `frozen`.
WIDE = 64


class Block(nn.Module):
    """A residual block: a norm, two layers, and a buffer."""

    gain: Tensor

    def __init__(self, width: int = WIDTH, hidden: int = 2 * WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.register_buffer("gain", torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.gain * self.down(torch.relu(self.up(self.norm(x))))
        return out


class Stack(nn.Module):
    """A first layer, blocks, a last layer; blocks are called in an order of choice."""

    def __init__(self, n_blocks: int = 4, width: int = WIDTH, *, hidden: int = 2 * WIDTH) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks: Any = nn.ModuleList(Block(width, hidden) for _ in range(n_blocks))
        self.head = nn.Linear(width, width)
        self.order = list(range(n_blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number in self.order:
            x = self.blocks[number](x)
        out: Tensor = self.head(x)
        return out


class Wrapper(nn.Module):
    """A root without a list: one child, called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def inputs(width: int = WIDTH, rows: int = 3) -> Tensor:
    """Return the same input each time."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(7))


def smallest_budget(model: nn.Module, **options: Any) -> int:
    """Return what the error says that would do, where one byte is allowed."""
    with pytest.raises(InsufficientMemoryError) as caught:
        LayerStreamer(model, device="cpu", budget=1, **options).attach()
    return caught.value.needed_bytes


def streamer_of(model: nn.Module, *, budget: int | None = None, **options: Any) -> LayerStreamer:
    """Return a streamer with the smallest budget, or another one; not attached."""
    room = smallest_budget(model, **options) if budget is None else budget
    return LayerStreamer(model, device="cpu", budget=room, **options)


def stage_of(streamer: LayerStreamer) -> Stage:
    """Return what is on the device, to look at it."""
    engine = streamer._engine
    assert engine is not None
    return engine._arbiter.stage_of(engine.component)


def bits(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's elements, in logical order."""
    dense = tensor.detach().clone(memory_format=torch.contiguous_format)
    return bytes(dense.reshape(-1).view(torch.uint8).tolist())


def same(a: Any, b: Any) -> bool:
    """Say whether two results are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@dataclass(frozen=True)
class _Held:
    owner: int
    names: tuple[str, ...]
    tensors: tuple[Any, ...]


class Snapshot:
    """Everything that must be as before once a model is no longer streamed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = [(m, type(m), dict(m.__dict__)) for m in model.modules()]
        self._names = [(list(m._parameters), list(m._buffers)) for m in model.modules()]
        self._tensors = [(t, self._look(t), bits(t)) for _, t in held_tensors(model)]

    @staticmethod
    def _look(tensor: Tensor) -> tuple[Any, ...]:
        return (
            type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device,
            tensor.requires_grad, tensor.is_inference(),
        )  # fmt: skip

    def pointers(self) -> list[int]:
        """Return the address of each tensor now."""
        return [tensor.data_ptr() for tensor, _, _ in self._tensors]

    def require(self) -> None:
        """Assert that nothing differs: objects, order, classes, attributes, bits."""
        now = list(self.model.modules())
        assert [id(m) for m in now] == [id(m) for m, _, _ in self._modules]
        assert [type(m) for m in now] == [kind for _, kind, _ in self._modules]
        # torch.compile leaves a mark of its own.
        names = [[key for key in m.__dict__ if key != "_is_torch_compile"] for m in now]
        assert names == [list(held) for _, _, held in self._modules]
        assert [(list(m._parameters), list(m._buffers)) for m in now] == self._names
        tensors = [tensor for _, tensor in held_tensors(self.model)]
        assert [id(t) for t in tensors] == [id(t) for t, _, _ in self._tensors]
        assert [self._look(t) for t in tensors] == [look for _, look, _ in self._tensors]
        assert [bits(t) for t in tensors] == [held for _, _, held in self._tensors]


def assert_streams(
    model: nn.Module,
    *args: Any,
    passes: int = 3,
    budget: int | None = None,
    **options: Any,
) -> StreamStats:
    """Assert that passes are bit-equal to the resident model's, within budget, and undone.

    Returns:
        The statistics after the last pass.
    """
    expected = model(*args)
    before = Snapshot(model)
    streamer = streamer_of(model, budget=budget, **options)
    with streamer:
        for number in range(passes):
            assert same(model(*args), expected), f"pass {number}"
        stats = streamer.stats()
    before.require()
    assert stats.peak_device_bytes <= stats.budget_bytes
    assert same(model(*args), expected)
    return stats


def reference() -> Stack:
    """Return the model of `streamed_models`, not streamed."""
    torch.manual_seed(0)
    return Stack(4).eval()


def frozen(scheme: str = "native") -> Stack:
    """Return blocks that are too wide to be left alone, packed or not, whose weights are frozen."""
    torch.manual_seed(0)
    model = Stack(4, WIDE, hidden=WIDE)
    if scheme != "native":
        lowbits.quantize(model, scheme)
    model.requires_grad_(requires_grad=False)
    return model


def streamed_models(locations: tuple[str, ...] = ("cpu", "disk")) -> Iterator[Stack]:
    """Yield the same model in each state that it may be in while it is streamed.

    In memory or on disk; before the first pass or when the ring has prefetched; with all of it
    streamed, some resident, or all.
    """
    least = smallest_budget(reference(), depth=1)
    budgets = (least, 10**6, least + 10_000)
    for location, passes, budget in product(locations, (0, 2), budgets):
        if budget == budgets[2] and (location, passes) != ("cpu", 2):
            continue
        model = reference()
        with LayerStreamer(model, device="cpu", budget=budget, location=location, depth=1):
            for _ in range(passes):
                model(inputs())
            yield model


class Hungry(nn.Module):
    """A layer between others that runs out of memory at some of its calls."""

    def __init__(self, at: range) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        if self.calls - 1 in self.at:
            raise torch.OutOfMemoryError("as asked")
        return x


def hungry(at: range, where: int = 2) -> tuple[nn.Sequential, Hungry]:
    torch.manual_seed(0)
    layer = Hungry(at)
    blocks = [Stack(1) for _ in range(5)]
    model = nn.Sequential(
        *blocks[:where], nn.Sequential(blocks[where], layer), *blocks[where + 1 :]
    )
    return model.eval(), layer
