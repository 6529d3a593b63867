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
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lowbits.core import memory
from lowbits.errors import FormatError, StreamError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

LOCATIONS = ("cpu", "disk")
BUDGETS = (None, 10**6)


class Ema(nn.Module):
    """As vector quantizers do: torch does not count writes by ``.data``."""

    ema: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("ema", torch.zeros(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.ema.data.mul_(0.9).add_(x.mean(0))
        out: Tensor = self.linear(x) + self.ema[0]
        return out


class Replaced(Ema):
    """Gives its buffer other memory."""

    def forward(self, x: Tensor) -> Tensor:
        self.ema.data = self.ema * 0.9 + x.mean(0)
        out: Tensor = self.linear(x) + self.ema[0]
        return out


class Written(nn.Module):
    """Writes into a Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.mean = nn.Parameter(torch.randn(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0))
        out: Tensor = self.linear(x) + self.mean[0]
        return out


class MaxNorm(nn.Module):
    """Lets torch scale rows of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.rows = nn.Linear(WIDTH, WIDTH), nn.Embedding(64, WIDTH, max_norm=1.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.rows(torch.arange(3))
        return out


class Normed(nn.Module):
    """Keeps running statistics, which torch does not count, without a counter, which it does."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(self.linear(x), self.mean, self.var, training=self.training)


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("make", [Ema, Replaced, Written, MaxNorm, Normed])
@torch.no_grad()
def test_what_a_forward_writes_is_kept(
    make: Callable[[], nn.Module], budget: int | None, location: str
) -> None:
    twin = nn.Sequential(*(make() for _ in range(5))).train()
    model = copy.deepcopy(twin)
    with streamer_of(model, budget=budget, location=location):
        for _ in range(3):
            assert same(model(inputs()), twin(inputs()))
    assert same(list(model.state_dict().values()), list(twin.state_dict().values()))
    model.eval()
    twin.eval()
    assert same(model(inputs()), twin(inputs()))


class Encoder(nn.Module):
    """Runs its blocks by another name than their calls."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in "abcde")
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.forward(x)
        return x


@torch.no_grad()
def test_statistics_of_blocks_that_are_not_called() -> None:
    twin = Encoder().train()
    model = copy.deepcopy(twin)
    with streamer_of(model, budget=10**6, method="queue"):
        for _ in range(3):
            assert same(model(inputs()), twin(inputs()))
    assert same(list(model.state_dict().values()), list(twin.state_dict().values()))


@pytest.mark.parametrize("budget", BUDGETS)
def test_gradients_through_statistics_that_are_written(budget: int | None) -> None:
    """A counter that moves is no write to the weights beside it."""
    twin = nn.Sequential(*(Encoder() for _ in range(3))).train().requires_grad_(False)
    model = copy.deepcopy(twin)
    grads = []
    with streamer_of(model, budget=budget):
        for each in (twin, model):
            x = inputs().requires_grad_()
            each(x).square().sum().backward()
            grads.append(x.grad)
    assert same(*grads)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_weight_that_is_written_is_refused_by_the_backward_pass(budget: int | None) -> None:
    model = reference().requires_grad_(False)
    with streamer_of(model, budget=budget):
        loss = model(inputs().requires_grad_()).sum()
        model.blocks[1].up.weight.data.add_(1)
        model(inputs())
        with pytest.raises(RuntimeError, match="changed|modified"):
            loss.backward()


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


class Caching(nn.Module):
    """Grows a buffer that begins without bytes."""

    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("cache", torch.empty(0, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.cache = torch.cat([self.cache, x])
        out: Tensor = self.linear(x) + self.cache.mean(0)
        return out


@torch.no_grad()
def test_tensors_that_begin_without_bytes_keep_what_was_put_there() -> None:
    twin = nn.Sequential(*(Caching() for _ in range(4)))
    model = copy.deepcopy(twin)
    with streamer_of(model, budget=10**6):
        for _ in range(3):
            assert same(model(inputs()), twin(inputs()))
    assert same(model(inputs()), twin(inputs()))


def with_adapters() -> Any:
    model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5)))
    for layer in model:
        layer.lora = nn.Linear(WIDTH, WIDTH, bias=False)
        layer.register_forward_hook(lambda module, args, out: out + module.lora(args[0]))
    return model


@torch.no_grad()
def test_adapters_that_are_loaded_while_streamed_stay() -> None:
    twin = with_adapters()
    model = copy.deepcopy(twin)
    values = {k: v + 1 for k, v in twin.state_dict().items() if "lora" in k}
    twin.load_state_dict(values, strict=False, assign=True)
    with streamer_of(model, budget=10**6):
        model.load_state_dict(values, strict=False, assign=True)
        assert same(model(inputs()), twin(inputs()))
    assert same(model(inputs()), twin(inputs()))


@torch.no_grad()
def test_a_buffer_without_bytes_that_is_taken_away_stays_away() -> None:
    model: Any = nn.Sequential(*(Caching() for _ in range(4)))
    with streamer_of(model, budget=10**6):
        model[0].cache = None
    assert model[0].cache is None


class Growing(Caching):
    """Grows a buffer that has bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = torch.zeros(1, WIDTH)


def test_a_buffer_of_another_shape_does_not_keep_a_streamer_attached() -> None:
    model = nn.Sequential(*(Growing() for _ in range(4)))
    streamer = streamer_of(model, budget=10**6).attach()
    with torch.no_grad():
        model(inputs())
        with pytest.raises(StreamError, match="cache was replaced by another shape"):
            model(inputs())
    streamer.detach()
    assert model[0].cache.shape == (4, WIDTH)
    assert torch.isfinite(model(inputs())).all()


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


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight: Any = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.weight.scale = 3.0

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


@torch.no_grad()
def test_writes_do_not_make_the_scratch_file_grow() -> None:
    model: Any = nn.Sequential(*(Ema() for _ in range(4))).train()
    sizes = []
    with streamer_of(model, location="disk") as streamer:
        for _ in range(6):
            model(inputs())
            model[0].linear.weight.data.add_(1)
            sizes.append(streamer.stats().disk_bytes)
    assert sizes[2:] == [sizes[2]] * 4


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
    for at in (0, 4, 20):
        other = values.clone()
        other.view(-1)[at] = 1.0
        assert not memory.same_bits(values, other)
    assert memory.same_bits(values.bfloat16().t(), values.t())
    assert not memory.same_bits(torch.tensor(0.0), torch.tensor(-0.0))
