"""Streaming to a real accelerator: its streams, its events, its page-locked memory, its limits."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from itertools import product
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, draw
from schemes import LAYOUTS
from streaming.models import Snapshot, Stack, same

import lowbits
import lowbits.streaming.streamer as streamers
from lowbits.errors import InsufficientMemoryError, StreamError
from lowbits.streaming.device_ops import device_ops
from lowbits.streaming.streamer import LayerStreamer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]
#: Long enough copies (33 MB) and products that one which starts too early is seen.
WIDTH, HIDDEN, BLOCKS = 1024, 4096, 8
MIB = 2**20
DEVICE: Any = torch.accelerator.current_accelerator(check_available=True)


def make() -> tuple[Stack, torch.Tensor, torch.Tensor]:
    """Return a model on the host, its inputs, and what it computes on the accelerator."""
    model = Stack(BLOCKS, WIDTH, hidden=HIDDEN).eval().requires_grad_(requires_grad=False)
    x = torch.randn(64, WIDTH, device=DEVICE)
    with torch.no_grad():
        expected = model.to(DEVICE)(x)
    return model.to("cpu"), x, expected


def least(model: Any, **options: Any) -> int:
    with pytest.raises(InsufficientMemoryError) as caught:
        LayerStreamer(model, device=DEVICE, budget=1, **options).attach()
    return caught.value.needed_bytes


WAYS = [
    (method, location, depth)
    for method, location, depth in product(
        ("queue", "async", "auto"), ("cpu", "shared", "disk"), (1, 2, 3, "auto")
    )
    if method == "async" or depth == "auto"
]


@pytest.mark.parametrize(("method", "location", "depth"), WAYS)
@torch.no_grad()
def test_passes_that_nobody_waits_for_are_right(method: str, location: str, depth: Any) -> None:
    model, x, expected = make()
    before = Snapshot(model)
    options: dict[str, Any] = {"method": method, "location": location, "depth": depth}
    budget = least(model, **options)
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    was = torch.accelerator.memory_allocated()
    with LayerStreamer(model, device=DEVICE, budget=budget, **options) as streamer:
        results = [model(x) for _ in range(20)]
        assert all(torch.equal(result, expected) for result in results)
        stats = streamer.stats()
    assert stats.peak_device_bytes <= budget
    assert torch.accelerator.max_memory_allocated() - was <= budget + 32 * MIB
    if location == "shared":
        assert stats.pinned_bytes > 0
    before.require()
    assert torch.accelerator.memory_allocated() - was <= 32 * MIB


@torch.no_grad()
def test_passes_on_streams_of_the_caller() -> None:
    model, x, expected = make()
    streams = [torch.Stream(DEVICE) for _ in range(2)]
    with LayerStreamer(model, device=DEVICE, budget=least(model), location="shared"):
        torch.accelerator.synchronize()
        for stream in streams * 3:
            with stream:
                result = model(x)
                stream.synchronize()
            assert torch.equal(result, expected)


def test_gradients_of_inputs() -> None:
    model, x, _ = make()
    grads = []
    for is_streamed in (False, True):
        inputs = x.clone().requires_grad_()
        if is_streamed:
            with LayerStreamer(model, device=DEVICE, budget=least(model)):
                model(inputs).square().sum().backward()
        else:
            model.to(DEVICE)(inputs).square().sum().backward()
            model.to("cpu")
        assert inputs.grad is not None
        grads.append(inputs.grad)
    assert torch.equal(*grads)


@torch.no_grad()
def test_copies_for_a_model_that_was_dropped_reach_nobody_else() -> None:
    """The next pass's are under way: the allocator must not give their memory to others yet."""
    model, x, _ = make()
    sizes = [tensor.nbytes for tensor in model.state_dict().values()]
    options: dict[str, Any] = {"location": "shared", "depth": 3}
    budget = least(model, **options)
    streamer = LayerStreamer(model, device=DEVICE, budget=budget, **options).attach()
    model(x)
    del streamer, model
    gc.collect()
    later = [torch.zeros(nbytes, dtype=torch.uint8, device=DEVICE) for nbytes in sizes]
    torch.accelerator.synchronize()
    assert not any(tensor.any() for tensor in later)


