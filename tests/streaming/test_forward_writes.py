"""Modules that write as they run, and what they leave behind: as without streaming, bit for bit."""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from streaming.models import WIDTH, inputs, reference, same, streamer_of
from torch import nn
from torch.nn import functional

from lowbits.errors import StreamError

if TYPE_CHECKING:
    from collections.abc import Callable

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


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["linear"], init_lora_weights=False),
        LoHaConfig(target_modules=["linear"], init_weights=False),
    ],
)
@torch.no_grad()
def test_merged_adapters_that_are_switched_off_stay_off(
    config: Any, budget: int | None, location: str
) -> None:
    """Peft takes them out of the weights in the forward, by ``.data``."""
    blocks = (nn.Sequential(OrderedDict(linear=nn.Linear(WIDTH, WIDTH))) for _ in range(5))
    twin = inject_adapter_in_model(config, nn.Sequential(*blocks)).eval()
    model = copy.deepcopy(twin)
    without = twin.state_dict()["0.linear.base_layer.weight"].clone()
    layers = [[m for m in each.modules() if hasattr(m, "merge")] for each in (twin, model)]
    with streamer_of(model, budget=budget, location=location):
        for _ in range(2):
            for layer in layers[0] + layers[1]:
                layer.merge()
            assert same(model(inputs()), twin(inputs()))
            for layer in layers[0] + layers[1]:
                layer.enable_adapters(enabled=False)
            for _ in range(3):
                assert same(model(inputs()), twin(inputs()))
            for layer in layers[0] + layers[1]:
                layer.enable_adapters(enabled=True)
    assert same(list(model.state_dict().values()), list(twin.state_dict().values()))
    torch.testing.assert_close(twin.state_dict()["0.linear.base_layer.weight"], without)


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


class Counter(nn.Linear):
    calls: Tensor

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls[0]


@pytest.mark.parametrize("budget", BUDGETS)
@torch.no_grad()
def test_statistics_that_are_adapted_alone(budget: int | None) -> None:
    """All is in evaluation but the norms."""
    blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in "abcd")
    twin: Any = nn.Sequential(*blocks)
    model = copy.deepcopy(twin)
    for each in (model, twin):
        each.eval()
        for block in each:
            block[1].train()
    with streamer_of(model, budget=budget):
        for _ in range(3):
            assert same(model(inputs()), twin(inputs()))
    assert same(list(model.state_dict().values()), list(twin.state_dict().values()))


class Failing(Counter):
    """Counts, and fails the second time."""

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        if self.calls[0] == 2:
            raise ValueError("not now")
        return result


@pytest.mark.parametrize("budget", BUDGETS)
@torch.no_grad()
def test_what_was_written_before_an_error_is_kept(budget: int | None) -> None:
    twin = nn.Sequential(*(Failing(WIDTH, WIDTH) for _ in range(4))).eval()
    model = copy.deepcopy(twin)
    with streamer_of(model, budget=budget):
        assert same(model(inputs()), twin(inputs()))
        for number in range(4):  # one after the other fails
            for each in (model, twin):
                with pytest.raises(ValueError, match="not now"):
                    each(inputs())
            assert calls(model) == calls(twin), number
        assert same(model(inputs()), twin(inputs()))
    assert calls(model) == calls(twin)


def calls(model: Any) -> list[float]:
    return [float(layer.calls[0]) for layer in model]


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


class Full(nn.Module):
    """Runs out of memory once."""

    is_due = True

    def forward(self, x: Tensor) -> Tensor:
        if self.is_due:
            self.is_due = False
            raise torch.OutOfMemoryError("as a GPU would")
        return x


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn_like(x)


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("first", "may_repeat"), [(nn.Linear, True), (Noisy, True), (InPlace, False), (Counter, False)]
)
@torch.no_grad()
def test_a_pass_runs_again_only_as_if_it_had_not_run(
    first: Callable[..., nn.Module], *, may_repeat: bool
) -> None:
    """The same random numbers; and not at all where it has written something."""
    layers = [first(WIDTH, WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(4))]
    twin = copy.deepcopy(nn.Sequential(*layers)).eval()
    model = nn.Sequential(*layers, Full()).eval()
    torch.manual_seed(3)
    expected = twin(inputs())
    with streamer_of(model, budget=10**6) as streamer:
        torch.manual_seed(3)
        if may_repeat:
            assert same(model(inputs()), expected)
        else:
            with pytest.raises(torch.OutOfMemoryError) as caught:
                model(inputs())
            assert "inputs or buffers that it may have changed" in str(caught.value.__notes__)
        assert streamer.stats().recoveries == may_repeat


class Reading(nn.Sequential):
    """Takes more than tensors, and changes it."""

    def forward(self, x: Tensor, how: str, given: Any) -> Tensor:  # type: ignore[override]
        match how:
            case "popped":
                x = x + given.pop("added")
            case "replaced":
                x = x + given[0]
                given[0] = x
            case "drawn":
                x = x + torch.randn(x.shape, generator=given)
            case "counted":
                given.count += 1
                x = x + given.count
        for layer in self:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("how", "given", "may_repeat"),
    [
        ("popped", lambda: {"added": torch.ones(WIDTH)}, False),
        ("replaced", lambda: [torch.ones(WIDTH)], False),
        ("drawn", lambda: torch.Generator().manual_seed(3), True),
        ("counted", lambda: SimpleNamespace(count=0), False),
        ("", lambda: {"scale": 1.0, "mask": None, "more": [torch.ones(1), "name"]}, True),
    ],
)
@torch.no_grad()
def test_a_pass_runs_again_only_with_the_same_inputs(
    how: str, given: Callable[[], Any], *, may_repeat: bool
) -> None:
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    twin = copy.deepcopy(Reading(*layers)).eval()
    model = Reading(*layers, Full()).eval()
    with streamer_of(model, budget=10**6) as streamer:
        if may_repeat:
            assert same(model(inputs(), how, given()), twin(inputs(), how, given()))
        else:
            with pytest.raises(torch.OutOfMemoryError):
                model(inputs(), how, given())
        assert streamer.stats().recoveries == may_repeat


@torch.no_grad()
def test_adapters_that_are_loaded_while_streamed_are_converted() -> None:
    twin = with_adapters()
    model = copy.deepcopy(twin)
    with streamer_of(model, budget=10**6):
        for each in (model, twin):
            for layer in each:
                layer.lora.weight = nn.Parameter(layer.lora.weight + 1)
            each.double()
        assert same(model(inputs().double()), twin(inputs().double()))
    assert same(model(inputs().double()), twin(inputs().double()))


@torch.no_grad()
def test_a_new_layer_with_an_old_ones_weight_and_no_pass_since() -> None:
    models: list[Any] = [reference(), reference()]
    model, twin = models
    with streamer_of(model):
        model(inputs())
        for each in models:
            new: Any = nn.Linear(WIDTH, WIDTH)
            new.weight, new.bias = each.stem.weight, each.stem.bias
            each.stem = nn.Sequential(new)
    assert same(model(inputs()), twin(inputs()))


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


class Told(Replaced):
    """Notes whether its weight says that it wants a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.told.append(self.linear.weight.requires_grad)
        return super().forward(x)


@torch.no_grad()
def test_weights_that_are_made_anew_say_what_the_originals_say() -> None:
    """`torch.matmul` chooses by that how it multiplies."""
    model: Any = nn.Sequential(*(Told() for _ in range(3))).train()
    with streamer_of(model, budget=10**6):
        for _ in range(3):
            model(inputs())
    assert all(block.told == [True] * 3 for block in model)
