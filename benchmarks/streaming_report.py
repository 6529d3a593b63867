"""What the benchmarks of streaming print and draw: rows, goals, bars."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Final, final

from paired import number, table
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

MIB: Final = 1 << 20
#: The way that goals are about, and what it is compared with: all in memory, other libraries.
STREAMED: Final = "lowbits, ring 3"
COMPUTE: Final = "resident"
FASTER: Final = {"diffusers": 1.5, "accelerate": 2.5}
AS_FAST: Final = 1.05
_SLACK_BYTES: Final = 64 * MIB
_HEADER: Final = (
    *("way", "wall, s", "of max(C, R)", "slowest / fastest", "waited, s", "no core, s"),
    *("CPU, s", "R, s", "read, MiB", "budget, MiB", "memory, MiB", "set up, s"),
)
_BAR, _LEFT, _RIGHT = 28, 240, 620

Figures = dict[str, Any]


@final
@dataclass
class Row:
    """What was measured of one way.

    Attributes:
        name: of the way.
        set_up: of attaching, and of two passes whose memory was sampled.
        bursts: of the last passes of bursts.
        reads_s: seconds of reading alone.
    """

    name: str
    set_up: Figures
    bursts: list[Figures] = field(default_factory=list)
    reads_s: list[float] = field(default_factory=list)

    def median(self, what: str) -> float | None:
        """Return the median of a figure; None where it is not known."""
        values = [done[what] for done in self.bursts if done[what] is not None]
        return median(values) if values else None

    @property
    def wall_s(self) -> float:
        """Median seconds of a pass."""
        return float(median(done["wall_s"] for done in self.bursts))

    @property
    def own_s(self) -> float:
        """Median seconds of a pass without the wait for a core that others were using."""
        return float(median(done["wall_s"] - done["no_core_s"] for done in self.bursts))

    @property
    def read_s(self) -> float | None:
        """Median seconds of reading alone."""
        return median(self.reads_s) if self.reads_s else None

    def cells(self, bound_s: float | None) -> list[str]:
        """Return the row of the table; ``bound_s`` is max(C, R)."""
        walls = [done["wall_s"] for done in self.bursts]
        read, budget = self.median("read_bytes"), self.set_up["budget_bytes"]
        return [
            *(self.name, number(self.wall_s), number(bound_s and self.wall_s / bound_s)),
            number(max(walls) / min(walls)),
            *(number(self.median(what)) for what in ("stall_s", "no_core_s", "cpu_s")),
            number(self.read_s),
            *(number(n and n / MIB, 0) for n in (read, budget)),
            number(self.set_up["memory_bytes"] / MIB, 0),
            number(self.set_up["attach_s"], 1),
        ]


def bound_s(rows: Mapping[str, Row]) -> float | None:
    """Return max(C, R); None where one of them was not measured."""
    if not {COMPUTE, STREAMED} <= rows.keys() or rows[STREAMED].read_s is None:
        return None
    return max(rows[COMPUTE].wall_s, rows[STREAMED].read_s)


def rows_table(rows: Mapping[str, Row]) -> str:
    """Return the Markdown table."""
    bound = bound_s(rows)
    return table(_HEADER, [row.cells(bound) for row in rows.values()])


def goals(rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield a line for each goal that can be judged."""
    bound = bound_s(rows)
    if bound is not None:
        c, r, w = rows[COMPUTE].wall_s, rows[STREAMED].read_s, rows[STREAMED].wall_s
        yield _verdict(
            w / bound <= AS_FAST,
            f"{STREAMED}: W <= {AS_FAST} x max(C, R): W {w:.3f} s, C {c:.3f} s, R {r:.3f} s, "
            f"ratio {w / bound:.3f}; W and C without waiting for a core: "
            f"{rows[STREAMED].own_s / max(rows[COMPUTE].own_s, r):.3f}",
        )
        activations = rows[COMPUTE].set_up["pass_memory_bytes"]
        for row in rows.values():
            if row.set_up["budget_bytes"] is not None:
                yield _memory_goal(row, activations)
    for name, factor in FASTER.items():
        if {name, STREAMED} <= rows.keys():
            ratio = rows[name].wall_s / rows[STREAMED].wall_s
            text = f"{STREAMED}: >= {factor} x faster than {name}: {ratio:.2f} x"
            yield _verdict(ratio >= factor, text)
    outputs = {done["output"] for row in rows.values() for done in row.bursts}
    yield _verdict(len(outputs) <= 1, f"outputs of all ways are bit-equal: {', '.join(outputs)}")


def _memory_goal(row: Row, activations: int) -> str:
    limit = row.set_up["budget_bytes"] + _SLACK_BYTES + activations
    taken = row.set_up["memory_bytes"]
    return _verdict(
        taken <= limit,
        f"{row.name}: memory <= budget + 64 MiB + activations ({activations / MIB:.1f} MiB): "
        f"{taken / MIB:.0f} of {limit / MIB:.0f} MiB",
    )


def _verdict(is_met: bool, text: str) -> str:  # noqa: FBT001 - what it says comes first
    return f"- {'MET' if is_met else 'MISSED'}: {text}"


def draw_bars(
    path: Path, title: str, bars: Sequence[tuple[str, float]], marks: Sequence[tuple[str, float]]
) -> None:
    """Draw values as bars, and marked values as lines through all of them."""
    longest = max(value for _, value in (*bars, *marks))
    height = _BAR * (len(bars) + len(marks) + 2)
    image = Image.new("RGB", (_LEFT + _RIGHT + 80, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    draw.text((10, 6), title, "black", font)
    for line, (name, value) in enumerate(bars, 1):
        top, end = line * _BAR + 4, _LEFT + _RIGHT * value / longest
        draw.text((10, top), name, "black", font)
        draw.rectangle((_LEFT, top, end, top + _BAR - 8), "#4878a8")
        draw.text((end + 6, top), f"{value:.2f}", "black", font)
    bottom = (len(bars) + 1) * _BAR
    for line, (name, value) in enumerate(marks):
        x = _LEFT + _RIGHT * value / longest
        draw.line((x, _BAR, x, bottom + line * _BAR), "#c03020", 2)
        draw.text((x + 4, bottom + line * _BAR - 4), f"{name} {value:.2f}", "#c03020", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
