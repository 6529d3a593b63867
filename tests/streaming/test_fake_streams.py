"""Devices with streams made of threads, or of a clock: what tests of a streamer rest on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable  # noqa: TC003 - fixtures and hypothesis read annotations
from typing import Any

import pytest
import torch

from lowbits.testing.streams import Step, StreamEvent, ThreadedOps, VirtualOps

OPS: list[Callable[..., Any]] = [ThreadedOps, lambda **k: VirtualOps(bandwidth=1.0, **k)]


def filled(value: int, nbytes: int = 8) -> torch.Tensor:
    return torch.full((nbytes,), value, dtype=torch.uint8)


@pytest.mark.parametrize("make", OPS, ids=("threads", "clock"))
def test_memory_is_counted_to_the_byte(make: Callable[..., Any]) -> None:
    ops = make(capacity_bytes=100)
    first, second = ops.empty(60), ops.empty(40)
    assert (ops.allocated_bytes, ops.peak_bytes, ops.free_bytes()) == (100, 100, 0)
    with pytest.raises(torch.OutOfMemoryError, match="1 bytes, 100 of 100"):
        ops.empty(1)
    view = first[10:20]
    del first
    assert ops.allocated_bytes == 100
    del view
    assert (ops.allocated_bytes, ops.peak_bytes, ops.free_bytes()) == (40, 100, 60)
    with torch.inference_mode():
        assert not ops.empty(60).is_inference()
    assert second.dtype == torch.uint8
    assert make().free_bytes() is None


class Gate:
    """A delay that lasts until it is opened: no clock decides what a test sees."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> float:
        self.reached.set()
        assert self._opened.wait(60)
        return 0.0

    def open(self) -> None:
        self._opened.set()


def test_copies_come_late_and_in_order() -> None:
    gate = Gate()
    with ThreadedOps(delay=gate, poison=True) as ops:
        slot = ops.empty(8)
        assert torch.equal(slot, filled(255))
        events = []
        for value in (1, 2):
            ops.copy(slot, filled(value))
            events.append(ops.mark_copied())
        assert not events[0].has_happened()
        gate.open()
        ops.compute_after(events[1])
        assert events[0].has_happened()
        assert torch.equal(slot, filled(2))
        ops.poison(slot)
        ops.host_after(ops.mark_copied())
        assert torch.equal(slot, filled(255))
        ops.compute_after(None)
        ops.host_after(None)
        ops.copy_after(None)
        ops.release_cached()
    assert ops.log[:4] == [Step("empty", 8), Step("copy", 8), Step("mark_copied"), Step("copy", 8)]
    assert ops.log[-1] == Step("release_cached")


def test_a_reader_that_does_not_wait_reads_poison() -> None:
    gate = Gate()
    with ThreadedOps(delay=gate, poison=True) as ops:
        slot = ops.empty(8).fill_(3)
        ops.copy(slot, filled(1))
        gate.reached.wait(60)
        assert torch.equal(slot, filled(255))
        gate.open()


def test_the_source_is_read_when_the_copy_runs() -> None:
    gate = Gate()
    with ThreadedOps(delay=gate) as ops:
        slot, staging = ops.empty(8), filled(1)
        ops.copy(slot, staging)
        staging.fill_(9)
        gate.open()
        ops.compute_after(ops.mark_copied())
        assert torch.equal(slot, filled(9))


def test_copies_wait_for_compute_and_the_host_does_not() -> None:
    with ThreadedOps(compute_delay=lambda: 0.2) as ops:
        slot = ops.empty(8).fill_(0)
        computed = ops.mark_computed()
        ops.copy_after(computed)
        ops.copy(slot, filled(1))
        copied = ops.mark_copied()
        assert torch.equal(slot, filled(0))
        ops.compute_after(copied)
        assert computed.has_happened()
        assert torch.equal(slot, filled(1))


