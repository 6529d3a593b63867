"""Tensors of every kind: strides, sizes, dtypes, classes, and the modes that they are made in."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from streaming.models import (
    WIDTH,
    Snapshot,
    Stack,
    assert_streams,
    inputs,
    reference,
    same,
    streamer_of,
)
from torch import nn

from lowbits.errors import LowbitsError
from lowbits.streaming.cut import lay_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

MODES = (torch.no_grad, torch.inference_mode, torch.enable_grad)
LOCATIONS = ("cpu", "disk")


def _strided() -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.weight = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH)[:, ::2])
    return layer


def _transposed() -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).t())
    return layer


def _expanded() -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.bias = nn.Parameter(torch.randn(1).expand(WIDTH))
    return layer


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize(
    "make",
    [
        _transposed,
        _strided,
        _expanded,
    ],
)
def test_tensors_that_are_not_contiguous(make: Callable[[], nn.Module], location: str) -> None:
    assert_streams(nn.Sequential(*(make() for _ in range(4))), inputs(), location=location)


class Odd(nn.Module):
    """Zero-size and 0-dim tensors, of Parameters and buffers; a None of each."""

    empty: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, WIDTH))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("count", torch.tensor(3), persistent=False)
        self.register_buffer("missing", None)
        self.register_parameter("absent", None)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight * self.scale + self.count
        return x + self.nothing.sum() + self.empty.sum()


@pytest.mark.parametrize("location", LOCATIONS)
def test_zero_size_and_zero_dim_tensors(location: str) -> None:
    assert_streams(nn.Sequential(*(Odd() for _ in range(3))), inputs(), location=location)


class Stored(nn.Module):
    """Tensors of a dtype that is converted before it is used."""

    raw: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        values = (torch.randn(WIDTH, WIDTH + 1) * 3).to(dtype)
        self.register_buffer("raw", values.clone())
        self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.float() + self.raw.float()[0])[:, :WIDTH] / 8


DTYPES = (
    torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.int64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
)  # fmt: skip


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype, location: str) -> None:
    model = nn.Sequential(*(Stored(dtype) for _ in range(3)))
    assert_streams(model, inputs(), location=location)


@pytest.mark.parametrize("location", LOCATIONS)
def test_nan_and_negative_zero_keep_their_bits(location: str) -> None:
    model = Stack(3)
    with torch.no_grad():
        model.blocks[0].up.weight[0, :3] = torch.tensor([float("nan"), -0.0, float("-inf")])
    assert_streams(model, inputs(), location=location)


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        torch.no_grad,
    ],
)
def test_modules_made_under_inference_mode(mode: Any, location: str) -> None:
    with torch.inference_mode():
        model = Stack(3)
    with mode():
        expected = model(inputs())
        with streamer_of(model, location=location):
            for _ in range(3):
                assert same(model(inputs()), expected)
        assert same(model(inputs()), expected)


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize(
    "second",
    [torch.no_grad, torch.enable_grad, torch.inference_mode],
)
def test_attach_in_one_mode_detach_in_another(first: Any, second: Any, location: str) -> None:
    model = Stack(3)
    expected = model(inputs())
    before = Snapshot(model)
    streamer = streamer_of(model, location=location)
    with first():
        streamer.attach()
        assert same(model(inputs()), expected)
    with second():
        assert same(model(inputs()), expected)
        streamer.detach()
    before.require()


class Sparse(nn.Module):
    adjacency: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(WIDTH).to_sparse())
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(torch.sparse.mm(self.adjacency, x.t()).t())
        return out


@pytest.mark.parametrize("location", LOCATIONS)
def test_sparse_buffers_stream_or_are_refused(location: str) -> None:
    model = nn.Sequential(*(Sparse() for _ in range(3)))
    with torch.no_grad():
        expected = model(inputs())
        with contextlib.suppress(LowbitsError), streamer_of(model, location=location):
            assert torch.equal(model(inputs()), expected)
        assert torch.equal(model(inputs()), expected)


def test_foreign_tensor_classes_stay_as_they_are() -> None:
    class Marked(torch.Tensor):
        pass

    model = Stack(3)
    for block in model.blocks:
        block._buffers["gain"] = torch.rand(WIDTH).as_subclass(Marked)
    assert len(lay_out(model, budget_bytes=1 << 40, depth=3).loose) == 3
    assert_streams(model, inputs())


@torch.no_grad()
def test_a_parameter_that_is_made_of_a_stand_in_is_an_ordinary_one() -> None:
    """As a normalizer of diffusers, which is sent to a device at each call, makes it."""
    model = Stack(4).eval()
    expected, up = model(inputs()), model.blocks[2].up
    with streamer_of(model) as streamer:
        for _ in range(2):
            up.weight = nn.Parameter(up.weight.to("cpu").to(torch.float32), requires_grad=False)
            assert same(model(inputs()), expected)
        assert streamer.stats().passes == 2
    assert type(up.weight) is nn.Parameter
    up.weight.data.mul_(2)
    assert not same(model(inputs()), expected)
    up.weight.data.mul_(0.5)
    assert same(model(inputs()), expected)


def test_an_empty_tensor_needs_no_bytes() -> None:
    model, expected = reference(), reference()(inputs())
    model.register_buffer("empty", torch.empty(0, device="meta"))
    with streamer_of(model, budget=10**6):
        assert same(model(inputs()), expected)
