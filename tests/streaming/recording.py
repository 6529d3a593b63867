"""A device that only writes down what it is asked for, and a search through all that may happen.

Three processes do the work: the compute stream, the copy stream, and whoever fills staging buffers.
Each does its own steps in order; events are all that orders the steps of different ones. Compute is
late here, too: a block's forward asks for it and returns. So the host is ahead of everything, and
every order of steps in which a device could do them is an order in which the three can take turns.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import numpy as np
import torch
from torch import nn

from lowbits.streaming.device_ops import DeviceOps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

COMPUTE, COPY, FILL = range(3)
_POISON = 0xFF


class Event(NamedTuple):
    """A point in a process: behind so many of its steps."""

    process: int
    steps: int


class Wrong(NamedTuple):
    """A result that is not the right one, and the steps that led to it."""

    result: int
    steps: tuple[int, ...]


@final
class RecordedOps(DeviceOps):
    """Writes down steps: what to do, or the event to wait for.

    Attributes:
        processes: the steps of each, as they are written down.
        recorded: the same, as they were at `freeze`.
        expected: the right results, in order; `launch` computes them while `is_eager`.
        ignored: names of methods that shall be forgotten, to see that that is found out.
        is_written_to: whether the masters that are copied from are written to in between.
        tells_time: whether `seconds` says something.
    """

    has_streams: ClassVar[bool] = True

    def __init__(self, *ignored: str) -> None:
        super().__init__(torch.device("cpu"))
        self.processes: tuple[list[Any], ...] = ([], [], [])
        self.recorded = self.processes
        self.memory: list[Tensor] = []
        self.expected: list[Tensor] = []
        self.is_eager = True
        self.ignored = ignored
        self.is_written_to = False
        self.tells_time = False
        self._results = itertools.count()
        self._freed: deque[Tensor] = deque()

    def empty(self, nbytes: int) -> Tensor:
        """Return memory that was freed, as a caching allocator does, or new one, poisoned."""
        if self._freed and self._freed[0].nbytes >= nbytes:
            return self._freed.popleft()[:nbytes]
        return self.track(torch.full((nbytes,), _POISON, dtype=torch.uint8))

    def track(self, tensor: Tensor) -> Tensor:
        """Remember memory that steps change."""
        self.memory.append(tensor.view(-1).view(torch.uint8))
        return tensor

    def free(self, tensor: Tensor) -> None:
        """Let `empty` give memory away: what compute was asked for before may read it still."""
        self._freed.append(tensor)

    def launch(self, function: Callable[[], Tensor]) -> Tensor:
        """Ask for compute; return where its result will be."""
        if self.is_eager:
            self.expected.append(function())
            return self.expected[-1]
        number = next(self._results)
        out = self.track(torch.full_like(self.expected[number], float("nan")))

        def run() -> int | None:
            out.copy_(function())
            return None if torch.equal(out, self.expected[number]) else number

        self.processes[COMPUTE].append(run)
        return out

    def freeze(self) -> None:
        """Write nothing down any more."""
        self.processes, self.recorded = ([], [], []), self.processes

    def read(self, target: Tensor, source: Tensor) -> None:
        """Fill a staging buffer."""
        self.processes[FILL].append(lambda: _done(target.copy_(source)))

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Write down two steps, for a copy can be seen half done; behind what filled source."""
        steps = self.processes[COPY]
        steps.append(Event(FILL, len(self.processes[FILL])))
        if self.is_written_to:
            source = source.clone()  # what is written to it later is for later copies
        steps += (
            lambda: _done(target.fill_(_POISON)),
            lambda: _done(target.copy_(source)),
        )

    def mark_computed(self, *, is_timed: bool = True) -> Event:
        """Return an event."""
        return Event(COMPUTE, len(self.processes[COMPUTE]))

    def mark_copied(self, *, is_timed: bool = True) -> Event:
        """Return an event."""
        return Event(COPY, len(self.processes[COPY]))

    def copy_after(self, event: Event | None) -> None:
        """Make the copy stream wait."""
        self._wait("copy_after", COPY, event)

    def compute_after(self, event: Event | None) -> None:
        """Make the compute stream wait."""
        self._wait("compute_after", COMPUTE, event)

    def host_after(self, event: Event | None) -> None:
        """Make what fills staging buffers wait."""
        self._wait("host_after", FILL, event)

    def _wait(self, name: str, process: int, event: Event | None) -> None:
        if event is not None and name not in self.ignored:
            self.processes[process].append(event)

    def has_happened(self, event: Event | None) -> bool:
        """Say no."""
        return event is None

    def seconds(self, start: Event, end: Event) -> float | None:
        """Tell nothing, for nothing has happened; or a second for each step."""
        return float(end.steps - start.steps) if self.tells_time else None

    def free_bytes(self) -> int | None:
        """Know nothing."""

    def release_cached(self) -> None:
        """Nothing is cached."""


