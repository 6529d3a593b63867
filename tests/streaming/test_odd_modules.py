"""Modules of unusual classes, weights that become others, and passes inside transforms."""

from __future__ import annotations

import abc
import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch
from streaming.models import (
    WIDTH,
    Snapshot,
    Stack,
    inputs,
    reference,
    same,
    smallest_budget,
    streamer_of,
)
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import lowbits
from lowbits.errors import PatchError, StreamError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LOCATIONS = ("cpu", "disk")

jit = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Abstract(abc.ABC, nn.Module):
    """Its objects are laid out as no class is whose first base is a module's."""


class Part(Abstract):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x).tanh()
        return out


class Whole(Abstract):
    def __init__(self, part: Callable[[], nn.Module] = Part) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(part() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Guarding(Part):
    """Lets nobody set its class."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError(name)
        super().__setattr__(name, value)


@pytest.mark.parametrize("part", [Part, Guarding])
@torch.no_grad()
def test_classes_that_lay_their_objects_out_otherwise(part: type[nn.Module]) -> None:
    model = Whole(part)
    before, expected = Snapshot(model), model(inputs())
    tensors = copy.deepcopy(model.state_dict())
    with streamer_of(model):
        for _ in range(3):
            assert same(model(inputs()), expected)
        assert isinstance(model, Whole)
        assert isinstance(model.blocks[1], part)
        copied = copy.deepcopy(model)
        assert type(copied) is Whole
        assert same(copied(inputs()), expected)
        assert same(model.state_dict()["blocks.1.linear.bias"], tensors["blocks.1.linear.bias"])
    before.require()
    assert type(model) is Whole
    assert type(model.blocks[1]) is part


class Processor(nn.Module):
    """Computes with the layers of who calls it, and says by its signature what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def __call__(self, owner: Attention, x: Tensor, gain: float = 1.0) -> Tensor:
        out: Tensor = self.layer(owner.inner(x)).tanh() * gain
        return out


class Attention(nn.Module):
    """As diffusers' calls its processors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.processor = Processor()

    def forward(self, x: Tensor, **options: float) -> Tensor:
        known = inspect.signature(self.processor.__call__).parameters
        out: Tensor = self.processor(self, x, **{k: v for k, v in options.items() if k in known})
        return out


class Called(Part):
    """As layers of transformers were, for gradient checkpointing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


@torch.no_grad()
def test_a_call_before_the_forward_makes_no_difference() -> None:
    model = Whole(lambda: nn.Sequential(Called(), Called()))
    expected = model(inputs())
    with streamer_of(model, budget=3_000, method="async") as streamer:
        names = {unit.name for unit in streamer.stats().units}
        assert {"blocks.0.0", "blocks.0.1"} <= names
        for _ in range(3):
            assert same(model(inputs()), expected)


@pytest.mark.parametrize("method", ["queue", "async"])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.3, 0.6, 0.9])
@torch.no_grad()
def test_modules_that_compute_with_the_layers_of_their_caller(share: float, method: str) -> None:
    model = Stack(0)
    model.blocks.extend(Attention() for _ in range(4))
    model.order = list(range(4))
    for block in model.blocks:
        block.forward = functools.partial(block.forward, gain=3.0)
    expected = model(inputs())
    budget = int(share * sum(tensor.nbytes for tensor in model.parameters()))
    needed = smallest_budget(model, method=method)
    with streamer_of(model, budget=max(budget, needed), method=method):
        for _ in range(3):
            assert same(model(inputs()), expected)


def test_layers_that_are_laid_out_otherwise_are_not_packed() -> None:
    class Layer(abc.ABC, nn.Linear):
        """Packed layers have torch's class first."""

    model = nn.Sequential(nn.Linear(64, 64), Layer(64, 64))
    before = Snapshot(model)
    with pytest.raises(PatchError, match="1: a Layer cannot become a packed layer.*skip= leaves"):
        lowbits.quantize(model, "float8-e4m3fn")
    before.require()
    assert lowbits.quantize(model, "float8-e4m3fn", skip=["1"]).report().layers


