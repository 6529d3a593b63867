"""A tiny FLUX on the fake accelerator: streamed, it draws what the CPU does, and behaves alike."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from streaming.devices import faked

import lowbits
from lowbits.errors import InsufficientMemoryError, LowbitsError
from lowbits.testing.accelerator import count_host_copies, fake_accelerator
from lowbits.testing.streams import ThreadedOps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from lowbits.core.handle import Handle

SCHEMES = [
    "native",
    "bnb-nf4",
    pytest.param("float8-e4m3fn", marks=pytest.mark.slow),
    pytest.param("gguf-q8_0", marks=pytest.mark.slow),
]
#: Bytes that all weights take, and a few more.
ALL_BYTES = 100_000_000


class Applied(NamedTuple):
    """A pipeline that is streamed to the fake accelerator."""

    pipe: Any
    handle: Handle
    ops: ThreadedOps
    budget: int


def build() -> Any:
    from pipelines import PIPELINES

    return PIPELINES["flux"].build()


def draw(pipe: Any) -> Tensor:
    from pipelines import draw

    return draw("flux", pipe)


@contextmanager
def applied(
    scheme: str, part: float = 1.5, *, pipe: Any = None, **options: Any
) -> Iterator[Applied]:
    """Stream a pipeline in so many times what it needs at least."""
    device, pipe = fake_accelerator(), pipe or build()
    ops = ThreadedOps(device, poison=True, delay=lambda nbytes: nbytes * 1e-9)
    with ops, faked(ops):
        with pytest.raises(InsufficientMemoryError) as caught:
            lowbits.apply(pipe, scheme, device=device, gpu_weights=1, **options)
        budget = int(caught.value.needed_bytes * part)
        handle = lowbits.apply(pipe, scheme, device="fakegpu", gpu_weights=budget, **options)
        yield Applied(pipe, handle, ops, budget)


def parameters_of(pipe: Any) -> list[tuple[Any, Tensor]]:
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [(p, p.detach().clone()) for module in modules for p in module.parameters()]


def pictures_are_the_same(scheme: str) -> None:
    """And the originals are, once it is restored: the same objects, with the same bits."""
    device, pipe = fake_accelerator(), build()
    before = parameters_of(pipe)
    with lowbits.apply(pipe, scheme, device="cpu"):
        expected = draw(pipe)
    with applied(scheme, pipe=pipe, location="cpu") as found:
        with count_host_copies(over=64) as copies:
            assert torch.equal(draw(pipe), expected)
        assert copies.nbytes == expected.nbytes
        stats = found.handle.stats()
        assert found.ops.peak_bytes <= stats.peak_device_bytes <= found.budget < stats.copied_bytes
        assert pipe._execution_device == pipe.transformer.device == pipe.device == device
        assert pipe.transformer.dtype == torch.float32
        found.handle.restore()
        assert found.ops.allocated_bytes == 0
    for (p, values), (q, restored) in zip(before, parameters_of(pipe), strict=True):
        assert p is q
        assert q.device.type == "cpu"
        assert torch.equal(values, restored)


def weights_that_came_from_the_device_are_placed_there_again() -> None:
    device = fake_accelerator()
    pipe = build().to(device)
    before = parameters_of(pipe)
    with applied("bnb-nf4", pipe=pipe, location="cpu") as found:
        expected = draw(pipe)
        found.handle.reconfigure(gpu_weights="all")
        assert not found.handle.stats().method
        assert torch.equal(draw(pipe), expected)
        found.handle.reconfigure(gpu_weights=found.budget)
        assert torch.equal(draw(pipe), expected)
        found.handle.reconfigure(gpu_weights="all")
        found.handle.restore()
    for (p, values), (q, restored) in zip(before, parameters_of(pipe), strict=True):
        assert p is q
        assert q.device == device
        assert torch.equal(values, restored)


def weights_are_placed_in_other_ways() -> None:
    with applied("float8-e4m3fn", location="cpu") as found:
        pipe, handle, ops, budget = found
        expected = draw(pipe)
        handle.reconfigure(gpu_weights=budget * 2, swap="queue")
        assert torch.equal(draw(pipe), expected)
        assert budget < ops.allocated_bytes <= 2 * budget
        handle.reconfigure(gpu_weights="all")
        assert not handle.stats().method
        assert not ops.allocated_bytes
        assert torch.equal(draw(pipe), expected)
        handle.reconfigure(gpu_weights=budget, location="shared", swap="async")
        assert torch.equal(draw(pipe), expected)
        assert ops.allocated_bytes <= budget
        handle.restore()  # other tests of this process cap the device


def moving_to_another_device_is_refused() -> None:
    with applied("float8-e4m3fn", location="cpu") as found:
        expected = draw(found.pipe)
        found.pipe.to("fakegpu")
        for part in (found.pipe, found.pipe.transformer):
            with pytest.raises(LowbitsError, match="reconfigure"):
                part.to("cpu")
        assert torch.equal(draw(found.pipe), expected)
        assert found.pipe.transformer.device == fake_accelerator()
        assert found.pipe.vae.device == fake_accelerator()


def a_lora_lands_on_the_device_and_counts(location: str) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=8, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe = build()
    lowbits.apply(pipe, "float8-e4m3fn", device="cpu")
    torch.manual_seed(5)
    pipe.transformer.add_adapter(config)
    expected = draw(pipe)
    with applied("float8-e4m3fn", 1.8, location=location) as found:
        plain = draw(found.pipe)
        torch.manual_seed(5)
        transformer = found.pipe.transformer
        transformer.add_adapter(config)
        factors = [p for n, p in transformer.named_parameters() if "lora" in n]
        assert torch.equal(draw(found.pipe), expected)
        assert {p.device for p in factors} == {fake_accelerator()}
        nbytes = sum(p.nbytes for p in factors)
        stats = found.handle.stats()
        assert nbytes
        assert found.ops.allocated_bytes + nbytes <= found.budget
        # It came while another model had all of the budget, which gives way at the next pass.
        assert nbytes < stats.peak_device_bytes <= found.budget + nbytes
        transformer.delete_adapters("default")
        assert torch.equal(draw(found.pipe), plain)


def all_that_fits_stays_by_itself(free_bytes: int) -> None:
    device, pipe = fake_accelerator(), build()
    expected = draw(pipe)
    with ThreadedOps(device, poison=True, capacity_bytes=free_bytes) as ops, faked(ops):
        handle = lowbits.apply(pipe, device="fakegpu", reserve=100_000, location="cpu")
        assert torch.equal(draw(pipe), expected)
        stats = handle.stats()
        assert bool(stats.method) == (free_bytes < ALL_BYTES)
        if stats.method:
            assert ops.peak_bytes <= stats.budget_bytes == free_bytes - 100_000
        handle.restore()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pictures(scheme: str, run_beside: Callable[..., Any]) -> None:
    run_beside(pictures_are_the_same, scheme)


@pytest.mark.slow
def test_reconfigure(run_beside: Callable[..., Any]) -> None:
    run_beside(weights_are_placed_in_other_ways)


def test_weights_that_came_from_the_device(run_beside: Callable[..., Any]) -> None:
    run_beside(weights_that_came_from_the_device_are_placed_there_again)


def test_moving(run_beside: Callable[..., Any]) -> None:
    run_beside(moving_to_another_device_is_refused)


@pytest.mark.parametrize("location", ["cpu", pytest.param("shared", marks=pytest.mark.slow)])
def test_lora(location: str, run_beside: Callable[..., Any]) -> None:
    run_beside(a_lora_lands_on_the_device_and_counts, location)


@pytest.mark.parametrize("free_bytes", [700_000, ALL_BYTES])
def test_auto(free_bytes: int, run_beside: Callable[..., Any]) -> None:
    run_beside(all_that_fits_stays_by_itself, free_bytes)
