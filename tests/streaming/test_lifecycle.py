"""Attach, detach, and everything that may end first: the model, a thread, the process."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch
from streaming.models import (
    WIDE,
    WIDTH,
    Block,
    Snapshot,
    Stack,
    frozen,
    inputs,
    reference,
    same,
    stage_of,
    streamer_of,
)
from torch import nn

from lowbits.core.interception import interceptor_of
from lowbits.errors import (
    AlreadyPatchedError,
    NotPatchedError,
    PatchError,
    StreamError,
)
from lowbits.streaming.masters import HostMaster
from lowbits.streaming.proxy import StreamedTensor
from lowbits.streaming.stored import Stored
from lowbits.streaming.streamer import LayerStreamer
from lowbits.streaming.transfer import ThreadTransfer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

LOCATIONS = ("cpu", "disk")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let scratch files lie here, and nothing be left of them."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield tmp_path
    assert list(tmp_path.glob("lowbits-*")) == []


def folders(scratch: Path) -> list[Path]:
    return list(scratch.glob("lowbits-*"))


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("method", ["queue", "async", "auto"])
def test_attach_and_detach_again_and_again(method: str, location: str) -> None:
    model = Stack(4)
    model.blocks[1].requires_grad_(requires_grad=False)
    model.stem.weight.requires_grad_(False)
    before = Snapshot(model)
    for passes in (0, 1, 3):
        streamer = streamer_of(model, method=method, location=location)
        assert not streamer.is_attached
        assert streamer.attach() is streamer
        assert streamer.stats().passes == 0
        for _ in range(passes):
            model(inputs())
        streamer.detach()
        assert not streamer.is_attached
        before.require()


def test_it_may_be_attached_again() -> None:
    model, expected = reference(), reference()(inputs())
    streamer = streamer_of(model)
    for _ in range(2):
        with streamer as entered:
            assert entered is streamer
            assert same(model(inputs()), expected)
    with streamer.attach():
        assert same(model(inputs()), expected)
    assert not streamer.is_attached


def test_nothing_is_touched_before_attach() -> None:
    model = Stack(2)
    before = Snapshot(model)
    pointers = before.pointers()
    streamer = LayerStreamer(model, device="cpu", budget=1)
    with pytest.raises(NotPatchedError):
        streamer.detach()
    with pytest.raises(NotPatchedError):
        streamer.stats()
    assert before.pointers() == pointers
    before.require()


def test_typed_errors_of_states() -> None:
    model = reference()
    streamer = streamer_of(model).attach()
    with pytest.raises(AlreadyPatchedError):
        streamer.attach()
    streamer.detach()
    with pytest.raises(NotPatchedError):
        streamer.detach()
    with streamer:
        streamer.detach()


@pytest.mark.parametrize(
    "part",
    [
        "",
        "stem",
        "blocks",
        "blocks.1",
        "blocks.1.down",
    ],
)
def test_two_streamers_on_one_module(part: str) -> None:
    model, expected = reference(), reference()(inputs())
    module = model.get_submodule(part)
    with LayerStreamer(model, device="cpu", budget=8_000, method="queue"):
        other = LayerStreamer(module, device="cpu", budget=10**6)
        with pytest.raises(AlreadyPatchedError):
            other.attach()
        assert same(model(inputs()), expected)


@pytest.mark.parametrize("part", ["stem", "blocks", "blocks.1", "blocks.1.down"])
def test_a_streamer_on_a_part_stands_in_the_way_of_the_whole(part: str) -> None:
    model, expected = reference(), reference()(inputs())
    with LayerStreamer(model.get_submodule(part), device="cpu", budget=10**6):
        assert same(model(inputs()), expected)
        with pytest.raises(AlreadyPatchedError):
            LayerStreamer(model, device="cpu", budget=10**6).attach()
        assert same(model(inputs()), expected)


class Nested(nn.Module):
    """A norm with buffers, which is no child of the root, and is called by nobody from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"norm": nn.BatchNorm1d(WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.parts["norm"](x.flatten(0, -2))
        return out.view(x.shape)


def test_a_copy_of_what_is_streamed_is_nobodys() -> None:
    """As adapter libraries make of modules that they train: it goes on when streaming ends."""
    model: Any = Stack(4).eval()
    model.stem = Nested().eval()
    norm = model.stem.parts["norm"]
    with streamer_of(model, budget=10**6):
        expected = model(inputs())
        assert not isinstance(norm.running_mean, StreamedTensor)
        copied = copy.deepcopy(norm)
        with streamer_of(copied, budget=10**6):
            assert same(copied(torch.ones(1, WIDTH)), norm(torch.ones(1, WIDTH)))
        with pytest.raises(AlreadyPatchedError):
            LayerStreamer(norm, device="cpu", budget=10**6).attach()
        borrowed = norm.running_mean
    model.stem.parts["other"] = copied
    norm.register_buffer("borrowed", borrowed)
    with streamer_of(model, budget=10**6):
        assert same(model(inputs()), expected)


def test_two_parts_may_have_a_streamer_each() -> None:
    model, expected = nn.Sequential(Stack(3), Stack(3)), None
    expected = model(inputs())
    before = Snapshot(model)
    with streamer_of(model[0]), streamer_of(model[1], location="disk"):
        for _ in range(3):
            assert same(model(inputs()), expected)
    before.require()


@pytest.mark.parametrize("part", ["", "stem", "blocks.1"])
def test_detach_inside_a_forward_is_refused(part: str) -> None:
    model, expected = reference(), reference()(inputs())
    streamer = streamer_of(model, budget=8_000).attach()
    raised: list[StreamError] = []

    def detach(*_: Any) -> None:
        with pytest.raises(StreamError) as caught:
            streamer.detach()
        raised.append(caught.value)
        with pytest.raises(StreamError):
            model.half()

    handle = model.get_submodule(part).register_forward_hook(detach)
    assert same(model(inputs()), expected)
    handle.remove()
    assert len(raised) == 1
    assert same(model(inputs()), expected)
    streamer.detach()
    assert same(model(inputs()), expected)


def test_a_meta_model_is_refused() -> None:
    with torch.device("meta"):
        model = Stack(2)
    with pytest.raises(PatchError, match="meta"):
        LayerStreamer(model, device="cpu", budget=10**6).attach()
    assert interceptor_of(model) is None


def test_attach_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference()
    before = Snapshot(model)
    original, calls = Stored.let_go, []

    def fail(self: Stored) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("as asked")
        original(self)

    streamer = streamer_of(model, location="disk")
    with monkeypatch.context() as patch:
        patch.setattr(Stored, "let_go", fail)
        with pytest.raises(RuntimeError, match="as asked"):
            streamer.attach()
    before.require()
    with streamer:
        assert same(model(inputs()), reference()(inputs()))


@pytest.mark.parametrize("how", ["detach", "error", "collect"])
def test_the_scratch_file_goes(scratch: Path, how: str) -> None:
    model = reference()
    streamer = streamer_of(model, location="disk").attach()
    model(inputs())
    assert len(folders(scratch)) == 1
    if how == "detach":
        streamer.detach()
    elif how == "error":
        with pytest.raises(RuntimeError), streamer:
            model(torch.ones(1, 3))
    else:
        reference_to = weakref.ref(model)
        del model, streamer
        gc.collect()
        assert reference_to() is None
    assert folders(scratch) == []


def stream_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "lowbits-stream"]