class Sealed(type):
    """Allows no class of its classes but one."""

    def __new__(cls, name: str, bases: tuple[type, ...], content: dict[str, Any]) -> Any:
        if any(isinstance(base, Sealed) for base in bases):
            raise TypeError("no subclasses")
        return super().__new__(cls, name, bases, content)


class Final(nn.Module, metaclass=Sealed):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.inner = torch.jit.script(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.linear(x))
        return out


@jit
@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Final, "cannot stand in front of a Final: no subclasses"),
        (Scripted, "0.inner is of torch.jit"),
        (lambda: nn.LazyLinear(WIDTH), "0.weight has no shape yet"),
    ],
)
def test_modules_that_cannot_be_streamed(part: Callable[[], nn.Module], message: str) -> None:
    model = nn.Sequential(part(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    tensors = [*model.parameters()]
    values = [tensor.tolist() for tensor in tensors[-4:]]
    for _ in range(2):
        with pytest.raises(PatchError, match=message):
            lowbits.LayerStreamer(model, device="cpu", budget=10**6).attach()
        assert [tensor.tolist() for tensor in tensors[-4:]] == values
    assert all(a is b for a, b in zip(tensors[-4:], [*model.parameters()][-4:], strict=True))
    assert type(model) is nn.Sequential
    copy.deepcopy(model)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.values


@jit
def test_scripted_parts_are_left_alone_when_the_rest_is_packed() -> None:
    model = nn.Sequential(nn.Linear(64, 64), torch.jit.script(Table()))
    handle = lowbits.quantize(model, "float8-e4m3fn", rules={"1.values": "float8-e4m3fn"})
    reasons = {row.fqn: row.reason for row in handle.report().layers}
    assert reasons["1.values"] == "torch.jit lets nobody exchange its weights"
    handle.restore()


@pytest.mark.parametrize("location", LOCATIONS)
@torch.no_grad()
def test_weights_that_change_places(location: str) -> None:
    """Outside the blocks, and from there into one: as without streaming, and after it too."""
    model, twin = reference(), reference()
    with streamer_of(model, budget=12_000, location=location) as streamer:
        assert "stem" not in {unit.name for unit in streamer.stats().units}
        model(inputs())
        for each in (model, twin):
            stem, head = each.stem, each.head
            stem.weight, head.weight = head.weight, stem.weight
            norm = each.blocks[3].norm
            norm.weight, norm.bias = norm.bias, norm.weight
        for _ in range(3):
            assert same(model(inputs()), twin(inputs()))
    assert same(model(inputs()), twin(inputs()))
    with streamer_of(model, budget=12_000, location=location):
        model(inputs())
        for each in (model, twin):
            each.head.weight = each.stem.weight
            each.blocks[1].up = nn.Linear(WIDTH, 2 * WIDTH)
            each.blocks[1].up.weight.fill_(0.25)
            each.blocks[1].up.bias = each.blocks[2].up.bias
        for _ in range(3):
            assert same(model(inputs()), twin(inputs()))
    assert same(model(inputs()), twin(inputs()))


@torch.no_grad()
def test_a_weight_that_is_given_to_another_model() -> None:
    first, second, twin = reference(), Stack(4), Stack(4)
    twin.load_state_dict(second.state_dict())
    expected = first(inputs())
    with streamer_of(first), streamer_of(second):
        first(inputs())
        second(inputs())
        second.stem.weight = first.head.weight
        twin.stem.weight = reference().head.weight
        for _ in range(3):
            assert same(second(inputs()), twin(inputs()))
            assert same(first(inputs()), expected)
    assert same(first(inputs()), expected)
    assert same(second(inputs()), twin(inputs()))


@jit
@pytest.mark.parametrize(
    "trace", [torch.jit.trace, lambda model, x: make_fx(model)(x)], ids=["jit", "fx"]
)
@torch.no_grad()
def test_a_pass_is_not_written_down(trace: Callable[[nn.Module, Tensor], Any]) -> None:
    """Whatever lay in a slot then would be a constant of what is made."""
    model = reference()
    expected = model(inputs())
    with streamer_of(model):
        for _ in range(2):
            with pytest.raises(StreamError, match="a streamed model cannot be traced"):
                trace(model, inputs())
            assert same(model(inputs()), expected)


@pytest.mark.parametrize("budget", [None, 10**6])
@pytest.mark.parametrize("method", ["queue", "async"])
@torch.no_grad()
def test_transforms_make_the_first_pass(method: str, budget: int | None) -> None:
    def tangents(model: nn.Module) -> Any:
        return torch.func.jvp(model, (inputs(),), (inputs(rows=3),))

    model, twin = reference(), reference()
    with streamer_of(model, budget=budget, method=method):
        for _ in range(3):
            assert same(tangents(model), tangents(twin))
            assert same(torch.func.jacfwd(model)(inputs()), torch.func.jacfwd(twin)(inputs()))
        assert same(model(inputs()), twin(inputs()))


def grow(model: Any) -> None:
    model.head.weight.data = torch.ones(2 * WIDTH, WIDTH)
    model.head.bias.data = torch.ones(2 * WIDTH)


def halve(model: Any) -> None:
    model.stem.weight.data = model.stem.weight.data.half()


def remove(model: Any) -> None:
    model.blocks[1].down.bias = None


@pytest.mark.parametrize("change", [grow, halve, remove])
@pytest.mark.parametrize("then", ["nothing", "pass", "save"])
@torch.no_grad()
def test_streaming_is_undone_though_a_weight_became_another(
    change: Callable[[nn.Module], None], then: str
) -> None:
    """It cannot be streamed like that, which is told; it is the model's own, after all."""
    model, twin = reference(), reference()
    with streamer_of(model, budget=12_000):
        model(inputs())
        change(model)
        change(twin)
        if then == "pass" and change is remove:
            with pytest.raises(StreamError, match="was replaced by None .* undo the streaming"):
                model(inputs())
        elif then == "save" and change in (grow, halve):
            with pytest.raises(StreamError, match="by another shape or dtype"):
                model.state_dict()
    assert {name: type(p) for name, p in model.named_parameters()} == {
        name: type(p) for name, p in twin.named_parameters()
    }
    assert all(map(same, model.parameters(), twin.parameters()))
    assert all(map(same, model.buffers(), twin.buffers()))


@pytest.mark.parametrize("wants_grad", [False, True])
def test_a_weight_that_became_another_wants_gradients_as_before(*, wants_grad: bool) -> None:
    model = reference()
    model.stem.weight.requires_grad_(wants_grad)
    with streamer_of(model, budget=10**6), torch.no_grad():
        model(inputs())
        model.stem.weight.data = torch.randn(2 * WIDTH, WIDTH)
    assert model.stem.weight.shape == (2 * WIDTH, WIDTH)
    assert model.stem.weight.requires_grad == wants_grad


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize("part", ["stem", "blocks.1.up"])
@torch.no_grad()
def test_weights_that_are_swapped_for_one_pass_again_and_again(part: str, when: str) -> None:
    """As an average of weights is tried: what is put back in between is not the unit's own."""
    model, twin = reference(), reference()
    layers: list[Any] = [each.get_submodule(part) for each in (model, twin)]
    others = [nn.Parameter(layer.weight + 1) for layer in layers]
    firsts = [layer.weight for layer in layers]
    with streamer_of(model):
        if when == "while":
            firsts = [layer.weight for layer in layers]
        for _ in range(3):
            for weights, passes in ((others, 1), (firsts, 3)):
                for layer, weight in zip(layers, weights, strict=True):
                    layer.weight = weight
                for _ in range(passes):
                    assert same(model(inputs()), twin(inputs()))
    assert same(model(inputs()), twin(inputs()))
