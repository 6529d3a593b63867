"""What goes wrong in a pass: the next one is right, and the error says where."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from streaming.models import (
    Snapshot,
    hungry,
    inputs,
    reference,
    same,
    stage_of,
    streamer_of,
)
from torch import nn

from lowbits.errors import InsufficientMemoryError, LowbitsError, StreamError
from lowbits.streaming import streamer as streamer_module
from lowbits.streaming.device_ops import CpuOps
from lowbits.streaming.host import Reader
from lowbits.streaming.masters import HostMaster
from lowbits.streaming.proxy import StreamedTensor
from lowbits.streaming.repeat import RandomState
from lowbits.streaming.streamer import LayerStreamer
from lowbits.testing.streams import VirtualOps

if TYPE_CHECKING:
    from collections.abc import Callable

METHODS = ("queue", "async")
LOCATIONS = ("cpu", "disk")
ADVICE = "Use a smaller budget"


class Failing:
    """Raises at some calls of a function, and else calls it."""

    def __init__(self, function: Callable[..., Any], error: BaseException, at: range) -> None:
        self.function, self.error, self.at, self.calls = function, error, at, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls - 1 in self.at:
            raise self.error
        return self.function(*args, **kwargs)

    def method(self) -> Callable[..., Any]:
        """Return it as a function, which a class binds."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return call


ONCE, ALWAYS = range(1), range(1 << 30)


def fail_reads(
    patch: pytest.MonkeyPatch, location: str, error: BaseException, at: range
) -> Failing:
    owner: Any = Reader if location == "disk" else HostMaster
    failing = Failing(owner.read, error, at)
    patch.setattr(owner, "read", failing.method())
    return failing


@pytest.mark.parametrize(
    ("error", "when"), [(ValueError("as asked"), 2), (KeyboardInterrupt("as asked"), 0)]
)
@pytest.mark.parametrize("part", ["stem", "blocks.0", "blocks.1.down", "blocks.3", "head"])
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_a_block(error: BaseException, part: str, method: str, when: int) -> None:
    model, expected = reference(), reference()(inputs())
    before = Snapshot(model)
    streamer = streamer_of(model, method=method).attach()
    for _ in range(when):
        model(inputs())

    def fail(*_: Any) -> None:
        raise error

    for hook in ("register_forward_pre_hook", "register_forward_hook"):
        handle = getattr(model.get_submodule(part), hook)(fail)
        with pytest.raises(type(error), match="as asked"):
            model(inputs())
        handle.remove()
        for _ in range(2):
            assert same(model(inputs()), expected)
        state = model.state_dict()
        assert all(same(state[key], value) for key, value in reference().state_dict().items())
    streamer.detach()
    before.require()


def test_an_exception_is_not_a_pass() -> None:
    model = reference()
    with streamer_of(model) as streamer:
        for _ in range(3):
            model(inputs())
        with pytest.raises(RuntimeError):
            model(torch.ones(1, 3))
        model(inputs())
        # The ring was left in the middle: one pass may notice.
        misses = streamer.stats().misses
        for _ in range(2):
            model(inputs())
        stats = streamer.stats()
    assert stats.passes == 6
    assert stats.misses == misses


@pytest.mark.parametrize("method", ["async", "queue"])
@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("at", [ONCE, range(3, 4), ALWAYS])
def test_a_read_that_fails(
    monkeypatch: pytest.MonkeyPatch, at: range, location: str, method: str
) -> None:
    model, expected = reference(), reference()(inputs())
    before = Snapshot(model)
    streamer = streamer_of(model, location=location, method=method).attach()
    model(inputs())
    with monkeypatch.context() as patch:
        fail_reads(patch, location, OSError("the disk is gone"), at)
        raised: list[StreamError] = []
        for _ in range(3):
            try:
                out = model(inputs())
            except StreamError as error:
                raised.append(error)
            else:
                assert same(out, expected)
    assert raised
    assert len(raised) == 3 or at is not ALWAYS
    for told in raised:
        assert told.unit
        assert told.unit in str(told)
        assert "the disk is gone" in str(told)
        assert isinstance(told.__cause__, OSError)
    for _ in range(3):
        assert same(model(inputs()), expected)
    streamer.detach()
    before.require()


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("budget", [None, 10**6])
def test_the_first_read_of_all_fails(
    monkeypatch: pytest.MonkeyPatch, location: str, budget: int | None
) -> None:
    model, expected = reference(), reference()(inputs())
    streamer = streamer_of(model, location=location, method="queue", budget=budget).attach()
    with monkeypatch.context() as patch:
        fail_reads(patch, location, OSError("the disk is gone"), ONCE)
        with pytest.raises((LowbitsError, OSError)):
            model(inputs())
    for _ in range(3):
        assert same(model(inputs()), expected)
    streamer.detach()
    assert same(model(inputs()), expected)


