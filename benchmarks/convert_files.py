"""Measure what converting a large checkpoint takes: memory of a process of its own, and seconds.

    python benchmarks/convert_files.py                   # 4 GB, to four forms; minutes
    python benchmarks/convert_files.py --gigabytes 0.5   # tries the script

The file is random, in bfloat16, of layers as FLUX.1's. The goal: the resident memory of the process
(VmHWM), above what it has once everything is imported, is at most twice the largest tensor in
float32, and 200 MB more.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch
from paired import machine, machine_line, parser, split, table, write_json

from lowbits.files.safetensors_writer import plain_group, write_safetensors
from lowbits.streaming.scratch import scratch_directory

#: Rows and row lengths of the matrices of one block.
SHAPES: Final = ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (18432, 3072))
#: Scheme, and how the file ends.
FORMS: Final = (
    *("float8-e4m3fn.safetensors", "bnb-nf4.safetensors", "bnb-nf4-dq.safetensors"),
    "gguf-q8_0.gguf",
)
SLACK_BYTES: Final = 200_000_000


def write_random(path: Path, nbytes: int) -> int:
    """Write a checkpoint of about this size; return its largest tensor's bytes in float32."""
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, int]) -> torch.Tensor:
        weight = torch.randn(shape, generator=generator) * 0.02
        return weight.to(torch.bfloat16)

    groups, total = [], 0
    while total < nbytes:
        block = len(groups) // len(SHAPES)
        shape = SHAPES[len(groups) % len(SHAPES)]
        name = f"blocks.{block}.linear_{len(groups) % len(SHAPES)}.weight"
        groups.append(plain_group(name, torch.bfloat16, shape, lambda shape=shape: make(shape)))
        total += groups[-1].nbytes
    write_safetensors(path, groups, max_shard_bytes=2 * nbytes)
    return max(rows * row_length * 4 for rows, row_length in SHAPES)


def memory_bytes(line: str) -> int:
    """Return a line of ``/proc/self/status``, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(row.split()[1]) * 1024 for row in text.splitlines() if row.startswith(line))


def convert_here(src: Path, dst: Path, scheme: str) -> dict[str, Any]:
    """Convert in this process, after a small file that imports everything."""
    import lowbits

    torch.set_num_threads(1)
    warm = dst.with_name(f"warm{dst.suffix}")
    small = dst.with_name("small.safetensors")
    weight = torch.zeros(64, 256, dtype=torch.bfloat16)
    write_safetensors(
        small, [plain_group("blocks.0.w.weight", weight.dtype, weight.shape, lambda: weight)]
    )
    lowbits.convert(small, warm, scheme)
    before = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    begin = time.perf_counter()
    report = lowbits.convert(src, dst, scheme)
    seconds = time.perf_counter() - begin
    return {
        "peak_bytes": memory_bytes("VmHWM") - before,
        "seconds": seconds,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "file_bytes": dst.stat().st_size,
    }


def main() -> None:
    """Measure, print, write."""
    made = parser("convert_files", __doc__, rounds=1)
    made.add_argument("--gigabytes", type=float, default=4.0)
    made.add_argument("--forms", type=split, default=list(FORMS))
    given = made.parse_args()
    where = machine(torch.device("cpu"))
    rows, data = [], []
    with tempfile.TemporaryDirectory(prefix="lowbits-bench-", dir=scratch_directory()) as folder:
        src = Path(folder) / "model.safetensors"
        largest = write_random(src, int(given.gigabytes * 1e9))
        limit = 2 * largest + SLACK_BYTES
        for form in given.forms:
            scheme, _, suffix = form.partition(".")
            dst = Path(folder) / f"out.{suffix}"
            job = json.dumps([str(src), str(dst), scheme])
            done = subprocess.run(
                [sys.executable, __file__, "--job", job], capture_output=True, text=True, check=True
            )
            measured = json.loads(done.stdout.splitlines()[-1])
            dst.unlink()
            data.append({"form": form, "limit_bytes": limit, **measured})
            peak = measured["peak_bytes"]
            rows.append(
                [
                    f"`{scheme}`, {suffix}",
                    f"{measured['bytes_before'] / 1e9:.2f}",
                    f"{measured['file_bytes'] / 1e9:.2f}",
                    f"{peak / 1e6:.0f}",
                    f"{limit / 1e6:.0f}",
                    "yes" if peak <= limit else "NO",
                    f"{measured['seconds']:.0f}",
                ]
            )
            print(*rows[-1], flush=True)
    header = ("to", "from, GB", "file, GB", "peak, MB", "goal, MB", "met", "seconds")
    print("", table(header, rows), "", machine_line(where), sep="\n")
    write_json(given.json, {"machine": where, "rows": data})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        paths = json.loads(sys.argv[2])
        print(json.dumps(convert_here(Path(paths[0]), Path(paths[1]), paths[2])))
    else:
        main()