@pytest.mark.parametrize("how", ["detach", "collect"])
def test_the_thread_goes(how: str) -> None:
    before = len(stream_threads())
    model = reference()
    streamer = streamer_of(model).attach()
    model(inputs())
    assert len(stream_threads()) == before + 1
    if how == "detach":
        streamer.detach()
    else:
        del model, streamer
        gc.collect()
        deadline = time.monotonic() + 5
        while len(stream_threads()) > before and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(stream_threads()) == before


def test_the_model_lives_on_when_the_streamer_is_dropped() -> None:
    model, expected = reference(), reference()(inputs())
    streamer_of(model, location="cpu").attach()
    gc.collect()
    for _ in range(2):
        assert same(model(inputs()), expected)


def test_threads_take_turns() -> None:
    model = reference()
    xs = [torch.randn(2, WIDTH) for _ in range(4)]
    expected = [model(x) for x in xs]
    wrong: list[int] = []

    def work(number: int) -> None:
        results = [model(xs[number]) for _ in range(5)]
        wrong.extend(number for result in results if not same(result, expected[number]))

    with streamer_of(model) as streamer:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert streamer.stats().passes == 20
    assert wrong == []


def test_a_thread_that_fails_leaves_the_model_to_others() -> None:
    model, expected = reference(), reference()(inputs())
    errors: list[BaseException] = []

    def work() -> None:
        try:
            model(torch.ones(1, 3))
        except RuntimeError as error:
            errors.append(error)

    with streamer_of(model):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
        assert same(model(inputs()), expected)
    assert len(errors) == 1


