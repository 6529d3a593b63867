"""Ways of running a stack of blocks whose weights lie in a file."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowbits.streaming import tiers
from lowbits.streaming.host import aligned_empty, drop_cached_pages
from lowbits.streaming.streamer import LayerStreamer

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Bytes that a budget has beside the tensors': for the padding between them.
_PADDING_BYTES: Final = 1 << 20
#: Of the stack's inputs and outputs.
CHANNELS: Final = 64
_HEAD_WIDTH: Final = 128


@final
@dataclass(frozen=True)
class Job:
    """What a process has to do.

    Attributes:
        way: a name in `WAYS`.
        path: of the weights.
        folder: for the files of whoever makes a copy of them.
        blocks: of the stack.
        width: of the stack.
        tokens: of a pass.
        threads: that compute.
        depth: slots of the ring.
        direct: whether lowbits passes the page cache by.
        core: that computes, while all other threads have the other ones; None: as it comes.
    """

    way: str
    path: str
    folder: str
    blocks: int
    width: int
    tokens: int
    threads: int
    depth: int = 0
    direct: bool = False
    core: int | None = None


class Block(nn.Module):
    """Attention and an MLP, as in a diffusion transformer; ``12 * width**2`` weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // _HEAD_WIDTH)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(1, tokens, width)`` to the same."""
        parts = self.qkv(self.attention_norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.mlp_norm(x))))


class Stack(nn.Module):
    """Equal blocks, and a small base."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS, width), nn.Linear(width, CHANNELS)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(1, tokens, 64)`` to the same."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def parts(self) -> list[nn.Module]:
        """Return what is called in turn."""
        return [self.embed, *self.blocks, self.head]


def write_weights(path: Path, blocks: int, width: int) -> int:
    """Write random weights; return their bytes."""
    torch.manual_seed(0)
    save_file(Stack(blocks, width).state_dict(), path)
    return path.stat().st_size


def mapped(job: Job) -> Stack:
    """Return the stack with weights that are read from the file as they are touched."""
    with torch.device("meta"):
        stack = Stack(job.blocks, job.width)
    stack.load_state_dict(load_file(job.path), assign=True)
    return stack.eval().requires_grad_(requires_grad=False)


class Way(ABC):
    """A way of running the stack.

    Attributes:
        stack: what is called.
        files: that weights come from during a pass.
        budget_bytes: for weights, where there is a budget.
        stall_s: seconds that compute has waited for weights so far, where that is known.
    """

    #: Whether something is read for the next pass after a pass.
    reads_ahead = False

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stack = mapped(job)
        self.files: Sequence[Path] = [Path(job.path)]
        self.budget_bytes: int | None = None

    @abstractmethod
    def attach(self) -> None:
        """Make the stack ready to run."""

    def run(self, x: Tensor) -> Tensor:
        """Run one pass."""
        result: Tensor = self.stack(x)
        return result

    @property
    def stall_s(self) -> float | None:
        """Return the seconds so far."""
        return None

    def read(self) -> float:
        """Return the seconds that reading alone takes."""
        raise NotImplementedError(self.job.way)


@final
class Resident(Way):
    """All weights are in memory."""

    def attach(self) -> None:
        """Copy the weights out of the file."""
        for parameter in self.stack.parameters():
            parameter.data = parameter.data.clone()

    @property
    def stall_s(self) -> float | None:
        """Nothing is waited for."""
        return 0.0


@final
class Lowbits(Way):
    """`LayerStreamer`, from its scratch file; the budget is the base and ``depth`` blocks."""

    reads_ahead = True

    def attach(self) -> None:
        """Copy the weights to the scratch file."""
        if self.job.direct:
            # Which files are read past the page cache depends on the free memory: this process
            # stands for one on a machine that has less of it than the model needs.
            tiers.file_is_larger_than_memory = lambda _: True
        base, *blocks, head = (sum(p.nbytes for p in m.parameters()) for m in self.stack.parts())
        self.budget_bytes = base + head + self.job.depth * max(blocks) + _PADDING_BYTES
        self.streamer = LayerStreamer(
            self.stack,
            device="cpu",
            budget=self.budget_bytes,
            method="async" if self.job.depth > 1 else "queue",
            location="disk",
            depth=self.job.depth,
        ).attach()
        assert self.streamer._engine is not None
        self._units = self.streamer._engine.component.units
        self.files = [Path(self._units[0].master._pieces[0][1].path)]

    @property
    def stall_s(self) -> float | None:
        """Ask the streamer."""
        return self.streamer.stats().stall_s

    def read(self) -> float:
        """Read what a pass reads, with the same reader, into as many buffers, without compute."""
        largest = max(entry.unit.nbytes for entry in self._units)
        # Written once, so that the pages are there.
        ring = [aligned_empty(largest).zero_() for _ in range(self.job.depth)]
        streamed = [u for u, s in zip(self._units, self.streamer.stats().units, strict=False)
                    if not s.is_resident]  # fmt: skip
        cool(self)
        begin = time.perf_counter()
        for number, entry in enumerate(streamed):
            entry.master.read(0, ring[number % len(ring)][: entry.unit.nbytes])
        return time.perf_counter() - begin


@final
class Diffusers(Way):
    """`apply_group_offloading` to a folder, one block a group, on the CPU."""

    def __init__(self, job: Job) -> None:
        from diffusers.hooks import apply_group_offloading

        self._apply = apply_group_offloading
        super().__init__(job)

    def attach(self) -> None:
        """Let it write its own files."""
        self._apply(
            self.stack,
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            offload_to_disk_path=self.job.folder,
        )
        self.files = list(Path(self.job.folder).iterdir())


@final
class Accelerate(Way):
    """`disk_offload`, on the CPU."""

    def __init__(self, job: Job) -> None:
        from accelerate import disk_offload

        self._apply = disk_offload
        super().__init__(job)

    def attach(self) -> None:
        """Let it write its own files."""
        self._apply(self.stack, self.job.folder, execution_device=torch.device("cpu"))
        self.files = list(Path(self.job.folder).iterdir())


@final
class Naive(Way):
    """`safe_open`: each block's tensors are copied out of the file before it, dropped after it."""

    def attach(self) -> None:
        """Stand before and behind each part of the stack."""
        self._stalled_s = 0.0
        self._prefixes = {m: f"{name}." for name, m in self.stack.named_modules()}
        for part in self.stack.parts():
            part.register_forward_pre_hook(self._load)
            part.register_forward_hook(self._drop)
            self._drop(part)

    def run(self, x: Tensor) -> Tensor:
        """Run one pass; the file is mapped for that long."""
        with safe_open(self.job.path, "pt") as self._file:
            return super().run(x)

    @property
    def stall_s(self) -> float | None:
        """Return how long loading took."""
        return self._stalled_s

    def _load(self, part: nn.Module, _args: object) -> None:
        begin = time.perf_counter()
        for name, parameter in part.named_parameters():
            parameter.data = self._file.get_tensor(self._prefixes[part] + name).clone()
        self._stalled_s += time.perf_counter() - begin

    def _drop(self, part: nn.Module, *_: object) -> None:
        for parameter in part.parameters():
            parameter.data = torch.empty(0)


WAYS: Final[dict[str, type[Way]]] = {
    "resident": Resident,
    "lowbits": Lowbits,
    "diffusers": Diffusers,
    "accelerate": Accelerate,
    "naive": Naive,
}


def cool(way: Way) -> None:
    """Make the next reads come from the disk."""
    for file in way.files:
        if not drop_cached_pages(file):
            raise RuntimeError("this system cannot drop cached pages: nothing would come from disk")
