"""Weights of any form written as a GGUF file, one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, final

import torch

from lowbits.backends.gguf.backend import GgufBackend, scheme_name
from lowbits.core.backend import Packed
from lowbits.core.packing import pack_weight
from lowbits.core.report import LayerReport, Report
from lowbits.core.scheme import LINEAR
from lowbits.errors import NonFiniteWeightError
from lowbits.files.convert import decoded
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
from lowbits.progress import CancelToken, ProgressCallback, ProgressEvent

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
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
        type_name: ggml's name of a type or mix, e.g. ``"Q4_K_M"``.
        arch: value of ``general.architecture``; None: none is written.
        target: who it is written for, see `lowbits.files.gguf_rules.TARGETS`.
        linear: names of the weights of Linear layers; None: guessed by name and shape.
        registry: of the schemes that weights may be in.
        device: that quantizes.
    """

    type_name: str
    arch: str | None
    target: str
    linear: Collection[str] | None
    registry: BackendRegistry
    device: torch.device
    progress: ProgressCallback | None = None
    cancel: CancelToken | None = None


def export(path: Path, weights: Mapping[str, Weight], options: ExportOptions) -> Report:
    """Write weights; those that are stored in the type that they are to have keep their bytes.

    All are read twice: what does not fit into float16 is found before types are written down.

    Returns:
        What each tensor is stored as, and why not as asked for.

    Raises:
        ConfigError: the target cannot read such a file.
        NonFiniteWeightError: a weight holds NaN or infinity.
        OSError: the system refuses to write; what was at the path stays.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    plans = plan_types(
        shapes, options.type_name, options.arch, options.target, linear=options.linear
    )
    plans = [_settled(plan, weights[plan.name], options) for plan in plans]
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
    return Report(tuple(map(partial(_report, weights), plans, tensors)))


def planned(weights: Mapping[str, Weight], options: ExportOptions) -> dict[str, str | None]:
    """Return the scheme that each weight will be in, as far as names and shapes tell."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    plans = plan_types(
        shapes, options.type_name, options.arch, options.target, linear=options.linear
    )
    return {plan.name: plan.type_name and scheme_name(plan.type_name) for plan in plans}


def _settled(plan: TensorPlan, weight: Weight, options: ExportOptions) -> TensorPlan:
    """Return a plan whose type holds the values."""
    if plan.type_name and weight.scheme == scheme_name(plan.type_name):
        return plan
    values = decoded(weight, options.registry)
    largest = float(values.abs().max()) if values.is_floating_point() and values.numel() else 0.0
    return settled(plan, weight.dtype or values.dtype, largest, options.target)


def _data(tensor: TensorToWrite, weight: Weight, options: ExportOptions) -> Tensor:
    """Return what stands in the file."""
    kind = STORED_TYPES[tensor.type_name]
    value = weight.read()
    if isinstance(value, Packed):
        if value.scheme == scheme_name(tensor.type_name):
            return value["qdata"]
        backend, _ = options.registry.find(value.scheme)
        assert backend
        value = backend.unpack(value, torch.float32)
    value = value.reshape(tensor.shape)
    if kind.dtype is not None:
        return value.to(kind.dtype)
    backend, scheme = GgufBackend(), _scheme(tensor.type_name)
    grid = value.reshape(-1, tensor.shape[-1])
    try:
        packed = pack_weight(grid, LINEAR, scheme, backend, options.device)
    except NonFiniteWeightError as error:
        raise NonFiniteWeightError(f"{tensor.name}: {error}") from error
    return packed["qdata"].cpu()


def _scheme(type_name: str) -> Scheme:
    return next(s for s in GgufBackend().schemes() if s.name == scheme_name(type_name))


def _report(weights: Mapping[str, Weight], plan: TensorPlan, tensor: TensorToWrite) -> LayerReport:
    weight = weights[plan.name]
    numel = torch.Size(plan.shape).numel()
    return LayerReport(
        fqn=plan.name.removesuffix(".weight"),
        component="",
        kind="tensor",
        shape=plan.shape,
        scheme=tensor.type_name,
        bytes_before=weight.nbytes,
        bytes_after=tensor.nbytes,
        bits_per_weight=tensor.nbytes * 8 / numel if numel else 0.0,
        source="-",
        reason=plan.reason,
    )
