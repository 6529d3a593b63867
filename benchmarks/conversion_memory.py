"""Measure what packing takes at most: anonymous memory of a process of its own, sampled.

    python benchmarks/conversion_memory.py                      # a table over schemes and sources
    python benchmarks/conversion_memory.py memory bnb-nf4 ...   # some of it, a line of JSON each

The model is four Linear layers of 3072 x 3072 in float32; originals are kept in memory, or found
again in a file, from which a model may be "mapped": read as it is touched. Peaks shorter than 2 ms
may be missed. The allocator is told to give freed blocks back at once: what is measured is what is
held.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Final

LAYERS: Final = 4
SIZE: Final = 3072
SCHEMES: Final = (
    *("bnb-nf4", "bnb-nf4-dq", "bnb-int8", "torchao-int8", "torchao-int4", "quanto-int8"),
    *("quanto-int4", "float8-e4m3fn", "gguf-q8_0", "gguf-q4_0"),
)
ENVIRONMENT: Final = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def anonymous_bytes() -> int:
    """Return the process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kinds = ("RssAnon", "RssShmem")
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) * 1024


class Peak(threading.Thread):
    """The most that the process held while this thread ran."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = anonymous_bytes()
        self.done = threading.Event()

    def run(self) -> None:
        """Sample every 2 ms."""
        while not self.done.wait(0.002):
            self.note()

    def note(self) -> None:
        """Sample once."""
        self.bytes = max(self.bytes, anonymous_bytes())

    def stop(self) -> int:
        """End the thread; return the most."""
        self.done.set()
        self.join()
        self.note()
        return self.bytes


def measure_here(scheme: str, mode: str, folder: Path) -> dict[str, int]:
    """Pack a model in this process; all values are bytes."""
    import torch
    from safetensors.torch import load_file, save_file

    import lowbits

    torch.set_num_threads(1)
    warm = torch.nn.Linear(256, 256)
    with lowbits.quantize(warm, scheme):
        warm(torch.ones(1, 256))
    layers = [torch.nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*layers)
    layers.clear()
    path = folder / "model.safetensors"
    source = None
    if mode != "memory":
        source = path
        save_file(model.state_dict(), path)
    if mode == "mapped":
        model.load_state_dict(load_file(path), assign=True)
    gc.collect()
    before = anonymous_bytes()
    peak = Peak()
    peak.start()
    keep_source = "file" if source else mode
    handle = lowbits.quantize(model, scheme, keep_source=keep_source, source=source)
    peak_bytes = peak.stop()
    gc.collect()
    report = handle.report()
    return {
        "before": before,
        "peak": peak_bytes,
        "after": anonymous_bytes(),
        "layer": SIZE * SIZE * 4,
        "model": report.bytes_before,
        "packed": report.bytes_after,
    }


def measure(mode: str, *schemes: str) -> list[dict[str, int]]:
    """Pack a model with one scheme after the other, in one fresh process.

    Raises:
        RuntimeError: with what the process said.
    """
    done = subprocess.run(
        [sys.executable, __file__, mode, *schemes],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ENVIRONMENT,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()[-len(schemes) :]]


def main() -> None:
    """Print a Markdown table."""
    print("| scheme | originals | model, MiB | packed | peak above the model | left above it |")
    print("|---|---|---|---|---|---|")
    for scheme in SCHEMES:
        for mode in ("memory", "file", "mapped"):
            (measured,) = measure(mode, scheme)
            m = {name: count / (1 << 20) for name, count in measured.items()}
            peak, left = m["peak"] - m["before"], m["after"] - m["before"]
            print(
                f"| {scheme} | {mode} | {m['model']:.0f} | {m['packed']:.1f} | {peak:.1f} "
                f"| {left:.1f} |"
            )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measurements = []
        for name in sys.argv[2:]:
            with tempfile.TemporaryDirectory() as scratch:
                measurements.append(measure_here(name, sys.argv[1], Path(scratch)))
        print(*map(json.dumps, measurements), sep="\n")
    else:
        main()
