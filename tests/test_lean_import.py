"""`import lowbits` costs nothing: checked in a fresh interpreter, without an accelerator too."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

OPTIONAL = [
    "bitsandbytes",
    "torchao",
    "optimum",
    "gguf",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "typer",
    "rich",
    "PIL",
    "numba",
]

IMPORT = """
import json, sys, time
import torch
modules = set(sys.modules)
start = time.perf_counter()
import lowbits
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(set(sys.modules) - modules), torch.cuda.is_initialized()]))
"""

LIST_SCHEMES = """
import json, sys
import lowbits.core.registry
for backend in lowbits.core.registry.DEFAULT.all().values():
    assert backend.schemes()
print(json.dumps(sorted(sys.modules)))
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_import_adds_little_time_and_no_optional_package() -> None:
    results = [json.loads(run(IMPORT)) for _ in range(3)]
    _, modules, initialized = results[0]
    assert not {name.split(".")[0] for name in modules} & set(OPTIONAL)
    assert initialized is False
    # The figure, 50 ms, is measured by benchmarks/bench_import.py; here only what cannot be noise.
    assert statistics.median(seconds for seconds, _, _ in results) < 1.0
    assert all(name.split(".")[0] in ("lowbits", "__future__") for name in modules), modules


def test_knowing_the_schemes_imports_no_quantization_library() -> None:
    modules = json.loads(run(LIST_SCHEMES))
    assert not {name.split(".")[0] for name in modules} & set(OPTIONAL)
