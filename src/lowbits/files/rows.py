"""Weights of one naming made of the rows of another's: taken apart and joined as they are stored.

Reference checkpoints keep queries, keys and values in one matrix that diffusers has three of, and
the other way round. Rows of packed weights are taken and joined without being quantized again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias, final

import torch
from torch import Tensor

from lowbits.core.backend import Packed
from lowbits.errors import FormatError
from lowbits.files.weights import Weight

if TYPE_CHECKING:
    from lowbits.core.registry import BackendRegistry

#: Weights that are kept once they are read: what is split is asked for several times in a row.
_KEPT: Final = 4


@final
@dataclass(frozen=True)
class Segment:
    """Rows of a tensor of another naming: ``tensor[start:stop:step]`` of dim 0.

    Attributes:
        source: name of that tensor; one without dims is one row.
        start: first row.
        stop: row behind the last one.
        step: 1, but for rows that alternate (llama.cpp's heads).
    """

    source: str
    start: int
    stop: int
    step: int = 1

    @property
    def rows(self) -> int:
        """How many they are."""
        return len(range(self.start, self.stop, self.step))

    def take(self, tensor: Tensor) -> Tensor:
        """Return these rows of a tensor, a view."""
        rows = tensor if tensor.dim() else tensor.reshape(1)
        return rows[self.start : self.stop : self.step]


#: What each tensor is made of: the rows of others, one after the other.
KeyMap: TypeAlias = Mapping[str, Sequence[Segment]]


@final
class RowReader:
    """Makes weights of the rows of a checkpoint's; the last few that it read are kept."""

    def __init__(self, weights: Mapping[str, Weight], registry: BackendRegistry) -> None:
        self._weights, self._registry = weights, registry
        self._kept: OrderedDict[str, Tensor | Packed] = OrderedDict()

    def read(self, segments: Sequence[Segment]) -> Tensor | Packed:
        """Return the rows, as they are stored if all are stored alike, else decoded in float32.

        Tensors are on the CPU. Those of one whole weight are what it gives, shared where it says
        so; all others are in memory of their own.

        Raises:
            FormatError: the bytes are not what they claim to be, or rows cannot be told apart.
        """
        parts = [self._part(segment) for segment in segments]
        if len(parts) == 1:
            return parts[0]
        packed = [part for part in parts if isinstance(part, Packed)]
        if len(packed) == len(parts) and len({_form(part) for part in packed}) == 1:
            return _joined(packed)
        return torch.cat([in_float32(part, self._registry) for part in parts])

    def _part(self, segment: Segment) -> Tensor | Packed:
        weight = self._weights[segment.source]
        whole = self._whole(weight)
        rows = weight.shape[0] if weight.shape else 1
        if (segment.start, segment.stop, segment.step) == (0, rows, 1):
            # Handed over: who asks for it again must not get the same memory.
            return self._kept.pop(weight.name)
        if not isinstance(whole, Packed):
            return segment.take(whole).clone()
        if not whole.row_sliceable:
            whole = self._sliceable(weight, whole)
        # Gathered: a copy, which does not keep the other rows.
        return whole.rows(torch.arange(segment.start, segment.stop, segment.step))

    def _whole(self, weight: Weight) -> Tensor | Packed:
        if weight.name not in self._kept:
            self._kept[weight.name] = weight.read()
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[weight.name]

    def _sliceable(self, weight: Weight, packed: Packed) -> Packed:
        backend, _ = self._registry.find(packed.scheme)
        sliceable = backend.sliceable(packed) if backend else None
        if sliceable is None:
            raise FormatError(
                f"its rows cannot be told apart in {packed.scheme}, and the model has it in parts: "
                "load it into a model that has it in one, or convert the original checkpoint",
                tensor=weight.name,
            )
        return sliceable


def in_float32(value: Tensor | Packed, registry: BackendRegistry) -> Tensor:
    """Return a packed weight in float32, ``(rows, row_length)``; a tensor as it is."""
    if not isinstance(value, Packed):
        return value
    backend, _ = registry.find(value.scheme)
    assert backend
    return backend.unpack(value, torch.float32)


def _form(packed: Packed) -> tuple[object, ...]:
    fields = tuple((name, t.dtype, t.shape[1:]) for name, t in packed.tensors.items())
    return packed.scheme, packed.shape[1], packed.row_sliceable or id(packed), fields


def _joined(parts: Sequence[Packed]) -> Packed:
    first = parts[0]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in first.tensors}
    return replace(first, shape=(sum(p.shape[0] for p in parts), first.shape[1]), tensors=tensors)


def rearranged(
    weights: Mapping[str, Weight], key_map: KeyMap, registry: BackendRegistry
) -> dict[str, Weight]:
    """Return the weights that a key map makes of others, each made when it is read."""
    reader = RowReader(weights, registry)
    result = {}
    for name, segments in key_map.items():
        parts = [weights[segment.source] for segment in segments]
        schemes, dtypes = {part.scheme for part in parts}, {part.dtype for part in parts}
        shape = (sum(segment.rows for segment in segments), *parts[0].shape[1:])
        share = sum(
            part.nbytes * segment.rows // (part.shape[0] if part.shape else 1)
            for part, segment in zip(parts, segments, strict=True)
        )
        result[name] = Weight(
            name,
            shape if parts[0].shape else (),
            dtypes.pop() if len(dtypes) == 1 else torch.float32,
            share,
            partial(reader.read, tuple(segments)),
            schemes.pop() if len(schemes) == 1 else None,
            is_shared=len(parts) == 1 and parts[0].is_shared,
        )
    return result
