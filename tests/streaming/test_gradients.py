"""Gradients through streamed blocks, and LoRA: before and while the model is streamed."""

from __future__ import annotations

import random
import weakref
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from streaming.devices import faked
from streaming.models import (
    WIDE,
    WIDTH,
    Block,
    Snapshot,
    Stack,
    frozen,
    inputs,
    same,
    smallest_budget,
    stage_of,
    streamer_of,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowbits import LayerStreamer
from lowbits.errors import LowbitsError
from lowbits.streaming.models import Placement, StreamedModels
from lowbits.testing.streams import VirtualOps

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

WAYS = (("queue", "disk"), ("async", "cpu"))
LOCATIONS = ("cpu", "disk")
CONFIG: dict[str, Any] = {"r": 4, "target_modules": ["up", "down"], "init_lora_weights": False}


def with_lora(model: nn.Module, seed: int = 3, name: str = "default") -> Any:
    torch.manual_seed(seed)
    return inject_adapter_in_model(LoraConfig(**CONFIG), model, adapter_name=name)


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


def gradients(model: nn.Module, wanted: Iterable[nn.Parameter], *, others: int = 0) -> list[Tensor]:
    """Return the gradients of the input and of Parameters; other forwards come in between."""
    x = inputs(WIDE).requires_grad_()
    loss = model(x).square().mean()
    for number in range(others):
        with torch.set_grad_enabled(number % 2 == 0):
            model(inputs(WIDE) + number)
    found = torch.autograd.grad(loss, [x, *wanted], allow_unused=True)
    assert all(gradient is not None for gradient in found)
    return list(found)


@pytest.mark.parametrize("scheme", ["native", "bnb-nf4", "torchao-int8"])
@pytest.mark.parametrize(("method", "location"), WAYS)
def test_gradients_of_inputs(scheme: str, method: str, location: str) -> None:
    model = frozen(scheme)
    expected = gradients(model, [])
    with streamer_of(model, method=method, location=location):
        for others in (0, 1, 3):
            assert same(gradients(model, [], others=others), expected)
    assert same(gradients(model, []), expected)


@pytest.mark.parametrize("scheme", ["native", "bnb-nf4", "torchao-int8"])
@pytest.mark.parametrize(("method", "location"), WAYS)
def test_gradients_of_factors_that_came_while_streamed(
    scheme: str, method: str, location: str
) -> None:
    twin = with_lora(frozen(scheme))
    expected = gradients(twin, factors(twin))
    model = frozen(scheme)
    with streamer_of(model, budget=100_000, method=method, location=location) as streamer:
        model(inputs(WIDE))
        with_lora(model)
        for others in (0, 3):
            assert same(gradients(model, factors(model), others=others), expected)
        assert streamer.stats().peak_device_bytes <= 100_000
    assert same(gradients(model, factors(model)), expected)


@pytest.mark.parametrize("budget", [60_000, 10**7])
def test_gradients_of_factors_from_before(budget: int) -> None:
    model = with_lora(frozen())
    expected = gradients(model, factors(model))
    with streamer_of(model, budget=budget):
        assert same(gradients(model, factors(model)), expected)


@pytest.mark.parametrize("part", ["stem", "blocks.1.up"])
def test_weights_that_require_a_gradient_get_it_or_it_is_told(part: str) -> None:
    """Training that trains nothing must not look like training."""
    model = frozen()
    layer: Any = model.get_submodule(part)
    layer.weight.requires_grad_()
    model(inputs(WIDE)).sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    try:
        with streamer_of(model, budget=60_000):
            x = inputs(WIDE).requires_grad_()
            model(x).sum().backward()
    except (LowbitsError, RuntimeError):
        return
    assert layer.weight.grad is not None
    assert same(layer.weight.grad, expected)


def test_an_optimizer_trains_factors_while_streamed() -> None:
    def train(model: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(factors(model), lr=0.1)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(inputs(WIDE)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    expected = train(with_lora(frozen()))
    model = frozen()
    with streamer_of(model, budget=100_000):
        with_lora(model)
        assert train(model) == expected
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(*, reentrant: bool) -> None:
    class Checkpointed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            out: Tensor = self.head(x)
            return out

    torch.manual_seed(0)
    model = Checkpointed(4, WIDE, hidden=WIDE).requires_grad_(requires_grad=False)
    x = inputs(WIDE).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x) if not reentrant else (None,)
    if reentrant:
        model(x).sum().backward()
        expected, x.grad = x.grad, None
    with streamer_of(model, budget=60_000):
        for _ in range(3):
            model(x).sum().backward()
            assert same(x.grad, expected)
            x.grad = None


def test_a_weight_that_changed_before_the_backward_pass_is_told() -> None:
    model = frozen()
    with streamer_of(model):
        x = inputs(WIDE).requires_grad_()
        loss = model(x).sum()
        with torch.no_grad():
            model.blocks[1].up.weight.mul_(2)
        with pytest.raises(RuntimeError, match="changed"):
            loss.backward()


class Normalised(nn.Module):
    """Keeps a running scale, and divides by it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDE, WIDE)
        self.scale = nn.Buffer(torch.ones(WIDE))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        with torch.no_grad():
            self.scale.mul_(0.9).add_(x.abs().mean(0), alpha=0.1)
        return x / self.scale


@pytest.mark.parametrize("budget", [None, 10**6])
@pytest.mark.parametrize(("method", "location"), WAYS)
def test_a_buffer_that_is_written_then_used(method: str, location: str, budget: int | None) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(Normalised() for _ in range(4))).requires_grad_(requires_grad=False)

    model, twin = made(), made()
    with streamer_of(model, budget=budget, method=method, location=location):
        for _ in range(3):
            assert same(gradients(model, []), gradients(twin, []))
    assert all(map(same, model.buffers(), twin.buffers()))


def test_a_copy_beside_a_weight_in_use_is_no_write_to_it() -> None:
    """Autograd refuses a weight that is written while it is saved; others may share its slot."""
    model = Stack(7)
    model.blocks = nn.ModuleList(Block(WIDTH, hidden) for hidden in (10, 80, 10, 80, 10, 35, 20))
    seen: list[bool] = []

    def look(norm: nn.Module, _: Any) -> None:
        weight = cast("Tensor", norm.weight)
        before = weight._version
        residency = stage_of(streamer)._residency
        assert residency
        residency.drain()
        seen.append(weight._version == before)

    for block in model.blocks:
        block.norm.register_forward_pre_hook(look)
    budget = smallest_budget(model, method="async", depth=1) + 8192
    with streamer_of(model, budget=budget, method="async", location="cpu", depth=1) as streamer:
        for _ in range(3):
            model(inputs())
        plan = stage_of(streamer).plan
        assert plan
        assert any(plan.offset_of.values())
    assert len(seen) == 3 * 7
    assert all(seen)


def test_backward_after_detach() -> None:
    model = frozen()
    expected = gradients(model, [])
    for location in LOCATIONS:
        x = inputs(WIDE).requires_grad_()
        with streamer_of(model, location=location):
            loss = model(x).square().mean()
        try:
            loss.backward()
        except (LowbitsError, OSError):
            assert location == "disk"
        else:
            assert same([x.grad], expected)


@pytest.mark.parametrize("when", ["before", "while", "after a pass"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_lora_is_right_whenever_it_comes(when: str, location: str) -> None:
    twin = with_lora(frozen())
    expected, plain = twin(inputs(WIDE)), frozen()(inputs(WIDE))
    assert not same(expected, plain)
    model = frozen()
    if when == "before":
        with_lora(model)
    with streamer_of(model, budget=60_000, location=location) as streamer:
        if when == "after a pass":
            assert same(model(inputs(WIDE)), plain)
        before = streamer.stats().peak_device_bytes
        if when != "before":
            with_lora(model)
        for _ in range(3):
            assert same(model(inputs(WIDE)), expected)
        stats = streamer.stats()
        assert before <= stats.peak_device_bytes <= 60_000
        if when != "before":
            held = {unit.nbytes for unit in stats.units}
            assert held == {unit.nbytes for unit in stats.units}
    assert same(model(inputs(WIDE)), expected)
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_factors_count_on_the_device() -> None:
    model = frozen()
    with streamer_of(model, budget=10**7) as streamer:
        model(inputs(WIDE))
        before = streamer.stats().peak_device_bytes
        with_lora(model)
        model(inputs(WIDE))
        added = sum(p.nbytes for p in factors(model))
        assert streamer.stats().peak_device_bytes == before + added


@pytest.mark.parametrize("scheme", ["native", "bnb-nf4"])
def test_adapters_come_and_go(scheme: str) -> None:
    def script(model: nn.Module) -> list[Tensor]:
        peft: Any = get_peft_model(model, LoraConfig(**CONFIG))
        torch.manual_seed(4)
        for p in factors(model):
            nn.init.normal_(p, std=0.1)
        results = [model(inputs(WIDE))]
        peft.add_adapter("other", LoraConfig(**CONFIG))
        torch.manual_seed(5)
        for name, p in model.named_parameters():
            if ".other." in name:
                nn.init.normal_(p, std=0.1)
        peft.set_adapter("other")
        results.append(model(inputs(WIDE)))
        with peft.disable_adapter():
            results.append(model(inputs(WIDE)))
        results.append(model(inputs(WIDE)))
        peft.set_adapter("default")
        peft.delete_adapter("other")
        results.append(model(inputs(WIDE)))
        peft.unload()
        results.append(model(inputs(WIDE)))
        return results

    expected = script(frozen(scheme))
    model = frozen(scheme)
    plain = model(inputs(WIDE))
    before = Snapshot(model)
    for location in LOCATIONS:
        with streamer_of(model, budget=120_000, location=location) as streamer:
            assert same(model(inputs(WIDE)), plain)
            assert same(script(model), expected)
            assert streamer.stats().peak_device_bytes <= 120_000
        before.require()
    assert same(expected[-1], plain)


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("safe", [True, False])
def test_adapters_are_merged_while_streamed(location: str, *, safe: bool) -> None:
    def script(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(3)
        peft: Any = get_peft_model(model, LoraConfig(**CONFIG))
        results = [model(inputs(WIDE))]
        peft.merge_adapter(safe_merge=safe)
        results += [model(inputs(WIDE)), model(inputs(WIDE))]
        peft.unmerge_adapter()
        results.append(model(inputs(WIDE)))
        peft.merge_and_unload(safe_merge=safe)
        return [*results, model(inputs(WIDE)), model(inputs(WIDE))]

    expected = script(frozen())
    for budget in (60_000, 10**7):
        model = frozen()
        with streamer_of(model, budget=budget, location=location):
            model(inputs(WIDE))
            assert same(script(model), expected)
        assert same(model(inputs(WIDE)), expected[-1])


def test_a_target_that_is_base_is_merged() -> None:
    config = LoraConfig(r=4, target_modules=["stem", "head"], init_lora_weights=False)

    def script(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(3)
        peft: Any = get_peft_model(model, config)
        results = [model(inputs(WIDE))]
        peft.merge_and_unload()
        return [*results, model(inputs(WIDE))]

    expected = script(frozen())
    model = frozen()
    with streamer_of(model, budget=90_000):
        model(inputs(WIDE))
        assert same(script(model), expected)
    assert same(model(inputs(WIDE)), expected[-1])


def test_other_kinds_of_adapters() -> None:
    for extra in ({"use_dora": True}, {"use_rslora": True, "lora_bias": True}):
        config = LoraConfig(**CONFIG, **extra)
        twin, model = frozen(), frozen()
        torch.manual_seed(3)
        get_peft_model(twin, config)
        expected = twin(inputs(WIDE))
        with streamer_of(model, budget=120_000):
            model(inputs(WIDE))
            torch.manual_seed(3)
            get_peft_model(model, config)
            assert same(model(inputs(WIDE)), expected)


class Squashed(nn.Module):
    """Saves its own result for the backward pass, and may change it after that."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDE, WIDE)
        self.results: list[weakref.ref[Tensor]] = []
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(x))
        self.results.append(weakref.ref(x))
        return x if self.factor == 1 else x.mul_(self.factor)


def squashed(n_blocks: int = 4) -> list[Squashed]:
    torch.manual_seed(0)
    return [Squashed().requires_grad_(requires_grad=False) for _ in range(n_blocks)]


@pytest.mark.parametrize("budget", [None, 10**6])
def test_a_graph_goes_with_its_result_though_nobody_goes_back(budget: int | None) -> None:
    blocks = squashed()
    model = nn.Sequential(*blocks)
    with streamer_of(model, budget=budget):
        for _ in range(3):
            model(inputs(WIDE).requires_grad_())
            assert not any(made() is not None for block in blocks for made in block.results)


@pytest.mark.parametrize("budget", [None, 10**6])
def test_a_result_that_is_changed_after_it_was_saved_is_told(budget: int | None) -> None:
    blocks = squashed()
    blocks[1].factor = 2.0
    model = nn.Sequential(*blocks)
    with pytest.raises(RuntimeError, match="inplace operation"):
        gradients(model, [])
    with streamer_of(model, budget=budget):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="inplace operation"):
                gradients(model, [])


