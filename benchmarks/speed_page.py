"""Print the tables of docs/speed.md from what the benchmarks wrote.

python benchmarks/speed_page.py docs/figures
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from paired import machine_line, number, table

Row = dict[str, Any]
MIB = 1 << 20


def three(row: Row | None) -> str:
    """Return a cell: packed, upstream's, dense, in ms."""
    if row is None:
        return "-"
    return " / ".join(number(row[f"{of}_ms"], 1) for of in ("lowbits", "upstream", "dense"))


def layers(data: Row) -> str:
    """Return the table of layers: a scheme a row for each shape, a case a column."""
    found = {(r["shape"], r["scheme"], r["dtype"], r["tokens"]): r for r in data["rows"]}
    peers = {(r["shape"], r["scheme"]): r["upstream"] for r in data["rows"]}
    cases = sorted(
        {(r["dtype"], r["tokens"]) for r in data["rows"]}, key=lambda c: (c[0][0] != "f", c)
    )
    header = ("layer", "scheme", "upstream", *(f"{dtype}, {tokens}" for dtype, tokens in cases))
    rows = [
        [shape, f"`{scheme}`", peer, *(three(found.get((shape, scheme, *case))) for case in cases)]
        for (shape, scheme), peer in peers.items()
    ]
    return table(header, rows)


def models(data: Row) -> str:
    """Return the table of models: seconds a step, and stored bytes."""
    names = ("lowbits", "upstream", "dense")
    header = ("model", "scheme", "upstream", "s per step", "stored, MiB", "error, lowbits")
    return table(
        header,
        [
            [
                row["model"],
                f"`{row['scheme']}`",
                row["upstream"],
                " / ".join(number(row["seconds"].get(name), 2) for name in names),
                " / ".join(
                    number(row["stored"][name] / MIB if name in row["stored"] else None, 0)
                    for name in names
                ),
                number(row["errors"].get("lowbits"), 4),
            ]
            for row in data["rows"]
        ],
    )


def gguf(data: Row) -> str:
    """Return the table of GGUF's types: MB/s, and errors."""
    quantize = {row["type"]: row for row in data["quantize"]}
    errors = {row["type"]: row for row in data["rmse"]}
    header = (
        *("type", "decode, MB/s: lowbits / diffusers / gguf", "quantize: ref / best / gguf"),
        *("error, Gaussian: ref / best", "error, Student-t: ref / best"),
    )
    rows = []
    for row in data["decode"]:
        name = row["type"]
        made, error = quantize.get(name, {}), errors.get(name, {})
        rows.append([
            name,
            " / ".join(number(row.get(of), 0) for of in ("lowbits", "diffusers", "gguf")),
            " / ".join(number(made.get(of), 0) for of in ("ref", "best", "gguf")),
            *(
                " / ".join(number(error.get(f"{kind} {effort}"), 4) for effort in ("ref", "best"))
                for kind in ("gaussian", "student_t")
            ),
        ])  # fmt: skip
    return table(header, rows)


def main() -> None:
    """Print each table that there is a report for, and where it was measured."""
    folder = Path(sys.argv[1])
    for name, make in (
        ("layers", layers),
        ("shapes", layers),
        ("convolution", layers),
        ("model", models),
        ("gguf", gguf),
    ):
        path = folder / f"bench_{name}.json"
        if path.exists():
            data = json.loads(path.read_text(encoding="utf-8"))
            print(f"## {name}\n\n{make(data)}\n\n{machine_line(data['machine'])}\n")


if __name__ == "__main__":
    main()
