"""Weights of a checkpoint in another form, each made when it is read: the model is never whole."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from lowbits.core.backend import Packed
from lowbits.core.memory import return_freed_memory
from lowbits.core.names import dotted
from lowbits.core.packing import pack_weight
from lowbits.core.scheme import rows_of
from lowbits.errors import NonFiniteWeightError
from lowbits.files.rows import in_float32
from lowbits.files.weights import Weight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lowbits.core.backend import QuantBackend
    from lowbits.core.registry import BackendRegistry
    from lowbits.core.scheme import Scheme
    from lowbits.core.select import Decision

_NARROW: Final = (torch.float16, torch.bfloat16)


def converted(
    weights: Mapping[str, Weight],
    decisions: Sequence[Decision],
    device: torch.device,
    registry: BackendRegistry,
) -> dict[str, Weight]:
    """Return weights in the schemes that were chosen for them; those left alone as they are.

    Args:
        weights: of a checkpoint.
        decisions: on the modules of its `skeleton_of`.
        device: that quantizes.
        registry: of the schemes that weights may be in already.
    """
    result = dict(weights)
    for decision in decisions:
        name = stored_name(decision)
        if decision.scheme is None or name not in weights:
            continue
        assert decision.backend
        weight, scheme = weights[name], decision.scheme
        if weight.scheme == scheme.name:
            continue
        rows = rows_of(decision.shape, decision.kind)
        make = partial(_pack, weight, decision.kind, scheme, decision.backend, device, registry)
        nbytes = decision.backend.packed_bytes(scheme, *rows)
        dtype = weight.dtype or torch.float32
        result[name] = Weight(
            name, weight.shape, dtype, nbytes, make, scheme.name, decision.compute_dtype
        )
    return result


def untied(weights: Mapping[str, Weight]) -> tuple[dict[str, Weight], dict[str, str]]:
    """Return weights by one name each, and the ties: that name by each other one."""
    firsts: dict[int, str] = {}
    ties = {}
    for name, weight in weights.items():
        first = firsts.setdefault(id(weight), name)
        if first != name:
            ties[name] = first
    return {name: weights[name] for name in firsts.values()}, ties


def widened(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Return weights of a GGUF file with those that are not packed in float32.

    There, float16 and bfloat16 are types like others, chosen for each tensor by its place; in other
    files they are what the model computes in, which would be several dtypes at once.
    """
    return {
        name: replace(
            weight,
            dtype=torch.float32,
            nbytes=math.prod(weight.shape) * 4,
            read=partial(_float32, weight),
        )
        if weight.dtype in _NARROW
        else weight
        for name, weight in weights.items()
    }


def _float32(weight: Weight) -> Tensor:
    value = weight.read()
    assert not isinstance(value, Packed)
    return value.float()


def stored_name(decision: Decision) -> str:
    """Return the name of a decision's tensor in a state dict."""
    return dotted(decision.fqn, "weight") if decision.name == "weight" else decision.fqn


def twice_quantized(
    before: Mapping[str, Weight], after: Mapping[str, str | None]
) -> dict[str, list[Weight]]:
    """Return the weights that are in a low-bit form and go into another, by both forms' names."""
    steps: dict[str, list[Weight]] = defaultdict(list)
    for name, weight in before.items():
        scheme = after.get(name)
        is_low_bit = weight.scheme and 8 * weight.nbytes < 16 * math.prod(weight.shape)
        if is_low_bit and scheme and scheme != weight.scheme:
            steps[f"{weight.scheme} to {scheme}"].append(weight)
    return steps


def _pack(
    weight: Weight,
    kind: str,
    scheme: Scheme,
    backend: QuantBackend,
    device: torch.device,
    registry: BackendRegistry,
) -> Packed:
    values = decoded(weight, registry)
    try:
        packed = pack_weight(values, kind, scheme, backend, device)
    except NonFiniteWeightError as error:
        raise NonFiniteWeightError(
            f"{weight.name} cannot be packed as {scheme.name}: {error}; leave it alone with "
            f"skip=({weight.name.removesuffix('.weight')!r},), or repair the weight"
        ) from error
    tensors = {name: tensor.cpu() for name, tensor in packed.tensors.items()}
    return Packed(packed.scheme, packed.shape, tensors, packed.row_sliceable)


def decoded(weight: Weight, registry: BackendRegistry) -> Tensor:
    """Return a weight's values in its shape; of a packed one in float32."""
    return_freed_memory()  # of the weight before
    return in_float32(weight.read(), registry).view(weight.shape)


def source_of(before: Weight, *, is_kept: bool) -> str:
    """Say where a weight that was packed is in full precision: in the file it is from, if anywhere.

    Args:
        before: as it was.
        is_kept: whether that file is there still.
    """
    return "file" if is_kept and not before.scheme else "none"