@pytest.mark.parametrize("budget", [None, 10**6])
def test_gradients_of_gradients(budget: int | None) -> None:
    def second(model: nn.Module) -> Tensor:
        x = inputs(WIDE).requires_grad_()
        (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), x)
        return found

    model = nn.Sequential(*squashed())
    expected = second(model)
    with streamer_of(model, budget=budget):
        for _ in range(3):
            assert same(second(model), expected)


class Times(nn.Module):
    """Multiplies by a weight, which autograd saves; computes for so many virtual seconds."""

    def __init__(self, ops: VirtualOps, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1024) + 0.5, requires_grad=False)
        self.ops, self.seconds = ops, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.ops.compute(self.seconds)
        return x * self.weight


def timed_blocks(ops: VirtualOps, n_blocks: int) -> list[Times]:
    return [Times(ops, 1e-6) for _ in range(n_blocks)]


def test_a_graph_keeps_no_residents_that_a_new_plan_has_moved() -> None:
    ops = VirtualOps(bandwidth=1e9)
    blocks, budget, spread = timed_blocks(ops, 16), 9 * 4096, random.Random(5)  # noqa: S311 - times
    model = nn.Sequential(*blocks)
    x = torch.randn(1024, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    plans: set[frozenset[int]] = set()
    with faked(ops), LayerStreamer(
        model, device="cpu", budget=budget, location="shared"
    ) as streamer:  # fmt: skip
        for step in range(16):
            for block in blocks if step == 8 else ():
                block.seconds = spread.uniform(0.5e-6, 10e-6)
            losses = [model(x).sum() for _ in range(3)]
            plans.add(frozenset(stage_of(streamer).streamed_of(stage_of(streamer).components[0])))
            for loss in losses:
                (found,) = torch.autograd.grad(loss, x)
                assert same(found, expected)
    assert len(plans) > 1
    assert ops.peak_bytes <= budget


def test_a_graph_keeps_no_residents_of_a_model_that_gives_way() -> None:
    ops = VirtualOps(bandwidth=1e9)
    first, second = (nn.Sequential(*timed_blocks(ops, 6)) for _ in range(2))
    budget = 8 * 4096
    x = torch.randn(1024, requires_grad=True)
    (expected,) = torch.autograd.grad(second(first(x)).sum(), x)
    place = Placement(torch.device("cpu"), budget, method="async", location="shared")
    with faked(ops):
        streamed = StreamedModels({"first": first, "second": second}, place, budget)
        streamed.attach()
        for _ in range(3):
            loss = second(first(x)).sum()
            assert ops.peak_bytes <= budget
            (found,) = torch.autograd.grad(loss, x)
            assert same(found, expected)
        streamed.detach()
