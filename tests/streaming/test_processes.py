"""Processes: a child that was forked while a model is streamed, and the end of the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from streaming.models import inputs, reference, same, stage_of, streamer_of
from torch import multiprocessing, nn

from lowbits.streaming.host import Reader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

LOCATIONS = ("cpu", "disk")


def in_child(work: Callable[[], None]) -> int:
    """Run something in a forked process; return its status, 0 where nothing was raised."""
    with warnings.catch_warnings():
        # Python warns of forks beside threads: that is what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        work()
    except BaseException:  # noqa: BLE001 - told by the status
        traceback.print_exc()
        os._exit(3)
    os._exit(0)


@pytest.mark.parametrize("method", ["queue", "async"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_a_child_runs_the_model(location: str, method: str) -> None:
    model, expected = reference(), reference()(inputs())

    def work() -> None:
        for _ in range(3):
            assert same(model(inputs()), expected)

    with streamer_of(model, location=location, method=method):
        for passes in (0, 2):
            for _ in range(passes):
                model(inputs())
            assert in_child(work) == 0
            assert same(model(inputs()), expected)
    assert same(model(inputs()), expected)


@pytest.mark.parametrize("first", ["child", "parent"])
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("location", LOCATIONS)
@torch.no_grad()
def test_what_one_process_writes_the_other_does_not_read(
    location: str, before: int, first: str
) -> None:
    model = reference()
    layers: tuple[Any, ...] = (model.stem, model.blocks[1].up)

    def write(value: float) -> None:
        for number, layer in enumerate(layers):
            layer.weight.fill_(value + number)
        model(inputs())

    def read() -> list[float]:
        return [float(layer.weight.mean()) for layer in layers]

    def work() -> None:
        try:
            for value in (7, 8, 9):
                write(value)
            assert read() == [9, 10]
        finally:
            os.write(done, b".")
        if first == "parent":
            os.read(goes_on, 1)
            assert read() == [9, 10]

    with streamer_of(model, location=location):
        model(inputs())
        for value in range(before):
            write(value)
        expected = read()
        (waits, done), (goes_on, go) = os.pipe(), os.pipe()
        if first == "child":
            assert in_child(work) == 0
            assert read() == expected
            return
        with ThreadPoolExecutor(1) as pool:
            status = pool.submit(in_child, work)
            os.read(waits, 1)
            assert read() == expected
            for value in (3, 4, 5):
                write(value)
            os.write(go, b".")
            assert status.result() == 0
            assert read() == [5, 6]


@pytest.mark.parametrize("what", ["model", "state dict"])
@torch.no_grad()
def test_weights_that_were_sent_elsewhere_are_written(what: str) -> None:
    """To send a tensor, torch moves its storage to memory that processes share."""
    twin, model = reference(), reference()
    with streamer_of(model, location="cpu"):
        model(inputs())
        queue = multiprocessing.get_context("fork").SimpleQueue()
        queue.put(model if what == "model" else model.state_dict())
        for each in (twin, model):
            layers: tuple[Any, ...] = (each.stem, each.blocks[1].up)
            for layer in layers:
                layer.weight.add_(1)
                layer.bias.data += 1
        assert all(map(same, model.state_dict().values(), twin.state_dict().values()))
        assert same(model(inputs()), twin(inputs()))
    assert all(map(same, model.state_dict().values(), twin.state_dict().values()))


def test_a_child_detaches_for_itself() -> None:
    model, expected = reference(), reference()(inputs())
    streamer = streamer_of(model, location="disk").attach()
    assert same(model(inputs()), expected)

    def work() -> None:
        streamer.detach()
        assert same(model(inputs()), expected)

    assert in_child(work) == 0
    assert same(model(inputs()), expected)
    streamer.detach()
    assert same(model(inputs()), expected)


@pytest.mark.parametrize("then", ["run", "detach"])
def test_a_fork_while_a_copy_is_under_way(monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    monkeypatch.setattr("lowbits.streaming.transfer._PATIENCE_S", 0.02)
    model, expected = reference(), reference()(inputs())
    read, is_slow, goes_on = Reader.read, threading.Event(), threading.Event()

    def slow_read(self: Reader, *args: object) -> None:
        if is_slow.is_set():
            assert goes_on.wait(20)
        read(self, *args)  # type: ignore[arg-type]

    def work() -> None:
        is_slow.clear()
        if then == "detach":
            streamer.detach()
        assert same(model(inputs()), expected)

    streamer = streamer_of(model, location="disk").attach()
    model(inputs())
    monkeypatch.setattr(Reader, "read", slow_read)
    stage = stage_of(streamer)
    assert stage._residency is not None
    for home in stage._residency._homes:
        home.is_present = False
    is_slow.set()
    stage._prefetch()
    status = in_child(work)
    goes_on.set()
    assert same(model(inputs()), expected)
    streamer.detach()
    assert status == 0


#: Children of one interpreter, for it takes seconds to start one: each ends in its own way.
SCRIPT = """
import os, sys, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from streaming.models import inputs, reference, same, streamer_of

def ends(leave):
    pid = os.fork()
    if pid == 0:
        leave()
        sys.exit(0)
    print(leave.__name__, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

def attach():
    global model
    model = reference()
    streamer_of(model, location="disk").attach()
    model(inputs())

def returns():
    attach()

def exits():
    attach()
    sys.exit(4)

def fails():
    attach()
    raise SystemExit("told")

def is_busy():
    attach()
    threading.Thread(target=lambda: [model(inputs()) for _ in range(50)], daemon=True).start()

for leave in (returns, exits, fails, is_busy):
    ends(leave)
    assert not list(Path(os.environ["TMPDIR"]).iterdir()), leave

attach()

def inherits():
    assert same(model(inputs()), reference()(inputs()))
    sys.exit(5)

ends(inherits)
assert list(Path(os.environ["TMPDIR"]).iterdir())
assert same(model(inputs()), reference()(inputs()))
raise RuntimeError("the end")
"""


def test_the_interpreter_exits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "returns 0",
        "exits 4",
        "fails 1",
        "is_busy 0",
        "inherits 5",
    ]
    assert done.returncode == 1
    # What a thread that is cut off in its forward prints is between these two.
    assert done.stderr.startswith("told\n")
    assert done.stderr.endswith("RuntimeError: the end\n")
    assert list(tmp_path.iterdir()) == []


class Sent(nn.Module):
    """A block that returns its weight, and sends it to another process when it is told to."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2048,), float(number)), requires_grad=False)
        self.is_due = False

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_due:
            self.weight.share_memory_()  # type: ignore[no-untyped-call] # torch moves its storage
        return x + self.weight[:16], self.weight


@torch.no_grad()
def test_results_that_are_weights_stay_when_their_slot_was_moved() -> None:
    blocks = [Sent(number) for number in range(8)]
    model = nn.ModuleList(blocks)
    with streamer_of(model, budget=30_000, location="disk", depth=2):
        for number in range(4):
            x, kept = torch.zeros(16), []
            for block in blocks:
                block.is_due = number == 1
                x, weight = block(x)
                kept.append(weight)
            assert [float(weight[0]) for weight in kept] == list(range(8))
