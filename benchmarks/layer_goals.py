"""What packed layers are held to, beside the layers of the libraries their schemes come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: Overhead, and total where 16-bit products are slow: half of upstream's at most.
HALF: Final = 0.5
#: Total, everywhere: as fast as upstream, within the noise.
AS_FAST: Final = 1.05
_FEW_TOKENS: Final = (1, 64, 512)


class Timed(Protocol):
    """A measured row."""

    @property
    def scheme(self) -> str:
        """Name of the scheme."""

    @property
    def shape(self) -> str:
        """E.g. ``"3072x3072"``; convolutions have no ``x``."""

    @property
    def dtype(self) -> str:
        """Of the inputs."""

    @property
    def tokens(self) -> int:
        """Rows of the inputs."""

    @property
    def total_ratio(self) -> float | None:
        """Our time by upstream's."""

    @property
    def overhead_ratio(self) -> float | None:
        """Our time above the dense layer's by upstream's; None where upstream has none."""


@final
@dataclass(frozen=True)
class Goal:
    """A goal, and the rows that it is about."""

    text: str
    met: int
    missed: tuple[str, ...]

    def __str__(self) -> str:
        total = self.met + len(self.missed)
        if not total:
            return f"- no row to judge: {self.text}"
        verdict = f"- {'MISSED' if self.missed else 'MET'} ({self.met} of {total} rows)"
        return f"{verdict}: {self.text}" + "".join(f"\n  - {row}" for row in self.missed)


def judged(rows: Iterable[Timed], *, fast_16_bit: bool, is_cpu: bool) -> list[Goal]:
    """Say which goals the rows meet; rows without an upstream layer are not judged."""
    compared = [row for row in rows if row.total_ratio is not None]
    goals = [_goal(f"everywhere: total <= {AS_FAST} x upstream's", compared, _total, AS_FAST)]
    if not is_cpu:
        return goals
    halved = [row for row in compared if _is_halved(row)]
    text = (
        f"CPU, float32 inputs, {', '.join(map(str, _FEW_TOKENS))} tokens, GGUF, float8, int8, nf4: "
        f"overhead <= {HALF} x upstream's"
    )
    goals.append(_goal(text, halved, _overhead, HALF))
    if not fast_16_bit:
        slow = [row for row in compared if row.dtype != "float32"]
        text = f"CPU without fast 16-bit products, 16-bit inputs: total <= {HALF} x upstream's"
        goals.append(_goal(text, slow, _total, HALF))
    return goals


def _is_halved(row: Timed) -> bool:
    """Say whether a row is one of those whose overhead is to be half of upstream's.

    Where upstream takes no longer than the dense layer there is no overhead to halve.
    """
    weight_only = not row.scheme.endswith("-dynamic")
    families = row.scheme.startswith("gguf-") or any(
        kind in row.scheme for kind in ("float8", "int8", "nf4")
    )
    is_small = row.tokens in _FEW_TOKENS and "x" in row.shape
    has_overhead = row.overhead_ratio is not None
    return weight_only and families and is_small and row.dtype == "float32" and has_overhead


def _goal(text: str, rows: list[Timed], ratio: Callable[[Timed], float], limit: float) -> Goal:
    missed = [row for row in rows if ratio(row) > limit]
    named = [
        f"{row.scheme} {row.shape} {row.dtype} {row.tokens}: {ratio(row):.2f}" for row in missed
    ]
    return Goal(text, len(rows) - len(missed), tuple(named))


def _total(row: Timed) -> float:
    assert row.total_ratio is not None
    return row.total_ratio


def _overhead(row: Timed) -> float:
    assert row.overhead_ratio is not None
    return row.overhead_ratio
