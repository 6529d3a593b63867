"""Time packed layers beside the layers of the libraries that their schemes come from.

    python benchmarks/bench_layers.py                       # preset quick
    python benchmarks/bench_layers.py --preset full --seconds 7200
    python benchmarks/bench_layers.py --device cuda --preset full
    python benchmarks/bench_layers.py --schemes gguf-q4_0,bnb-nf4 --shapes 3072x3072 --tokens 1,64

Every row times three layers in turn: the dense one, upstream's, and the packed one. Overhead is
what a layer takes above the dense one on the same inputs. A convolution's tokens are the positions
of its picture. Rows that would take too long are named, not run.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import torch
from layer_goals import judged
from paired import (
    NOTHING,
    Budget,
    Pace,
    TooSlowError,
    machine,
    machine_line,
    medians_s,
    number,
    parser,
    split,
    table,
    write_json,
)
from peers import NoPeerError, packable_schemes, peer_of
from torch import Tensor, nn

import lowbits

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

CONV: Final = "conv640"
SHAPES: Final = ("3072x3072", "3072x12288", "12288x3072", CONV)
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS: Final = (1, 64, 512, 4096)
#: Height and width of the pictures that have so many positions.
POSITIONS: Final = {1: (1, 1), 64: (8, 8), 512: (16, 32), 4096: (64, 64)}
#: Tokens for each dtype: what 20 minutes on two cores are enough for, and everything.
PRESETS: Final[dict[str, dict[str, tuple[int, ...]]]] = {
    "quick": {"float32": (1, 64, 512), "bfloat16": (1, 64)},
    "full": {"float32": TOKENS, "bfloat16": TOKENS},
}
_HEADER: Final = (
    *("scheme", "layer", "inputs", "tokens", "upstream", "dense, ms", "upstream, ms"),
    *("lowbits, ms", "overhead, of upstream's", "total, of upstream's"),
    *("error, upstream", "error, lowbits"),
)


@final
@dataclass(frozen=True)
class Case:
    """A layer to measure: weights in ``dtype``, inputs in the same."""

    scheme: str
    shape: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.scheme} {self.shape} {self.dtype}"


@final
@dataclass(frozen=True)
class Row:
    """Medians of one comparison, in ms; errors are relative to the dense layer's output."""

    scheme: str
    shape: str
    dtype: str
    tokens: int
    upstream: str
    dense_ms: float
    upstream_ms: float | None
    lowbits_ms: float
    upstream_error: float | None
    lowbits_error: float

    @property
    def total_ratio(self) -> float | None:
        """The packed layer's time by upstream's."""
        return self.lowbits_ms / self.upstream_ms if self.upstream_ms else None

    @property
    def overhead_ratio(self) -> float | None:
        """The packed layer's overhead by upstream's; None where upstream has none."""
        if self.upstream_ms is None or self.upstream_ms <= self.dense_ms:
            return None
        return (self.lowbits_ms - self.dense_ms) / (self.upstream_ms - self.dense_ms)

    def cells(self) -> list[str]:
        """Return the row of the table."""
        return [
            *(self.scheme, self.shape, self.dtype, str(self.tokens), self.upstream),
            *(number(ms) for ms in (self.dense_ms, self.upstream_ms, self.lowbits_ms)),
            *(number(ratio) for ratio in (self.overhead_ratio, self.total_ratio)),
            *(number(error, 4) for error in (self.upstream_error, self.lowbits_error)),
        ]


@final
@dataclass(frozen=True)
class Layers:
    """The layers that are compared; ``upstream`` is None where no library has one that runs."""

    dense: nn.Module
    packed: nn.Module
    upstream: nn.Module | None
    upstream_name: str


