"""What users' modules and tools do to a streamed model: as without streaming, bit for bit."""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from streaming.models import WIDTH, Stack, inputs, reference, same, stage_of, streamer_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lowbits.core import memory
from lowbits.errors import AlreadyPatchedError, FormatError, StreamError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

LOCATIONS = ("cpu", "disk")
BUDGETS = (None, 10**6)


class Asking(nn.Linear):
    """Says what it has been shown, as `torch.matmul` asks to choose how it multiplies."""

    asked = True

    def forward(self, x: Tensor) -> Tensor:
        self.asked = self.weight.requires_grad
        return super().forward(x)


def test_weights_want_gradients_as_without_streaming_but_where_they_would_be_given_some() -> None:
    model: Any = nn.Sequential(*(Asking(WIDTH, WIDTH) for _ in range(5))).eval()

    def asked() -> list[bool]:
        return [layer.asked for layer in model]

    with streamer_of(model):
        for mode, expected in (
            (torch.no_grad, [True] * 5),
            (torch.enable_grad, [False] * 5),
            (torch.inference_mode, [True] * 5),
        ):
            with mode():
                for _ in range(2):
                    model(inputs())
                    assert asked() == expected
        model[2].requires_grad_(False)
        with torch.no_grad():
            model(inputs())
        assert asked() == [True, True, False, True, True]
        model(inputs())
        assert asked() == [False] * 5
    assert [layer.weight.grad for layer in model] == [None] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_inputs_that_do_not_lie_side_by_side(dtype: torch.dtype) -> None:
    """`torch.matmul` folds them where the weight wants gradients, and rounds otherwise then."""
    twin = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5))).to(dtype)
    model = copy.deepcopy(twin)
    x = torch.randn(2, 64, 16).to(dtype).transpose(1, 2)
    with streamer_of(model):
        assert same(model(x), twin(x))


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) - self.inner(2 * x)
        return out


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("is_wrapped", [False, True])
@torch.no_grad()
def test_functional_calls_that_use_a_block_twice(*, is_wrapped: bool, budget: int | None) -> None:
    twin = reference()
    twin.order = [0, 1, 2, 3] if is_wrapped else [0, 1, 2, 3, 0, 1]
    model = copy.deepcopy(twin)
    prefix = "inner." if is_wrapped else ""
    values = {prefix + name: p + 1 for name, p in twin.named_parameters()}
    called = [Twice(each) if is_wrapped else each for each in (model, twin)]
    with streamer_of(model, budget=budget):
        results = [torch.func.functional_call(each, values, (inputs(),)) for each in called]
        assert same(*results)
        assert same(model(inputs()), twin(inputs()))
    assert same(model(inputs()), twin(inputs()))


weakly: Any = StorageWeakRef
run_checkpointed: Any = checkpoint_sequential


class Tanh(nn.Module):
    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        self.kept.append(weakly(hidden.untyped_storage()))
        return torch.tanh(self.second(hidden))


def tanh_blocks(kept: list[Any]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Tanh(kept) for _ in range(6))).requires_grad_(False)


@pytest.mark.parametrize("budget", BUDGETS)
def test_checkpoints_keep_no_activations(budget: int | None) -> None:
    kept: list[Any] = []
    model = tanh_blocks(kept)
    with streamer_of(model, budget=budget):
        x = inputs().requires_grad_()
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        gc.collect()
        assert [reference.expired() for reference in kept] == [True] * 6


@pytest.mark.parametrize("method", ["queue", "async"])
def test_checkpoints_of_units_that_are_streamed_and_then_stay(method: str) -> None:
    def gradient(model: nn.Sequential) -> Tensor:
        x = inputs().requires_grad_()
        run_checkpointed(model, 2, x, use_reentrant=False).sum().backward()
        assert x.grad is not None
        return x.grad

    twin, model = tanh_blocks([]), tanh_blocks([])
    expected = gradient(twin)
    with streamer_of(model, budget=7168, method=method) as streamer:
        for number in range(6):
            assert same(gradient(model), expected)
            stage_of(streamer).give_way(5000 if number % 2 else 7168)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("is_parked", [False, True])
@pytest.mark.parametrize("kind", ["Parameters", "buffers"])
@torch.no_grad()
def test_functional_calls_in_a_row(kind: str, *, is_parked: bool, budget: int | None) -> None:
    """With the same objects each time: they look like what was put there for good."""
    twin, other = reference(), Stack(4)
    model = copy.deepcopy(twin)
    values: dict[str, Any] = dict(other.named_parameters())
    if kind == "buffers":
        values = {name: value + 1 for name, value in twin.named_buffers()}
    before = [value.clone() for value in values.values()]
    expected = torch.func.functional_call(twin, values, (inputs(),))
    with streamer_of(model, budget=budget):
        if not is_parked:
            assert same(model(inputs()), twin(inputs()))
        for _ in range(4):
            assert same(torch.func.functional_call(model, values, (inputs(),)), expected)
        for _ in range(3):
            assert same(model(inputs()), twin(inputs()))
    assert same(model(inputs()), twin(inputs()))
    assert all(map(same, values.values(), before))


