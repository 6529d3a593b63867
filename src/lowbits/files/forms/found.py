"""What the forms of low-bit weights share: a checkpoint's tensors, and weights made of several."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, final

import torch

from lowbits.errors import FormatError
from lowbits.files.soundness import require_finite
from lowbits.files.weights import Weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from lowbits.core.backend import Packed
    from lowbits.files.weights import StoredTensor

#: A description of one weight in JSON takes some 200 bytes.
_JSON_BYTES: Final = 1 << 16
#: Codes that are looked at together.
_PART_BYTES: Final = 1 << 24


@final
@dataclass(frozen=True)
class Found:
    """A weight, or nothing but a marker, and the tensors that stand for it.

    Attributes:
        weight: None where the tensors mean nothing by themselves.
        parts: names of all tensors that belong to it, also of those that nobody reads.
    """

    weight: Weight | None
    parts: tuple[str, ...]


@final
@dataclass(frozen=True)
class Listed:
    """A weight before it is known what it is made of, with the attributes that `Weight` has."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    scheme: str


@final
@dataclass(frozen=True)
class Checkpoint:
    """What a form looks at.

    Attributes:
        tensors: by name; those that no other form has claimed.
        metadata: of the file.
        config: the folder's config.json.
        allow_nonfinite: whether NaN and infinity are read as well.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    allow_nonfinite: bool = False

    @property
    def quantization(self) -> Mapping[str, Any]:
        """What config.json says of quantization; empty where it says nothing."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else {}

    def without(self, names: Iterable[str]) -> Checkpoint:
        """Return the same checkpoint without some tensors."""
        gone = set(names)
        return replace(self, tensors={n: t for n, t in self.tensors.items() if n not in gone})

    def need(self, name: str, of: StoredTensor) -> StoredTensor:
        """Return a tensor that another one cannot be read without.

        Raises:
            FormatError: it is not there.
        """
        if name not in self.tensors:
            raise refusal(of, f"{name} is missing, without which it cannot be read")
        return self.tensors[name]

    def present(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of some names that are there."""
        return tuple(name for name in names if name in self.tensors)

    def found(
        self,
        weight: Listed,
        parts: Mapping[str, StoredTensor],
        make: Callable[[Mapping[str, Tensor]], Packed],
        others: Sequence[str] = (),
    ) -> Found:
        """Return a weight that is made of some tensors when it is read.

        Args:
            weight: as it is to be listed.
            parts: tensors that are read, by the names that `make` gets them by.
            make: returns them as a packed weight.
            others: names of tensors that belong to it, and are not read.
        """
        reader = _Reader(weight.name, parts, make, self.allow_nonfinite)
        return self._claim(weight, reader, (*(p.name for p in parts.values()), *others))

    def refused(self, weight: Listed, parts: Sequence[str], message: str) -> Found:
        """Return a weight that no scheme holds: it is listed, and refuses to be read."""
        return self._claim(weight, _Refusal(self.tensors[parts[0]], message), parts)

    def _claim(self, listed: Listed, read: Callable[[], Packed], parts: Sequence[str]) -> Found:
        nbytes = sum(self.tensors[name].extent.nbytes for name in set(parts))
        weight = Weight(listed.name, listed.shape, listed.dtype, nbytes, read, listed.scheme)
        return Found(weight, tuple(parts))


@final
@dataclass(frozen=True)
class _Reader:
    """Reads the tensors of one weight, and makes it of them."""

    name: str
    parts: Mapping[str, StoredTensor]
    make: Callable[[Mapping[str, Tensor]], Packed]
    allow_nonfinite: bool

    def __call__(self) -> Packed:
        tensors = {key: part.read() for key, part in self.parts.items()}
        path = next(iter(self.parts.values())).extent.path
        try:
            packed = self.make(tensors)
        except FormatError as error:
            raise FormatError(error.args[0], path, self.name) from error
        if not self.allow_nonfinite:
            require_finite(packed, path, self.name)
        return packed


@final
@dataclass(frozen=True)
class _Refusal:
    part: StoredTensor
    message: str

    def __call__(self) -> Packed:
        raise refusal(self.part, self.message)


def refusal(part: StoredTensor, message: str) -> FormatError:
    """Return the error about a tensor of a file."""
    return FormatError(message, part.extent.path, part.name)


def read_json(part: StoredTensor) -> dict[str, Any]:
    """Return the JSON object that a tensor's bytes are.

    Raises:
        FormatError: they are not.
    """
    if part.dtype != torch.uint8 or part.extent.nbytes > _JSON_BYTES:
        raise refusal(part, f"{part.extent.nbytes} bytes of {part.dtype} are no description")
    return parsed(bytes(part.read().view(-1).tolist()), part)


def parsed(text: bytes | str, part: StoredTensor, what: str = "it") -> dict[str, Any]:
    """Return a JSON object.

    Args:
        text: JSON.
        part: a tensor that it is about, for the message.
        what: the text is, for the message.

    Raises:
        FormatError: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(part, f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise refusal(part, f"{what} is not a JSON object, but {type(value).__name__}")
    return value


def rows_of(part: StoredTensor) -> tuple[int, int]:
    """Return ``(rows, row_length)`` of a tensor whose rows are its first dimension.

    Raises:
        FormatError: it has fewer than two dimensions, or no values.
    """
    count = math.prod(part.shape)
    if len(part.shape) < 2 or not count:
        raise refusal(part, f"a quantized weight of shape {part.shape}")
    return part.shape[0], count // part.shape[0]
