"""Models whose blocks compute for some seconds of a clock that only counts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from streaming.devices import faked
from torch import nn

from lowbits import LayerStreamer
from lowbits.testing.streams import VirtualOps

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

    from torch import Tensor

    from lowbits.streaming.plan import StreamPlan

PAGE = 4096
BANDWIDTH = 1e9


class Timed(nn.Module):
    """A block that computes for some virtual seconds; the host takes some to say so."""

    def __init__(
        self, nbytes: int, seconds: Callable[[], float], ops: VirtualOps, host_s: float = 0.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(nbytes, dtype=torch.uint8), requires_grad=False)
        self.seconds, self.ops, self.host_s = seconds, ops, host_s

    def forward(self, x: Tensor) -> Tensor:
        self.ops.work(self.host_s)
        self.ops.compute(self.seconds())
        return x


class Some(nn.Module):
    """Blocks, of which each pass calls some."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor, numbers: Sequence[int]) -> Tensor:
        for number in numbers:
            x = self.blocks[number](x)
        return x


class Parted(nn.Module):
    """A block of parts, which share what it takes: bytes, and seconds."""

    def __init__(
        self, shares: Sequence[tuple[float, float]], part: Callable[[float, float], Timed]
    ) -> None:
        super().__init__()
        nbytes, seconds = (sum(shares) for shares in zip(*shares, strict=True))
        for number, share in enumerate(shares):
            self.add_module(f"part{number}", part(share[0] / nbytes, share[1] / seconds))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


class Timeline(NamedTuple):
    """Passes of a streamed model, by the clock.

    Attributes:
        walls: of each pass.
        busy: seconds of compute in each.
        loads: seconds of all copies for a pass.
        plan: that was in force at the end.
        predicted_s: of a pass, by the stats.
        peak_bytes: on the device.
        slow_passes: by the stats.
    """

    walls: list[float]
    busy: list[float]
    loads: float
    plan: StreamPlan
    predicted_s: float
    peak_bytes: int
    slow_passes: int


@dataclass(frozen=True)
class Case:
    """Blocks, and how they are streamed; slow passes compute five times as long.

    Attributes:
        shares: of bytes, and of seconds, of the parts of each block; none: it has no parts.
    """

    sizes: Sequence[int]
    compute: Sequence[float]
    budget: int
    method: str = "async"
    depth: int | str = "auto"
    bandwidth: float = BANDWIDTH
    passes: int = 6
    jitter: float = 0.0
    slow: Container[int] = ()
    shares: Sequence[Sequence[tuple[float, float]]] | None = None

    def run(self) -> Timeline:
        """Stream them."""
        ops = VirtualOps(bandwidth=self.bandwidth)
        random_ = random.Random(1)  # noqa: S311 - blocks, not keys

        factor = 1.0

        def time_of(seconds: float) -> Callable[[], float]:
            return lambda: seconds * factor * random_.uniform(1 - self.jitter, 1 + self.jitter)

        def block(nbytes: int, seconds: float, shares: Sequence[tuple[float, float]]) -> nn.Module:
            if not shares:
                return Timed(nbytes, time_of(seconds), ops)
            return Parted(shares, lambda n, s: Timed(int(n * nbytes), time_of(s * seconds), ops))

        shares = self.shares or [()] * len(self.sizes)
        model = nn.Sequential(*map(block, self.sizes, self.compute, shares))
        streamer = LayerStreamer(
            model, device="cpu", budget=self.budget, method=self.method, depth=self.depth,
            location="shared",
        )  # fmt: skip
        walls, busy = [], []
        with faked(ops), streamer:
            for index in range(self.passes):
                factor = 5.0 if index in self.slow else 1.0
                before = ops.wall_s, ops.compute_busy_s
                model(torch.zeros(1))
                walls.append(ops.wall_s - before[0])
                busy.append(ops.compute_busy_s - before[1])
            stats, plan = streamer.stats(), plan_of(streamer)
        assert ops.peak_bytes == stats.peak_device_bytes <= self.budget
        loads = sum(stats.units[number].nbytes for number in plan.slot_of) / self.bandwidth
        return Timeline(
            walls, busy, loads, plan, stats.predicted_s, ops.peak_bytes, stats.slow_passes
        )


def plan_of(streamer: LayerStreamer) -> StreamPlan:
    engine = streamer._engine
    assert engine is not None
    plan = engine._arbiter.stage_of(engine.component).plan
    assert plan is not None
    return plan