@pytest.mark.parametrize("part", ["stem", "blocks.1.up"])
@torch.no_grad()
def test_weights_that_are_swapped_and_put_back(part: str) -> None:
    model, twin = reference(), reference()
    layers: list[Any] = [each.get_submodule(part) for each in (model, twin)]
    first, first_of_twin = (layer.weight for layer in layers)
    seconds = [nn.Parameter(layer.weight + 1) for layer in layers]
    with streamer_of(model):
        stand_in = layers[0].weight
        for mine, its in ((seconds[0], seconds[1]), (first, first_of_twin), tuple(seconds)):
            layers[0].weight, layers[1].weight = mine, its
            for _ in range(3):
                assert same(model(inputs()), twin(inputs()))
        layers[0].weight = stand_in
        with pytest.raises(StreamError, match="read it from the model again"):
            model(inputs())
        layers[0].weight = seconds[0]
        assert same(model(inputs()), twin(inputs()))
    assert layers[0].weight is seconds[0]
    assert same(first, first_of_twin)
    assert same(model(inputs()), twin(inputs()))


class Adjoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mH


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.linear.weight) + x[:, :0] @ self.linear.weight[:0]


@pytest.mark.parametrize(("make", "dtype"), [(Adjoint, torch.complex64), (Sliced, torch.float32)])
def test_gradients_through_views_of_weights(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    twin = nn.Sequential(*(make() for _ in range(6))).requires_grad_(False)
    model = copy.deepcopy(twin)
    grads = []
    with streamer_of(model):
        for each in (model, twin):
            x = inputs().to(dtype).requires_grad_()
            each(x).abs().square().sum().backward()
            grads.append(x.grad)
    assert same(*grads)


class Strided(nn.Module):
    """Buffers whose elements do not lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("every", torch.arange(2.0 * WIDTH)[::2])
        self.register_buffer("same", torch.ones(1).expand(WIDTH))
        self.register_buffer("column", torch.randn(WIDTH, 3)[:, 1])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) * self.same + self.every + self.column
        return out


@pytest.mark.parametrize("location", LOCATIONS)
@torch.no_grad()
def test_buffers_with_holes(location: str) -> None:
    class Net(Strided):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Strided() for _ in range(4)))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.blocks(super().forward(x))
            return out

    twin = Net().train()
    model = copy.deepcopy(twin)
    with streamer_of(model, location=location):
        for _ in range(2):
            assert same(model(inputs()), twin(inputs()))
        assert same(list(model.state_dict().values()), list(twin.state_dict().values()))
    assert same(model(inputs()), twin(inputs()))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight: Any = nn.Parameter(torch.randn(WIDTH, WIDTH))
        weight.scale = 3.0
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x @ self.weight * getattr(self.weight, "scale", 1.0)
        return out


@torch.no_grad()
def test_attributes_of_parameters_are_there() -> None:
    twin = nn.Sequential(*(Scaled() for _ in range(4)))
    model = nn.Sequential(*(Scaled() for _ in range(4)))
    model.load_state_dict(twin.state_dict())
    with streamer_of(model):
        for _ in range(2):
            assert same(model(inputs()), twin(inputs()))
        assert [vars(p)["scale"] for p in model.parameters()] == [3.0] * 4


class Features(nn.Module):
    """Calls slices of a `Sequential`, which are new modules of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers[3:](self.layers[:3](x))
        return out


@torch.no_grad()
def test_new_modules_of_a_streamed_ones_class_are_ordinary() -> None:
    twin = Features()
    model = copy.deepcopy(twin)
    with streamer_of(model):
        assert same(model(inputs()), twin(inputs()))
        assert type(model.layers[:2]) is nn.Sequential
        kind: Any = type(model.layers[0])
        layer = kind(WIDTH, 3)
        assert type(layer) is nn.Linear
        assert layer(inputs()).shape == (3, 3)


@pytest.mark.parametrize("location", LOCATIONS)
@torch.no_grad()
def test_another_default_device_is_nobodys_business(location: str) -> None:
    model, twin = reference(), reference()
    expected, x = twin(inputs()), inputs()
    streamer = streamer_of(model, location=location)
    with torch.device("meta"):
        streamer.attach()
        assert same(model(x), expected)
        model.state_dict()
        streamer.detach()
    assert same(model(x), expected)


@pytest.mark.parametrize("is_read", [False, True])
def test_a_source_that_is_replaced_after_it_was_compared(tmp_path: Path, *, is_read: bool) -> None:
    """Read once, the file that was compared stays open; before that, another one is refused."""
    model, twin = reference(), reference()
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    streamer = streamer_of(model, location="disk", source=path).attach()
    if is_read:
        assert same(model(inputs()), twin(inputs()))
    path.unlink()
    save_file({name: value + 1 for name, value in twin.state_dict().items()}, path)
    if is_read:
        assert same(model(inputs()), twin(inputs()))
        streamer.detach()
        assert same(model(inputs()), twin(inputs()))
    else:
        with pytest.raises(StreamError, match="was changed, or replaced, since it was compared"):
            model(inputs())
        with pytest.raises(FormatError, match="was changed, or replaced"):
            streamer.detach()


@pytest.mark.parametrize("location", LOCATIONS)
def test_stand_ins_that_were_kept_say_that_they_are_none_any_more(location: str) -> None:
    model = reference()
    with streamer_of(model, location=location):
        before = list(model.parameters())
        model.half()
        for parameter in before:
            with pytest.raises(StreamError, match="read it from the model again"):
                parameter.data.add_(1)
        model.float()
        kept = list(model.parameters())
        kept[0].data.add_(1)
    for parameter in kept:
        assert parameter.shape
        with pytest.raises(StreamError, match="read it from the model again"):
            parameter.data.add_(1)
        with pytest.raises(StreamError, match="read it from the model again"):
            parameter.sum()


@torch.no_grad()
def test_a_weight_of_two_models_is_streamed_once() -> None:
    first, second = reference(), reference()
    second.blocks[1].up.weight = first.blocks[2].up.weight
    expected = second(inputs())
    is_refused = pytest.raises(AlreadyPatchedError, match=r"blocks\.1\.up is streamed already")
    with streamer_of(first), is_refused:
        streamer_of(second, budget=10**6).attach()
    with streamer_of(second):
        assert same(second(inputs()), expected)


@pytest.mark.parametrize("budget", BUDGETS)
@torch.no_grad()
def test_transforms_of_torch(budget: int | None) -> None:
    model, twin = reference(), reference()
    batch = torch.randn(2, 3, WIDTH)
    with streamer_of(model, budget=budget):
        assert same(torch.vmap(model)(batch), torch.vmap(twin)(batch))
        results = [torch.func.jvp(each, (inputs(),), (inputs(),)) for each in (model, twin)]
        assert same(*results)


class Conjugated(nn.Module):
    phase: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("phase", torch.randn(WIDTH, dtype=torch.complex64).conj())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.linear(x) * self.phase).real
        return out


