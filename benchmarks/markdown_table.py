"""Print a report of `lowbits compare` as a Markdown table, with machine, versions and date.

python benchmarks/markdown_table.py out/report.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

_MIB: Final = 1 << 20
_HEADER: Final = (
    "scheme",
    "bits per weight",
    "packed components, MiB",
    "everything, MiB",
    "conversion, s",
    "peak memory, MiB",
    "s per picture",
    "PSNR, dB",
    "read as asked",
    "first picture after restore",
)


def row(result: dict[str, Any]) -> list[str]:
    """Return the cells of one scheme's row."""
    psnr = result.get("psnr_db")
    return [
        result["scheme"],
        f"{result['bits_per_weight']:.3f}",
        f"{result['packed_component_bytes'] / _MIB:.2f}",
        f"{result['total_bytes'] / _MIB:.2f}",
        f"{result['convert_s']:.2f}" if result.get("convert_s") else "-",
        f"{result['convert_peak_bytes'] / _MIB:.0f}" if result.get("convert_peak_bytes") else "-",
        f"{result['seconds_per_picture']:.3f}",
        f"{psnr:.1f}" if psnr else "-",
        f"{result['accuracy']:.1%}" if result.get("accuracy") is not None else "-",
        {True: "bit-equal", False: "DIFFERENT", None: "-"}[result.get("restored")],
    ]


def table(report: dict[str, Any]) -> str:
    """Return the table and the line that says where it was measured."""
    rows = [row({"scheme": "full precision", **report["full_precision"]})]
    rows += [row(result) for result in report["schemes"]]
    lines = [_HEADER, ["---"] * len(_HEADER), *rows]
    machine = report["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    where = (
        f"{report['model']}, {report['pictures']} pictures a row, equal seeds; {report['device']}, "
        f"{machine['cpu_count']} cores ({machine['processor']}), Python {machine['python']}, "
        f"{packages}; {machine['date']}."
    )
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in lines] + ["", where])


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
