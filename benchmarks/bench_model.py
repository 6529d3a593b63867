"""Time a step of FLUX and of SDXL, packed, beside the same model quantized by other libraries.

    python benchmarks/bench_model.py
    python benchmarks/bench_model.py --models flux --schemes bnb-nf4,gguf-q4_0 --tokens 256+64
    python benchmarks/bench_model.py --device cuda --dtype bfloat16 --tokens 4096+512
    python benchmarks/bench_model.py --models tiny-flux,tiny-sdxl --rounds 3    # tries the script

A step is one forward of the denoiser. The models come from configurations: layers of the real
width, fewer of them. Upstream packs the layers that lowbits packs, as far as it has layers for
them; most have none for convolutions, and with ``--linear-only`` lowbits leaves those alone too.
Bytes are those of all storages behind a model. Dense, upstream's and packed model take turns.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import torch
from paired import (
    NOTHING,
    Budget,
    Pace,
    machine,
    machine_line,
    medians_s,
    number,
    parser,
    split,
    table,
    write_json,
)
from peers import NoPeerError, peer_of, stored_bytes
from random_models import DENOISERS, spread_
from torch import nn

import lowbits

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from torch import Tensor

MIB: Final = 1 << 20
#: One of each family, so that a run takes a quarter of an hour on two cores.
SCHEMES: Final = (
    *("bnb-nf4", "bnb-int8", "torchao-int8", "quanto-float8", "float8-e4m3fn"),
    *("gguf-q8_0", "gguf-q4_0", "gguf-q4_k"),
)
_HEADER: Final = (
    *(
        "model",
        "scheme",
        "upstream",
        "dense, s",
        "upstream, s",
        "lowbits, s",
        "total, of upstream's",
    ),
    *("dense, MiB", "upstream, MiB", "lowbits, MiB", "error, upstream", "error, lowbits"),
)


@final
@dataclass(frozen=True)
class Row:
    """Medians of one comparison; errors are relative to the dense model's output."""

    model: str
    scheme: str
    upstream: str
    seconds: dict[str, float]
    stored: dict[str, int]
    errors: dict[str, float]

    def cells(self) -> list[str]:
        """Return the row of the table."""
        names, times = ("dense", "upstream", "lowbits"), self.seconds
        ratio = times["lowbits"] / times["upstream"] if "upstream" in times else None
        mib = (self.stored[name] / MIB if name in self.stored else None for name in names)
        return [
            *(self.model, self.scheme, self.upstream),
            *(number(times.get(name), 3) for name in names),
            *(number(ratio), *(number(value, 1) for value in mib)),
            *(number(self.errors.get(name), 4) for name in names[1:]),
        ]


@final
@dataclass(frozen=True)
class Bench:
    """A dense model and the inputs of a step."""

    name: str
    dense: nn.Module
    inputs: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    linear_only: bool

    def step(self, model: nn.Module) -> Tensor:
        """Run a step."""
        output: Tensor = model(**self.inputs)[0]
        return output

    def rows(self, schemes: list[str], pace: Pace, budget: Budget) -> Iterator[Row]:
        """Measure each scheme."""
        for scheme in schemes:
            what = f"{self.name} {scheme}"
            if budget.allows(what):
                try:
                    yield self.row(scheme, pace, budget)
                except Exception as error:  # noqa: BLE001 - the others are measured all the same
                    budget.skip(what, error)

    def row(self, scheme: str, pace: Pace, budget: Budget) -> Row:
        """Measure a scheme.

        Raises:
            TooSlowError: it takes longer than it may.
        """
        models = {"dense": self.dense}
        models["lowbits"], names = self.packed(scheme)
        upstream = NOTHING
        try:
            models["upstream"], upstream = self.upstream(scheme, names)
        except NoPeerError as error:
            budget.skip(f"upstream's {self.name} {scheme}", error)
        except Exception as error:  # noqa: BLE001 - whatever a library raises, there is no upstream
            budget.skip(f"upstream's {self.name} {scheme}", error)
            upstream = "does not run here"
        outputs: dict[str, Tensor] = {}

        def run(name: str) -> None:
            outputs[name] = self.step(models[name])

        seconds = medians_s({name: partial(run, name) for name in models}, self.device, pace)
        expected = outputs["dense"].float()
        norm = expected.norm()
        errors = {
            name: float((output.float() - expected).norm() / norm)
            for name, output in outputs.items()
        }
        stored = {name: stored_bytes(model) for name, model in models.items()}
        return Row(self.name, scheme, upstream, seconds, stored, errors)

    def packed(self, scheme: str) -> tuple[nn.Module, set[str]]:
        """Return a packed copy, and the names of the layers that are stored in the scheme."""
        model = copy.deepcopy(self.dense)
        convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        skip = convolutions if self.linear_only else ()
        handle = lowbits.quantize(model, scheme, skip=skip, keep_source="none")
        return model, {layer.fqn for layer in handle.report().layers if layer.scheme == scheme}

    def upstream(self, scheme: str, names: set[str]) -> tuple[nn.Module, str]:
        """Return a copy quantized by the scheme's library, tried once, and the layer's name.

        Raises:
            NoPeerError: no library has such layers.
        """
        peer = peer_of(scheme)
        model = copy.deepcopy(self.dense)
        peer.convert(model, names, self.dtype)
        self.step(model)
        return model, peer.name


def bench(name: str, given: argparse.Namespace) -> Bench:
    """Build a model and the inputs of a step, as the options say."""
    denoiser, dtype = DENOISERS[name], getattr(torch, given.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = spread_(denoiser.build()).to(given.device, dtype)
    image, text = map(int, given.tokens.split("+"))
    inputs = denoiser.inputs(model, math.isqrt(image), text, dtype)
    return Bench(name, model, _on(inputs, given.device), dtype, given.device, given.linear_only)


def _on(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    placed: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            placed[name] = _on(value, device)
        else:
            placed[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    return placed


def options() -> argparse.Namespace:
    """Parse the command line."""
    made = parser("bench_model", __doc__)
    made.set_defaults(seconds=900.0, rounds=3)
    made.add_argument("--models", type=split, default=["flux", "sdxl"], help=", ".join(DENOISERS))
    made.add_argument("--schemes", type=split, default=list(SCHEMES))
    made.add_argument("--tokens", default="64+32", help="image + text")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    made.add_argument("--linear-only", action="store_true", help="leave convolutions dense")
    made.add_argument("--row-seconds", type=float, default=120.0, help="that one row may take")
    return made.parse_args()


def main() -> None:
    """Measure, print, and write after each row."""
    given = options()
    torch.set_num_threads(given.threads)
    budget = Budget(given.seconds)
    pace = Pace(given.rounds, min(given.rounds, 3), given.row_seconds)
    where = machine(given.device)
    print(machine_line(where), flush=True)
    rows: list[Row] = []
    with torch.no_grad():
        for index, name in enumerate(given.models, start=1):
            budget.seconds = given.seconds * index / len(given.models)
            built = bench(name, given)
            weights = sum(parameter.numel() for parameter in built.dense.parameters())
            print(f"{name}: {weights / 1e6:.0f} million weights", flush=True)
            for row in built.rows(given.schemes, pace, budget):
                rows.append(row)
                print(" ".join(row.cells()), flush=True)
                data = {"machine": where, "rows": [asdict(row) for row in rows]}
                write_json(given.json, data | {"not_run": budget.not_run})
            del built
    print("", table(_HEADER, [row.cells() for row in rows]), "", machine_line(where), sep="\n")
    print("", budget.text(), sep="\n")


if __name__ == "__main__":
    main()
