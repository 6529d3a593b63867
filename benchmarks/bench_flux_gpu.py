"""Measure FLUX.1-dev on a GPU: memory after loading, peak, and seconds of a picture, per scheme.

    python benchmarks/bench_flux_gpu.py
    python benchmarks/bench_flux_gpu.py --schemes bnb-nf4,gguf-q8_0 --libraries lowbits,upstream
    python benchmarks/bench_flux_gpu.py --tiny        # tries the script on a CPU

The settings are those of the published table (Hugging Face's blog, "Exploring Quantization Backends
in Diffusers", 2025-05-21): 1024 x 1024, 50 steps, guidance 3.5, 512 text tokens, bfloat16; memory
is `torch.cuda.max_memory_reserved() / 1024**3`. Weights are random, shapes exact. GGUF and the
plain float8 cast pack the transformer alone, as there; all others T5 as well. Each row is a process
of its own. Seconds are those of a picture, text encoders included, after a warm-up of one step.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, final

import torch
from flux_pipeline import FULL, TINY, loaded, picture, pipeline
from paired import (
    NOTHING,
    Budget,
    accelerator_name,
    machine,
    machine_line,
    number,
    one_line,
    parser,
    sample_s,
    split,
    synchronize,
    table,
    write_json,
)
from peers import packable_schemes, peer_of
from torch import nn

import lowbits

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

GIB: Final = 1024**3
#: Forks would not do: to import diffusers initializes CUDA.
PROCESSES: Final = multiprocessing.get_context("spawn")
IMPORTED: Final = (
    *("diffusers.pipelines.flux.pipeline_flux", "diffusers.models.transformers.transformer_flux"),
    *("transformers.models.t5.modeling_t5", "transformers.models.clip.modeling_clip"),
)
LIBRARIES: Final = ("lowbits", "upstream")
Row = dict[str, Any]


@final
@dataclass(frozen=True)
class Published:
    """A row of the published table: one H100 of 80 GB; GiB and seconds."""

    name: str
    loaded_gib: float
    peak_gib: float
    seconds: float
    packs_t5: bool = True


PUBLISHED: Final = {
    "native": Published("BF16", 31.447, 36.166, 12, packs_t5=False),
    "bnb-nf4": Published("bitsandbytes 4-bit", 12.584, 17.281, 12),
    "bnb-int8": Published("bitsandbytes 8-bit", 19.273, 24.432, 27),
    "torchao-int4": Published("torchao int4_weight_only", 10.635, 14.654, 109),
    "torchao-int8": Published("torchao int8_weight_only", 17.020, 21.482, 15),
    "torchao-float8": Published("torchao float8_weight_only", 17.016, 21.488, 15),
    "quanto-int4": Published("quanto INT4", 12.254, 16.139, 109),
    "quanto-int8": Published("quanto INT8", 17.330, 21.814, 15),
    "quanto-float8": Published("quanto FP8", 16.395, 20.898, 16),
    "gguf-q4_1": Published("GGUF Q4_1", 16.838, 21.326, 23, packs_t5=False),
    "gguf-q8_0": Published("GGUF Q8_0", 21.502, 25.973, 15, packs_t5=False),
    "gguf-q2_k": Published("GGUF Q2_k", 13.264, 17.752, 26, packs_t5=False),
    "float8-e4m3fn-raw": Published("fp8 layerwise e4m3", 23.682, 28.451, 13, packs_t5=False),
}
_HEADER: Final = ("scheme", "library", "packed", "after loading, GiB", "peak, GiB", "seconds")
_PUBLISHED_HEADER: Final = (
    *("published as", "published: after loading, GiB", "published: peak, GiB"),
    "published: seconds",
)


def packed_components(scheme: str) -> tuple[str, ...]:
    """Return what a scheme packs: as published, else the transformer and T5."""
    if scheme == "native":
        return ()
    published = PUBLISHED.get(scheme)
    is_pair = published.packs_t5 if published else not scheme.startswith(("gguf-", "float8-"))
    return ("transformer", "text_encoder_2") if is_pair else ("transformer",)


def packer(scheme: str, library: str) -> Callable[[nn.Module], object]:
    """Return what packs a block in place.

    Raises:
        NoPeerError: no other library has such layers.
    """
    if library == "lowbits":
        return partial(lowbits.quantize, scheme=scheme, keep_source="none")
    peer = peer_of(scheme)

    def convert(block: nn.Module) -> None:
        names = {name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        peer.convert(block, names, torch.bfloat16)

    return convert


def reserved_gib(device: torch.device) -> float | None:
    """Return the most that the allocator took from the device so far; None on a CPU."""
    if device.type == "cpu":
        return None
    return float(torch.get_device_module(device).max_memory_reserved() / GIB)


def measure_here(scheme: str, library: str, given: argparse.Namespace) -> Row:
    """Measure a scheme in this process."""
    device, start = given.device, time.perf_counter()
    configs = TINY if given.tiny else FULL
    packs = packed_components(scheme)
    components = {}
    for name, config in configs.items():
        pack = packer(scheme, library) if name in packs else None
        components[name] = loaded(name, config, device, pack)
    pipe = pipeline(components)
    gc.collect()
    synchronize(device)
    row: Row = {"scheme": scheme, "library": library, "packed": packs}
    row |= {"load_s": time.perf_counter() - start, "loaded_gib": reserved_gib(device)}
    size = 64 if given.tiny else 1024
    draw = partial(picture, pipe, size=size, device=device)
    draw(steps=1)
    pictures: list[torch.Tensor] = []
    row["seconds"] = sample_s(lambda: pictures.append(draw(steps=given.steps)), device)
    row["peak_gib"] = reserved_gib(device)
    row["is_finite"] = bool(pictures[0].isfinite().all())
    return row


def answer(pipe: Connection, given: argparse.Namespace) -> None:
    """Import, wait for a scheme and a library, and send their row: a process's whole job."""
    for name in IMPORTED:
        import_module(name)
    torch.set_num_threads(given.threads)
    try:
        scheme, library = pipe.recv()
        with torch.no_grad():
            pipe.send(measure_here(scheme, library, given))
    except EOFError:
        return  # there was no row left for it
    except Exception as error:  # noqa: BLE001 - the other rows are measured all the same
        pipe.send({"error": one_line(error)})


