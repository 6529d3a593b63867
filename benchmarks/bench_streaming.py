"""Time a model that is streamed from the disk beside other ways of running it in little memory.

    python benchmarks/bench_streaming.py --preset small     # 200 MB, a minute
    python benchmarks/bench_streaming.py                    # 1.8 GB, ten minutes
    python benchmarks/bench_streaming.py --device cuda      # FLUX.1-dev, from host memory

On a CPU: a stack of blocks like a diffusion transformer's, in float32. Each way has a process of
its own, and they take turns; a pass begins with a cold page cache. Of two passes in a row the
second one counts. C is the same pass with all weights in memory, R reading alone: the same reader,
the same parts of the file, no compute. One thread computes, so that a core is left for reading.
lowbits passes the page cache by, as it does where a model is larger than the free memory; one row
does not. With ``--core 0`` every way computes on that core and does all else on the others: where
one core serves all of the disk's interrupts (``/proc/interrupts``), what is computed there is
slower by the time they take. Memory is what no file backs, above what the process had before:
mapped files, which the ways of other libraries use, are not counted. "No core" is the time that the
computing thread waited for a core that something else on the machine was using: where it is large,
repeat.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, final

from paired import Budget, machine, machine_line, parser, split, write_json
from streaming_flux import measure_flux
from streaming_report import (
    COMPUTE,
    MIB,
    STREAMED,
    Figures,
    Row,
    bound_s,
    draw_bars,
    goals,
    rows_table,
)
from streaming_ways import Job, write_weights

from lowbits.streaming.scratch import scratch_directory

if TYPE_CHECKING:
    import argparse

#: Blocks and width of the stack.
PRESETS: Final = {"full": (16, 1536), "small": (16, 512)}
#: Way, depth of the ring, whether the page cache is passed by.
WAYS: Final[dict[str, tuple[str, int, bool]]] = {
    COMPUTE: ("resident", 0, False),
    STREAMED: ("lowbits", 3, True),
    "lowbits, ring 2": ("lowbits", 2, True),
    "lowbits, ring 1": ("lowbits", 1, True),
    "lowbits, ring 3, page cache": ("lowbits", 3, False),
    "diffusers": ("diffusers", 0, False),
    "accelerate": ("accelerate", 0, False),
    "safe_open": ("naive", 0, False),
}
#: Whose reading alone is timed.
_READERS: Final = (STREAMED, "lowbits, ring 3, page cache")


@final
class Worker:
    """A process that runs the stack in one way; leaving it ends the process."""

    def __init__(self, job: Job) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        script = Path(__file__).with_name("streaming_work.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def answer(self) -> Figures:
        """Return what it says next.

        Raises:
            RuntimeError: it has ended, with the last line of its errors.
        """
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(self._errors.read().strip().rpartition("\n")[2])
        figures: Figures = json.loads(line)
        return figures

    def ask(self, what: str) -> Figures:
        """Let it do something; return what it says."""
        assert self._process.stdin
        print(what, file=self._process.stdin, flush=True)
        return self.answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends it
        self._errors.close()


def job_of(name: str, path: Path, given: argparse.Namespace) -> Job:
    """Return what a process has to do; its folder is made."""
    way, depth, direct = WAYS[name]
    folder = path.with_name(way)
    folder.mkdir(exist_ok=True)
    stack = {"blocks": given.blocks, "width": given.width, "tokens": given.tokens}
    files = {"path": str(path), "folder": str(folder)}
    ring = {"depth": depth, "direct": direct}
    return Job(way, **files, **stack, threads=given.threads, core=given.core, **ring)


def started(
    path: Path, given: argparse.Namespace, budget: Budget, stack: ExitStack
) -> dict[str, tuple[Worker, Row]]:
    """Start the processes, one after the other; those that fail are named, not run."""
    workers = {}
    for name in given.ways:
        worker = stack.enter_context(Worker(job_of(name, path, given)))
        try:
            workers[name] = (worker, Row(name, worker.answer()))
        except RuntimeError as error:
            budget.skip(name, error)
        else:
            print(name, workers[name][1].set_up, flush=True)
    return workers


def measure_disk(given: argparse.Namespace, budget: Budget) -> dict[str, Row]:
    """Measure all ways in turn."""
    with ExitStack() as stack:
        scratch = tempfile.TemporaryDirectory(prefix="lowbits-bench-", dir=scratch_directory())
        path = Path(stack.enter_context(scratch)) / "weights.safetensors"
        nbytes = write_weights(path, given.blocks, given.width)
        print(f"{nbytes / MIB:.0f} MiB in {given.blocks} blocks", flush=True)
        workers = started(path, given, budget, stack)
        for number in range(given.rounds):
            if not budget.allows(f"round {number + 1}"):
                break
            for name, (worker, row) in workers.items():
                row.bursts.append(worker.ask("pass"))
                if name in _READERS:
                    row.reads_s.append(worker.ask("read")["wall_s"])
            walls = {name: round(row.bursts[-1]["wall_s"], 3) for name, (_, row) in workers.items()}
            print(f"round {number + 1}: {walls}", flush=True)
    return {name: row for name, (_, row) in workers.items() if row.bursts}


def options() -> argparse.Namespace:
    """Parse the command line."""
    made = parser("bench_streaming", __doc__, rounds=5)
    made.add_argument("--plot", type=Path, default=Path("out") / "bench_streaming.png")
    made.add_argument("--preset", choices=PRESETS, default="full")
    made.add_argument("--blocks", type=int, help="of the stack, instead of the preset's")
    made.add_argument("--width", type=int, help="of the stack, instead of the preset's")
    made.add_argument("--tokens", type=int, default=64, help="of a pass")
    made.add_argument("--core", type=int, help="that computes; the other ones read")
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="one or more")
    made.add_argument("--schemes", type=split, default=["float8-e4m3fn", "bnb-nf4"], help="of FLUX")
    made.add_argument("--budgets", type=split, default=["2GB", "4GB", "6GB", "8GB", "12GB"])
    given = made.parse_args()
    blocks, width = PRESETS[given.preset]
    given.blocks, given.width = given.blocks or blocks, given.width or width
    return given


def report_disk(rows: dict[str, Row], given: argparse.Namespace) -> None:
    """Print and draw what was measured."""
    print("", rows_table(rows), "", *goals(rows), sep="\n")
    bound = bound_s(rows)
    draw_bars(
        given.plot,
        f"seconds a pass, {given.blocks} blocks of width {given.width} from the disk",
        [(row.name, row.wall_s) for row in rows.values()],
        [] if bound is None else [("max(C, R)", bound)],
    )


def main() -> None:
    """Measure, print, write, draw."""
    given = options()
    budget, where = Budget(given.seconds), machine(given.device)
    where["threads"] = given.threads
    print(machine_line(where), flush=True)
    if given.device.type != "cpu":
        measure_flux(given, budget, where)
        return
    rows = measure_disk(given, budget)
    report_disk(rows, given)
    stack = {name: vars(given)[name] for name in ("blocks", "width", "tokens", "rounds", "core")}
    data = {"machine": where, **stack, "rows": [asdict(row) for row in rows.values()]}
    write_json(given.json, data)
    print("", machine_line(where), budget.text(), sep="\n")


if __name__ == "__main__":
    main()
