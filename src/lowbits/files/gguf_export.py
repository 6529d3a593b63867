"""Weights of any form written as a GGUF file, one at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, final

import torch

from lowbits.backends.gguf.backend import SEARCHED, GgufBackend, scheme_name
from lowbits.backends.gguf.quantize import BEST
from lowbits.core.backend import Packed
from lowbits.core.packing import pack_weight
from lowbits.core.report import LayerReport, Report
from lowbits.core.scheme import LINEAR
from lowbits.errors import ConfigError, NonFiniteWeightError
from lowbits.files.convert import decoded, source_of
from lowbits.files.gguf_rules import (
    TensorPlan,
    check_metadata,
    metadata_for,
    plan_types,
    settled,
    shapes_metadata,
)
from lowbits.files.gguf_types import STORED_TYPES
from lowbits.files.gguf_values import GgufValue
from lowbits.files.gguf_writer import TensorToWrite, write_gguf
from lowbits.files.rows import in_float32
from lowbits.progress import CancelToken, ProgressCallback, ProgressEvent

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lowbits.core.registry import BackendRegistry
    from lowbits.core.scheme import Scheme
    from lowbits.files.weights import Weight


@final
@dataclass(frozen=True)
class ExportOptions:
    """How to write.

    Attributes:
        asked: ggml's name of a type or mix, e.g. ``"Q4_K_M"``; ``"Q4_K-best"`` searches longer.
        arch: value of ``general.architecture``; None: none is written.
        target: who it is written for, see `lowbits.files.gguf_rules.TARGETS`.
        linear: names of the weights of Linear layers; None: guessed by name and shape.
        registry: of the schemes that weights may be in.
        device: that quantizes.
        is_kept: whether the weights come from a file that stays.
        progress: called after each weight.
        cancel: stops between two weights.
    """

    asked: str
    arch: str | None
    target: str
    linear: Collection[str] | None
    registry: BackendRegistry
    device: torch.device
    is_kept: bool = False
    progress: ProgressCallback | None = None
    cancel: CancelToken | None = None

    @property
    def is_best(self) -> bool:
        """Whether to search longer for less error."""
        return self.asked.lower().endswith(SEARCHED)

    @property
    def type_name(self) -> str:
        """The type or mix, without that.

        Raises:
            ConfigError: there is no longer search for this type.
        """
        if not self.is_best:
            return self.asked
        name = self.asked[: -len(SEARCHED)]
        if name.upper() not in BEST:
            can = ", ".join(BEST)
            raise ConfigError(f"type: {name} is not searched longer; these are: {can}")
        return name


def export(path: Path, weights: Mapping[str, Weight], options: ExportOptions) -> Report:
    """Write weights; those that are stored in the type that they are to have keep their bytes.

    What may not fit into float16 is read twice: types stand in front of the first tensor. Progress
    calls the first time ``"check"``.

    Returns:
        What each tensor is stored as, and why not as asked for.

    Raises:
        ConfigError: the target cannot read such a file.
        NonFiniteWeightError: a weight that is to be packed holds NaN or infinity.
        OSError: the system refuses to write; what was at the path stays.
    """
    plans = _checked(_plans(weights, options), weights, options)
    entries = [*metadata_for(options.arch, options.type_name), *shapes_metadata(plans)]
    check_metadata(entries, plans, options.target)
    metadata = {key: GgufValue(kind, value) for key, kind, value in entries}
    tensors = [
        TensorToWrite(plan.name, plan.stored_shape, plan.type_name or "F32") for plan in plans
    ]
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def read(tensor: TensorToWrite) -> Tensor:
        nonlocal done
        if options.cancel:
            options.cancel.raise_if_cancelled("converting")
        data = _data(tensor, weights[tensor.name], options)
        done += tensor.nbytes
        if options.progress:
            options.progress(ProgressEvent("convert", tensor.name, done, total))
        return data

    write_gguf(path, metadata, tensors, read)
    return Report(tuple(map(partial(_report, weights, options), plans, tensors)))


def planned(weights: Mapping[str, Weight], options: ExportOptions) -> dict[str, str]:
    """Return the scheme that each quantized weight will be in, as far as names and shapes tell."""
    found = {}
    for plan in _plans(weights, options):
        if plan.type_name and _is_blocks(plan.type_name):
            kept = weights[plan.name].scheme if _is_of(weights[plan.name], plan.type_name) else None
            found[plan.name] = kept or scheme_name(plan.type_name)
    return found


def _plans(weights: Mapping[str, Weight], options: ExportOptions) -> list[TensorPlan]:
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return plan_types(
        shapes, options.type_name, options.arch, options.target, linear=options.linear
    )


def _checked(
    plans: Sequence[TensorPlan], weights: Mapping[str, Weight], options: ExportOptions
) -> list[TensorPlan]:
    """Return plans whose types hold the values."""
    total, done, result = sum(weights[plan.name].nbytes for plan in plans), 0, []
    for plan in plans:
        if options.cancel:
            options.cancel.raise_if_cancelled("converting")
        result.append(_settled(plan, weights[plan.name], options))
        done += weights[plan.name].nbytes
        if options.progress:
            options.progress(ProgressEvent("check", plan.name, done, total))
    return result


def _settled(plan: TensorPlan, weight: Weight, options: ExportOptions) -> TensorPlan:
    if plan.type_name == "F32" or (plan.type_name and _is_of(weight, plan.type_name)):
        return plan
    if weight.scheme is None and weight.dtype == torch.float16:
        return settled(plan, weight.dtype, 0.0, options.target)
    largest = _largest(decoded(weight, options.registry))
    if plan.type_name and _is_blocks(plan.type_name) and not math.isfinite(largest):
        raise NonFiniteWeightError(
            f"{plan.name} cannot be quantized to {plan.type_name}: some of its values are NaN or "
            "infinite; repair the weight"
        )
    return settled(plan, weight.dtype or torch.float32, largest, options.target)


def _largest(values: Tensor) -> float:
    """Return the largest magnitude; NaN where one of the values is."""
    if not values.is_floating_point() or not values.numel():
        return 0.0
    # A copy of its own only where torch does not compare: float8.
    low, high = (values if values.dtype.itemsize > 1 else values.float()).aminmax()
    return max(-float(low), float(high))


def _is_of(weight: Weight, type_name: str) -> bool:
    """Say whether a weight is stored as this type, however its codes were found."""
    return (weight.scheme or "").removesuffix(SEARCHED) == scheme_name(type_name)


def _is_blocks(type_name: str) -> bool:
    """Say whether a type is quantized, not ordinary numbers."""
    return STORED_TYPES[type_name].dtype is None


def _data(tensor: TensorToWrite, weight: Weight, options: ExportOptions) -> Tensor:
    """Return what stands in the file."""
    kind = STORED_TYPES[tensor.type_name]
    value = weight.read()
    if isinstance(value, Packed) and _is_of(weight, tensor.type_name):
        return value["qdata"]
    value = in_float32(value, options.registry).reshape(tensor.shape)
    if kind.dtype is not None:
        return value.to(kind.dtype)
    backend, scheme = GgufBackend(), _scheme(tensor.type_name, is_best=options.is_best)
    grid = value.reshape(-1, tensor.shape[-1])
    try:
        packed = pack_weight(grid, LINEAR, scheme, backend, options.device)
    except NonFiniteWeightError as error:
        raise NonFiniteWeightError(f"{tensor.name}: {error}") from error
    return packed["qdata"].cpu()


def _scheme(type_name: str, *, is_best: bool) -> Scheme:
    schemes = {scheme.name: scheme for scheme in GgufBackend().schemes()}
    name = scheme_name(type_name)
    best = schemes.get(name + SEARCHED)
    return best if best and is_best else schemes[name]


def _report(
    weights: Mapping[str, Weight],
    options: ExportOptions,
    plan: TensorPlan,
    tensor: TensorToWrite,
) -> LayerReport:
    weight = weights[plan.name]
    source = source_of(weight, is_kept=options.is_kept)
    numel = torch.Size(plan.shape).numel()
    return LayerReport(
        fqn=plan.name.removesuffix(".weight"),
        component="",
        kind=plan.reason if plan.reason == "vector" else "tensor",
        shape=plan.shape,
        scheme=tensor.type_name,
        bytes_before=weight.nbytes,
        bytes_after=tensor.nbytes,
        bits_per_weight=tensor.nbytes * 8 / numel if numel else 0.0,
        source=source if _is_blocks(tensor.type_name) else "-",
        reason=plan.reason,
    )
