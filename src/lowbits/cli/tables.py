"""Tables of backends, schemes and comparisons for the terminal."""

from __future__ import annotations

import math
import os
import sys
from itertools import groupby
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lowbits
    from lowbits.cli.compare import Comparison, Result

_MIB: Final = 2**20

#: Columns that a table of schemes needs to say what each of them is.
_WIDE: Final = 110

_FIGURES: Final = (
    "\nbits",
    "packed\nMiB",
    "all\nMiB",
    "pack\ns",
    "peak\nMiB",
    "draw\ns",
    "PSNR\ndB",
    "read\nright",
    "re-\nstored",
)
_FIGURES_NOTE: Final = (
    "bits: of a packed weight. packed, all: stored size of the packed components, of everything. "
    "pack: seconds it took; peak: memory above what was there before. draw: seconds a picture. "
    "PSNR: to the pictures of full precision. read right: recognised as what was asked for."
)

#: Columns of what is written to a file or a pipe: no table here needs more.
_UNBOUNDED: Final = 200


def make_console(*, stderr: bool = False) -> Console:
    """Return a console; one that writes to a file or a pipe does not wrap tables at 80 columns."""
    stream = sys.stderr if stderr else sys.stdout
    is_sized = stream.isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, width=None if is_sized else _UNBOUNDED, highlight=False)


def backends_table(backends: Sequence[lowbits.BackendInfo]) -> Table:
    """Return a table of `lowbits.backends`."""
    table = _table("backend", "version", "available", "why not", "install")
    for info in backends:
        table.add_row(
            Text(info.name, style="bold"),
            info.version or "-",
            _mark(info.available),
            Text(info.reason or ""),
            Text(info.install or ""),
        )
    return table


def schemes_table(schemes: Sequence[lowbits.SchemeInfo], width: int) -> Table:
    """Return a table of `lowbits.schemes`, a section for each backend.

    Bits are those of a weight; rows say which lengths are accepted, ``32n``: multiples of 32. Here:
    whether it can be used; ``read``: files in it are loaded, and nothing is packed in it.

    Args:
        schemes: the rows.
        width: of the console; a narrow one has no room for what is said about each scheme.
    """
    is_wide = width >= _WIDE
    summary = ["summary"] if is_wide else []
    table = _table("scheme", "backend", "bits", "layers", "rows", "here", "Forge", *summary)
    table.caption = "Here, read: files are loaded in it, and nothing is packed in it."
    if not is_wide:
        table.caption += "\nA wider terminal, and --json, say what each of them is."
    every = set[str]().union(*(info.layer_kinds for info in schemes))
    for backend, group in groupby(schemes, lambda info: info.backend):
        for info in group:
            table.add_row(
                Text(info.name, style="bold" if info.available else "dim"),
                backend,
                f"{info.bits_per_weight:.2f}".rjust(5),
                _kinds(info.layer_kinds, every),
                f"{info.row_multiple}n" if info.row_multiple > 1 else "any",
                _mark(info.available) if info.can_quantize else Text("read", style="dim"),
                info.forge_name or "-",
                *([info.summary] if is_wide else []),
            )
        table.add_section()
    return table


def reason_lines(schemes: Sequence[lowbits.SchemeInfo]) -> list[Text]:
    """Return a line for each backend whose schemes cannot be used here."""
    reasons = {info.backend: info.reason for info in schemes if info.reason}
    return [Text.assemble((f"{name}: ", "yellow"), reason) for name, reason in reasons.items()]


def comparison_table(comparison: Comparison) -> Table:
    """Return a table of what was measured, full precision first; it fits 80 columns."""
    table = _table("scheme")
    table.columns[0].no_wrap = True
    for heading in _FIGURES:
        table.add_column(heading, justify="right")
    table.caption = _FIGURES_NOTE
    table.caption_justify = "left"
    table.add_row(*_comparison_row(comparison.reference), end_section=True)
    for result in comparison.results:
        table.add_row(*_comparison_row(result))
    return table


def skipped_lines(comparison: Comparison) -> list[Text]:
    """Return a line for each scheme that was skipped."""
    return [
        Text.assemble((f"skipped {item.scheme}: ", "yellow"), item.reason)
        for item in comparison.skipped
    ]


def format_psnr(value: float) -> str:
    """Return decibels for a table: ``equal`` where pictures are the same bit by bit."""
    return "equal" if math.isinf(value) else f"{value:.1f}"


def format_share(value: float | None) -> str:
    """Return a share in per cent, or a dash."""
    return "-" if value is None else f"{value:.1%}"


def _kinds(kinds: Sequence[str], every: set[str]) -> str:
    """Say shortly which layers a scheme holds: all, all but a few, or the few."""
    missing = sorted(every.difference(kinds))
    if not missing:
        return "all"
    return f"no {', '.join(missing)}" if len(missing) < len(kinds) else ", ".join(kinds)


def _comparison_row(result: Result) -> list[str | Text]:
    is_reference = result.convert_s is None
    peak = result.convert_peak_bytes
    return [
        Text(result.name, style="bold"),
        f"{result.stored.bits_per_weight:.2f}",
        f"{result.stored.component_bytes / _MIB:.2f}",
        f"{result.stored.total_bytes / _MIB:.2f}",
        "-" if result.convert_s is None else f"{result.convert_s:.2f}",
        "-" if peak is None else f"{peak / _MIB:.1f}",
        f"{result.seconds_per_picture:.3f}",
        "-" if is_reference else format_psnr(result.psnr_db),
        format_share(result.accuracy),
        Text("-") if result.restored is None else _mark(result.restored),
    ]


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold cyan", padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading == "scheme")
    return table


def _mark(is_good: bool) -> Text:
    return Text("yes", style="green") if is_good else Text("no", style="bold red")
