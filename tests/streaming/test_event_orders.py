"""Every order in which copies and compute of a few units can happen gives the right results.

What is covered is in [Note: coverage].

[Note: coverage]
Two passes or more over at most four units, in one slot or two. A copy is two steps, so that it is
seen half done; a block's compute is one. Of two that overlap and that nothing orders, either may be
first, which is all that the streamer can get wrong. Not covered: orders within a kernel, and more
than one stream of compute.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import pytest
import torch
from streaming.devices import PlainSlab, faked
from streaming.recording import Chain, RecordedOps, Search, TrackedSlab, Wrong

from lowbits import LayerStreamer
from lowbits.streaming import timing, transfer
from lowbits.streaming.masters import HostMaster
from lowbits.streaming.residency import _Home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from lowbits import StreamStats

SMALL, LARGE = 4096, 8192
TWICE = [range(4), range(4)]


@contextmanager
def recorded_reads(ops: RecordedOps, chunk_bytes: int) -> Iterator[None]:
    """Write down what is read into staging buffers, which are small."""

    def read(master: HostMaster, start: int, out: Tensor, _: Any = None) -> None:
        ops.read(out, master.flat[start : start + out.numel()])

    with (
        mock.patch.object(HostMaster, "read", read),
        mock.patch.object(transfer, "_CHUNK_BYTES", chunk_bytes),
    ):
        yield


class Found(NamedTuple):
    """What a search has found."""

    wrong: Wrong | None
    steps: int
    stats: StreamStats


def search(
    model: Chain,
    passes: Sequence[Sequence[int]],
    *,
    prepare: Callable[[], Any] | None = None,
    chunk_bytes: int = 256,
    writes: Mapping[int, Sequence[int]] | None = None,
    **options: Any,
) -> Found:
    """Stream a model for some passes, each in some order, and look for a wrong result.

    Args:
        model: its results are computed before.
        passes: numbers of blocks.
        prepare: called before the first pass.
        chunk_bytes: of a staging buffer.
        writes: numbers of blocks whose weights are written to, by the pass that comes after it.
        options: of the streamer.
    """
    ops = model.ops
    ops.is_written_to = bool(writes)
    inputs = [torch.randn(16) for _ in passes]
    originals = [parameter.detach().clone() for parameter in model.parameters()]
    if prepare is not None:
        prepare()
    run(model, inputs, passes, writes)
    for parameter, original in zip(model.parameters(), originals, strict=True):
        parameter.data.copy_(original)
    ops.is_eager = False
    is_staged = options.get("location") == "cpu"
    slab = partial(TrackedSlab, ops) if is_staged else PlainSlab
    with ExitStack() as stack:
        stack.enter_context(faked(ops, slab))
        if is_staged:
            stack.enter_context(recorded_reads(ops, chunk_bytes))
        streamer = LayerStreamer(model, device="cpu", **options).attach()
        stack.callback(streamer.detach)
        if prepare is not None:
            prepare()
        run(model, inputs, passes, writes)
        ops.freeze()
        found = Search(ops)
        return Found(found.first_wrong(), found.steps, streamer.stats())


@torch.no_grad()
def run(
    model: Chain,
    inputs: Sequence[Tensor],
    passes: Sequence[Sequence[int]],
    writes: Mapping[int, Sequence[int]] | None,
) -> None:
    blocks: Any = model.blocks
    for index, (x, order) in enumerate(zip(inputs, passes, strict=True)):
        for number in (writes or {}).get(index, ()):
            blocks[number].weight.add_(1.0)
        model(x, order)


@pytest.mark.parametrize("method", ["async", "queue"])
@pytest.mark.parametrize("location", ["shared", "cpu"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_order_is_right(count: int, depth: int, location: str, method: str) -> None:
    model = Chain(RecordedOps(), [512] * count)
    found = search(
        model, [range(count)] * 3, budget=256 + 512 * depth, depth=depth,
        location=location, method=method,
    )  # fmt: skip
    assert found.wrong is None
    assert found.stats.copied_bytes


@pytest.mark.parametrize("location", ["shared", "cpu"])
@pytest.mark.parametrize("second", list(itertools.permutations(range(3))))
def test_no_order_of_calls_is_wrong(second: tuple[int, ...], location: str) -> None:
    """Passes in another order than the one before, without a unit, and with one twice."""
    passes = [range(3), second, second[:2], (second[2],) * 2, range(3)]
    model = Chain(RecordedOps(), [512] * 3)
    found = search(model, passes, budget=256 + 1024, depth=2, location=location)
    assert found.wrong is None
    assert found.stats.depth == 2


@pytest.mark.parametrize("location", ["shared", "cpu"])
@pytest.mark.parametrize(
    ("sizes", "slots", "depth"),
    [
        ([LARGE, SMALL, SMALL, LARGE], [LARGE], 1),
        ([SMALL, SMALL, LARGE, SMALL], [LARGE], 1),
        ([LARGE, SMALL, SMALL, SMALL], [LARGE, SMALL], 2),
        ([SMALL, LARGE, SMALL, SMALL], [LARGE, LARGE], 2),
    ],
)
def test_units_that_share_a_slot(
    sizes: list[int], slots: list[int], depth: int, location: str
) -> None:
    model = Chain(RecordedOps(), sizes)
    found = search(
        model, [range(4)] * 2, budget=256 + sum(slots), depth=depth, location=location,
        chunk_bytes=LARGE,
    )  # fmt: skip
    assert found.wrong is None


@pytest.mark.parametrize("outer", range(4))
@pytest.mark.parametrize("inner", range(4))
@pytest.mark.parametrize("location", ["shared", "cpu"])
def test_a_unit_that_calls_another(outer: int, inner: int, location: str) -> None:
    model = Chain(RecordedOps(), [512] * 4)
    if outer == inner:
        return
    blocks: Any = model.blocks
    blocks[outer].inner = [blocks[inner]]
    order = [number for number in range(4) if number != inner]
    found = search(model, [order] * 2, budget=256 + 1024, depth=2, location=location)
    assert found.wrong is None


@pytest.mark.parametrize("is_measured", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("residents", [1, 2])
@pytest.mark.parametrize("written", [(0,), (1, 2), (3,), range(4)])
def test_weights_that_are_written_to_between_passes(
    written: Sequence[int], residents: int, depth: int, *, is_measured: bool
) -> None:
    """Those that stay on the device too, whose uses nobody marks."""
    ops = RecordedOps()
    ops.tells_time = not is_measured  # what has no time yet is measured
    with mock.patch.object(timing, "_MEASURED_FIRST", 5 if is_measured else 1):
        found = search(
            Chain(ops, [512] * 4), [range(4)] * 3, writes={2: written},
            budget=256 + 512 * (depth + residents), depth=depth, location="shared",
        )  # fmt: skip
    assert found.wrong is None
    resident = sum(unit.is_resident for unit in found.stats.units if not unit.is_base)
    assert resident in (residents, 4)


@pytest.mark.parametrize("location", ["shared", "cpu"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("nbytes", [256, 512])
def test_memory_that_compute_still_reads(nbytes: int, depth: int, location: str) -> None:
    """A caching allocator gives memory away that work asked for before has not yet read."""
    ops = RecordedOps()
    scratch = ops.track(torch.randn(nbytes // 4))

    def prepare() -> None:
        ops.launch(lambda: scratch[:16] * 2)
        if not ops.is_eager:
            ops.free(scratch.view(torch.uint8))

    found = search(
        Chain(ops, [512] * 3), [range(3)] * 2, prepare=prepare, budget=256 + 512 * depth,
        depth=depth, location=location,
    )  # fmt: skip
    assert found.wrong is None


@pytest.mark.parametrize("location", ["shared", "cpu"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("forgotten", ["copy_after", "compute_after"])
def test_it_is_found_that_something_does_not_wait(
    forgotten: str, depth: int, location: str
) -> None:
    model = Chain(RecordedOps(forgotten), [512] * 4)
    found = search(model, TWICE, budget=256 + 512 * depth, depth=depth, location=location)
    assert found.wrong is not None
    assert len(found.wrong.steps) <= found.steps


def test_it_is_found_that_staging_is_written_too_early() -> None:
    model = Chain(RecordedOps("host_after"), [512] * 4)
    found = search(model, TWICE, budget=256 + 512, depth=1, location="cpu", chunk_bytes=512)
    assert found.wrong is not None


def test_it_is_found_that_a_slot_in_use_is_overwritten() -> None:
    class Blind(_Home):  # type: ignore[misc] # a mutant
        rivals = property(lambda _: [], lambda *_: None)

    with mock.patch("lowbits.streaming.residency._Home", Blind):
        found = search(
            Chain(RecordedOps(), [512] * 4), TWICE, budget=256 + 512, depth=1, location="shared"
        )
    assert found.wrong is not None