def test_the_base_is_shown_after_its_copy_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference()
    with streamer_of(model, location="disk", method="queue", budget=10**6):
        with monkeypatch.context() as patch:
            fail_reads(patch, "disk", OSError("the disk is gone"), ONCE)
            with pytest.raises((LowbitsError, OSError)):
                model(inputs())
        model(inputs())
        assert not isinstance(model.stem.weight, StreamedTensor)


def test_a_file_that_cannot_be_read_leaves_the_model_streamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, expected = reference(), reference()(inputs())
    streamer = streamer_of(model, location="disk").attach()
    model(inputs())
    with monkeypatch.context() as patch:
        fail_reads(patch, "disk", OSError("the disk is gone"), ALWAYS)
        with pytest.raises(OSError, match="gone"):
            streamer.detach()
    assert streamer.is_attached
    for _ in range(2):
        assert same(model(inputs()), expected)
    streamer.detach()
    assert same(model(inputs()), expected)


def test_copies_that_failed_beside_it_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = reference(), reference()(inputs())
    streamer = streamer_of(model, location="disk").attach()
    read: Callable[..., None] = Reader.read
    is_over, is_gone = threading.Event(), threading.Event()
    failed: list[str] = []

    def fail(reader: Reader, *args: Any) -> None:
        """Read until the pass is over; then no more, the thread after the caller."""
        if not is_over.is_set():
            read(reader, *args)
            return
        if threading.current_thread() is threading.main_thread():
            is_gone.set()
        assert is_gone.wait(60)
        failed.append(threading.current_thread().name)
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", fail)
        hook = model.head.register_forward_hook(lambda *_: is_over.set())
        model(inputs())
        hook.remove()
        with pytest.raises(OSError, match="gone"):
            streamer.detach()
    assert "lowbits-stream" in failed
    for _ in range(2):
        assert same(model(inputs()), expected)
    streamer.detach()
    assert same(model(inputs()), expected)


