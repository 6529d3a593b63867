"""What a packing scheme costs and saves: the same pictures drawn with each of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, final

import torch

import lowbits
from lowbits.cli.drawing import draw
from lowbits.cli.memory import PeakSampler
from lowbits.cli.reader import load_reader, read
from lowbits.config import scheme_name
from lowbits.core.registry import DEFAULT
from lowbits.core.scheme import NATIVE
from lowbits.errors import BackendUnavailableError, LowbitsError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor

    from lowbits.cli.loading import Recipe

#: One of each kind and backend: what a first look at a model needs.
DEFAULT_SCHEMES: Final = (
    "bnb-nf4",
    "bnb-int8",
    "torchao-int8",
    "torchao-int4",
    "quanto-int4",
    "float8-e4m3fn",
    "gguf-q8_0",
    "gguf-q4_0",
)

#: Shares of the LoRAs' strengths that pictures are drawn at.
_SHARES: Final = (0.0, 0.5, 1.0)

#: The size of picture that a reader reads.
_READABLE: Final = (32, 32)

#: Is told a phase's name, how much of it is done, and how much there is to do.
Track = Callable[[str, float, float], None]


@final
@dataclass(frozen=True)
class Plan:
    """What is to be compared.

    Attributes:
        recipe: what is drawn.
        schemes: in the order of the results.
        seeds: pictures of each prompt; the seeds are 0, 1, ...
        batch: pictures drawn at once.
        device: that everything runs on.
        adapters: the strengths of LoRAs that the pipeline has loaded; each picture is drawn at each
            of the `shares` of them.
        loras: ways that LoRAs act, as `lowbits.apply` names them; each scheme has a row for each.
    """

    recipe: Recipe
    schemes: tuple[str, ...]
    seeds: int
    batch: int
    device: torch.device
    adapters: Mapping[str, float] = field(default_factory=dict)
    loras: tuple[str, ...] = ("auto",)

    @property
    def shares(self) -> tuple[float, ...]:
        """What the adapters' strengths are multiplied by, one after the other."""
        return _SHARES if self.adapters else (1.0,)

    @property
    def rows(self) -> tuple[tuple[str, str], ...]:
        """The scheme of each row, and the way that LoRAs act in it."""
        return tuple((scheme, lora) for scheme in self.schemes for lora in self.loras)

    @property
    def pictures(self) -> int:
        """How many pictures each row draws."""
        return len(self.shares) * len(self.recipe.prompts) * self.seeds

    def batches(self) -> Iterator[tuple[str, range]]:
        """Yield the prompt and the seeds of each call of the pipeline."""
        for prompt in self.recipe.prompts:
            for start in range(0, self.seeds, self.batch):
                yield prompt, range(start, min(start + self.batch, self.seeds))


@final
@dataclass(frozen=True)
class Stored:
    """Exact bytes of a pipeline's weights as they are stored.

    Attributes:
        component_bytes: of the components that are packed, whatever in them is left alone included.
        total_bytes: of all components.
        bits_per_weight: of what is packed.
    """

    component_bytes: int
    total_bytes: int
    bits_per_weight: float


@final
@dataclass(frozen=True)
class Result:
    """One scheme's figures; those of full precision have no conversion.

    Attributes:
        scheme: its name.
        stored: bytes of the weights.
        convert_s: seconds that packing took.
        convert_peak_bytes: the process's memory at most while packing, above what it had before;
            None where it cannot be read.
        seconds_per_picture: drawing, text encoding included.
        psnr_db: to the pictures of full precision, over all of them; infinite where equal.
        accuracy: share of pictures that are recognised as what was asked for.
        restored: whether a restored pipeline drew the first pictures bit-equal.
        pictures: the first of each prompt, at one of the plan's shares after the other,
            ``(shares * prompts, 3, height, width)`` in 0 to 1.
        lora: the way that LoRAs act; None where there are none.
    """

    scheme: str
    stored: Stored
    convert_s: float | None
    convert_peak_bytes: int | None
    seconds_per_picture: float
    psnr_db: float
    accuracy: float | None
    restored: bool | None
    pictures: Tensor
    lora: str | None = None

    @property
    def name(self) -> str:
        """The scheme, and the way that LoRAs act where it was chosen."""
        return self.scheme if self.lora in {None, "auto"} else f"{self.scheme} {self.lora}"


@final
@dataclass(frozen=True)
class Skipped:
    """A scheme that could not be measured, and why."""

    scheme: str
    reason: str


@final
@dataclass(frozen=True)
class Comparison:
    """The figures of full precision and of every scheme, in the order asked for."""

    plan: Plan
    reference: Result
    results: tuple[Result, ...]
    skipped: tuple[Skipped, ...]


def usable_schemes(names: Collection[str]) -> tuple[tuple[str, ...], tuple[Skipped, ...]]:
    """Split schemes into those that can be packed here, and the others with their reasons.

    Raises:
        UnknownSchemeError: no such scheme.
    """
    usable, skipped = [], []
    for name in dict.fromkeys(map(scheme_name, names)):
        try:
            _, scheme = DEFAULT.require(name)
        except BackendUnavailableError as error:
            skipped.append(Skipped(name, str(error)))
            continue
        if scheme.can_quantize:
            usable.append(name)
        else:
            skipped.append(Skipped(name, "can be decoded only"))
    return tuple(usable), tuple(skipped)