def _done(_: Tensor) -> None:
    """Drop what an in-place function returns."""


class _Branch(NamedTuple):
    """A state that was reached, and the process that goes on from there."""

    at: tuple[int, ...]
    memory: bytes
    path: tuple[int, ...]
    process: int | None


@final
class Search:
    """All orders of the recorded steps, each state of memory once.

    Attributes:
        steps: that were done, in all orders together.
    """

    def __init__(self, ops: RecordedOps) -> None:
        self._processes = ops.recorded
        self._arrays = [tensor.numpy() for tensor in ops.memory]
        self._seen: set[tuple[tuple[int, ...], bytes]] = set()
        self.steps = 0

    def first_wrong(self) -> Wrong | None:
        """Return a wrong result; None if no order of steps has one.

        Depth first. Two orders that lead to the same state go on as one.

        Raises:
            RuntimeError: nobody can go on, and not all is done.
        """
        todo: list[_Branch] = [_Branch(self._settled((0, 0, 0)), self._save(), (), None)]
        while todo:
            branch = todo.pop()
            self._load(branch.memory)
            wrong = self._follow(branch, todo)
            if wrong is not None:
                return wrong
        return None

    def _follow(self, branch: _Branch, todo: list[_Branch]) -> Wrong | None:
        """Do steps until nothing is left to do, and note the other ways to go on for later."""
        at, _, path, process = branch
        while True:
            if process is None:
                able = [p for p in range(3) if self._can_step(p, at)]
                if not able:
                    self._require_end(at)
                    return None
                if len(able) > 1:
                    memory = self._save()
                    if (at, memory) in self._seen:
                        return None
                    self._seen.add((at, memory))
                    todo += [_Branch(at, memory, path, other) for other in able[1:]]
                process = able[0]
            at, result = self._step(at, process)
            path, process = (*path, process), None
            if result is not None:
                return Wrong(result, path)

    def _step(self, at: tuple[int, ...], process: int) -> tuple[tuple[int, ...], int | None]:
        result = self._processes[process][at[process]]()
        self.steps += 1
        after = tuple(n + (p == process) for p, n in enumerate(at))
        return self._settled(after), result

    def _settled(self, at: tuple[int, ...]) -> tuple[int, ...]:
        """Leave behind all waiting for what has happened already."""
        places = list(at)
        is_moving = True
        while is_moving:
            is_moving = False
            for process, steps in enumerate(self._processes):
                while places[process] < len(steps):
                    step = steps[places[process]]
                    if not isinstance(step, Event) or places[step.process] < step.steps:
                        break
                    places[process] += 1
                    is_moving = True
        return tuple(places)

    def _can_step(self, process: int, at: tuple[int, ...]) -> bool:
        steps = self._processes[process]
        return at[process] < len(steps) and not isinstance(steps[at[process]], Event)

    def _require_end(self, at: tuple[int, ...]) -> None:
        if any(place < len(steps) for place, steps in zip(at, self._processes, strict=True)):
            raise RuntimeError(f"nobody can go on at {at}")

    def _save(self) -> bytes:
        return b"".join(array.tobytes() for array in self._arrays)

    def _load(self, memory: bytes) -> None:
        start = 0
        for array in self._arrays:
            stop = start + array.nbytes
            array[:] = np.frombuffer(memory[start:stop], np.uint8)
            start = stop


class Affine(nn.Module):
    """A block whose forward only asks for compute; it may call another block inside."""

    def __init__(self, ops: RecordedOps, nbytes: int = 512) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nbytes // 4))
        self.ops = ops
        self.inner: list[nn.Module] = []  # not a submodule: it is a unit of its own

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach()
        half = len(weight) // 2
        for inner in self.inner:
            x = inner(x)
        return self.ops.launch(lambda: x * weight[:16] + weight[half : half + 16])


class Chain(nn.Module):
    """Blocks that are called in any order, and a weight that belongs to none."""

    def __init__(self, ops: RecordedOps, sizes: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Affine(ops, nbytes) for nbytes in sizes)
        self.shift = nn.Parameter(torch.randn(16))
        self.ops = ops

    def forward(self, x: Tensor, order: Sequence[int]) -> Tensor:
        shift = self.shift.detach()
        y = self.ops.launch(lambda: x + shift)
        for number in order:
            y = self.blocks[number](y)
        return y


@final
class TrackedSlab:
    """A staging buffer."""

    def __init__(self, ops: RecordedOps, nbytes: int, _settle: Callable[[], None]) -> None:
        self.tensor = ops.track(torch.zeros(nbytes, dtype=torch.uint8))

    def release(self) -> None:
        """Nothing to give back."""
