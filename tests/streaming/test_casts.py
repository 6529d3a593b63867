"""``.to()``, ``.half()`` and the like on a streamed model: honoured, or refused."""

from __future__ import annotations

import contextlib
import copy
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
    streamed_models,
    streamer_of,
)
from torch import nn

import lowbits
from lowbits.core.interception import interceptor_of
from lowbits.errors import InsufficientMemoryError, PatchError
from lowbits.streaming.streamer import LayerStreamer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def run(model: nn.Module, width: int = WIDTH) -> Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    out: Tensor = model(inputs(width).to(dtype))
    return out


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "to float64": lambda m: m.to(torch.float64),
    "to both": lambda m: m.to("cpu", torch.float64),
    "type": lambda m: m.type(torch.float64),
    "there and back": lambda m: m.half().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
@pytest.mark.parametrize(("location", "passes"), [("cpu", 0), ("disk", 2)])
def test_casts_are_honoured(
    cast: Callable[[nn.Module], nn.Module], location: str, passes: int
) -> None:
    model, twin = reference(), reference()
    expected = run(cast(twin))
    with streamer_of(model, location=location, budget=12_000) as streamer:
        for _ in range(passes):
            model(inputs())
        assert cast(model) is model
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert a.dtype == b.dtype
            assert same(a.detach(), b.detach())
        for _ in range(3):
            assert same(run(model), expected)
        assert streamer.stats().peak_device_bytes <= 12_000
        twin_state, state = twin.state_dict(), model.state_dict()
        assert all(same(state[key], twin_state[key]) for key in twin_state)
    assert same(run(model), expected)
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_the_objects_stay_the_same_through_a_cast() -> None:
    model = reference()
    parameters = list(model.parameters())
    with streamer_of(model, budget=12_000):
        model(inputs())
        model.double()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.dtype == torch.float64 for p in parameters)


def test_tied_weights_stay_tied_through_a_cast() -> None:
    model, twin = reference(), reference()
    for m in (model, twin):
        blocks: Any = m.blocks
        blocks[2].up.weight = blocks[0].up.weight
        blocks[1].norm.bias = blocks[1].norm.weight
    with streamer_of(model, budget=30_000):
        model(inputs())
        model.double()
        assert same(run(model), run(twin.double()))
    blocks = model.blocks
    assert blocks[2].up.weight is blocks[0].up.weight
    assert same(run(model), run(twin))


@pytest.mark.parametrize("part", ["blocks.1", "stem", "blocks", "blocks.1.up"])
def test_a_part_is_cast_or_refused(part: str) -> None:
    """A part that is computed in another dtype: values are as without streaming, or an error."""
    model, twin = reference(), reference()
    with streamer_of(model, budget=30_000, method="queue"):
        model(inputs())
        try:
            model.get_submodule(part).double()
        except (PatchError, RuntimeError):
            assert same(run(model), run(twin))
            return
        twin.get_submodule(part).double()
        expected = {name: (p.dtype, p.detach()) for name, p in twin.named_parameters()}
        assert {name: p.dtype for name, p in model.named_parameters()} == {
            name: dtype for name, (dtype, _) in expected.items()
        }
        x = inputs().double() if part == "stem" else inputs()
        with pytest.raises(RuntimeError):
            twin(x)
        with pytest.raises(RuntimeError):
            model(x)
    assert {name: p.dtype for name, p in model.named_parameters()} == {
        name: dtype for name, (dtype, _) in expected.items()
    }


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to meta": lambda m: m.to("meta"),
    "to meta and half": lambda m: m.to("meta", torch.float16),
    "to_empty": lambda m: m.to_empty(device="meta"),
    "a part": lambda m: m.get_submodule("blocks.1").to("meta"),
    "the first layer": lambda m: m.get_submodule("stem").to("meta"),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_other_devices_are_refused(move: Callable[[nn.Module], nn.Module]) -> None:
    expected = reference()(inputs())
    for model in streamed_models():
        before = [(id(p), p.dtype, p.device) for p in model.parameters()]
        if interceptor_of(model.blocks[1]) is None:
            continue  # its layers are units: see the next test
        with pytest.raises(PatchError, match="reconfigure"):
            move(model)
        assert before == [(id(p), p.dtype, p.device) for p in model.parameters()]
        for _ in range(2):
            assert same(model(inputs()), expected)


def test_another_device_for_a_part_of_a_unit_is_refused() -> None:
    model, expected = reference(), reference()(inputs())
    with streamer_of(model, budget=8_000, method="queue"):
        model(inputs())
        with contextlib.suppress(PatchError):
            model.get_submodule("blocks.1.up").to("meta")
        assert same(model(inputs()), expected)


@pytest.mark.parametrize("call", ["to", "cpu", "float", "share_memory"])
def test_what_changes_nothing_is_accepted(call: str) -> None:
    expected = reference()(inputs())
    for model in streamed_models():
        arguments = ("cpu",) if call == "to" else ()
        assert getattr(model, call)(*arguments) is model
        assert same(model(inputs()), expected)


@pytest.mark.parametrize("scheme", ["bnb-nf4", "torchao-int8", "float8-e4m3fn", "gguf-q5_1"])
def test_packed_codes_stay_as_they_are(scheme: str) -> None:
    def model_of() -> nn.Module:
        torch.manual_seed(0)
        model = Stack(2, 256, hidden=256).eval()
        lowbits.quantize(model, scheme)
        return model

    with torch.no_grad():
        model, twin = model_of(), model_of().to(torch.bfloat16)
        expected = run(twin, 256)
        with streamer_of(model, budget=2_000_000):
            run(model, 256)
            model.to(torch.bfloat16)
            for _ in range(2):
                assert same(run(model, 256), expected)
        assert same(run(model, 256), expected)
        twin_state, state = twin.state_dict(), model.state_dict()
        assert all(same(state[key], twin_state[key]) for key in twin_state)


def test_a_cast_that_does_not_fit_is_refused_and_can_be_taken_back() -> None:
    model = reference()
    needed = smallest_budget(model)
    with LayerStreamer(model, device="cpu", budget=needed):
        expected = run(model)
        model.double()
        for _ in range(2):
            with pytest.raises(InsufficientMemoryError):
                run(model)
        model.float()
        assert same(run(model), expected)
    assert same(run(model), expected)


def test_a_memory_format_is_honoured_or_refused() -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    move: Any = model.to
    try:
        with streamer_of(model):
            move(memory_format=torch.channels_last)
    except PatchError:
        return
    weight = next(model.parameters())
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_attach_after_a_cast_and_detach_before_another() -> None:
    model = reference().half()
    before = Snapshot(model)
    with streamer_of(model):
        run(model)
    before.require()
    model.float()
    with streamer_of(model):
        run(model)


@pytest.mark.parametrize("passes", [0, 1])
@torch.no_grad()
def test_an_adapter_that_came_since_the_last_pass_is_cast_too(passes: int) -> None:
    twin = reference()
    model = copy.deepcopy(twin)
    with streamer_of(model, budget=10**5):
        model(inputs())
        for each in (twin, model):
            torch.manual_seed(3)
            each.stem.add_module("added", nn.Linear(WIDTH, WIDTH))
            for _ in range(passes):
                each(inputs())
            each.double()
        assert [p.dtype for p in model.parameters()] == [p.dtype for p in twin.parameters()]
        assert same(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("cache_enabled", [False, True])
@torch.no_grad()
def test_autocasts_cache_is_as_it_was(*, cache_enabled: bool) -> None:
    model = reference()
    with (
        streamer_of(model),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled),
    ):
        model(inputs())
        assert torch.is_autocast_cache_enabled() == cache_enabled