def dense_layer(shape: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Make a layer whose rows and columns differ in size, as trained ones do; ``in x out``."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if shape == CONV:
            layer: nn.Module = nn.Conv2d(640, 640, 3, padding=1)
        else:
            columns, rows = map(int, shape.split("x"))
            layer = nn.Linear(columns, rows)
        weight = layer.get_parameter("weight").data
        values = torch.randn(weight.shape) / weight[0].numel() ** 0.5
        values *= torch.exp(0.3 * torch.randn(len(weight), *[1] * (weight.dim() - 1)))
        weight.copy_(values * torch.exp(0.3 * torch.randn(weight.shape[1:])))
    return layer.to(device, dtype).requires_grad_(requires_grad=False)


def inputs(shape: str, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return normally distributed inputs: ``(tokens, in)``, or one picture."""
    generator = torch.Generator().manual_seed(1)
    columns = int(shape.partition("x")[0]) if shape != CONV else 0
    size = (tokens, columns) if columns else (1, 640, *POSITIONS[tokens])
    return torch.randn(size, generator=generator).to(device, dtype)


def packed_layer(dense: nn.Module, scheme: str) -> nn.Module:
    """Return a packed copy.

    Raises:
        ValueError: the scheme does not hold this layer, which fell back to another one.
    """
    layer = copy.deepcopy(dense)
    handle = lowbits.quantize(layer, scheme, rules={"*": scheme}, keep_source="none")
    found = next(iter(handle.report().layers))
    if found.scheme != scheme:
        raise ValueError(f"stored as {found.scheme}: {found.reason}")
    return layer


def upstream_layer(dense: nn.Module, case: Case) -> tuple[nn.Module, str]:
    """Return a copy in the library that the scheme comes from, tried once, and its name.

    Raises:
        NoPeerError: no library has such a layer.
    """
    peer, dtype = peer_of(case.scheme), DTYPES[case.dtype]
    root = nn.Sequential(copy.deepcopy(dense)).eval()
    peer.convert(root, {"0"}, dtype)
    root(inputs(case.shape, 64, dtype, next(dense.parameters()).device))
    return root[0], peer.name


def build(case: Case, device: torch.device, budget: Budget) -> Layers:
    """Make the layers of a case; an upstream one that fails is listed as not run."""
    dense = dense_layer(case.shape, DTYPES[case.dtype], device)
    packed = packed_layer(dense, case.scheme)
    try:
        return Layers(dense, packed, *upstream_layer(dense, case))
    except NoPeerError:
        return Layers(dense, packed, None, NOTHING)
    except Exception as error:  # noqa: BLE001 - whatever a library raises, the row has no upstream
        budget.skip(f"upstream's {case}", error)
        return Layers(dense, packed, None, "does not run here")


def measured(case: Case, tokens: int, layers: Layers, place: torch.device, pace: Pace) -> Row:
    """Measure one row.

    Raises:
        TooSlowError: it would take longer than it may.
    """
    x = inputs(case.shape, tokens, DTYPES[case.dtype], place)
    work = {"dense": partial(layers.dense, x), "lowbits": partial(layers.packed, x)}
    if layers.upstream is not None:
        work["upstream"] = partial(layers.upstream, x)
    medians = medians_s(work, place, pace)
    expected = work["dense"]().float()
    errors = {
        name: float((call().float() - expected).norm() / expected.norm())
        for name, call in work.items()
    }
    milliseconds = {name: seconds * 1000 for name, seconds in medians.items()}
    return Row(
        case.scheme, case.shape, case.dtype, tokens, layers.upstream_name,
        milliseconds["dense"], milliseconds.get("upstream"), milliseconds["lowbits"],
        errors.get("upstream"), errors["lowbits"],
    )  # fmt: skip


def rows_of(
    case: Case, tokens: Sequence[int], place: torch.device, pace: Pace, budget: Budget
) -> Iterator[Row]:
    """Measure a case at ascending numbers of tokens; after one that is too slow, no more."""
    try:
        layers = build(case, place, budget)
    except Exception as error:  # noqa: BLE001 - the other schemes are measured all the same
        budget.skip(str(case), error)
        return
    too_slow: TooSlowError | None = None
    for count in sorted(tokens):
        what = f"{case} {count} tokens"
        if too_slow is not None:
            budget.skip(what, too_slow)
        elif budget.allows(what):
            try:
                yield measured(case, count, layers, place, pace)
            except TooSlowError as error:
                budget.skip(what, error)
                too_slow = TooSlowError("fewer tokens are too slow already")


def wanted(given: argparse.Namespace) -> dict[Case, tuple[int, ...]]:
    """Return what to measure, as the options say: the numbers of tokens for each case."""
    tokens = dict(PRESETS[given.preset])
    if given.dtypes:
        tokens = {name: tokens.get(name, TOKENS) for name in given.dtypes}
    if given.tokens:
        tokens = dict.fromkeys(tokens, tuple(map(int, given.tokens)))
    shapes = given.shapes or (SHAPES if given.preset == "full" else SHAPES[:1])
    schemes = given.schemes or packable_schemes()
    products = itertools.product(shapes, schemes, tokens)
    return {Case(scheme, shape, dtype): tokens[dtype] for shape, scheme, dtype in products}


def options() -> argparse.Namespace:
    """Parse the command line."""
    made = parser("bench_layers", __doc__)
    made.set_defaults(seconds=1200.0)
    made.add_argument("--preset", choices=PRESETS, default="quick")
    made.add_argument("--schemes", type=split, help="default: all that have layers")
    made.add_argument("--shapes", type=split, help=f"of {', '.join(SHAPES)}; in x out")
    made.add_argument("--dtypes", type=split, help=f"of {', '.join(DTYPES)}")
    made.add_argument("--tokens", type=split, help=f"of {', '.join(map(str, TOKENS))}")
    made.add_argument("--row-seconds", type=float, default=60.0, help="that one row may take")
    return made.parse_args()


def report(rows: Sequence[Row], budget: Budget, where: dict[str, Any]) -> str:
    """Return what is printed."""
    goals = judged(
        rows, fast_16_bit=where["fast_16_bit_products"], is_cpu="accelerator" not in where
    )
    return "\n\n".join(
        [
            table(_HEADER, [row.cells() for row in rows]),
            machine_line(where),
            "\n".join(str(goal) for goal in goals),
            budget.text(),
        ]
    )


def main() -> None:
    """Measure, print, and write after each case."""
    given = options()
    torch.set_num_threads(given.threads)
    budget = Budget(given.seconds)
    pace = Pace(given.rounds, given.rounds, given.row_seconds)
    where = machine(given.device)
    print(machine_line(where), flush=True)
    rows: list[Row] = []
    with torch.no_grad():
        for case, tokens in wanted(given).items():
            for row in rows_of(case, tokens, given.device, pace, budget):
                rows.append(row)
                print(" ".join(row.cells()), flush=True)
            data = {"machine": where, "rows": [asdict(row) for row in rows]}
            write_json(given.json, data | {"not_run": budget.not_run})
    print("\n" + report(rows, budget, where))


if __name__ == "__main__":
    main()