def test_detach_from_another_thread_waits_for_the_forward() -> None:
    model = nn.Sequential(*(Block() for _ in range(3)))
    before, expected = Snapshot(model), model(inputs())
    streamer = streamer_of(model).attach()
    started = threading.Event()

    def begin(*_: Any) -> None:
        started.set()
        time.sleep(0.05)

    handle = model[0].register_forward_pre_hook(begin)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(model(inputs())))
    thread.start()
    assert started.wait(10)
    streamer.detach()
    thread.join(10)
    handle.remove()
    assert same(results[0], expected)
    before.require()


def kill_copying_thread(streamer: LayerStreamer) -> None:
    transfer = stage_of(streamer)._transfer
    assert isinstance(transfer, ThreadTransfer)
    assert transfer._thread is not None
    transfer._work.jobs.put(None)
    transfer._thread.join(10)


def test_detach_when_the_copying_thread_has_died() -> None:
    model, expected = reference(), reference()(inputs())
    streamer = streamer_of(model).attach()
    model(inputs())
    kill_copying_thread(streamer)
    streamer.detach()
    assert same(model(inputs()), expected)


@pytest.mark.parametrize("after", ["error", "pass", "detach"])
def test_the_copying_thread_dies(after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next pass has a new one, or says so in bounded time; what follows is right."""
    monkeypatch.setattr("lowbits.streaming.transfer._PATIENCE_S", 0.02)
    model, expected = reference(), reference()(inputs())
    streamer = streamer_of(model, location="cpu").attach()
    model(inputs())
    kill_copying_thread(streamer)
    errors = []
    for _ in range(2):
        try:
            model(inputs())
        except StreamError as error:
            errors.append(error)
            break
    assert all(error.unit in str(error) for error in errors)
    if after == "pass":
        assert same(model(inputs()), expected)
    if after == "detach":
        streamer.detach()
        assert same(model(inputs()), expected)


@pytest.mark.parametrize("scheme", ["native", "bnb-nf4"])
def test_a_graph_from_before_tells_that_its_weights_are_gone(scheme: str) -> None:
    model = frozen(scheme)
    x = inputs(WIDE).requires_grad_()
    loss = model(x).square().mean()
    with streamer_of(model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    (gradient,) = torch.autograd.grad(model(x).square().mean(), x)
    assert gradient.isfinite().all()


def test_host_memory_is_free_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the garbage collector comes: several models of gigabytes would have gathered."""
    made: list[weakref.ref[Tensor]] = []
    init = HostMaster.__init__

    def noted(self: HostMaster, unit: Any, flat: Tensor, *args: Any) -> None:
        init(self, unit, flat, *args)
        made.append(weakref.ref(flat))

    monkeypatch.setattr(HostMaster, "__init__", noted)
    model = Stack(4)
    gc.disable()
    try:
        for _ in range(2):
            with streamer_of(model, location="cpu"):
                model(inputs())
            assert not [reference for reference in made if reference() is not None]
    finally:
        gc.enable()
    assert made


def test_attach_is_all_or_nothing_though_modules_hold_stand_ins_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = reference()
    before = Snapshot(model)
    original, calls = Stored.hide, []

    def fail(self: Stored) -> None:
        original(self)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    streamer = streamer_of(model, location="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(Stored, "hide", fail)
        with pytest.raises(KeyboardInterrupt):
            streamer.attach()
    before.require()
    with streamer:
        assert same(model(inputs()), reference()(inputs()))


def test_host_memory_is_free_at_once_though_attach_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    init = HostMaster.__init__

    def noted(self: HostMaster, unit: Any, flat: Tensor, *args: Any) -> None:
        init(self, unit, flat, *args)
        made.append(weakref.ref(flat))

    def fail(_: Stored) -> None:
        raise RuntimeError("as asked")

    model = reference()
    streamer = streamer_of(model, location="cpu")
    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(HostMaster, "__init__", noted)
            patch.setattr(Stored, "hide", fail)
            with suppress(RuntimeError):
                streamer.attach()
        assert made
        assert not [reference for reference in made if reference() is not None]
    finally:
        gc.enable()
    assert torch.is_tensor(model(inputs()))
