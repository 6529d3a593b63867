"""What is written into a streamed model: the next pass uses it, or it is refused."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from streaming.models import (
    WIDTH,
    Block,
    Stack,
    inputs,
    reference,
    same,
    smallest_budget,
    streamed_models,
    streamer_of,
)
from torch import nn
from torch.nn import functional

import lowbits
from lowbits.errors import AlreadyPatchedError, LowbitsError, PatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LOCATIONS = ("cpu", "disk")
PARTS = ("stem", "blocks.0.up", "blocks.1.up", "blocks.3.down")


def other_values() -> Stack:
    torch.manual_seed(5)
    return Stack(4).eval()


@pytest.mark.parametrize("assign", [True, False])
def test_loaded_values_are_used(*, assign: bool) -> None:
    new = other_values()
    expected = new(inputs())
    for model in streamed_models():
        model.load_state_dict(new.state_dict(), strict=True, assign=assign)
        for _ in range(3):
            assert same(model(inputs()), expected)
        state = model.state_dict()
        assert all(same(state[key], value) for key, value in new.state_dict().items())


def test_loaded_values_are_used_under_inference_mode() -> None:
    new = other_values()
    expected = new(inputs())
    for model in streamed_models():
        with torch.inference_mode():
            model.load_state_dict(new.state_dict())
            for _ in range(3):
                assert same(model(inputs()), expected)


@pytest.mark.parametrize(
    ("assign", "runs"),
    [
        (False, True),
        (False, False),
        (True, True),
        (True, False),
    ],
)
def test_loaded_values_are_there_after_detach(*, assign: bool, runs: bool) -> None:
    new = other_values()
    expected = new(inputs())
    models = []
    for model in streamed_models():
        model.load_state_dict(new.state_dict(), assign=assign)
        if runs:
            model(inputs())
        models.append(model)
    for model in models:
        assert all(type(p) is nn.Parameter for p in model.parameters())
        assert same(model(inputs()), expected)


def test_other_shapes_are_refused_by_torch() -> None:
    wrong = Stack(4, 2 * WIDTH, hidden=3 * WIDTH).state_dict()
    expected = reference()(inputs())
    for model in streamed_models():
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(wrong)
        assert same(model(inputs()), expected)


def add_to_data(layer: Any) -> None:
    layer.weight.data.add_(1)


def augment_data(layer: Any) -> None:
    layer.weight.data += 1


def copy_in(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.copy_(layer.weight + 1)


def set_item(layer: Any) -> None:
    with torch.no_grad():
        layer.weight[:] = layer.weight + 1


def set_rows(layer: Any) -> None:
    for row in range(2):
        layer.weight.data[row] += 1


def set_data(layer: Any) -> None:
    layer.weight.data = layer.weight.detach() + 1


def replace(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() + 1)


def write_out(layer: Any) -> None:
    with torch.no_grad():
        torch.add(layer.weight, 1, out=layer.weight)


def foreach(layer: Any) -> None:
    with torch.no_grad():
        torch._foreach_add_([layer.weight], 1)


def init(layer: Any) -> None:
    nn.init.constant_(layer.weight, 0.25)


def apply(layer: Any) -> None:
    def halve(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.data.mul_(0.5)

    layer.apply(halve)


def through_a_view(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.view(-1).add_(1)


def through_a_row(layer: Any) -> None:
    with torch.no_grad():
        layer.weight[0].add_(1)


def through_rows(layer: Any) -> None:
    with torch.no_grad():
        for row in layer.weight:
            row.add_(1)


def under_inference_mode(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight.copy_(layer.weight + 1)


@pytest.mark.parametrize(
    "write",
    [
        add_to_data,
        augment_data,
        copy_in,
        set_item,
        set_rows,
        set_data,
        replace,
        write_out,
        foreach,
        init,
        apply,
        through_a_view,
        through_a_row,
        through_rows,
        under_inference_mode,
    ],
)
def test_what_is_written_is_used_or_refused(write: Callable[[nn.Module], None]) -> None:
    """Never the old values: not in the next pass, not in the ones after it."""
    for model in streamed_models():
        twin = reference()
        for part in PARTS:
            try:
                write(model.get_submodule(part))
            except LowbitsError:
                assert same(model(inputs()), twin(inputs()))
                continue
            write(twin.get_submodule(part))
            expected = twin(inputs())
            for _ in range(3):
                assert same(model(inputs()), expected), part


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("part", ["stem", "blocks.0.up"])
def test_a_reference_from_before_is_no_way_around(location: str, part: str) -> None:
    model = reference()
    layer: Any = model.get_submodule(part)
    weight = layer.weight
    with streamer_of(model, location=location, budget=10**6):
        old = model(inputs())
        try:
            with torch.no_grad():
                weight.add_(1)
        except RuntimeError:
            assert same(model(inputs()), old)
            return
        new = model(inputs())
        assert not same(new, old)
    assert same(model(inputs()), new)


@pytest.mark.parametrize(
    ("part", "runs"),
    [
        ("blocks.0.up", True),
        ("blocks.0.up", False),
        ("stem", True),
        ("stem", False),
    ],
)
def test_a_replaced_parameter_stays_after_detach(part: str, *, runs: bool) -> None:
    twin = reference()
    replace(twin.get_submodule(part))
    models = []
    for model in streamed_models():
        replace(model.get_submodule(part))
        if runs:
            model(inputs())
        models.append(model)
    for model in models:
        assert same(model(inputs()), twin(inputs()))


@pytest.mark.parametrize("part", ["stem", "blocks.0.up"])
@pytest.mark.parametrize("passes", [0, 2])
def test_a_parameter_of_another_shape_is_refused(part: str, passes: int) -> None:
    model, expected = reference(), reference()(inputs())
    streamer = streamer_of(model).attach()
    for _ in range(passes):
        model(inputs())
    layer: Any = model.get_submodule(part)
    good, layer.weight = layer.weight, nn.Parameter(torch.randn(2, WIDTH))
    with pytest.raises((LowbitsError, RuntimeError)):
        model(inputs())
    layer.weight = good
    assert same(model(inputs()), expected)
    streamer.detach()
    assert same(model(inputs()), expected)


def test_a_detach_that_is_refused_can_be_repeated() -> None:
    model, expected = reference(), reference()(inputs())
    streamer = streamer_of(model, budget=10**6).attach()
    model(inputs())
    good, model.stem.weight = model.stem.weight, nn.Parameter(torch.randn(2, WIDTH))
    with pytest.raises(LowbitsError):
        streamer.detach()
    model.stem.weight = good
    assert same(model(inputs()), expected)
    streamer.detach()
    assert same(model(inputs()), expected)


@pytest.mark.parametrize("location", LOCATIONS)
def test_tying_units_while_streamed(location: str) -> None:
    model, twin = reference(), reference()
    streamer = streamer_of(model, location=location).attach()
    for m in (model, twin):
        blocks: Any = m.blocks
        blocks[1].up.weight = blocks[0].up.weight
    expected = twin(inputs())
    for _ in range(2):
        assert same(model(inputs()), expected)
    streamer.detach()
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert same(model(inputs()), expected)


@pytest.mark.parametrize("location", LOCATIONS)
def test_functional_call_leaves_nothing_behind(location: str) -> None:
    model, twin = reference(), reference()
    values = {name: p.detach() + 1 for name, p in twin.named_parameters()}
    expected = torch.func.functional_call(twin, values, (inputs(),))
    with streamer_of(model, location=location):
        assert same(model(inputs()), twin(inputs()))
        assert same(torch.func.functional_call(model, values, (inputs(),)), expected)
        assert same(model(inputs()), twin(inputs()))


@pytest.mark.parametrize(
    ("when", "part"),
    [
        ("before", "stem"),
        ("before", "blocks.0.up"),
        ("while", "stem"),
        ("while", "blocks.0.up"),
        ("after a pass", "stem"),
        ("after a pass", "blocks.0.up"),
    ],
)
@pytest.mark.parametrize("requires", [True, False])
def test_requires_grad_is_kept(when: str, part: str, *, requires: bool) -> None:
    model = reference()
    layer: Any = model.get_submodule(part)
    layer.weight.requires_grad_(not requires)
    if when == "before":
        layer.weight.requires_grad_(requires)
    with streamer_of(model, budget=10**6):
        if when == "after a pass":
            model(inputs())
        if when != "before":
            layer.weight.requires_grad_(requires)
        model(inputs())
    assert layer.weight.requires_grad is requires


@pytest.mark.parametrize(
    ("part", "share"), [("", 0.0), ("", 0.5), ("0", 0.0), ("0.down", 0.0), ("0.down", 0.5)]
)
def test_what_is_packed_is_not_restored_while_it_is_streamed(part: str, share: float) -> None:
    """Not even a part inside a unit of something larger, whose own calls nobody intercepts."""
    model = nn.Sequential(*(Block(64, 128) for _ in range(6))).eval()
    expected, packed_part = model(inputs(64)), model.get_submodule(part)
    handle = lowbits.quantize(packed_part, "float8-e4m3fn", rules={"*": "float8-e4m3fn"})
    packed = model(inputs(64))
    least = smallest_budget(model)
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    with streamer_of(model, budget=least + int(share * nbytes)):
        for _ in range(2):
            assert same(model(inputs(64)), packed)
            with pytest.raises(AlreadyPatchedError, match=r"streamed by a LayerStreamer.*detach"):
                handle.restore()
    handle.restore()
    assert same(model(inputs(64)), expected)


@pytest.mark.parametrize("scheme", ["native", "float8-e4m3fn"])
@pytest.mark.parametrize(
    "compute",
    [
        lambda a, b: a.weight.T @ b.weight,
        lambda a, b: a.weight @ b.weight.T,
        lambda a, b: a.weight.T[0] + b.bias,
        lambda a, b: functional.conv1d(a.weight[..., None].transpose(0, 1), b.weight[..., None]),
        lambda a, b: torch.cat([a.weight[:2], b.weight, b.bias[None]]),
    ],
)
def test_views_of_weights_beside_other_weights(
    compute: Callable[[Any, Any], Tensor], scheme: str
) -> None:
    """As peft multiplies the factors of a convolution's adapter; a write to a view is refused."""
    model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))).eval()
    lowbits.quantize(model, scheme, rules={"*": scheme})
    expected = compute(model[0], model[1])
    with streamer_of(model):
        model(inputs())
        assert same(compute(model[0], model[1]).as_subclass(torch.Tensor), expected)
        with pytest.raises(PatchError, match="read only"):
            model[0].weight.T.add_(model[1].weight)