@pytest.mark.parametrize("location", LOCATIONS)
@torch.no_grad()
def test_buffers_that_are_conjugated_views(location: str) -> None:
    twin = nn.Sequential(*(Conjugated() for _ in range(4)))
    model = copy.deepcopy(twin)
    with streamer_of(model, location=location):
        assert same(model(inputs()), twin(inputs()))
    assert same(model(inputs()), twin(inputs()))


@torch.no_grad()
def test_conversions_of_inference_tensors() -> None:
    twin = reference()
    with torch.inference_mode():
        model = reference()
    with streamer_of(model, budget=20_000):
        model.double()
        assert same(model(inputs().double()), twin.double()(inputs().double()))
    assert same(model(inputs().double()), twin(inputs().double()))


def test_stand_ins_are_not_swapped() -> None:
    """As ``torch.__future__.set_swap_module_params_on_conversion`` asks `load_state_dict` to."""
    model, other = reference(), Stack(4)
    with streamer_of(model):
        torch.__future__.set_swap_module_params_on_conversion(value=True)
        try:
            with pytest.raises(RuntimeError, match="weakref"):
                model.load_state_dict(other.state_dict())
        finally:
            torch.__future__.set_swap_module_params_on_conversion(value=False)
        assert same(model(inputs()), reference()(inputs()))


@pytest.mark.parametrize("nbytes", [16, 20, 1 << 24])
def test_bits_are_compared_to_the_last_one(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(memory, "_COMPARED_BYTES", nbytes)
    values = torch.full((3, 7), torch.nan)
    assert memory.same_bits(values, values.clone())
    assert memory.same_bits(torch.ones(6, 4)[:, ::2], torch.ones(2).expand(6, 2))
    for at in (0, 4, 20):
        other = values.clone()
        other.view(-1)[at] = 1.0
        assert not memory.same_bits(values, other)
    assert memory.same_bits(values.bfloat16().t(), values.t())
    assert not memory.same_bits(torch.tensor(0.0), torch.tensor(-0.0))


@pytest.mark.parametrize("budget", BUDGETS)
def test_autocast_keeps_no_casts_of_weights(budget: int | None) -> None:
    """All of a model's in the end, beside its budget: of weights that could be trained."""
    twin = reference()
    model = copy.deepcopy(twin)
    sizes: list[int] = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = [twin(inputs()) for _ in range(2)]
    with streamer_of(model, budget=budget), torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16), Casts() as casts:  # type: ignore[no-untyped-call]
            for before in expected:
                assert same(model(inputs()), before)
                sizes.append(casts.count)
        assert torch.is_autocast_cache_enabled()
    assert sizes[1] == 2 * sizes[0] > 0


class Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts casts."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))
