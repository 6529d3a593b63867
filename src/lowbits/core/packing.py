"""Packing one weight: in parts of bounded size, refusing what is not finite."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING

import torch

from lowbits.core.backend import Packed
from lowbits.core.memory import part_weights, temporary
from lowbits.core.scheme import rows_of
from lowbits.errors import NonFiniteWeightError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from lowbits.core.backend import QuantBackend
    from lowbits.core.scheme import Scheme


def pack_weight(
    weight: Tensor, kind: str, scheme: Scheme, backend: QuantBackend, device: torch.device
) -> Packed:
    """Quantize a layer's weight on a device.

    Args:
        weight: of any layer kind, floating, on any device but meta; not changed.
        kind: the layer's kind, which says what a row is.
        scheme: accepts this kind and row length.
        backend: the scheme's.
        device: that quantizes; the packed tensors lie there.

    Raises:
        NonFiniteWeightError: the weight, or a scale made from it, is not finite.
    """
    rows, row_length = rows_of(weight.shape, kind)
    flat = weight.detach().reshape(rows, row_length)

    def read(start: int, stop: int) -> Tensor:
        return flat[start:stop]

    shape = rows, row_length
    parts = packed_parts(read, shape, scheme, backend, device)
    first = next(parts)
    if first.shape == shape:
        return first
    tensors = {name: t.new_empty(rows, *t.shape[1:]) for name, t in first.tensors.items()}
    start = 0
    for part in chain((first,), parts):
        stop = start + part.shape[0]
        for name, tensor in part.tensors.items():
            tensors[name][start:stop] = tensor
        start = stop
    return Packed(scheme.name, shape, tensors)


def packed_parts(
    read: Callable[[int, int], Tensor],
    shape: tuple[int, int],
    scheme: Scheme,
    backend: QuantBackend,
    device: torch.device,
) -> Iterator[Packed]:
    """Quantize a weight that is made, or read, a few rows at a time; yield them in order.

    Args:
        read: gives rows ``start`` to ``stop``, ``(stop - start, row_length)``, floating, anywhere;
            not changed. Asked for the first rows twice where the scheme wants the whole at once.
        shape: ``(rows, row_length)`` of all.
        scheme: accepts this row length.
        backend: the scheme's.
        device: that quantizes; the packed tensors lie there.

    Raises:
        NonFiniteWeightError: the weight, or a scale made from it, is not finite.
    """
    rows, row_length = shape
    step = max(1, part_weights(device) // row_length)
    first = _pack_part(read(0, min(step, rows)), scheme, backend, device)
    if step < rows and not first.row_sliceable:
        step, first = rows, _pack_part(read(0, rows), scheme, backend, device)
    yield first
    for start in range(step, rows, step):
        yield _pack_part(read(start, min(start + step, rows)), scheme, backend, device)


@torch.no_grad()
def _pack_part(part: Tensor, scheme: Scheme, backend: QuantBackend, device: torch.device) -> Packed:
    # Metal has neither float8 nor float64, and its memory is the host's.
    maker = torch.device("cpu") if device.type == "mps" else device
    values = part.to(maker)
    if values.dtype != torch.float32 or not values.is_contiguous():
        values = temporary("rows", values, torch.float32).copy_(values)
    # Part by part: torch.isfinite makes a copy of what it looks at.
    pieces = torch.split(values.view(-1), part_weights(maker))
    bad: int = sum(_count_bad(piece) for piece in pieces)
    if bad:
        raise NonFiniteWeightError(f"{bad} of its values are NaN or infinite")
    packed = backend.pack(values, scheme)
    _require_finite(packed, values, backend)
    return packed if maker == device else packed.to(device)


def are_finite(values: Tensor) -> bool:
    """Say whether no value of a floating tensor is NaN or infinite.

    The least and the greatest tell, without a temporary, in a tenth of the time of ``isfinite``.
    """
    return not values.numel() or all(math.isfinite(value) for value in values.aminmax())


def _count_bad(values: Tensor) -> int:
    return 0 if are_finite(values) else values.numel() - int(values.isfinite().sum())


def _require_finite(packed: Packed, values: Tensor, backend: QuantBackend) -> None:
    """Decode what was packed, part by part, and look at it.

    It may be NaN although the weight is not: a float16 scale that overflowed, a library that
    divided a row of zeros by its scale.
    """
    rows, row_length = packed.shape
    step = packed.rows_at_once(max(1, part_weights(values.device) // row_length))
    bad = 0
    for start in range(0, rows, step):
        span = start, min(start + step, rows)
        room = temporary("decoded", values[slice(*span)], torch.float32)
        bad += _count_bad(backend.unpack(packed, torch.float32, room, span))
    if bad:
        raise NonFiniteWeightError(
            f"{bad} of its values would decode to NaN or infinity in {packed.scheme} "
            f"(the largest is {float(values.abs().max()):g})"
        )
