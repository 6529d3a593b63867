"""Measure what `import lowbits` adds to `import torch`: interleaved fresh interpreters, medians.

python benchmarks/bench_import.py [RUNS]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Final

_CODE: Final = """
import sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import {module}
print(time.perf_counter() - start, len(set(sys.modules) - before))
"""


def import_cost(module: str) -> tuple[float, int]:
    """Return seconds and modules that importing a module adds, after torch, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _CODE.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, modules = done.stdout.split()
    return float(seconds), int(modules)


def main(runs: int) -> None:
    """Print the medians over some runs, beside those of a small standard module."""
    modules = ("lowbits", "colorsys")
    costs: dict[str, list[tuple[float, int]]] = {module: [] for module in modules}
    for _ in range(runs):
        for module in modules:
            costs[module].append(import_cost(module))
    for module, measured in costs.items():
        milliseconds = statistics.median(seconds for seconds, _ in measured) * 1000
        print(f"import {module}: {milliseconds:.2f} ms after torch, {measured[0][1]} new modules")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