def test_bandwidth_is_kept() -> None:
    with ThreadedOps(bandwidth=1000.0) as ops:
        slot, start = ops.empty(50), time.perf_counter()
        ops.copy(slot, filled(1, 50))
        ops.host_after(ops.mark_copied())
        assert time.perf_counter() - start >= 0.05


def test_a_failed_copy_reaches_its_waiter_alone() -> None:
    with ThreadedOps() as ops:
        slot = ops.empty(8).fill_(0)
        ops.fail_on(1)
        events = []
        for value in (1, 2, 3):
            ops.copy(slot, filled(value))
            events.append(ops.mark_copied())
        ops.compute_after(events[0])
        for _ in range(2):
            with pytest.raises(RuntimeError, match="copy 1 failed"):
                ops.compute_after(events[1])
        ops.host_after(events[2])
        assert torch.equal(slot, filled(3))


def test_closing_finishes_and_ends_the_threads() -> None:
    before = threading.active_count()
    ops = ThreadedOps(delay=lambda _: 0.02)
    slot = ops.empty(8)
    ops.copy(slot, filled(1))
    ops.close()
    ops.close()
    assert torch.equal(slot, filled(1))
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        ops.copy(slot, filled(2))
    ops.compute_after(ops.mark_copied())
    forgotten = ThreadedOps()
    threads = [stream.thread for stream in (forgotten._copy_stream, forgotten._compute_stream)]
    del forgotten
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_stream_that_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbits.testing.streams._PATIENCE_S", 0.01)
    with pytest.raises(TimeoutError, match=r"did not get on for 0\.01 s"):
        StreamEvent().wait()


def run_ring(ops: VirtualOps, slots: int, units: int, seconds: float) -> None:
    """Compute units of 100 bytes in turn, each copied as soon as its slot is free."""
    ring, free = [ops.empty(100) for _ in range(slots)], [None] * slots
    master, computed = filled(1, 100), dict[int, float | None](enumerate(free))
    ready = []
    for unit in range(units + slots - 1):
        if unit < units:
            ops.copy_after(computed[unit % slots])
            ops.copy(ring[unit % slots], master)
            ready.append(ops.mark_copied())
        now = unit - slots + 1
        if now >= 0:
            ops.compute_after(ready[now])
            ops.compute(seconds)
            computed[now % slots] = ops.mark_computed()


@pytest.mark.parametrize(("slots", "wall"), [(1, 20.0), (2, 11.0), (3, 11.0)])
def test_the_clock_overlaps_copies_with_compute(slots: int, wall: float) -> None:
    ops = VirtualOps(bandwidth=100.0)
    run_ring(ops, slots, units=10, seconds=1.0)
    assert ops.wall_s == pytest.approx(wall)
    assert ops.compute_busy_s == ops.copy_busy_s == pytest.approx(10.0)
    assert ops.stall_s == pytest.approx(wall - 10.0)
    assert ops.peak_bytes == 100 * slots


def test_jitter_is_the_same_each_time() -> None:
    first, again, other = (VirtualOps(bandwidth=100.0, jitter=0.3, seed=s) for s in (1, 1, 2))
    for ops in (first, again, other):
        run_ring(ops, 2, units=50, seconds=1.0)
    assert first.wall_s == again.wall_s != other.wall_s
    assert 50 * 0.7 < first.copy_busy_s < 50 * 1.3
    assert first.wall_s > 51


def test_the_clock_of_the_host() -> None:
    ops = VirtualOps(bandwidth=10.0)
    slot = ops.empty(20)
    ops.work(1.0)
    ops.copy(slot, filled(4, 20))
    assert torch.equal(slot, filled(4, 20))
    assert (ops.mark_copied(), ops.mark_computed(), ops.wall_s) == (3.0, 1.0, 1.0)
    ops.host_after(ops.mark_copied())
    ops.host_after(None)
    assert ops.wall_s == 3.0
    ops.compute(1.0)
    ops.copy_after(ops.mark_computed())
    ops.compute_after(None)
    assert (ops.copy_s, ops.stall_s) == (4.0, 0.0)
