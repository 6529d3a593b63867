"""FLUX.1-dev streamed from page-locked host memory, each component by itself.

Shapes are exact, weights random, packed block by block as they are made. A pass of the denoiser is
one step of a picture of 1024 x 1024, of the text encoder one prompt, of the VAE one decoding. A
streamed pass is compared with the longer of a resident one and of its bytes at the bandwidth of a
copy from page-locked memory, probed in the same run. The resident passes are those of a copy of the
component, which stays on the device beside what the budget is about: both take turns, so that what
slows the host or the device down for a while slows both. Passes of the denoiser are timed as they
are made, several in a row, with nobody waiting between two steps; the first one of each row by
itself, too: it is begun when the device has nothing to do, so that a host that is slower than the
device at the beginning of a pass counts there. One untimed pass comes before each row.
"""

from __future__ import annotations

import copy
import gc
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, Final, final

import torch
from flux_pipeline import FULL, T5_TOKENS, TINY, loaded
from paired import Budget, machine_line, number, sample_s, table, write_json
from random_models import flux_inputs
from streaming_report import AS_FAST, draw_bars

import lowbits
from lowbits.errors import InsufficientMemoryError
from lowbits.streaming.streamer import LayerStreamer

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

GB: Final = 10**9
#: Passes before the clock starts: the order is traced, and the plan made anew from what was timed.
_WARM_UP: Final = 6
_PROBE_BYTES: Final = 1 << 28
#: Passes in a row that are timed as one: steps of a picture. The others are called once for each.
_STEPS: Final = {"transformer": 4}
#: Turns of an empty loop before each pass: what the host takes for the same work, a millisecond.
_TURNS: Final = 50_000
_HEADER: Final = (
    *("component", "scheme", "model, GB", "budget", "resident units", "ring", "wall, s"),
    *("host, s", "C, s", "C: host, s", "copied, GB", "T, s", "of max(C, T)", "the fastest"),
    *("first passes", "waited, s", "host, slowest / fastest"),
    *("weights on the device, GB", "allocated, GB", "bit-equal"),
)


@final
@dataclass(frozen=True)
class FluxRow:
    """A component in a budget; seconds and bytes are a pass's, of those in a row.

    Attributes:
        component: its name in the pipeline.
        scheme: of its Linear layers; ``"native"``: bfloat16.
        model_bytes: of all its weights.
        budget: of weights on the device.
        units: resident ones, and all.
        depth: slots of the ring.
        steps: passes in a row.
        wall_s: median.
        host_s: median until the call returned, the device still computing.
        compute_s: median of the copy with all weights on the device.
        compute_host_s: of that, until the call returned: where it is as long, the host limits it.
        copied_bytes: to the device.
        transfer_s: of those bytes, at the probed bandwidth.
        fastest_s: of the fastest row, and of the fastest one of the copy: a host that others slow
            down in turns, too, does not decide here.
        first_s: median of the first pass of each row, and the same of the copy.
        stall_s: that compute has waited.
        weight_bytes: most on the device.
        allocated_bytes: most that torch had allocated there above what was before: the copy, the
            inputs, what libraries keep.
        is_equal: whether the result is that of the resident component, bit for bit.
        host_spread: of the same work of the host before each pass, the slowest by the fastest: far
            above 1 something else had its cores, and rows where the host decides mean little.
        samples: seconds of a pass of each row, streamed and resident, those until the call
            returned, those of the first pass, and those of the host's work before it.
    """

    component: str
    scheme: str
    model_bytes: int
    budget: str
    units: tuple[int, int]
    depth: int
    steps: int
    wall_s: float
    host_s: float
    compute_s: float
    compute_host_s: float
    copied_bytes: float
    transfer_s: float
    fastest_s: tuple[float, float]
    first_s: tuple[float, float]
    stall_s: float
    weight_bytes: int
    allocated_bytes: int
    is_equal: bool
    host_spread: float
    samples: Mapping[str, Sequence[float]]

    @property
    def ratio(self) -> float:
        """The pass by the longer of compute and transfer."""
        return self.ratio_of(self.wall_s, self.compute_s)

    def ratio_of(self, wall_s: float, compute_s: float) -> float:
        """Return the same of other passes."""
        return wall_s / max(compute_s, self.transfer_s)

    def cells(self) -> list[str]:
        """Return the row of the table."""
        return [
            *(self.component, self.scheme, number(self.model_bytes / GB), self.budget),
            *("{} of {}".format(*self.units), str(self.depth), number(self.wall_s, 3)),
            *(number(value, 3) for value in (self.host_s, self.compute_s, self.compute_host_s)),
            number(self.copied_bytes / GB),
            *(number(value, 3) for value in (self.transfer_s, self.ratio)),
            *(number(self.ratio_of(*pair), 3) for pair in (self.fastest_s, self.first_s)),
            *(number(self.stall_s, 3), number(self.host_spread)),
            *(number(count / GB) for count in (self.weight_bytes, self.allocated_bytes)),
            str(self.is_equal),
        ]


