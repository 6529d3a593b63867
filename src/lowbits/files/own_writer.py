"""Writes lowbits' own files, a weight at a time: what `lowbits.files.own` reads."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.core.backend import Packed
from lowbits.core.packed import storage_dtype
from lowbits.files.manifest import Manifest, PackedEntry, field_name
from lowbits.files.safetensors_writer import (
    SHARD_BYTES,
    Metadata,
    TensorGroup,
    header_bytes,
    json_bytes,
    write_safetensors,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lowbits.files.weights import Weight
    from lowbits.progress import CancelToken, ProgressCallback

#: Tensors of a packed weight that room is left for, and letters of their fields' names.
_FIELDS: Final = 8
_FIELD_LETTERS: Final = 24

#: No dtype's name is longer, and no dimension is larger.
_WIDEST: Final = torch.float8_e4m3fnuz
_LARGEST: Final = 2**63


@final
@dataclass(frozen=True)
class WriteOptions:
    """How to write.

    Attributes:
        versions: of the packages that made the weights, by their names.
        max_shard_bytes: of a file's tensors, unless it is one larger weight.
        stage: as progress calls it.
        progress: called after each weight.
        cancel: stops between two weights.
    """

    versions: Mapping[str, str]
    max_shard_bytes: int = SHARD_BYTES
    stage: str = "save"
    progress: ProgressCallback | None = None
    cancel: CancelToken | None = None


def write_own(
    path: Path, weights: Mapping[str, Weight], ties: Mapping[str, str], options: WriteOptions
) -> tuple[Path, ...]:
    """Write weights to a safetensors file, or to shards with an index.

    Holds one weight at a time. What was at `path` stays until all is written, also where weights
    are read from it; shards of a former, larger save are removed then.

    Args:
        path: ends with ``.safetensors``.
        weights: by name, in the order to write them in.
        ties: the stored name of each other name.
        options: how.

    Returns:
        The file; or the index, then the shards.

    Raises:
        BackendError: a weight is packed into too many tensors; nothing has changed.
        ConfigError: a weight has a name or dtype that files do not have; nothing has changed.
        CancelledError: nothing has changed.
        OSError: the system refuses to write.
    """
    contents = _Contents(ties, options.versions)
    return write_safetensors(
        path,
        [contents.group(name, weight) for name, weight in weights.items()],
        Metadata(_metadata_bytes(Manifest(versions=options.versions)), contents.metadata),
        max_shard_bytes=options.max_shard_bytes,
        progress=options.progress,
        cancel=options.cancel,
        stage=options.stage,
    )


@final
class _Contents:
    """Keeps what each packed weight turned out to be, for its file's manifest."""

    def __init__(self, ties: Mapping[str, str], versions: Mapping[str, str]) -> None:
        self._versions = versions
        self._packed: dict[str, PackedEntry] = {}
        self._ties: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for alias, name in ties.items():
            self._ties[name][alias] = name

    def group(self, name: str, weight: Weight) -> TensorGroup:
        """Return what a weight is stored as."""
        size = _header_bytes(name, weight) + _metadata_bytes(self._manifest(name, weight))
        return TensorGroup(name, weight.nbytes, size, partial(self._read, name, weight))

    def metadata(self, names: Sequence[str]) -> dict[str, str]:
        """Return the manifest of weights that were read."""
        packed = {name: self._packed[name] for name in names if name in self._packed}
        ties = {alias: name for name in names for alias in self._ties[name]}
        return Manifest(packed, ties, self._versions).to_metadata()

    def _manifest(self, name: str, weight: Weight) -> Manifest:
        """Return the largest one that a weight's part of a manifest may be."""
        packed = {} if weight.scheme is None else {name: _widest(weight, weight.scheme)}
        return Manifest(packed, self._ties[name])

    def _read(self, name: str, weight: Weight) -> dict[str, Tensor]:
        value = weight.read()
        if not isinstance(value, Packed):
            return {name: value}
        self._packed[name] = PackedEntry.of(weight, value)
        return {
            # Integers: no cast of floats changes them.
            field_name(name, field): tensor.contiguous().view(storage_dtype(tensor.dtype))
            for field, tensor in value.tensors.items()
        }


def _widest(weight: Weight, scheme: str) -> PackedEntry:
    fields = {f"{number:0{_FIELD_LETTERS}}": _WIDEST for number in range(_FIELDS)}
    rows = (_LARGEST, _LARGEST)
    return PackedEntry(
        scheme, weight.shape, rows, _WIDEST, fields, row_sliceable=False, compute_dtype=_WIDEST
    )


def _header_bytes(name: str, weight: Weight) -> int:
    if weight.scheme is None:
        return header_bytes(name, dimensions=len(weight.shape))
    return header_bytes(field_name(name, "-" * _FIELD_LETTERS), _FIELDS)


def _metadata_bytes(manifest: Manifest) -> int:
    return json_bytes(manifest.to_metadata())
