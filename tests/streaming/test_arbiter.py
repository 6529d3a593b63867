"""Several models in one budget: who is on the device, and that it is never too much."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from streaming.devices import Net, faked, least_budget, unit_bytes
from torch import nn

from lowbits.errors import InsufficientMemoryError, StreamError
from lowbits.streaming.activations import Activations
from lowbits.streaming.arbiter import Arbiter
from lowbits.streaming.device_ops import device_ops
from lowbits.streaming.engine import Engine, cut
from lowbits.streaming.models import Placement, StreamedModels
from lowbits.testing.streams import ThreadedOps

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

CPU = torch.device("cpu")


class Coder(nn.Module):
    """As a VAE: callers use its two halves, and never the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Net([32, 32, 32]), Net([32, 32, 32])

    def encode(self, x: Tensor) -> Tensor:
        encoded: Tensor = self.encoder(x)
        return encoded

    def decode(self, x: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(x)
        return decoded


class Guided(nn.Module):
    """A model whose forward calls another model, which is no part of it, between its blocks."""

    def __init__(self, guide: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.guide = [guide]

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = torch.relu(block(x))
            if number % 2:
                x = x + self.guide[0](x)
        return x


def stack() -> nn.Sequential:
    """Return a model whose blocks cannot be cut, however small the budget is."""
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))


def least_bytes(model: nn.Module) -> int:
    return least_budget(model, Arbiter(ThreadedOps(), 0, method="async", depth=None))


class Asking(nn.Linear):
    """A block that calls another model in its own forward."""

    def __init__(self, guide: nn.Module) -> None:
        super().__init__(16, 16)
        self.guide = [guide]

    def forward(self, x: Tensor) -> Tensor:
        asked: Tensor = super().forward(x) + self.guide[0](x)
        return asked


class Inside(nn.Module):
    """A model whose blocks call another model."""

    def __init__(self, guide: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Asking(guide) if number % 2 else nn.Linear(16, 16 * 3 if number == 2 else 16)
            for number in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))[..., :16]
        return x


@dataclass
class Streamed:
    """Models that are streamed now."""

    ops: ThreadedOps
    models: StreamedModels
    budget: int

    @property
    def arbiter(self) -> Arbiter:
        arbiter = self.models._arbiter
        assert arbiter is not None
        return arbiter

    @property
    def engines(self) -> dict[str, Engine]:
        return self.models._engines

    @property
    def stages(self) -> int:
        return len(self.arbiter.stages())

    def copied(self) -> int:
        return self.models.stats().copied_bytes


@contextmanager
def streamed(
    modules: Mapping[str, nn.Module], budget: int, method: str = "async"
) -> Iterator[Streamed]:
    """Stream models on a device that has not a byte more than the budget."""
    placement = Placement(CPU, budget, method=method, location="cpu")
    with (
        torch.no_grad(),
        ThreadedOps(poison=True, delay=lambda _: 1e-4, capacity_bytes=budget) as ops,
        faked(ops),
    ):
        models = StreamedModels(modules, placement, budget)
        models.attach()
        try:
            yield Streamed(ops, models, budget)
            assert ops.peak_bytes <= budget
            assert models.stats().peak_device_bytes == ops.peak_bytes
        finally:
            models.detach()
        gc.collect()  # the traceback of a copy that failed holds what it was writing to
        assert ops.allocated_bytes == 0


def make(**sizes: list[int]) -> tuple[dict[str, nn.Module], Tensor, dict[str, Tensor]]:
    """Return models, an input, and what they make of it."""
    models: dict[str, nn.Module] = {name: Net(hidden) for name, hidden in sizes.items()}
    x = torch.randn(2, 16)
    with torch.no_grad():
        return models, x, {name: model(x) for name, model in models.items()}


def check(models: Mapping[str, nn.Module], x: Tensor, expected: Mapping[str, Tensor]) -> None:
    for name, model in models.items():
        assert torch.equal(model(x), expected[name]), name


THREE = {"encoder": [64] * 6, "denoiser": [32, 96] * 4, "coder": [48]}


@pytest.mark.parametrize("method", ["queue", "async", "auto"])
def test_models_take_turns(method: str) -> None:
    models, x, expected = make(**THREE)
    with streamed(models, 60_000, method) as found:
        for _ in range(3):
            check(models, x, expected)
        for _ in range(6):
            check({"denoiser": models["denoiser"]}, x, expected)
        check(models, x, expected)
        assert found.stages == 3
        resident = [s for s in found.arbiter.stages() if s.plan is not None]
        assert sum(stage.device_bytes for stage in resident) <= found.budget


