"""Time GGUF's types: lowbits beside diffusers' torch functions and the ``gguf`` package.

    python benchmarks/bench_gguf.py
    python benchmarks/bench_gguf.py --types Q4_K,Q6_K --what quantize,rmse

Speeds are MB (1e6 bytes) of float32 weights per second: one thread, 64 MiB of weights, callables
in turn, medians. Decoders read random valid blocks. Whatever is missing or too slow is named.
"""

from __future__ import annotations

import statistics
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from gguf_types import LLAMA_CPP, TYPES, Blocks, gaussian, student_t
from paired import (
    Budget,
    Pace,
    TooSlowError,
    machine,
    machine_line,
    medians_s,
    number,
    parser,
    sample_s,
    split,
    table,
    write_json,
)

import lowbits

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

COLUMNS: Final = 4096
CPU: Final = torch.device("cpu")
#: How much faster than diffusers decoding is meant to be, in the median type.
MEDIAN_GOAL: Final = 1.5
EFFORTS: Final = ("ref", "best")
#: Rows that are quantized to tell how long all of them would take.
_PROBE_ROWS: Final = 16

Row = dict[str, Any]


def backend() -> Any:
    """Return lowbits' GGUF backend."""
    return lowbits.backend("gguf")


def gguf_type(name: str) -> Any:
    """Return the ``gguf`` package's type.

    Raises:
        NotImplementedError: this version knows no such type.
    """
    import gguf

    if name not in gguf.GGMLQuantizationType.__members__:
        raise NotImplementedError(f"the gguf package has no type {name}")
    return gguf.GGMLQuantizationType[name]


def diffusers_decode(name: str, blocks: Tensor) -> Tensor:
    """Decode with the functions of diffusers' `GGUFLinear`, in float32.

    Raises:
        NotImplementedError: diffusers cannot decode this type.
    """
    from diffusers.quantizers.gguf.utils import dequantize_functions

    functions = {qtype.name: function for qtype, function in dequantize_functions.items()}
    if name not in functions:
        raise NotImplementedError(f"diffusers does not decode {name}")
    kind = TYPES[name]
    decoded: Tensor = functions[name](blocks, kind.weights, kind.size_bytes, dtype=torch.float32)
    return decoded


def package_decode(name: str, rows: Tensor) -> Tensor:
    """Decode with the ``gguf`` package."""
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf_type(name)))


def package_encode(name: str, weight: Tensor) -> Tensor:
    """Quantize with the ``gguf`` package."""
    import gguf

    return torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf_type(name)))


def decode(name: str, data: Tensor, rows: int) -> Tensor:
    """Decode with lowbits."""
    decoded: Tensor = backend().decode(data, name, (rows, COLUMNS), dtype=torch.float32)
    return decoded


def encode(name: str, effort: str, weight: Tensor) -> Tensor:
    """Quantize with lowbits.

    Raises:
        NotImplementedError: this version cannot quantize to blocks.
    """
    if getattr(backend(), "encode", None) is None:
        raise NotImplementedError("lowbits' gguf backend has no encode()")
    data: Tensor = backend().encode(weight, name, effort=effort)
    return data


def working(
    candidates: Mapping[str, Callable[[], Tensor]], what: str, budget: Budget
) -> dict[str, Callable[[], Tensor]]:
    """Return what runs; each is called once, and one that fails is listed as not run."""
    found = {}
    for name, call in candidates.items():
        try:
            call()
        except Exception as error:  # noqa: BLE001 - missing here, or not yet: the reason is printed
            budget.skip(f"{name} {what}", error)
        else:
            found[name] = call
    return found


def speeds(work: Mapping[str, Callable[[], Tensor]], rows: int, pace: Pace) -> dict[str, float]:
    """Return MB of float32 weights per second, for each callable."""
    medians = medians_s(work, CPU, pace)
    return {name: rows * COLUMNS * 4 / 1e6 / seconds for name, seconds in medians.items()}


def decode_row(name: str, kind: Blocks, rows: int, pace: Pace, budget: Budget) -> Row:
    """Time the decoders of a type, and compare their values bit for bit.

    Raises:
        TooSlowError: they take longer than they may.
    """
    blocks = kind.random(rows * COLUMNS, torch.Generator().manual_seed(0))
    data = blocks.view(rows, -1)
    candidates = {
        "lowbits": partial(decode, name, data, rows),
        "diffusers": partial(diffusers_decode, name, blocks),
        "gguf": partial(package_decode, name, data),
    }
    work = working(candidates, f"decode {name}", budget)
    row: Row = {"type": name, **speeds(work, rows, pace)}
    if "lowbits" in work and "gguf" in work:
        ours, theirs = (candidates[key]().view(torch.int32) for key in ("lowbits", "gguf"))
        row["bit_equal"] = torch.equal(ours, theirs)
    if "lowbits" in row and "diffusers" in row:
        row["ratio"] = row["lowbits"] / row["diffusers"]
    return row


def encoders(
    name: str, weight: Tensor, limit_s: float, budget: Budget, *, with_package: bool = True
) -> dict[str, Callable[[], Tensor]]:
    """Return the quantizers that can do these weights within a time, each tried on a few rows."""
    few, share = weight[:_PROBE_ROWS], _PROBE_ROWS / weight.shape[0]
    makers: dict[str, Callable[[Tensor], Tensor]] = {
        effort: partial(encode, name, effort) for effort in EFFORTS
    }
    if with_package:
        makers["gguf"] = partial(package_encode, name)
    tried = {key: partial(make, few) for key, make in makers.items()}
    found: dict[str, Callable[[], Tensor]] = {}
    for key, call in working(tried, f"quantize {name}", budget).items():
        speed = few.numel() * 4 / 1e6 / (seconds := sample_s(call, CPU))
        if seconds / share > limit_s:
            budget.skip(f"{key} quantize {name}", f"at about {speed:.2g} MB/s")
        else:
            found[key] = partial(makers[key], weight)
    return found