@pytest.mark.parametrize(("mode", "when"), [(torch.no_grad, 3), (torch.inference_mode, 0)])
@pytest.mark.parametrize("where", [0, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_out_of_memory_is_recovered(mode: Any, where: int, when: int, method: str) -> None:
    model, layer = hungry(range(0), where)
    with mode():
        expected = model(inputs())
        with streamer_of(model, budget=10**6, method=method) as streamer:
            for _ in range(when):
                model(inputs())
            layer.at = range(layer.calls, layer.calls + 1)
            residents = streamer.stats().units
            assert same(model(inputs()), expected)
            stats = streamer.stats()
            assert stats.recoveries == 1
            assert stats.passes == when + 1
            assert sum(u.is_resident for u in stats.units) < sum(
                u.is_resident or when == 0 for u in residents
            )
            for _ in range(3):
                assert same(model(inputs()), expected)
            assert streamer.stats().recoveries == 1
        assert same(model(inputs()), expected)


@pytest.mark.parametrize("method", METHODS)
def test_out_of_memory_for_ever_ends(method: str) -> None:
    model, layer = hungry(ALWAYS)
    with torch.no_grad(), streamer_of(model, budget=10**6, method=method) as streamer:
        with pytest.raises(torch.OutOfMemoryError, match="as asked") as caught:
            model(inputs())
        assert any(ADVICE in note for note in caught.value.__notes__)
        stats = streamer.stats()
        assert 0 < stats.recoveries < 64
        assert layer.calls == stats.recoveries + 1
        assert not any(unit.is_resident for unit in stats.units[:-1] if unit.nbytes > 4000)
        layer.at = range(0)
        out = model(inputs())
    with torch.no_grad():
        assert same(model(inputs()), out)


@pytest.mark.parametrize("why", ["gradients", "training", "not the root"])
def test_out_of_memory_that_cannot_be_repeated(why: str) -> None:
    model, layer = hungry(ONCE)
    with torch.no_grad():
        layer.at = range(0)
        expected = model(inputs())
        layer.at, layer.calls = ONCE, 0
    model.train(why == "training")
    called = model[2] if why == "not the root" else model
    with streamer_of(model, budget=10**6) as streamer:
        with torch.set_grad_enabled(why == "gradients"):
            with pytest.raises(torch.OutOfMemoryError, match="as asked") as caught:
                called(inputs())
            assert any(ADVICE in note for note in caught.value.__notes__)
        assert streamer.stats().recoveries == 0
        with torch.no_grad():
            assert same(model(inputs()), expected)


class Remembering(ModelHook):  # type: ignore[misc]
    """As a cache of diffusers."""

    _is_stateful = True


class Adding(nn.Module):
    """Writes into what it is given, or has: what a second call would do twice."""

    def __init__(self) -> None:
        super().__init__()
        self.written: Any = None

    def forward(self, x: Any) -> Any:
        return x if self.written is None else x + self.written.add_(1)


@pytest.mark.parametrize("what", ["an input of inference mode", "what came later"])
def test_what_was_written_is_not_written_twice(what: str) -> None:
    model, layer = hungry(range(0))
    adding = Adding()
    model.insert(0, adding)
    with streamer_of(model, budget=10**6) as streamer, torch.inference_mode():
        model(inputs())
        x = inputs()
        if what == "what came later":
            del adding.written
            with torch.inference_mode(mode=False):
                adding.register_buffer("written", torch.zeros(1))
            model(inputs())
        else:
            adding.written = x
        before = adding.written.clone()
        layer.at = range(layer.calls, layer.calls + 1)
        with pytest.raises(torch.OutOfMemoryError):
            model(x)
        assert same(adding.written, before + 1)
        assert streamer.stats().recoveries == 0


def test_random_numbers_of_devices_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's is the only one of its kind, and is not named."""
    for kind, where in (("mps", ()), ("cuda", (torch.device("cuda", 1),))):
        states = {where: "first"}
        module: Any = torch.get_device_module(kind)
        monkeypatch.setattr(module, "get_rng_state", lambda *at, states=states: states[at])
        monkeypatch.setattr(
            module, "set_rng_state", lambda state, *at, states=states: states.update({at: state})
        )
        random = RandomState([], torch.device(kind, 1 if where else 0))
        states[where] = "later"
        random.return_to()
        assert states == {where: "first"}


def test_a_hook_that_remembers_passes_is_not_run_twice() -> None:
    model, layer = hungry(range(0))
    hook = HookRegistry.check_if_exists_or_initialize(model[0])
    hook.register_hook(Remembering(), "remembering")
    with torch.no_grad(), streamer_of(model, budget=10**6) as streamer:
        model(inputs())
        layer.at = range(layer.calls, layer.calls + 1)
        with pytest.raises(torch.OutOfMemoryError):
            model(inputs())
        assert streamer.stats().recoveries == 0


@torch.no_grad()
def test_a_prefetch_without_memory_keeps_what_a_pass_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = reference()
    with streamer_of(model, budget=10**6, method="async") as streamer:
        for _ in range(2):
            model(inputs())
        model.order.sort(reverse=True)
        expected, stage = model(inputs()), stage_of(streamer)  # the second deviation is accepted

        def fail() -> None:
            if not stage.uses or not stage._is_in_pass:
                raise torch.OutOfMemoryError("as asked")

        monkeypatch.setattr(stage, "_prefetch", fail)
        assert same(model(inputs()), expected)
        monkeypatch.undo()
        assert same(model(inputs()), expected)
        assert streamer.stats().recoveries == 0


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("method", METHODS)
def test_a_buffer_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, number: int, method: str
) -> None:
    """Recovered, or raised as what it is; and the next pass is right."""
    model, _ = hungry(range(0))
    with torch.no_grad():
        expected = model(inputs())
        with streamer_of(model, budget=10**6, method=method) as streamer:
            failing = Failing(
                CpuOps.empty, torch.OutOfMemoryError("as asked"), range(number, number + 1)
            )
            with monkeypatch.context() as patch:
                patch.setattr(CpuOps, "empty", failing.method())
                try:
                    assert same(model(inputs()), expected)
                except torch.OutOfMemoryError:
                    assert streamer.stats().recoveries == 0
            for _ in range(3):
                assert same(model(inputs()), expected)
        assert same(model(inputs()), expected)


def test_a_device_that_is_smaller_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that recovery gives back is real: a device counts it."""
    model, _ = hungry(range(0))
    needed = streamer_of(model)._budget
    assert isinstance(needed, int)
    device = VirtualOps(bandwidth=1e9, capacity_bytes=3 * needed)
    monkeypatch.setattr(streamer_module, "device_ops", lambda _: device)
    with torch.no_grad():
        expected = model(inputs())
        with LayerStreamer(model, device="cpu", budget=10**6, location="cpu") as streamer:
            for _ in range(4):
                assert same(model(inputs()), expected)
            assert streamer.stats().recoveries > 0
            assert device.peak_bytes <= 3 * needed
    assert device.allocated_bytes == 0


def test_a_budget_that_factors_exceed_is_refused_every_time() -> None:
    """What came to the model while it is streamed counts, and goes on to count."""
    model = reference()
    with streamer_of(model) as streamer:
        model(inputs())
        model.extra = nn.Linear(64, 64)
        for _ in range(3):
            with pytest.raises(InsufficientMemoryError) as caught:
                model(inputs())
            assert caught.value.needed_bytes > streamer.stats().budget_bytes
        del model.extra
        assert same(model(inputs()), reference()(inputs()))
        assert stage_of(streamer).device_bytes <= streamer.stats().budget_bytes