@final
@dataclass(frozen=True)
class Twins:
    """A component on the host, and a copy of it on the device.

    Attributes:
        model: to be streamed.
        call: one pass of it.
        resident_call: one pass of the copy.
        result: of the copy.
    """

    model: nn.Module
    call: Callable[[], Tensor]
    resident_call: Callable[[], Tensor]
    result: Tensor


@final
@dataclass(frozen=True)
class Timed:
    """Seconds of a pass of each row, those until the call returned, and those of the first one.

    And of the same work of the host before each row.
    """

    walls: list[float] = field(default_factory=list)
    hosts: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    works: list[float] = field(default_factory=list)

    def add(self, call: Callable[[], Tensor], steps: int, device: torch.device) -> None:
        """Time passes in a row, behind another pass.

        They end with the last result: what is fetched for the next one goes on meanwhile, as it
        does from one step of a picture to the next.
        """
        self.works.append(host_work_s())  # not between the two: copies would have that time, too
        call()
        finish_compute(device)
        start, begin = time.perf_counter(), marked(device)
        call()
        first = marked(device)
        for _ in range(steps - 1):
            call()
        self.hosts.append((time.perf_counter() - start) / steps)
        finish_compute(device)
        self.walls.append((time.perf_counter() - start) / steps)
        self.firsts.append(begin.elapsed_time(first) / 1000)


def host_work_s() -> float:
    """Return the seconds that the host takes for the same work as ever."""
    start = time.perf_counter()
    for _ in range(_TURNS):
        pass
    return time.perf_counter() - start


def finish_compute(device: torch.device) -> None:
    """Wait for the stream that computes, not for that of the copies."""
    torch.accelerator.current_stream(device).synchronize()


def marked(device: torch.device) -> torch.Event:
    """Return an event behind what the stream that computes was given."""
    event = torch.Event(device, enable_timing=True)
    event.record(torch.accelerator.current_stream(device))
    return event


