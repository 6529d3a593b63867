"""What the benchmarks share: interleaved timing, a time budget, the machine, JSON and Markdown.

Figures are compared only with figures of the same run: callables take turns, so that whatever else
the machine does falls on all of them, and medians are reported.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_PACKAGES: Final = (
    *("lowbits", "torch", "diffusers", "transformers", "bitsandbytes", "torchao"),
    *("optimum-quanto", "gguf"),
)
#: A sample repeats what is shorter than this, so that the clock and the launch do not decide.
_SHORTEST_SAMPLE_S: Final = 0.002
_MOST_REPEATS: Final = 50
#: A first call that takes longer says well enough how long the next one takes.
_LONG_WARM_UP_S: Final = 0.5

#: What stands in a table cell that has no value.
NOTHING: Final = "-"


@final
@dataclass(frozen=True)
class Pace:
    """How often things are measured.

    Attributes:
        rounds: samples of each callable.
        fewest: rounds that are enough where all of them would take too long.
        limit_s: that one comparison may take; `TooSlowError` if even the fewest rounds take longer.
    """

    rounds: int = 7
    fewest: int = 7
    limit_s: float = 60.0

    def rounds_within(self, round_s: float) -> int:
        """Return how many rounds to measure where one takes this long.

        Raises:
            TooSlowError: not even the fewest fit.
        """
        fitting = min(self.rounds, int(self.limit_s / max(round_s, 1e-9)))
        if fitting < self.fewest:
            needed = self.fewest * round_s
            raise TooSlowError(f"{self.fewest} rounds take {needed:.0f} s, limit {self.limit_s:g}")
        return fitting


class TooSlowError(RuntimeError):
    """A comparison would take longer than it may."""


@final
@dataclass
class Budget:
    """Time for a run, and what did not fit into it.

    Attributes:
        seconds: from the start; None: no limit.
        not_run: what was left out, with its reason.
    """

    seconds: float | None = None
    not_run: list[tuple[str, str]] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def elapsed_s(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.start

    def allows(self, what: str) -> bool:
        """Say whether there is time left; if not, ``what`` is listed as not run."""
        if self.seconds is None or self.elapsed_s() < self.seconds:
            return True
        self.skip(what, f"the budget of {self.seconds:g} s was used up")
        return False

    def skip(self, what: str, reason: object) -> None:
        """List ``what`` as not run, with the first line of the reason."""
        entry = (what, one_line(reason))
        if entry not in self.not_run:
            self.not_run.append(entry)

    def text(self) -> str:
        """Name what was not run, equal reasons together."""
        if not self.not_run:
            return "Not run: nothing; every row was measured."
        reasons: dict[str, list[str]] = {}
        for what, reason in self.not_run:
            reasons.setdefault(reason, []).append(what)
        lines = [f"- {'; '.join(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(["Not run:", *lines])


def one_line(reason: object) -> str:
    """Return what an error says, type included, in one line without the machine's paths."""
    kind = f"{type(reason).__name__}: " if isinstance(reason, Exception) else ""
    words = f"{kind}{reason}".strip(": \n").partition("\n")[0].split()
    return " ".join(Path(word).name if word.startswith("/") else word for word in words)[:160]


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on an accelerator; nothing to wait for on a CPU."""
    if device.type != "cpu":
        # A kernel runs after its launch returned: without this the clock would miss it.
        torch.accelerator.synchronize(device)


def sample_s(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Return the seconds that one call takes, the mean over some repeats."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def measure(
    work: Mapping[str, Callable[[], object]], device: torch.device, pace: Pace
) -> dict[str, list[float]]:
    """Time callables in turn: a, b, c, a, b, c, ...; each is warmed up first.

    Returns:
        Seconds per call, a list of samples for each name.

    Raises:
        TooSlowError: the warm-up says that it would take too long.
    """
    warm = {name: sample_s(call, device) for name, call in work.items()}
    pace.rounds_within(sum(warm.values()) / 4)  # a first call may do four times the work
    steady = {
        name: seconds if seconds > _LONG_WARM_UP_S else sample_s(work[name], device)
        for name, seconds in warm.items()
    }
    rounds = pace.rounds_within(sum(steady.values()))
    repeats = {
        name: max(1, min(_MOST_REPEATS, math.ceil(_SHORTEST_SAMPLE_S / max(seconds, 1e-9))))
        for name, seconds in steady.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            samples[name].append(sample_s(call, device, repeats[name]))
    return samples


def medians_s(
    work: Mapping[str, Callable[[], object]], device: torch.device, pace: Pace
) -> dict[str, float]:
    """Return the medians of `measure`, in seconds."""
    samples = measure(work, device, pace)
    return {name: statistics.median(values) for name, values in samples.items()}


def has_fast_16_bit_products(device: torch.device) -> bool:
    """Say whether 16-bit matrix products are faster than float32 ones: not on every CPU."""
    if device.type != "cpu":
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def machine(device: torch.device) -> dict[str, Any]:
    """Say what the figures were measured on; the accelerator's name comes first."""
    accelerator = {} if device.type == "cpu" else {"accelerator": accelerator_name(device)}
    return accelerator | {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "fast_16_bit_products": has_fast_16_bit_products(device),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def machine_line(described: Mapping[str, Any]) -> str:
    """Return `machine` in one line of text."""
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    accelerator = f"{described['accelerator']}; " if "accelerator" in described else ""
    return (
        f"{accelerator}{described['cpu']}, {described['cores']} cores, {described['threads']} "
        f"thread(s), Python {described['python']}, {packages}; {described['date']}."
    )


def accelerator_name(device: torch.device) -> str:
    """Return the accelerator's name, e.g. that of a GPU."""
    module = torch.get_device_module(device)
    named = getattr(module, "get_device_name", None)
    return str(named(device)) if named else device.type


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float | None, digits: int = 2) -> str:
    """Return a number as a cell; a dash where there is none."""
    return NOTHING if value is None or math.isnan(value) else f"{value:.{digits}f}"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a report; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def parser(name: str, description: str | None, *, rounds: int = 7) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    made.add_argument("--threads", type=int, default=1, help="of the CPU")
    made.add_argument("--rounds", type=int, default=rounds, help="samples of each row")
    made.add_argument("--seconds", type=float, help="for all rows; what does not fit is named")
    made.add_argument("--json", type=Path, default=Path("out") / f"{name}.json")
    return made


def split(text: str) -> list[str]:
    """Return the parts of a comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]