def quantize_row(name: str, weight: Tensor, pace: Pace, budget: Budget) -> Row | None:
    """Time the quantizers of a type.

    Raises:
        TooSlowError: they take longer than they may.
    """
    work = encoders(name, weight, pace.limit_s / 2, budget)
    return {"type": name, **speeds(work, weight.shape[0], pace)} if work else None


def rmse_row(name: str, rows: int, limit_s: float, budget: Budget) -> Row | None:
    """Measure the errors of our quantizers, relative to the weights' standard deviation."""
    row: Row = {"type": name, "llama_cpp": LLAMA_CPP[name]}
    for distribution in (gaussian, student_t):
        weight = distribution(rows, COLUMNS)
        ours = encoders(name, weight, limit_s, budget, with_package=False)
        for effort, call in ours.items():
            error = decode(name, call(), rows) - weight
            rmse = float(error.square().mean().sqrt() / weight.std())
            row[f"{distribution.__name__} {effort}"] = rmse
    return row if len(row) > 2 else None


def goals(rows: Sequence[Row]) -> list[str]:
    """Say whether decoding is as fast as it is meant to be."""
    ratios = {row["type"]: row["ratio"] for row in rows if "ratio" in row}
    if not ratios:
        return ["- no type is decoded by both lowbits and diffusers"]
    median = statistics.median(ratios.values())
    slower = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio < 1]
    different = [row["type"] for row in rows if row.get("bit_equal") is False]
    verdict = "MET" if median >= MEDIAN_GOAL else "MISSED"
    median_goal = f"- {verdict}: decoding >= {MEDIAN_GOAL} x diffusers in the median type"
    return [
        f"{median_goal}: {median:.2f} over {len(ratios)} types",
        f"- MISSED: slower than diffusers: {', '.join(slower)}"
        if slower
        else "- MET: never slower",
        f"- decoded values differ from the gguf package's: {', '.join(different) or 'nowhere'}",
    ]


def sections(report: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Yield the Markdown tables."""
    headers = {
        "decode": ("lowbits", "diffusers", "gguf", "ratio"),
        "quantize": (*EFFORTS, "gguf"),
        "rmse": tuple(f"{d} {effort}" for d in ("gaussian", "student_t") for effort in EFFORTS),
    }
    for what, rows in report.items():
        columns, digits = headers[what], 5 if what == "rmse" else 2
        cells = [[row["type"], *(number(row.get(c), digits) for c in columns)] for row in rows]
        header = ["type", *columns]
        if what == "decode":
            header[-1] = "lowbits / diffusers"
        if what == "rmse":
            header += ["llama.cpp, gaussian", "llama.cpp, student_t"]
            for line, row in zip(cells, rows, strict=True):
                line.extend(number(value, 4) for value in row["llama_cpp"])
        yield f"### {what}\n\n" + table(header, cells)


def options() -> argparse.Namespace:
    """Parse the command line."""
    made = parser("bench_gguf", __doc__)
    made.set_defaults(seconds=1500.0)
    made.add_argument("--types", type=split, default=list(TYPES))
    made.add_argument("--what", type=split, default=["decode", "rmse", "quantize"])
    made.add_argument("--mib", type=int, default=64, help="of float32 weights")
    made.add_argument("--rmse-rows", type=int, default=512, help=f"of {COLUMNS} weights")
    made.add_argument("--row-seconds", type=float, default=30.0, help="that one row may take")
    return made.parse_args()


def measured(given: argparse.Namespace, budget: Budget) -> Iterator[tuple[str, Row]]:
    """Measure what the options ask for."""
    rows = given.mib * (1 << 20) // (4 * COLUMNS)
    weight = gaussian(rows, COLUMNS)
    all_rounds = Pace(given.rounds, given.rounds, given.row_seconds)
    # Quantizing is done once: two rounds of a slow one say enough.
    few_rounds = Pace(given.rounds, 2, given.row_seconds)
    work: dict[str, Callable[[str], Row | None]] = {
        "decode": lambda name: decode_row(name, TYPES[name], rows, all_rounds, budget),
        "quantize": lambda name: quantize_row(name, weight, few_rounds, budget),
        "rmse": lambda name: rmse_row(name, given.rmse_rows, given.row_seconds, budget),
    }
    for what in given.what:
        for name in given.types:
            if budget.allows(f"{what} {name}"):
                try:
                    row = work[what](name)
                except TooSlowError as error:
                    budget.skip(f"{what} {name}", error)
                else:
                    if row is not None:
                        yield what, row


def main() -> None:
    """Measure, print, and write after each row."""
    given = options()
    torch.set_num_threads(given.threads)
    budget = Budget(given.seconds)
    where = machine(CPU)
    print(machine_line(where), flush=True)
    report: dict[str, list[Row]] = {what: [] for what in given.what}
    # The gguf package's own arithmetic overflows harmlessly on some random bytes.
    warnings.simplefilter("ignore", RuntimeWarning)
    with torch.no_grad():
        for what, row in measured(given, budget):
            report[what].append(row)
            print(what, row, flush=True)
            write_json(given.json, {"machine": where, **report, "not_run": budget.not_run})
    print("", *sections(report), machine_line(where), sep="\n\n")
    judged = goals(report["decode"]) if report.get("decode") else []
    print("", *judged, "", budget.text(), sep="\n")


if __name__ == "__main__":
    main()