def in_turn(twins: Twins, steps: int, given: argparse.Namespace) -> tuple[Timed, Timed]:
    """Time streamed and resident passes."""
    streamed, resident = Timed(), Timed()
    for _ in range(given.rounds):
        for call, passes in ((twins.resident_call, resident), (twins.call, streamed)):
            passes.add(call, steps, given.device)
    return streamed, resident


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second of a copy from page-locked memory."""
    source = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    send = partial(target.copy_, source, non_blocking=True)
    send()
    return _PROBE_BYTES / median(sample_s(send, device) for _ in range(7))


def call_of(name: str, model: Any, *, is_small: bool, device: torch.device) -> Callable[[], Tensor]:
    """Return one pass of a component, on fixed inputs."""
    side = 8 if is_small else 64
    generator = torch.Generator().manual_seed(0)
    if name == "transformer":
        inputs = flux_inputs(model, side, T5_TOKENS, torch.bfloat16)
        moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        return lambda: model(**moved)[0]
    if name == "text_encoder_2":
        vocabulary = model.config.vocab_size
        tokens = torch.randint(vocabulary, (1, T5_TOKENS), generator=generator).to(device)
        return lambda: model(tokens)[0]
    # A token of FLUX is 2 x 2 latents.
    latents = torch.randn(1, 16, 2 * side, 2 * side, generator=generator)
    moved_latents = latents.to(device, torch.bfloat16)
    return lambda: model.decode(moved_latents, return_dict=False)[0]


def twins_of(name: str, scheme: str, given: argparse.Namespace) -> Twins:
    """Build a component on the device, copy it there, and move one of both to the host."""
    is_small = given.preset == "small"
    packs = partial(lowbits.quantize, scheme=scheme, keep_source="none")
    config = (TINY if is_small else FULL)[name]
    model = loaded(name, config, given.device, None if scheme == "native" else packs)
    twin = copy.deepcopy(model)
    model.to("cpu")
    calls = [call_of(name, m, is_small=is_small, device=given.device) for m in (model, twin)]
    return Twins(model, *calls, calls[1]().cpu())


def streamed(
    name: str, scheme: str, size: str, twins: Twins, given: argparse.Namespace, link: float
) -> FluxRow:
    """Stream a component within a budget.

    Raises:
        InsufficientMemoryError: the budget is too small for its largest part.
    """
    device, beside = given.device, torch.accelerator.memory_allocated(given.device)
    steps = _STEPS.get(name, 1)
    with LayerStreamer(twins.model, device=device, budget=size, location="shared") as streamer:
        for _ in range(_WARM_UP):
            result = twins.call()
        is_equal = torch.equal(result.cpu(), twins.result)
        del result
        torch.accelerator.reset_peak_memory_stats(device)
        before = streamer.stats()
        timed, resident = in_turn(twins, steps, given)
        after = streamer.stats()
        passes = (1 + steps) * given.rounds
        copied = (after.copied_bytes - before.copied_bytes) / passes
        works = timed.works + resident.works
        samples = {f"streamed {name}": values for name, values in asdict(timed).items()}
        samples |= {f"resident {name}": values for name, values in asdict(resident).items()}
        return FluxRow(
            name,
            scheme,
            sum(unit.nbytes for unit in after.units),
            size,
            (sum(unit.is_resident for unit in after.units[:-1]), len(after.units) - 1),
            after.depth,
            steps,
            median(timed.walls),
            median(timed.hosts),
            median(resident.walls),
            median(resident.hosts),
            copied,
            copied / link,
            (min(timed.walls), min(resident.walls)),
            (median(timed.firsts), median(resident.firsts)),
            (after.stall_s - before.stall_s) / passes,
            after.peak_device_bytes,
            torch.accelerator.max_memory_allocated(device) - beside,
            is_equal,
            max(works) / min(works),
            samples,
        )


def cases(schemes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield components with their schemes; the denoiser, which most of the time goes to, first."""
    for name in ("transformer", "text_encoder_2"):
        for scheme in schemes:
            yield name, scheme
    yield "vae", "native"


def flux_rows(given: argparse.Namespace, budget: Budget, link: float) -> Iterator[FluxRow]:
    """Measure each component in each budget, up to the first that holds all of it."""
    for name, scheme in cases(given.schemes):
        if not budget.allows(f"{name} {scheme}"):
            continue
        twins = twins_of(name, scheme, given)
        for size in given.budgets:
            what = f"{name} {scheme} in {size}"
            if not budget.allows(what):
                continue
            try:
                row = streamed(name, scheme, size, twins, given, link)
            except InsufficientMemoryError as error:
                budget.skip(what, error)
            else:
                yield row
                if not row.copied_bytes:
                    break
        del twins
        gc.collect()


def judged(row: FluxRow) -> str:
    """Say whether a row is as fast as it can be, within its budget."""
    is_met = row.ratio <= AS_FAST and row.is_equal
    return (
        f"- {'MET' if is_met else 'MISSED'}: {row.component} {row.scheme} in {row.budget}: "
        f"<= {AS_FAST} x max(C, T), bit-equal: {row.ratio:.3f}"
    )


def measure_flux(given: argparse.Namespace, budget: Budget, where: dict[str, Any]) -> None:
    """Measure, print, draw, and write after each row."""
    rows: list[FluxRow] = []
    data: dict[str, Any] = {"machine": where}
    with torch.no_grad():
        link = bandwidth(given.device)
        print(f"page-locked memory to the device: {link / GB:.1f} GB/s", flush=True)
        for row in flux_rows(given, budget, link):
            rows.append(row)
            print(*row.cells(), flush=True)
            data |= {"bandwidth": link, "rows": [asdict(row) for row in rows]}
            write_json(given.json, data)
    print("", table(_HEADER, [row.cells() for row in rows]), "", *map(judged, rows), sep="\n")
    if rows:
        bars = [(f"{row.component} {row.scheme} {row.budget}", row.ratio) for row in rows]
        draw_bars(given.plot, "a pass by max(C, T)", bars, [("1.05", AS_FAST)])
    write_json(given.json, data | {"not_run": budget.not_run})
    print("", machine_line(where), budget.text(), sep="\n")
