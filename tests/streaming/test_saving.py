"""What is saved, copied and pickled of a streamed model."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from streaming.models import (
    WIDTH,
    Stack,
    inputs,
    reference,
    same,
    streamed_models,
    streamer_of,
)
from torch import nn
from torch.fx import symbolic_trace

from lowbits.core.interception import interceptor_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor


def loaded(state: dict[str, Tensor]) -> Stack:
    torch.manual_seed(5)
    model = Stack(4).eval()
    model.load_state_dict(state)
    return model


def is_plain(tensor: Any) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"


def test_a_state_dict_is_plain_and_bit_equal() -> None:
    expected = reference().state_dict()
    for model in streamed_models():
        state = model.state_dict()
        assert list(state) == list(expected)
        assert all(is_plain(tensor) for tensor in state.values())
        assert all(same(state[key], expected[key]) for key in expected)
        for _ in range(2):
            model(inputs())
        assert all(same(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("budget", [None, 10**6])
def test_a_state_dict_writes_nothing(budget: int | None) -> None:
    """A backward pass that follows is right, and no unit is copied to the device again."""
    model, x = reference(), inputs().requires_grad_()
    twin = inputs().requires_grad_()
    reference()(twin).sum().backward()
    with streamer_of(model, budget=budget, location="cpu") as streamer:
        result = model(x)
        model.state_dict()
        result.sum().backward()
        assert same(x.grad, twin.grad)
        copied = []
        for _ in range(5):
            model(x)
            copied.append(streamer.stats().copied_bytes)
            model.state_dict()
    assert copied[4] - copied[3] == copied[3] - copied[2]
    assert (copied[4] == copied[0]) == (budget is not None)


def test_a_state_dict_survives_detach() -> None:
    states = [model.state_dict() for model in streamed_models()]
    expected = reference().state_dict()
    assert all(same(state[key], expected[key]) for state in states for key in expected)


def test_a_state_dict_made_inside_the_forward() -> None:
    model = reference()
    taken: list[dict[str, Tensor]] = []
    handle = model.blocks[1].register_forward_hook(lambda *_: taken.append(model.state_dict()))
    with streamer_of(model, method="queue", budget=8_000) as streamer:
        assert "blocks.1" in {unit.name for unit in streamer.stats().units}
        for _ in range(2):
            model(inputs())
    handle.remove()
    expected = reference().state_dict()
    assert all(same(state[key], expected[key]) for state in taken for key in expected)


def test_saved_state_dicts_load() -> None:
    expected = reference()(inputs())
    for model in streamed_models():
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        assert same(loaded(torch.load(file))(inputs()), expected)


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_loads_into_another_model(*, assign: bool) -> None:
    expected = reference()(inputs())
    for model in streamed_models():
        other = Stack(4).eval()
        other.load_state_dict(model.state_dict(), assign=assign)
        assert same(other(inputs()), expected)
        with torch.no_grad():
            other.stem.weight.zero_()
        if not assign:
            assert same(model(inputs()), expected)


def test_safetensors_saves_the_state_dict(tmp_path: Path) -> None:
    expected = reference()(inputs())
    for model in streamed_models():
        save_file(model.state_dict(), tmp_path / "state.safetensors")
        assert same(loaded(load_file(tmp_path / "state.safetensors"))(inputs()), expected)


def test_safetensors_saves_the_model(tmp_path: Path) -> None:
    expected = reference()(inputs())
    for model in streamed_models():
        save_model(model, str(tmp_path / "model.safetensors"))
        assert same(loaded(load_file(tmp_path / "model.safetensors"))(inputs()), expected)


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, pickled, saved],
)
def test_copies_are_ordinary_modules(copied: Callable[[nn.Module], Any]) -> None:
    model = reference()
    expected = model(inputs())
    for streamed in streamed_models():
        twin = copied(streamed)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        for a, b in zip(twin.modules(), model.modules(), strict=True):
            assert list(a.__dict__) == list(b.__dict__)
        assert all(is_plain(tensor) for tensor in (*twin.parameters(), *twin.buffers()))
        with torch.no_grad():
            assert same(twin(inputs()), expected)
            twin.blocks[0].up.weight.zero_()
        assert same(streamed(inputs()), expected)
        twin.double()
        assert twin(inputs().double()).dtype == torch.float64


def test_copies_keep_what_requires_a_gradient() -> None:
    model = Stack(2)
    with streamer_of(model, budget=10**6):
        model(inputs())
        flags = [p.requires_grad for p in copy.deepcopy(model).parameters()]
    assert flags == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_block_is_copied_alone(copied: Callable[[nn.Module], Any]) -> None:
    model = reference()
    for streamed in streamed_models():
        block = copied(streamed.blocks[1])
        assert type(block) is type(model.blocks[1])
        assert same(block(inputs()), model.blocks[1](inputs()))


def class_names(model: nn.Module) -> list[str]:
    return [f"{type(m).__name__} of {type(m).__base__}" for m in model.modules()]


class Own(nn.Linear):
    """Copies itself, as parametrized modules and those of torch.fx do."""

    def __deepcopy__(self, memo: Any) -> Own:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made


@pytest.mark.parametrize(
    "make",
    [Own, lambda *w: torch.nn.utils.parametrizations.weight_norm(nn.Linear(*w)),
     lambda *w: symbolic_trace(nn.Sequential(nn.Linear(*w), nn.ReLU()))],
    ids=["own", "weight_norm", "fx"],
)  # fmt: skip
@torch.no_grad()
def test_modules_that_copy_themselves(make: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(*(make(WIDTH, WIDTH) for _ in range(4)))
    expected, kinds = model(inputs()), class_names(model)
    copied_kinds = class_names(copy.deepcopy(model))  # those of torch.fx become others
    with streamer_of(model, budget=10**5):
        for _ in range(2):
            made = copy.deepcopy(model)
            assert not any(interceptor_of(module) for module in made.modules())
            assert same(made(inputs()), expected)
            assert same(model(inputs()), expected)
            assert all(is_plain(tensor) for tensor in made.parameters())
            assert class_names(made) == copied_kinds
    assert class_names(model) == kinds


def test_tied_weights_are_tied_in_a_copy() -> None:
    model = Stack(3, hidden=WIDTH)
    blocks: Any = model.blocks
    blocks[0].down.weight = blocks[0].up.weight
    blocks[2].up.weight = blocks[1].up.weight
    with streamer_of(model):
        for _ in range(2):
            twin = copy.deepcopy(model)
            model(inputs())
            assert twin.blocks[0].down.weight is twin.blocks[0].up.weight
            assert twin.blocks[2].up.weight is twin.blocks[1].up.weight


def test_what_others_ask_of_weights() -> None:
    plain = reference()
    for model in streamed_models():
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert isinstance(a, nn.Parameter)
            assert (a.shape, a.dtype, a.device, a.stride()) == (
                b.shape,
                b.dtype,
                b.device,
                b.stride(),
            )
            assert (a.numel(), a.nbytes, a.element_size()) == (
                b.numel(),
                b.nbytes,
                b.element_size(),
            )
            assert torch.equal(a, b)
            assert a.tolist() == b.tolist()
            assert torch.equal(a.sum(), b.sum())
            assert torch.equal(a.cpu(), b)
            assert torch.equal(a.detach().clone(), b)
            assert torch.equal(a.to(torch.bfloat16), b.to(torch.bfloat16))
            assert a.flatten()[0].item() == b.flatten()[0].item()
        assert str(model) == str(plain)
        assert next(model.parameters()).is_floating_point()
        vector = nn.utils.parameters_to_vector(model.parameters())
        assert torch.equal(vector, nn.utils.parameters_to_vector(plain.parameters()))


def test_a_state_dict_waits_for_the_forward_of_another_thread() -> None:
    """It would take the weights from under it for a moment."""
    model, expected = reference(), reference()(inputs())
    started, is_running, seen = threading.Event(), threading.Event(), []

    def begin(*_: Any) -> None:
        is_running.set()
        started.set()
        time.sleep(0.05)

    with streamer_of(model):
        model.blocks[0].register_forward_pre_hook(begin)
        model.blocks[3].register_forward_hook(lambda *_: is_running.clear())
        hook: Any = model.register_state_dict_pre_hook
        hook(lambda *_: seen.append(is_running.is_set()))
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(model(inputs())))
        thread.start()
        assert started.wait(10)
        model.state_dict()
        thread.join(10)
    assert seen == [False]
    assert same(results[0], expected)


@pytest.mark.parametrize("passes", [0, 1])
@torch.no_grad()
def test_what_is_of_another_shape_is_copied_as_it_is(passes: int) -> None:
    model = reference()
    layer: Any = model.blocks[1].up
    with streamer_of(model):
        for _ in range(passes):
            model(inputs())
        before, layer.weight = layer.weight, nn.Parameter(torch.ones(3, WIDTH))
        copied = copy.deepcopy(model)
        assert copied.blocks[1].up.weight.shape == (3, WIDTH)
        layer.weight = before
        assert same(model(inputs()), reference()(inputs()))
