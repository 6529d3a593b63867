"""What a conversion may take, measured in a process of its own: anonymous memory, sampled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import gc, json, os, sys, threading, time
import torch
from safetensors.torch import load_file, save_file
import lowbits

scheme, mode, folder = sys.argv[1:]
torch.set_num_threads(1)
LAYERS, SIZE = 4, 3072

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    kinds = ("RssAnon", "RssShmem")
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) * 1024

class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self.stop = anonymous(), threading.Event()
    def run(self):
        while not self.stop.wait(0.002):
            self.bytes = max(self.bytes, anonymous())

warm = torch.nn.Linear(256, 256)
with lowbits.quantize(warm, scheme):
    warm(torch.ones(1, 256))
model = torch.nn.Sequential(*(torch.nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))
path = folder + "/model.safetensors"
if mode == "file":
    save_file(model.state_dict(), path)
gc.collect()
before = anonymous()
peak = Peak()
peak.start()
handle = lowbits.quantize(model, scheme, keep_source=mode, source=path if mode == "file" else None)
peak.stop.set()
peak.join()
gc.collect()
report = handle.report()
print(json.dumps({
    "before": before, "peak": peak.bytes, "after": anonymous(), "layer": SIZE * SIZE * 4,
    "model": report.bytes_before, "packed": report.bytes_after,
}))
"""

#: Interpreter, allocator and threads: not what a layer costs.
SLACK = 8 << 20

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(scheme: str, mode: str, folder: Path) -> dict[str, int]:
    import os

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, scheme, mode, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc/self/status (Linux)"
)


@pytest.mark.parametrize("scheme", ["bnb-nf4", "torchao-int8", "float8-e4m3fn", "gguf-q4_0"])
def test_memory_keeps_model_and_packed_and_one_layer(scheme: str, tmp_path: Path) -> None:
    m = measure(scheme, "memory", tmp_path)
    assert m["peak"] - m["before"] <= m["packed"] + m["layer"] + SLACK
    assert m["after"] - m["before"] <= m["packed"] + SLACK


@pytest.mark.parametrize("scheme", ["bnb-nf4", "quanto-int8"])
def test_file_lets_originals_go_as_layers_are_packed(scheme: str, tmp_path: Path) -> None:
    m = measure(scheme, "file", tmp_path)
    assert m["peak"] - m["before"] <= m["layer"] + SLACK
    assert m["before"] - m["after"] >= m["model"] - m["packed"] - m["layer"]
