"""Runs a stack of blocks in one way, in a process of its own.

Started by bench_streaming.py, which asks for one burst of passes after the other, a line each.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from conversion_memory import Peak, anonymous_bytes
from streaming_ways import CHANNELS, WAYS, Job, Way, cool

if TYPE_CHECKING:
    from torch import Tensor

#: Passes of a burst: the last one is reported. What is read ahead for the first one was read while
#: the clock stood still.
BURST: Final = 2

Figures = dict[str, Any]


def disk_bytes() -> int:
    """Return the bytes that this process had read from disks so far."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def no_core_s() -> float:
    """Return the seconds that this thread could have run so far, had a core been free.

    Source: ``/proc/.../schedstat``, docs.kernel.org/scheduler/sched-stats.html.
    """
    text = Path("/proc/thread-self/schedstat").read_text(encoding="ascii")
    return int(text.split()[1]) / 1e9


def set_up(way: Way, x: Tensor) -> Figures:
    """Attach, and run two passes; what the process holds meanwhile is sampled."""
    before, begin = anonymous_bytes(), time.perf_counter()
    peak = Peak()
    hooks = [part.register_forward_hook(lambda *_: peak.note()) for part in way.stack.parts()]
    peak.start()
    way.attach()
    attach_s = time.perf_counter() - begin
    cool(way)
    way.run(x)
    most, first = peak.stop(), anonymous_bytes()
    peak = Peak()
    peak.start()
    way.run(x)
    steady = peak.stop()
    for hook in hooks:
        hook.remove()
    return {
        "attach_s": attach_s,
        "memory_bytes": max(most, steady) - before,
        "pass_memory_bytes": steady - first,
        "budget_bytes": way.budget_bytes,
    }


def keep_to(core: int | None) -> None:
    """Let this thread have one core, and this process's other threads the others."""
    if core is None:
        return
    others = set(range(os.cpu_count() or 1)) - {core}
    me = threading.get_native_id()
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(task.name), {core} if int(task.name) == me else others)


def burst(way: Way, x: Tensor) -> Figures:
    """Run passes back to back, each from a cold cache; return what the last one took."""
    keep_to(way.job.core)
    for _ in range(BURST):
        begin, stalled, read = time.perf_counter(), way.stall_s, disk_bytes()
        cool(way)
        # Who reads ahead does so while the cache is cooled.
        begin = begin if way.reads_ahead else time.perf_counter()
        cpu, no_core = time.process_time(), no_core_s()
        result = way.run(x)
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        no_core = no_core_s() - no_core
    now = way.stall_s
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "no_core_s": no_core,
        "stall_s": None if now is None or stalled is None else now - stalled,
        "read_bytes": disk_bytes() - read,
        "memory_bytes": anonymous_bytes(),
        "output": hashlib.sha256(result.contiguous().numpy().tobytes()).hexdigest()[:12],
    }


def main() -> None:
    """Set up, then do what each line asks for; answer each with a line."""
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    x = torch.randn(1, job.tokens, CHANNELS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        way = WAYS[job.way](job)
        print(json.dumps(set_up(way, x)), flush=True)
        for line in sys.stdin:
            done = {"wall_s": way.read()} if line.strip() == "read" else burst(way, x)
            print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