def test_models_stay_where_all_fit() -> None:
    models, x, expected = make(**THREE)
    budget = sum(map(unit_bytes, models.values()))
    with streamed(models, budget) as found:
        check(models, x, expected)
        once = found.copied()
        for _ in range(3):
            check(models, x, expected)
        assert found.copied() == once == found.ops.peak_bytes == budget
    with streamed(models, budget - 1) as found:
        for _ in range(3):
            check(models, x, expected)
        assert found.copied() > once


def test_a_model_of_which_only_a_part_was_used_keeps_its_room() -> None:
    """What a model has not touched yet it may touch next: that room is not for others."""
    coder, net = Coder(), Net([32, 32, 32])
    x = torch.randn(2, 16)
    with torch.no_grad():
        expected = coder.decode(x), net(x), coder.encode(x)
    budget = unit_bytes(coder) + unit_bytes(net) // 2
    with streamed({"coder": coder, "net": net}, budget) as found:
        for _ in range(3):
            assert torch.equal(coder.decode(x), expected[0])
            assert torch.equal(net(x), expected[1])
            assert torch.equal(coder.encode(x), expected[2])
        assert found.ops.peak_bytes <= budget


def test_children_are_called_without_their_root() -> None:
    coder = Coder()
    x = torch.randn(2, 16)
    with torch.no_grad():
        expected = coder.decode(x), coder.encode(x)
    with streamed({"coder": coder}, unit_bytes(coder) // 2):
        for _ in range(3):
            assert torch.equal(coder.encode(x), expected[1])
            assert torch.equal(coder.decode(x), expected[0])


def test_two_that_alternate_share_one_ring() -> None:
    models, x, expected = make(a=[64] * 4, b=[32] * 4)
    with streamed(models, 45_000) as found:
        assert found.stages == 2
        check(models, x, expected)
        assert found.stages == 2
        check(models, x, expected)
        assert found.stages == 1
        for _ in range(5):
            check(models, x, expected)
        assert found.stages == 1


@pytest.mark.parametrize("calls", ["ab", "aabb", "abb", "aab", "abba"])
def test_both_of_two_that_share_a_ring_are_fetched_ahead(calls: str) -> None:
    """With guidance each is called twice in its turn."""
    models, x, expected = make(a=[64] * 4, b=[32] * 4)

    def step() -> None:
        for name in calls:
            check({name: models[name]}, x, expected)

    with streamed(models, 45_000) as found:
        for _ in range(6):
            step()
        assert found.stages == 1
        misses = found.models.stats().misses
        for _ in range(3):
            step()
        assert found.models.stats().misses == misses


def test_a_third_model_comes_between_two_that_alternate() -> None:
    models, x, expected = make(a=[64] * 4, b=[32] * 4, c=[64] * 4)
    pair = {name: models[name] for name in "ab"}
    with streamed(models, 45_000) as found:
        for _ in range(3):
            for _ in range(3):
                check(pair, x, expected)
            check({"c": models["c"]}, x, expected)
        assert found.stages == 2


def test_long_turns_do_not_join() -> None:
    models, x, expected = make(a=[64] * 4, b=[32] * 4)
    with streamed(models, 45_000) as found:
        for _ in range(3):
            for name in "ab":
                for _ in range(5):
                    check({name: models[name]}, x, expected)
        assert found.stages == 2


def test_a_pair_that_does_not_fit_takes_turns() -> None:
    models, x, expected = make(a=[400], b=[400])
    largest = max(map(unit_bytes, models.values()))
    with streamed(models, largest) as found:
        for _ in range(4):
            check(models, x, expected)
        assert found.stages == 2


def test_a_pair_that_an_adapter_makes_too_large_takes_turns_again() -> None:
    models, x, expected = make(a=[64] * 6, b=[64] * 6)
    arbiter = Arbiter(device_ops(CPU), 8_192, method="async", depth=None)
    engines = [
        Engine(name, model, cut(model, arbiter), arbiter, "cpu", Activations())
        for name, model in models.items()
    ]
    stages = []
    for grows in (False, True):
        if grows:
            factor = torch.nn.Parameter(torch.zeros(512), requires_grad=False)
            models["a"].register_parameter("factor", factor)
        for _ in range(4):
            check(models, x, expected)
        stages.append(len(arbiter.stages()))
    assert stages == [1, 2]
    for engine in engines:
        engine.detach()


@pytest.mark.parametrize("part", [0.5, 0.8, 1.0])
def test_a_model_that_another_calls_in_its_forward(part: float) -> None:
    guide = Net([32, 32])
    model = Guided(guide)
    x = torch.randn(2, 16)
    with torch.no_grad():
        expected = model(x), guide(x)
    budget = int((unit_bytes(model) + unit_bytes(guide)) * part)
    with streamed({"model": model, "guide": guide}, budget) as found:
        for _ in range(4):
            assert torch.equal(model(x), expected[0])
        assert torch.equal(guide(x), expected[1])
        assert torch.equal(model(x), expected[0])
        assert found.ops.peak_bytes <= budget


@pytest.mark.parametrize("method", ["queue", "async", "auto"])
@pytest.mark.parametrize("kind", [Guided, Inside])
@pytest.mark.parametrize("extra", [0, 300, 2_500])
def test_both_run_in_what_they_need_at_least(
    kind: type[Guided | Inside], method: str, extra: int
) -> None:
    guide = stack()
    model = kind(guide)
    x = torch.randn(2, 16)
    with torch.no_grad():
        expected = model(x), guide(x)
    models = {"model": model, "guide": guide}
    least = sum(map(least_bytes, models.values()))
    with streamed(models, least + extra, method) as found:
        for _ in range(5):
            assert torch.equal(model(x), expected[0])
        assert torch.equal(guide(x), expected[1])
        assert torch.equal(model(x), expected[0])
        assert found.stages == 2
    with streamed(models, least - 1, method):
        for _ in range(2):
            with pytest.raises(InsufficientMemoryError, match="inside another's") as caught:
                model(x)
            assert caught.value.needed_bytes == least
            assert caught.value.available_bytes == least - 1
            assert torch.equal(guide(x), expected[1])


def test_a_model_gives_way_to_two_that_are_called_in_each_other() -> None:
    inner = stack()
    middle = Inside(inner)
    outer = Guided(middle)
    x = torch.randn(2, 16)
    with torch.no_grad():
        expected = outer(x)
    models = {"outer": outer, "middle": middle, "inner": inner}
    least = sum(map(least_bytes, models.values()))
    for budget in (least, least + 1_500, least + 5_000):
        with streamed(models, budget):
            for _ in range(3):
                assert torch.equal(outer(x), expected)


def test_a_model_has_its_room_again_when_another_comes_and_goes() -> None:
    models, x, expected = make(**THREE)
    guide = Net([32, 32])
    model = Guided(guide)
    with torch.no_grad():
        guided = model(x)
    total = unit_bytes(model) + unit_bytes(guide)
    with streamed({"model": model, "guide": guide, **models}, total // 2) as found:
        for _ in range(3):
            assert torch.equal(model(x), guided)
            check(models, x, expected)
        assert found.stages == 5


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("is_joined", [False, True])
def test_one_of_several_is_taken_away(name: str, *, is_joined: bool) -> None:
    models, x, expected = make(a=[64] * 4, b=[32] * 4, c=[64] * 4)
    originals = [*models[name].parameters()]
    pair = {n: models[n] for n in "ab"}
    with streamed(models, 45_000) as found:
        for _ in range(3 if is_joined else 1):
            check(pair, x, expected)
        check(models, x, expected)
        found.engines.pop(name).detach()
        now = [*models[name].parameters()]
        assert all(a is b for a, b in zip(now, originals, strict=True))
        for _ in range(3):
            check(models, x, expected)
    check(models, x, expected)


def test_an_error_in_one_leaves_the_others_right() -> None:
    models, x, expected = make(**THREE)
    with streamed(models, 60_000) as found:
        for _ in range(2):
            for name, model in models.items():
                with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                    model(torch.randn(2, 17))
                check({name: model}, x, expected)
        check(models, x, expected)
        found.ops.fail_on(3)
        with pytest.raises((RuntimeError, StreamError), match="as the test asked"):
            check(models, x, expected)
        for _ in range(2):
            check(models, x, expected)


def test_threads_wait_for_their_turn() -> None:
    models, x, expected = make(**THREE)
    errors: list[BaseException] = []

    def call(name: str) -> None:
        try:
            with torch.no_grad():
                for _ in range(4):
                    check({name: models[name]}, x, expected)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    with streamed(models, 60_000):
        threads = [threading.Thread(target=call, args=(name,)) for name in [*models, *models]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        if errors:
            raise errors[0]
        check(models, x, expected)


def test_the_budget_is_for_the_largest_model() -> None:
    models, _, _ = make(a=[64] * 4, b=[400], c=[32])
    with pytest.raises(InsufficientMemoryError) as caught, streamed(models, 20_000):
        pass
    needed = caught.value.needed_bytes
    with streamed(models, needed):
        pass
    with pytest.raises(InsufficientMemoryError), streamed(models, needed - 1):
        pass
