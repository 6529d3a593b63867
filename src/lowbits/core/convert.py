"""Packing the chosen weights of a target: all of them, or none."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast, final

import torch

from lowbits.core.memory import available_host_bytes
from lowbits.core.names import WRAPPED, dotted
from lowbits.core.packed import (
    PackedLayer,
    dequantized,
    storage_form,
    stored_names,
)
from lowbits.core.packing import pack_weight
from lowbits.core.peak import conversion_peak, require_room
from lowbits.core.report import LayerReport, Report, format_bytes
from lowbits.core.scheme import NATIVE, rows_of
from lowbits.core.source import (
    AUTO_MEMORY_SHARE,
    FileSource,
    MemorySource,
    PackedSource,
    Source,
    SourceFiles,
)
from lowbits.core.surgery import Journal, PackedParameters, journal_of, packed_parameters
from lowbits.errors import NonFiniteWeightError, SourceUnavailableError
from lowbits.progress import CancelToken, ProgressCallback, ProgressEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from lowbits.core.select import Decision


@final
@dataclass(frozen=True)
class ConvertOptions:
    """How to convert.

    Attributes:
        keep_source: one of `lowbits.core.source.KEEP_SOURCE`.
        source: a safetensors file or folder that the weights came from.
        device: that quantizes and holds the result; None: the one each weight lies on.
        hold: that holds the result, where it is not the one that quantizes.
        free_bytes: of a device that is not the host; None where that is not known.
    """

    keep_source: str = "auto"
    source: SourceFiles | None = None
    device: torch.device | None = None
    hold: torch.device | None = None
    free_bytes: Callable[[torch.device], int | None] | None = None
    progress: ProgressCallback | None = None
    cancel: CancelToken | None = None


@final
@dataclass(frozen=True)
class Conversion:
    """What was done, and the way back.

    Attributes:
        journals: undo it, by component.
        report: of every parameter and buffer.
        lets_originals_go: whether `commit` has anything to do.
    """

    journals: Mapping[str, Journal]
    report: Report
    lets_originals_go: bool

    def commit(self) -> None:
        """Let originals go that nobody asked to keep: until now they were there to go back to."""
        for journal in self.journals.values() if self.lets_originals_go else ():
            journal.forget_originals()


@torch.no_grad()
@torch.inference_mode(mode=False)
def convert(
    decisions: Sequence[Decision], options: ConvertOptions, journals: defaultdict[str, Journal]
) -> Conversion:
    """Pack the weights that were chosen, in place.

    Peak memory above the target's: the packed weights and one part of one layer (`part_weights`);
    with file sources, originals go as their layers are packed. Where that is not free, nothing
    begins.

    Args:
        decisions: of every parameter and buffer of the target.
        options: how.
        journals: by component; every change is written there before it is made, and whatever is
            raised here, `undo` of them gives the target back.
    """
    chosen = [d for d in decisions if d.scheme]
    sources = _prove(chosen, options)
    mode = _memory_or_none(chosen, sources, options.keep_source)
    before = _bytes_before(decisions)
    peak = conversion_peak(decisions, sources, options.device, options.hold, _packed_bytes)
    require_room(peak, options.free_bytes)
    _pack_all(chosen, sources, journals, options)
    return Conversion(journals, _report(decisions, before, sources, mode), mode == "none")


def _prove(chosen: Sequence[Decision], options: ConvertOptions) -> dict[int, FileSource]:
    """Return a file source for each tensor that has one; all must where the caller insists."""
    if options.source is None:
        if options.keep_source == "file" and chosen:
            raise SourceUnavailableError(
                "keep_source='file' needs source=path: no weight is known to come from a file"
            )
        return {}
    if options.keep_source in ("memory", "none"):
        return {}
    proven = {}
    for decision in chosen:
        if decision.tie not in proven and not decision.is_packed:
            fqn = dotted(_module_fqn(decision), decision.name)
            parameter = cast("nn.Parameter", decision.tensor)
            # peft has put its layers between; files have the names from before.
            for name in dict.fromkeys((fqn, fqn.replace(f"{WRAPPED}.", ""))):
                source = options.source.prove(decision.component, name, parameter)
                if source is not None:
                    proven[decision.tie] = source
                    break
    missing = [d.path for d in chosen if d.tie not in proven]
    if missing and options.keep_source == "file":
        raise SourceUnavailableError(
            f"{len(missing)} weights are not in {options.source.path} with these values, e.g. "
            f"{missing[0]} (a fused LoRA, another dtype or another file?): "
            "pass keep_source='auto' to keep those in memory"
        )
    return proven


def _module_fqn(decision: Decision) -> str:
    return decision.fqn if decision.name == "weight" else decision.fqn.rpartition(".")[0]


def _memory_or_none(
    chosen: Sequence[Decision], proven: Mapping[int, FileSource], keep_source: str
) -> str:
    """Return what happens to the originals that no file holds."""
    if keep_source in ("memory", "none"):
        return keep_source
    rest = [d for d in chosen if d.tie not in proven]
    available = available_host_bytes()
    if available is None or not rest:
        return "memory"
    original = sum({d.tie: d.nbytes for d in rest}.values())
    packed = sum({d.tie: _packed_bytes(d) for d in chosen}.values())
    # Originals in host memory are there already: what is free has to hold the rest of the sum.
    on_host = sum({d.tie: d.nbytes for d in rest if d.tensor.device.type == "cpu"}.values())
    fits = original + packed <= AUTO_MEMORY_SHARE * (available + on_host)
    return "memory" if fits else "none"


def _packed_bytes(decision: Decision) -> int:
    assert decision.scheme
    assert decision.backend
    rows, row_length = rows_of(decision.shape, decision.kind)
    return decision.backend.packed_bytes(decision.scheme, rows, row_length)


def stored_bytes_of(decisions: Sequence[Decision]) -> int:
    """Return the bytes that all tensors will take once they are packed, tied ones once."""
    sizes = {d.tie: _packed_bytes(d) if d.scheme else d.nbytes for d in decisions}
    return sum(sizes.values())


def _bytes_before(decisions: Sequence[Decision]) -> dict[int, int]:
    """Return what each tensor took: of what was loaded packed, and stays so, in full precision."""
    return {
        d.tie: d.nbytes if d.scheme or journal_of(d.module) else d.full_bytes for d in decisions
    }


def _pack_all(
    chosen: Sequence[Decision],
    sources: Mapping[int, FileSource],
    journals: defaultdict[str, Journal],
    options: ConvertOptions,
) -> None:
    modules: dict[int, list[Decision]] = defaultdict(list)
    for decision in chosen:
        modules[id(decision.module)].append(decision)
    total = sum({d.tie: d.nbytes for d in chosen}.values())
    holders = _count_holders(chosen)
    tied: dict[int, tuple[str, PackedParameters]] = {}
    done = 0
    for group in modules.values():
        packed = {}
        for decision in group:
            if options.cancel:
                options.cancel.raise_if_cancelled("packing")
            if decision.tie in tied:
                name, shared = tied[decision.tie]
                packed[decision.name] = shared.renamed(name, decision.name)
                continue
            done += decision.nbytes
            packed[decision.name] = _pack_one(decision, sources.get(decision.tie), options)
            if holders[decision.tie] > 1:
                tied[decision.tie] = decision.name, packed[decision.name]
        journals[group[0].component].install(group[0].module, packed, group[0].path)
        if options.progress:
            options.progress(ProgressEvent("pack", group[-1].path, done, total))


def _count_holders(chosen: Sequence[Decision]) -> dict[int, int]:
    counts: dict[int, int] = defaultdict(int)
    for decision in chosen:
        counts[decision.tie] += 1
    return counts


def _pack_one(
    decision: Decision, source: FileSource | None, options: ConvertOptions
) -> PackedParameters:
    scheme, backend = decision.scheme, decision.backend
    assert scheme
    assert backend
    device = options.device or decision.tensor.device
    values, kept = _values_of(decision)
    try:
        packed = pack_weight(values, decision.kind, scheme, backend, device)
    except NonFiniteWeightError as error:
        raise NonFiniteWeightError(
            f"{decision.path or 'weight'} cannot be packed as {scheme.name}: {error}; repair the "
            f"weight, or leave it alone with skip=({decision.path!r},)"
        ) from error
    layout, tensors = storage_form(decision.name, packed, backend, decision.shape)
    if options.hold is not None:
        tensors = {name: tensor.to(options.hold) for name, tensor in tensors.items()}
    layout = replace(layout, compute_dtype=decision.compute_dtype, keeps_fp32=decision.keeps_fp32)
    dtype = decision.dtype or decision.tensor.dtype
    return packed_parameters(decision.name, layout, tensors, dtype, source or kept)


def _values_of(decision: Decision) -> tuple[Tensor, Source]:
    """Return a weight's values, and itself as the way back; what is packed decodes in float32."""
    layer, name = decision.module, decision.name
    if not (isinstance(layer, PackedLayer) and decision.is_packed):
        original = cast("nn.Parameter", decision.tensor)
        return original, MemorySource(original)
    stored = {
        key.removeprefix(name): cast("nn.Parameter", layer._parameters[key])
        for key in stored_names(layer, name)
    }
    return dequantized(layer, name, torch.float32), PackedSource(decision.stored_as, stored)