@final
class Worker:
    """A process of its own for one row; it imports what it needs while another one is measured."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._pipe, there = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=answer, args=(there, given), daemon=True)
        self._process.start()
        there.close()

    def measure(self, scheme: str, library: str, timeout_s: float | None) -> Row:
        """Measure a scheme, and end.

        Raises:
            RuntimeError: with the first line of what went wrong.
            TimeoutError: it took longer.
        """
        try:
            self._pipe.send((scheme, library))
            if not self._pipe.poll(timeout_s):
                raise TimeoutError
            row: Row = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError("the process ended without an answer") from None
        finally:
            self._process.kill()
            self._process.join()
        if "error" in row:
            raise RuntimeError(row["error"])
        return row


def rows(given: argparse.Namespace, budget: Budget) -> Iterator[Row]:
    """Measure what the options ask for."""
    next_worker = Worker(given)
    for scheme in given.schemes or default_schemes():
        for library in given.libraries if scheme != "native" else given.libraries[:1]:
            what = f"{scheme} {library}"
            if not budget.allows(what):
                continue
            left = None if budget.seconds is None else budget.seconds - budget.elapsed_s()
            worker, next_worker = next_worker, Worker(given)
            try:
                yield worker.measure(scheme, library, left)
            except TimeoutError:
                budget.skip(what, f"the budget of {budget.seconds:g} s ran out in it")
            except RuntimeError as error:
                budget.skip(what, error)


def default_schemes() -> list[str]:
    """Return every scheme that can be quantized to here, those of the published table first."""
    known = ["native", *packable_schemes()]
    return sorted(known, key=lambda name: name not in PUBLISHED)


def tables(measured: Sequence[Row], accelerator: str) -> str:
    """Return the rows; beside the published ones on the same GPU, else above them."""
    cells = [
        [
            *(row["scheme"], row["library"], " + ".join(row["packed"]) or NOTHING),
            *(number(row["loaded_gib"]), number(row["peak_gib"]), number(row["seconds"])),
        ]
        for row in measured
    ]
    published = {
        name: [p.name, number(p.loaded_gib), number(p.peak_gib), number(p.seconds, 0)]
        for name, p in PUBLISHED.items()
    }
    if "H100" not in accelerator:
        ours = table(_HEADER, cells)
        theirs = table(("scheme", *_PUBLISHED_HEADER), [[k, *v] for k, v in published.items()])
        return f"{ours}\n\nPublished, on another device (one H100 of 80 GB, 50 steps):\n\n{theirs}"
    header = (*_HEADER, *_PUBLISHED_HEADER)
    nothing = [NOTHING] * len(_PUBLISHED_HEADER)
    return table(header, [line + published.get(line[0], nothing) for line in cells])


def options() -> argparse.Namespace:
    """Parse the command line."""
    made = parser("bench_flux_gpu", __doc__)
    made.set_defaults(seconds=1500.0, device=None)
    made.add_argument("--schemes", type=split, help="default: all, the published ones first")
    made.add_argument("--libraries", type=split, default=["lowbits"], help=", ".join(LIBRARIES))
    made.add_argument("--steps", type=int, help="default: 50")
    made.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, 2 steps")
    given = made.parse_args()
    given.steps = given.steps or (2 if given.tiny else 50)
    if given.device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        given.device = torch.device("cpu") if given.tiny else accelerator
    if given.device is None:
        made.error("no accelerator here; --tiny tries the script on the CPU")
    return given


def main() -> None:
    """Measure, print, and write after each row."""
    given = options()
    torch.set_num_threads(given.threads)
    name = "CPU" if given.device.type == "cpu" else accelerator_name(given.device)
    print(f"{name}\n{machine_line(machine(given.device))}", flush=True)
    budget = Budget(given.seconds)
    measured: list[Row] = []
    for row in rows(given, budget):
        measured.append(row)
        print(row, flush=True)
        data = {"machine": machine(given.device), "steps": given.steps, "tiny": given.tiny}
        write_json(given.json, data | {"rows": measured, "not_run": budget.not_run})
    print("", tables(measured, name), "", sep="\n")
    print(f"{given.steps} steps; {machine_line(machine(given.device))}", budget.text(), sep="\n\n")


if __name__ == "__main__":
    main()
