"""One cap for several pipelines: the one called longest ago gives way, and comes back."""

from __future__ import annotations

import gc
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from loras import save_lora
from peft import LoraConfig, inject_adapter_in_model
from pipelines import PIPELINES, draw
from schemes import every_scheme
from streamed import Anatomy, smallest_budget
from streaming import models
from streaming.devices import Net, faked, unit_bytes
from torch import nn

import lowbits
from lowbits import errors
from lowbits.streaming.budget import BUDGETS, Budgets
from lowbits.testing.accelerator import fake_accelerator
from lowbits.testing.streams import ThreadedOps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lowbits.streaming.budget import DeviceBudget

CPU: dict[str, Any] = {"device": "cpu", "location": "cpu"}


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    gc.collect()  # what other tests have left would be streamed still
    yield
    lowbits.device_budget("cpu", None)
    gc.collect()


def cap(size: int | str) -> DeviceBudget:
    budget = lowbits.device_budget("cpu", size)
    assert budget is not None
    return budget


def build(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net([64] * 6)


def copies(handle: lowbits.Handle) -> int:
    return int(sum(unit.copies for unit in handle.stats().units))


def on_device(handle: lowbits.Handle) -> bool:
    """Say whether something of a handle's models is on the device now."""
    arbiter = handle._placed._placed._arbiter  # type: ignore[attr-defined]
    return bool(arbiter.device_bytes)


def test_all_that_fit_together_stay() -> None:
    models = [build(seed) for seed in range(3)]
    x = torch.randn(2, 16)
    expected = [model(x) for model in models]
    budget = cap(3 * unit_bytes(models[0]))
    handles = [lowbits.apply(model, **CPU) for model in models]
    for _ in range(3):
        for model, y in zip(models, expected, strict=True):
            assert torch.equal(model(x), y)
    assert all(max(unit.copies for unit in handle.stats().units) == 1 for handle in handles)
    assert budget.device_bytes == budget.peak_bytes == 3 * unit_bytes(models[0])


def test_the_one_called_longest_ago_gives_way_and_comes_back() -> None:
    a, b, c = models = [build(seed) for seed in range(3)]
    x = torch.randn(2, 16)
    expected = [model(x) for model in models]
    budget = cap(2 * unit_bytes(a))
    handles = [lowbits.apply(model, **CPU) for model in models]
    a(x), b(x), a(x), c(x)
    assert [on_device(handle) for handle in handles] == [True, False, True]
    before = copies(handles[0])
    assert torch.equal(a(x), expected[0])
    assert copies(handles[0]) == before
    assert torch.equal(b(x), expected[1])
    assert [on_device(handle) for handle in handles] == [True, True, False]
    assert torch.equal(c(x), expected[2])
    assert budget.peak_bytes <= budget.budget_bytes
    for handle in handles:
        handle.restore()
    assert budget.device_bytes == 0
    assert all(torch.equal(model(x), y) for model, y in zip(models, expected, strict=True))


def test_own_caps_hold_as_before() -> None:
    a, b = build(), build(1)
    x = torch.randn(2, 16)
    small = unit_bytes(a) // 2
    budget = cap(unit_bytes(a) + small)
    first = lowbits.apply(a, gpu_weights=small, **CPU)
    second = lowbits.apply(b, gpu_weights="all", **CPU)
    for _ in range(3):
        a(x), b(x)
    assert first.stats().peak_device_bytes <= small == first.stats().budget_bytes
    assert second.stats().peak_device_bytes == unit_bytes(b)
    assert copies(second) == len(second.stats().units)
    assert budget.peak_bytes <= budget.budget_bytes


def test_what_is_there_already_is_placed_again_and_back() -> None:
    models = [build(seed) for seed in range(2)]
    x = torch.randn(2, 16)
    expected = [model(x) for model in models]
    parameters = [list(model.parameters()) for model in models]
    handles = [lowbits.apply(models[0], **CPU), lowbits.apply(models[1], **CPU, gpu_weights="1GB")]
    assert not any(handle.stats().method for handle in handles)
    budget = cap(unit_bytes(models[0]))
    for _ in range(2):
        assert all(torch.equal(model(x), y) for model, y in zip(models, expected, strict=True))
    assert 0 < budget.peak_bytes <= budget.budget_bytes
    assert all(handle.stats().method for handle in handles)
    larger = cap(3 * unit_bytes(models[0]))
    for _ in range(2):
        assert all(torch.equal(model(x), y) for model, y in zip(models, expected, strict=True))
    assert larger.device_bytes == 2 * unit_bytes(models[0])
    assert lowbits.device_budget("cpu", None) is None
    assert not any(handle.stats().method for handle in handles)
    assert all(torch.equal(model(x), y) for model, y in zip(models, expected, strict=True))
    for model, held in zip(models, parameters, strict=True):
        assert all(now is was for now, was in zip(model.parameters(), held, strict=True))


def test_a_cap_that_is_too_small_changes_nothing() -> None:
    models = [build(0), Net([64, 512])]
    x = torch.randn(2, 16)
    expected = [model(x) for model in models]
    handles = [lowbits.apply(model, **CPU) for model in models]
    streamer = lowbits.LayerStreamer(build(2), device="cpu", budget="1MB", location="cpu").attach()
    for size in (10, smallest_budget(Net([64, 512])) // 2):
        with pytest.raises(errors.InsufficientMemoryError) as caught:
            lowbits.device_budget("cpu", size)
        assert caught.value.needed_bytes > size
        assert BUDGETS.of(torch.device("cpu")) is None
        assert not any(handle.stats().method for handle in handles)
        assert streamer.is_attached
        assert streamer.stats().budget_bytes == 10**6
    assert all(torch.equal(model(x), y) for model, y in zip(models, expected, strict=True))
    budget = cap("1MB")
    with pytest.raises(errors.InsufficientMemoryError) as caught:
        lowbits.device_budget("cpu", 10)
    assert BUDGETS.of(torch.device("cpu")) is budget
    cap(caught.value.needed_bytes)  # of the one that needs most, which is not the first
    assert all(torch.equal(model(x), y) for model, y in zip(models, expected, strict=True))
    budget = cap("1MB")
    with pytest.raises(errors.ConfigError, match="size: got 'lots'"):
        lowbits.device_budget("cpu", "lots")
    streamer.detach()


def test_a_cap_may_be_raised_and_taken_away_though_an_adapter_is_too_much(tmp_path: Path) -> None:
    save_lora(tmp_path)
    pipes: list[Any] = [PIPELINES["flux"].build(seed=seed) for seed in range(2)]
    least = smallest_budget(pipes[0])
    cap(least)
    own = lowbits.apply(pipes[0], gpu_weights=least, **CPU)
    lowbits.apply(pipes[1], **CPU)
    expected = [draw("flux", pipe) for pipe in pipes]
    pipes[0].load_lora_weights(tmp_path)
    with pytest.raises(errors.InsufficientMemoryError, match="adapters of other models"):
        draw("flux", pipes[0])
    with pytest.raises(errors.InsufficientMemoryError, match="of other pipelines") as caught:
        draw("flux", pipes[1])
    assert "lowbits.device_budget" in str(caught.value)
    budget = cap(caught.value.needed_bytes)
    assert torch.equal(draw("flux", pipes[1]), expected[1])
    with pytest.raises(errors.InsufficientMemoryError, match="adapters of other models") as caught:
        draw("flux", pipes[0])
    assert budget.peak_bytes <= budget.budget_bytes
    lowbits.device_budget("cpu", None)
    own.reconfigure(gpu_weights=caught.value.needed_bytes)
    assert not torch.equal(draw("flux", pipes[0]), expected[0])
    pipes[0].unload_lora_weights()
    assert torch.equal(draw("flux", pipes[0]), expected[0])
    for pipe in pipes:
        lowbits.restore(pipe)


def test_what_a_streamer_needs_is_for_the_slots_that_it_was_asked_for() -> None:
    """Beside the adapter that another one keeps there."""
    other: Any = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    config = LoraConfig(target_modules=["0", "1"], init_lora_weights=False)
    other, model, x = inject_adapter_in_model(config, other), build(), torch.randn(2, 16)
    expected = [other(x), model(x)]
    alone = models.smallest_budget(model, depth=3, location="cpu")
    options: dict[str, Any] = {"device": "cpu", "budget": "1MB", "location": "cpu"}
    streamers = [
        lowbits.LayerStreamer(other, **options).attach(),
        lowbits.LayerStreamer(model, depth=3, **options).attach(),
    ]
    budget = cap(alone)
    with torch.no_grad():
        assert torch.equal(other(x), expected[0])
        for _ in range(2):  # in more memory, parts are larger
            with pytest.raises(errors.InsufficientMemoryError, match="other pipelines") as caught:
                model(x)
            assert caught.value.needed_bytes > budget.budget_bytes
            budget = cap(caught.value.needed_bytes)
        for _ in range(2):
            assert torch.equal(model(x), expected[1])
            assert torch.equal(other(x), expected[0])
    assert budget.peak_bytes <= budget.budget_bytes
    assert streamers[1].stats().depth == 3
    for streamer in streamers:
        streamer.detach()


def test_streamers_count_too() -> None:
    model, other = build(), build(1)
    x = torch.randn(2, 16)
    expected = other(x)
    streamer = lowbits.LayerStreamer(model, device="cpu", budget="1MB", location="cpu").attach()
    budget = cap(unit_bytes(model) + 5000)
    handle = lowbits.apply(other, **CPU)
    for _ in range(2):
        model(x)
        assert torch.equal(other(x), expected)
    assert streamer.stats().budget_bytes == budget.budget_bytes
    assert budget.peak_bytes <= budget.budget_bytes
    assert copies(handle) == 2 * len(handle.stats().units)
    streamer.detach()
    lowbits.device_budget("cpu", None)
    assert not streamer.is_attached


def test_what_is_gone_takes_nothing() -> None:
    model = build()
    budget = cap("1MB")
    lowbits.apply(model, **CPU)
    model(torch.randn(2, 16))
    assert budget.device_bytes
    del model
    gc.collect()
    assert budget.device_bytes == 0


def test_threads_wait_for_each_other() -> None:
    models = [build(seed) for seed in range(3)]
    x = torch.randn(2, 16)
    expected = [model(x) for model in models]
    budget = cap(smallest_budget(build()) + 4000)
    for model in models:
        lowbits.apply(model, **CPU)
    wrong: list[int] = []

    def run(number: int) -> None:
        with torch.no_grad():
            outputs = [models[number](x) for _ in range(10)]
        wrong.extend(number for y in outputs if not torch.equal(y, expected[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert budget.peak_bytes <= budget.budget_bytes


def test_threads_wait_while_a_cap_changes() -> None:
    class Slow(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01)
            return super().forward(x)

    model, x = Slow([64] * 4), torch.randn(3, 16)
    with torch.no_grad():
        expected = model(x)
    streamer = lowbits.LayerStreamer(model, device="cpu", budget="30KB", location="cpu").attach()
    found: list[bool] = []

    def run() -> None:
        with torch.no_grad():
            found.extend(torch.equal(model(x), expected) for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(10):
        time.sleep(0.02)
        cap(25_000 + number)
    for thread in threads:
        thread.join(60)
    assert found == [True] * 60
    streamer.detach()


def pipelines_take_turns() -> None:
    models = [build(seed) for seed in range(3)]
    x = torch.randn(2, 16)
    expected = [model(x) for model in models]
    device = fake_accelerator()
    ops = ThreadedOps(device, poison=True, delay=lambda nbytes: nbytes * 1e-9)
    least = smallest_budget(build())
    with ops, faked(ops), torch.no_grad():
        budget = lowbits.device_budget(device, unit_bytes(models[0]) + least)
        assert budget is not None
        handles = [lowbits.apply(model, device=device, gpu_weights="all") for model in models]
        for number in (0, 1, 2, 1, 0, 0, 2, 1):
            y = models[number](x.to(device)).cpu()
            assert torch.equal(y, expected[number])
            assert [on_device(handle) for handle in handles].count(True) == 1
        assert budget.peak_bytes <= budget.budget_bytes
        for handle in handles:
            handle.restore()
        lowbits.device_budget(device, None)


def test_on_a_device_with_streams_pipelines_take_turns(run_beside: Callable[..., Any]) -> None:
    run_beside(pipelines_take_turns)


def test_a_device_without_a_number_is_the_current_one() -> None:
    budgets = Budgets()
    made = budgets.set(torch.device("cuda"), 100)
    assert made is not None
    assert budgets.of(torch.device("cuda", 0)) is made
    assert budgets.of(torch.device("cuda", 1)) is None
    assert budgets.of(torch.device("cpu")) is None


def test_two_pipelines_that_share_components() -> None:
    first = PIPELINES["flux"].build()
    second = type(first)(**{**first.components, "transformer": PIPELINES["flux"].build(seed=1)
                            .transformer})  # fmt: skip
    second.set_progress_bar_config(disable=True)
    expected = [draw("flux", pipe) for pipe in (first, second)]
    anatomies = [Anatomy(pipe) for pipe in (first, second)]
    whole = sum(t.nbytes for m in (first, second.transformer) for t in _tensors(m))
    budget = cap(2 * whole)
    one = lowbits.apply(first, **CPU)
    two = lowbits.apply(second, components=["transformer"], **CPU)
    assert set(two.components) == {"transformer"}
    for _ in range(2):
        for pipe, picture in zip((first, second), expected, strict=True):
            assert torch.equal(draw("flux", pipe), picture)
    assert whole <= budget.device_bytes <= 1.1 * whole
    assert max(unit.copies for handle in (one, two) for unit in handle.stats().units) == 1
    budget = cap(smallest_budget(PIPELINES["flux"].build()) * 2)
    for _ in range(2):
        for pipe, picture in zip((first, second), expected, strict=True):
            assert torch.equal(draw("flux", pipe), picture)
    assert 0 < budget.peak_bytes <= budget.budget_bytes
    two.restore()
    one.restore()
    for anatomy in anatomies:
        anatomy.check()


@pytest.mark.parametrize("scheme", every_scheme())
def test_every_scheme_gives_way_and_comes_back(scheme: str) -> None:
    pipes = [PIPELINES["flux"].build(seed=seed) for seed in range(2)]
    expected = []
    for pipe in pipes:
        with lowbits.apply(pipe, scheme, device="cpu", keep_source="memory") as handle:
            expected.append(draw("flux", pipe))
            nbytes = handle.stats().peak_device_bytes
    budget = cap(int(1.2 * nbytes))
    for pipe in pipes:
        lowbits.apply(pipe, scheme, keep_source="memory", **CPU)
    for _ in range(2):
        for pipe, picture in zip(pipes, expected, strict=True):
            assert torch.equal(draw("flux", pipe), picture)
    assert budget.peak_bytes <= budget.budget_bytes


def _tensors(part: Any) -> list[torch.Tensor]:
    if isinstance(part, torch.nn.Module):
        return [*part.parameters(), *part.buffers()]
    modules = [m for m in part.components.values() if isinstance(m, torch.nn.Module)]
    return [tensor for module in modules for tensor in _tensors(module)]