def compare(pipe: Any, plan: Plan, track: Track) -> Comparison:
    """Draw the same pictures in full precision and with each scheme, and measure.

    Args:
        pipe: a diffusers pipeline; restored after each scheme.
        plan: what to do; schemes that turn out not to work are skipped.
        track: is told where the work is.
    """
    study = _Study(pipe, plan, track)
    reference = study.full_precision()
    results, skipped = [], []
    for number, (scheme, lora) in enumerate(plan.rows, 1):
        study.title = f"{scheme} ({number} of {len(plan.rows)})"
        try:
            results.append(study.packed(scheme, lora))
        except LowbitsError as error:
            skipped.append(Skipped(scheme, str(error)))
        except RuntimeError as error:  # what torch raises where a device cannot run an operation
            skipped.append(Skipped(scheme, f"{type(error).__name__}: {error}"))
    return Comparison(plan, reference, tuple(results), tuple(skipped))


def psnr_db(pictures: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio of pictures in 0 to 1; infinite where they are equal.

    Source: ``10 log10(1 / mean squared error)``, the error over all pixels of all pictures.
    """
    error = float((pictures.double() - reference.double()).square().mean())
    return -10 * math.log10(error) if error else math.inf


def stored(report: lowbits.Report, components: Collection[str]) -> Stored:
    """Sum up a report.

    Args:
        report: of an applied pipeline.
        components: those that were asked for; they stand for the packed ones where none is packed.
    """
    chosen = {layer.component for layer in report.packed} or set(components)
    parts = [layer for layer in report.layers if layer.component in chosen]
    weighed = [layer for layer in report.packed or parts if layer.bytes_before]
    weights = sum(math.prod(layer.shape) for layer in weighed)
    bits = 8 * sum(layer.bytes_after for layer in weighed)
    return Stored(
        component_bytes=sum(layer.bytes_after for layer in parts),
        total_bytes=report.bytes_after,
        bits_per_weight=bits / weights if weights else 0.0,
    )


@final
class _Study:
    """A pipeline, and the pictures that it draws in full precision."""

    def __init__(self, pipe: Any, plan: Plan, track: Track) -> None:
        self.title = "full precision"
        self._pipe = pipe
        self._plan = plan
        self._track = track
        self._reference = torch.empty(0)
        classifier = plan.recipe.classifier
        self._reader = load_reader(classifier) if classifier and plan.recipe.labels else None

    def full_precision(self) -> Result:
        """Draw the pictures that all others are measured by."""
        with lowbits.apply(self._pipe, NATIVE, device=self._plan.device) as handle:
            # The first pass of a process allocates and plans; it would count as full precision's.
            self._draw("warming up", first_only=True)
            self._reference, seconds = self._draw("drawing")
            size = stored(handle.report(), handle.components)
        return self._result("full precision", size, self._reference, seconds)

    def packed(self, scheme: str, lora: Any) -> Result:
        """Draw the same pictures with packed weights, then undo it."""
        with PeakSampler() as memory:
            start = time.perf_counter()
            handle = lowbits.apply(
                self._pipe,
                scheme,
                device=self._plan.device,
                lora=lora,
                keep_source="memory",
                progress=lambda event: self._phase("packing", event.done_bytes, event.total_bytes),
            )
            _synchronize()
            convert_s = time.perf_counter() - start
        with handle:
            pictures, seconds = self._draw("drawing")
        return self._result(
            scheme,
            stored(handle.report(), handle.components),
            pictures,
            seconds,
            convert_s=convert_s,
            convert_peak_bytes=memory.peak_bytes,
            restored=self._is_restored(),
            lora=lora if self._plan.adapters else None,
        )

    def _is_restored(self) -> bool:
        with lowbits.apply(self._pipe, NATIVE, device=self._plan.device):
            again, _ = self._draw("restoring", first_only=True)
        return torch.equal(again, self._reference[: len(again)])

    def _draw(self, phase: str, *, first_only: bool = False) -> tuple[Tensor, float]:
        batches = [(share, *batch) for share in self._plan.shares for batch in self._plan.batches()]
        batches = batches[: 1 if first_only else None]
        total = sum(len(seeds) for *_, seeds in batches)
        parts, done = [], 0
        start = time.perf_counter()
        for share, prompt, seeds in batches:
            before = done
            done += len(seeds)

            def on_step(part: float, first: int = before, last: int = done) -> None:
                self._phase(phase, first + part * (last - first), total)

            self._scale_adapters(share)
            parts.append(draw(self._pipe, prompt, seeds, self._plan.recipe.call, on_step))
        return torch.cat(parts), time.perf_counter() - start

    def _scale_adapters(self, share: float) -> None:
        adapters = self._plan.adapters
        if adapters:
            strengths = [share * strength for strength in adapters.values()]
            self._pipe.set_adapters(list(adapters), strengths)

    def _phase(self, phase: str, done: float, total: float) -> None:
        self._track(f"{self.title}: {phase}", done, total)

    def _result(
        self, scheme: str, size: Stored, pictures: Tensor, seconds: float, **conversion: Any
    ) -> Result:
        figures = {"convert_s": None, "convert_peak_bytes": None, "restored": None, **conversion}
        return Result(
            scheme=scheme,
            stored=size,
            seconds_per_picture=seconds / len(pictures),
            psnr_db=psnr_db(pictures, self._reference),
            accuracy=self._accuracy(pictures),
            pictures=pictures[:: self._plan.seeds],
            **figures,
        )

    def _accuracy(self, pictures: Tensor) -> float | None:
        if self._reader is None or pictures.shape[-2:] != _READABLE:
            return None
        asked = torch.arange(len(self._plan.recipe.labels))
        asked = asked.repeat_interleave(self._plan.seeds).repeat(len(self._plan.shares))
        return float((read(self._reader, pictures) == asked).double().mean())


def _synchronize() -> None:
    """Wait for the accelerator, so that a clock read next has all of its work in it."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