@torch.no_grad()
def test_models_of_one_pipeline_copy_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each from a thread of its own, and on one stream; its object remembers one caller."""
    stream, ops = torch.Stream(DEVICE), device_ops(DEVICE)
    monkeypatch.setattr(streamers, "device_ops", lambda _: ops)
    found = [make() for _ in range(2)]
    options: dict[str, Any] = {"location": "cpu", "depth": 3}
    with ExitStack() as stack:
        for model, _, _ in found:
            budget = least(model, **options)
            stack.enter_context(LayerStreamer(model, device=DEVICE, budget=budget, **options))
        with stream:
            for _ in range(5):
                for model, x, expected in found:
                    assert torch.equal(model(x), expected)
                    assert torch.accelerator.current_stream() == stream


@torch.no_grad()
def test_a_graph_is_refused() -> None:
    if DEVICE.type != "cuda":
        pytest.skip("needs CUDA graphs")
    model, x, expected = make()
    with LayerStreamer(model, device=DEVICE, budget=least(model), location="shared"):
        with pytest.raises(StreamError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(x.clone())  # which is captured: torch warns of a graph without anything
        assert torch.equal(model(x), expected)


@torch.no_grad()
def test_blocks_that_are_compiled() -> None:
    model, x, expected = make()
    # In the smallest one blocks are not moved whole.
    budget = sum(tensor.nbytes for tensor in model.state_dict().values()) // 2
    with LayerStreamer(model, device=DEVICE, budget=budget, location="shared"):
        for block in model.blocks:
            block.compile(fullgraph=True)
        for _ in range(4):
            got = model(x)
            assert float((got - expected).norm() / expected.norm()) <= 1e-5


@torch.no_grad()
def test_memory_that_runs_out_is_made_room_for() -> None:
    """A limit that holds all weights but not what a pass computes beside them."""
    if DEVICE.type != "cuda":
        pytest.skip("needs torch.cuda.set_per_process_memory_fraction")
    model, _, _ = make()
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    x = torch.randn(4096, WIDTH, device=DEVICE)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    expected = model.to(DEVICE)(x)
    limit = torch.cuda.max_memory_reserved() - total // 4
    model.to("cpu")
    torch.cuda.empty_cache()
    everything = torch.cuda.get_device_properties(DEVICE).total_memory
    with LayerStreamer(model, device=DEVICE, budget=total, location="shared") as streamer:
        torch.cuda.set_per_process_memory_fraction(limit / everything)
        try:
            results = [model(x) for _ in range(3)]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert all(torch.equal(result, expected) for result in results)
        assert streamer.stats().recoveries >= 1


@pytest.mark.parametrize("scheme", ["native", *LAYOUTS])
@pytest.mark.parametrize(("swap", "location"), [("queue", "cpu"), ("async", "shared")])
def test_a_pipeline_draws_what_it_draws_resident(scheme: str, swap: str, location: str) -> None:
    pipe = PIPELINES["flux"].build()
    options: dict[str, Any] = {"device": DEVICE, "keep_source": "memory"}
    with lowbits.apply(pipe, scheme, gpu_weights="1GB", **options):
        expected = draw("flux", pipe)
    with pytest.raises(InsufficientMemoryError) as caught:
        lowbits.apply(pipe, scheme, gpu_weights=1, **options)
    budget = caught.value.needed_bytes
    handle = lowbits.apply(
        pipe, scheme, gpu_weights=budget, swap=swap, location=location, **options
    )
    for _ in range(3):
        assert same(draw("flux", pipe), expected)
    assert handle.stats().peak_device_bytes <= budget
    assert handle.stats().copied_bytes > 0
    handle.restore()
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cpu"}


class Wide(torch.nn.Module):
    """Takes and gives back memory, beside a streamed stack."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack, self.nbytes = stack, 256 * MIB

    def forward(self, x: torch.Tensor) -> Any:
        y = self.stack(x)
        torch.empty(self.nbytes, dtype=torch.uint8, device=x.device)
        return y


@torch.no_grad()
def test_what_calls_take_is_what_auto_leaves_free() -> None:
    stack, x, expected = make()
    model = Wide(stack)
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    streamer = LayerStreamer(model, device=DEVICE, budget=least(model), location="cpu")
    with streamer:
        for _ in range(3):
            assert torch.equal(model(x), expected)
        taken = streamer.stats().activation_bytes
    assert 256 * MIB <= taken <= 320 * MIB
    free = device_ops(DEVICE).free_bytes()
    assert free is not None
    streamer = LayerStreamer(model, device=DEVICE, budget="auto", location="cpu")
    before = streamer.attach().stats().budget_bytes
    model(x)
    torch.accelerator.reset_peak_memory_stats()
    model(x)
    streamer.detach()
    after = streamer.attach().stats().budget_bytes
    streamer.detach()
    assert before < after <= free - 224 * MIB
