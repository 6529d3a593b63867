"""Which rows of which tensors a converter of state dicts makes its result of.

[Note: tracing rows]
A converter renames tensors, splits them along dim 0, joins them, and changes their order. It is
run once on tensors whose few rows are numbers of their own, and the rows are read off its result.
What a tensor has is not its real number of rows, but a few that all fractions in use divide: a
piece's share is read off, and the model's own shapes say how many rows that is. So it does not
matter how large a model is, nor which one a converter with widths written into it was written for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final

import torch

from lowbits.errors import FormatError
from lowbits.files.rows import Segment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = "Mapping[str, Shape]"

#: Rows of a tensor while it is traced: halves, thirds, quarters and sixths are whole.
_ROWS: Final = 12

#: What a converter raises on tensors that it was not made for.
_REFUSALS: Final = (LookupError, ValueError, TypeError, AttributeError, RuntimeError)


@final
@dataclass(frozen=True)
class Piece:
    """A run of rows of a source in a target, as shares of the source's rows."""

    source: str
    start: Fraction
    stop: Fraction

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the source."""
        return self.stop - self.start == 1


@final
@dataclass(frozen=True)
class Trace:
    """What a converter did.

    Attributes:
        targets: by name of a result, the pieces that it is made of, in order.
        left: sources that the converter neither used nor took away.
    """

    targets: Mapping[str, Sequence[Piece]]
    left: tuple[str, ...]


def trace(
    converter: Callable[[dict[str, Tensor]], Mapping[str, Any]],
    shapes: Shapes,
    fixed_rows: Callable[[str], int | None],
) -> Trace:
    """Run a converter on row numbers, and read off what it does.

    It runs twice, at two numbers of rows: what is the same share of both is a share. Interleaved
    rows are not.

    Args:
        converter: takes a state dict, which it may empty, and returns another.
        shapes: of the tensors, by the names that the converter knows them by.
        fixed_rows: number of rows that the converter takes a tensor to have; None where it does
            not care.

    Raises:
        FormatError: the converter refuses these names, or does what is no splitting and joining.
    """
    first, second = (
        _trace_at(converter, shapes, {name: fixed_rows(name) or count for name in shapes})
        for count in (_ROWS, 2 * _ROWS)
    )
    for name, pieces in first.targets.items():
        if pieces != second.targets.get(name):
            raise FormatError("is not made of whole runs of rows of other tensors", tensor=name)
    return first


def _trace_at(
    converter: Callable[[dict[str, Tensor]], Mapping[str, Any]],
    shapes: Shapes,
    rows: Mapping[str, int],
) -> Trace:
    starts, numbered, at = [], {}, 0
    for name, shape in shapes.items():
        starts.append(at)
        values = torch.arange(at, at + rows[name], device="cpu")
        numbered[name] = values.reshape(_row_shape(shape))
        at += rows[name] + 1  # the gap keeps the last row of one apart from the first of the next
    given = dict(numbered)
    try:
        results = dict(converter(given))
    except _REFUSALS as err:
        raise FormatError(
            f"the converter refuses these tensors: {err!r}; is it a file of another model?"
        ) from err
    names, firsts = list(shapes), torch.tensor(starts)
    targets = {
        name: _pieces(_row_numbers(name, result), names, firsts, rows)
        for name, result in results.items()
    }
    used = {piece.source for pieces in targets.values() for piece in pieces}
    remain = {id(tensor) for tensor in given.values()}
    left = [name for name in names if name not in used and id(numbered[name]) in remain]
    return Trace(targets, tuple(left))


def _row_shape(shape: Shape) -> tuple[int, ...]:
    """Return a shape with as many dims and nothing but rows; leading ones are no rows."""
    rows = next((axis for axis, size in enumerate(shape) if size != 1), 0)
    return tuple(-1 if axis == rows else 1 for axis in range(max(len(shape), 1)))


def _row_numbers(name: str, result: object) -> Tensor:
    if not isinstance(result, torch.Tensor) or not result.numel():
        raise FormatError("the tensors that it is made of are missing", tensor=name)
    return result.reshape(-1)


def _pieces(
    numbers: Tensor, names: Sequence[str], starts: Tensor, rows: Mapping[str, int]
) -> list[Piece]:
    breaks = (torch.diff(numbers) != 1).nonzero().flatten().add(1).tolist()
    ends = [*breaks, numbers.numel()]
    pieces = []
    for begin, end in zip([0, *breaks], ends, strict=True):
        first = int(numbers[begin])
        index = int(torch.searchsorted(starts, first, right=True)) - 1
        name, start = names[index], first - int(starts[index])
        stop = start + end - begin
        pieces.append(Piece(name, Fraction(start, rows[name]), Fraction(stop, rows[name])))
    return pieces


@final
@dataclass(frozen=True)
class _Run:
    """``length`` rows of both tensors; of a source only while its rows are not known: from 0."""

    target: str
    target_start: int
    source: str
    share: Fraction
    length: int


def forward(traced: Trace, targets: Shapes, sources: Shapes) -> dict[str, tuple[Segment, ...]]:
    """Return each target as rows of the sources.

    Raises:
        FormatError: the shapes do not fit each other.
    """
    maps: dict[str, list[Segment]] = {name: [] for name in traced.targets}
    starts: dict[tuple[str, Fraction], int] = {}
    runs = _runs(traced, targets, sources)
    for source, parts in _by_source(runs).items():
        at = 0
        for run in parts:
            starts[source, run.share] = at
            at += run.length
        if at != rows_in(sources[source]):
            raise FormatError(
                f"has {rows_in(sources[source])} rows where the model's shapes ask for {at}",
                tensor=source,
            )
    for run in runs:
        at = starts[run.source, run.share]
        maps[run.target].append(Segment(run.source, at, at + run.length))
        _require_row_length(run, targets, sources)
    for name, pieces in traced.targets.items():
        if _is_renamed(pieces):
            source = pieces[0].source
            require_same_tensor(name, targets[name], source, sources[source])
            maps[name] = [Segment(source, 0, rows_in(sources[source]))]
    return {name: tuple(segments) for name, segments in maps.items()}


def backward(traced: Trace, targets: Shapes) -> dict[str, tuple[Segment, ...]]:
    """Return each source as rows of the targets; of equal ones, of the first.

    Raises:
        FormatError: the targets' shapes are not those of splits of the sources.
    """
    maps: dict[str, tuple[Segment, ...]] = {}
    for name, pieces in traced.targets.items():
        if _is_renamed(pieces):
            maps.setdefault(pieces[0].source, (Segment(name, 0, rows_in(targets[name])),))
    for source, parts in _by_source(_runs(traced, targets, {})).items():
        maps[source] = tuple(
            Segment(run.target, run.target_start, run.target_start + run.length) for run in parts
        )
    return maps


def rows_in(shape: Shape) -> int:
    """Return the size of dim 0; a tensor without dims is one row."""
    return shape[0] if shape else 1


def _is_renamed(pieces: Sequence[Piece]) -> bool:
    return len(pieces) == 1 and pieces[0].is_whole


def _runs(traced: Trace, targets: Shapes, sources: Shapes) -> list[_Run]:
    """Return all pieces of tensors that are split or joined, with their real numbers of rows."""
    runs = []
    for name, pieces in traced.targets.items():
        if _is_renamed(pieces):
            continue
        at = 0
        for piece, length in zip(pieces, _lengths(name, pieces, targets, sources), strict=True):
            runs.append(_Run(name, at, piece.source, piece.start, length))
            at += length
    _require_tiling(traced)
    return runs


def _lengths(name: str, pieces: Sequence[Piece], targets: Shapes, sources: Shapes) -> list[int]:
    """Return how many of a target's rows each piece is.

    Whole sources have the rows that they have; the pieces of others share what remains.
    """
    known = [
        rows_in(sources[piece.source]) if piece.is_whole and piece.source in sources else None
        for piece in pieces
    ]
    shared = rows_in(targets[name]) - sum(filter(None, known))
    shares = [
        piece.stop - piece.start if count is None else Fraction(0)
        for piece, count in zip(pieces, known, strict=True)
    ]
    total = sum(shares) or Fraction(1)
    lengths = [
        shared * share / total if count is None else Fraction(count)
        for share, count in zip(shares, known, strict=True)
    ]
    if any(length.denominator != 1 or length <= 0 for length in lengths) or sum(lengths) != rows_in(
        targets[name]
    ):
        joined = ", ".join(dict.fromkeys(piece.source for piece in pieces))
        raise FormatError(
            f"its {rows_in(targets[name])} rows cannot be made of {joined}", tensor=name
        )
    return [int(length) for length in lengths]


def _require_tiling(traced: Trace) -> None:
    """Refuse sources of which rows are used twice, or some only."""
    ends: dict[str, list[tuple[Fraction, Fraction]]] = {}
    for pieces in traced.targets.values():
        for piece in pieces:
            if not _is_renamed(pieces):
                ends.setdefault(piece.source, []).append((piece.start, piece.stop))
    for source, spans in ends.items():
        at = Fraction(0)
        for start, stop in sorted(spans):
            if start != at:
                raise FormatError("some of its rows are used twice, or never", tensor=source)
            at = stop
        if at != 1:
            raise FormatError("some of its rows are never used", tensor=source)


def _by_source(runs: Iterable[_Run]) -> dict[str, list[_Run]]:
    ordered = sorted(runs, key=lambda run: (run.source, run.share))
    return {source: list(parts) for source, parts in groupby(ordered, lambda run: run.source)}


def _require_row_length(run: _Run, targets: Shapes, sources: Shapes) -> None:
    source, target = sources[run.source], targets[run.target]
    if math.prod(source[1:]) != math.prod(target[1:]):
        raise FormatError(
            f"its rows have {math.prod(source[1:])} values; those of {run.target} have "
            f"{math.prod(target[1:])}",
            tensor=run.source,
        )


def require_same_tensor(name: str, target: Shape, source_name: str, source: Shape) -> None:
    """Refuse a tensor whose shape is another than the model's.

    Dims of one element are no difference, nor is how a row is folded, nor a flat tensor.

    Raises:
        FormatError: names both.
    """
    flat = len([size for size in source if size != 1]) <= 1
    same_rows = next((size for size in source if size != 1), 1) == next(
        (size for size in target if size != 1), 1
    )
    if math.prod(source) != math.prod(target) or not (flat or same_rows):
        raise FormatError(
            f"has shape {list(source)}; {name} of the model has {list(target)}",
            tensor=source_name,
        )