SAVES: dict[str, Any] = {
    "nothing": lambda model: None,
    "state_dict": lambda model: model.state_dict(),
    "twice": lambda model: (model.state_dict(), model.state_dict()),
    "a part": lambda model: (model.stem.state_dict(), model.stem.state_dict()),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("budget", [None, 10**6])
@torch.no_grad()
def test_what_was_replaced_stays_although_it_is_saved(
    budget: int | None, part: str, save: str, location: str
) -> None:
    twin = reference()
    model = copy.deepcopy(twin)
    with streamer_of(model, budget=budget, location=location):
        model(inputs())
        for each in (twin, model):
            layer: Any = each.get_submodule(part)
            layer.weight = nn.Parameter(layer.weight.detach() * 2)
        SAVES[save](model)
        assert same(model.state_dict()[f"{part}.weight"], twin.state_dict()[f"{part}.weight"])
        for each in (twin, model):
            each.get_submodule(part).weight.add_(1)  # type: ignore[operator]
        for _ in range(2):
            assert same(model(inputs()), twin(inputs()))
    assert same(list(model.state_dict().values()), list(twin.state_dict().values()))


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("budget", [None, 10**6])
@torch.no_grad()
def test_a_weight_that_is_kept_from_before_the_first_pass(
    budget: int | None, part: str, location: str
) -> None:
    """What is written into it later is used, and there in the end, of the base as of units."""
    twin = reference()
    model = copy.deepcopy(twin)
    with streamer_of(model, budget=budget, location=location):
        kept = [each.get_submodule(part).weight for each in (twin, model)]
        for _ in range(2):
            assert same(model(inputs()), twin(inputs()))
            for weight in kept:
                weight.mul_(2)  # type: ignore[operator] # a Parameter
        assert same(model(inputs()), twin(inputs()))
    assert same(list(model.state_dict().values()), list(twin.state_dict().values()))


@pytest.mark.parametrize(
    "write",
    [
        lambda w: torch.ops.aten.add_.Tensor(w.data, 1),
        lambda w: torch.ops.aten.copy_.default(w, w + 1),
        lambda w: functional.relu(w, inplace=True),
        lambda w: functional.leaky_relu(w, 0.1, inplace=True),
        lambda w: torch._foreach_add_([w], 1),
    ],
)
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_writes_whose_names_do_not_say_so(write: Callable[[Any], object], part: str) -> None:
    twin = reference()
    model = copy.deepcopy(twin)
    with streamer_of(model):
        for _ in range(2):
            assert same(model(inputs()), twin(inputs()))
            for each in (twin, model):
                write(each.get_submodule(part).weight)
    assert same(list(model.state_dict().values()), list(twin.state_dict().values()))


@pytest.mark.parametrize("scheme", ["native", "float8-e4m3fn"])
def test_arrays_of_weights_are_read_only(scheme: str) -> None:
    """A write into one would be lost."""
    model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    lowbits.quantize(model, scheme, rules={"*": scheme})
    expected = model[0].weight.detach().clone().numpy()
    with streamer_of(model):
        array = model[0].weight.data.numpy()
        assert (array == expected).all()
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