def _report(
    decisions: Sequence[Decision],
    before: Mapping[int, int],
    sources: Mapping[int, FileSource],
    mode: str,
) -> Report:
    layers, counted, dropped = [], set(), 0
    for decision in decisions:
        is_again = decision.tie in counted
        counted.add(decision.tie)
        bytes_before = before[decision.tie]
        bytes_after = decision.nbytes
        source = ("file" if decision.tie in sources else mode) if decision.scheme else "-"
        dropped += bytes_before if source == "none" and not is_again else 0
        numel = decision.shape.numel()
        layers.append(
            LayerReport(
                fqn=decision.fqn,
                component=decision.component,
                kind=decision.kind,
                shape=tuple(decision.shape),
                scheme=_scheme_now(decision),
                bytes_before=0 if is_again else bytes_before,
                bytes_after=0 if is_again else bytes_after,
                bits_per_weight=bytes_after * 8 / numel if numel else 0.0,
                source=source,
                reason=f"tied; {decision.reason}".strip("; ") if is_again else decision.reason,
            )
        )
    warnings = (
        (f"{format_bytes(dropped)} of originals were not kept: restore() is not possible",)
        if dropped
        else ()
    )
    return Report(tuple(layers), warnings)


def _scheme_now(decision: Decision) -> str:
    if decision.scheme:
        return decision.scheme.name
    return decision.stored_as if decision.is_packed else NATIVE
