"""What lowbits writes beside the tensors of its own files: which of them make one packed weight.

It is JSON in the metadata of a safetensors file, or of each shard. Versions that are newer than
this code, and schemes that nobody registered, are refused: their bytes cannot be guessed at.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, final

from lowbits.core.packed import LAYOUT_VERSION
from lowbits.errors import FormatError
from lowbits.files.safetensors import DTYPES, parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from lowbits.core.backend import Packed
    from lowbits.files.weights import Weight

#: Key of the metadata that it stands under.
MANIFEST: Final = "lowbits"
VERSION: Final = 1

#: By their names in torch; a name in a file must not reach any other attribute of it.
_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}

_MAX_DIMENSIONS: Final = 64


@final
@dataclass(frozen=True)
class PackedEntry:
    """How one packed weight is stored.

    Attributes:
        scheme: name of the scheme.
        shape: of the weight as its module sees it.
        rows: the weight as ``(rows, row_length)``.
        dtype: of the weight before it was packed; None: not known.
        fields: dtype of the values of each stored tensor, by the field's name.
        row_sliceable: whether dim 0 of each is dim 0 of the weight.
        compute_dtype: that the caller asked for; None: what is fast on the device.
    """

    scheme: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    dtype: torch.dtype | None
    fields: Mapping[str, torch.dtype]
    row_sliceable: bool
    compute_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, weight: Weight, packed: Packed) -> PackedEntry:
        """Describe a packed weight."""
        fields = {name: tensor.dtype for name, tensor in packed.tensors.items()}
        return cls(
            packed.scheme, tuple(weight.shape), packed.shape, weight.dtype, fields,
            packed.row_sliceable, weight.compute_dtype,
        )  # fmt: skip


@final
@dataclass(frozen=True)
class Manifest:
    """What a file, or a set of shards, holds beside ordinary tensors.

    Attributes:
        weights: packed ones, by their dotted names.
        ties: the name that a tied weight is stored under, by its other names.
        versions: of the packages that made it, by their names; only to be shown.
    """

    weights: Mapping[str, PackedEntry] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """Return what is put into the metadata of a safetensors file."""
        weights = {name: _to_json(entry) for name, entry in self.weights.items()}
        data = {
            "version": VERSION,
            "layout": LAYOUT_VERSION,
            "weights": weights,
            "ties": dict(self.ties),
            "versions": dict(self.versions),
        }
        return {"format": "pt", MANIFEST: json.dumps(data, separators=(",", ":"))}


def field_name(weight: str, field: str) -> str:
    """Return the name of a stored tensor of a packed weight: as in its module's state dict."""
    return f"{weight}_{field}"


def read_manifest(metadata: Mapping[str, str], path: Path) -> Manifest | None:
    """Return what a file's metadata says; None where lowbits did not write the file.

    Raises:
        FormatError: it does not hold what it should, or a newer lowbits wrote it.
    """
    if MANIFEST not in metadata:
        return None
    data = parse_json(metadata[MANIFEST].encode(), path)
    versions = data.get("version"), data.get("layout")
    if versions != (VERSION, LAYOUT_VERSION):
        raise FormatError(
            f"its manifest is of version {versions[0]}, layout {versions[1]}; this lowbits reads "
            f"version {VERSION}, layout {LAYOUT_VERSION}: pip install -U lowbits",
            path,
        )
    try:
        weights = {str(name): _from_json(entry) for name, entry in data["weights"].items()}
        ties, made_by = _texts(data["ties"]), _texts(data["versions"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"its manifest cannot be read: {error!r}", path) from error
    return Manifest(weights, ties, made_by)


def _texts(data: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in data.items()}


def _to_json(entry: PackedEntry) -> dict[str, Any]:
    fields = {name: _dtype_name(dtype) for name, dtype in entry.fields.items()}
    dtypes = {"dtype": _dtype_name(entry.dtype), "compute_dtype": _dtype_name(entry.compute_dtype)}
    return {**asdict(entry), **dtypes, "fields": fields}


def _from_json(data: Any) -> PackedEntry:
    shape, rows = _shape(data["shape"]), _shape(data["rows"])
    if len(rows) != 2 or math.prod(shape) != math.prod(rows):
        raise ValueError(f"rows {rows} do not make shape {shape}")
    dtype, compute_dtype = data["dtype"], data["compute_dtype"]
    if not isinstance(data["row_sliceable"], bool):
        raise ValueError(f"row_sliceable is {data['row_sliceable']!r}")  # noqa: TRY004 - a file's
    return PackedEntry(
        scheme=str(data["scheme"]),
        shape=shape,
        rows=(rows[0], rows[1]),
        dtype=None if dtype is None else _DTYPES[dtype],
        fields={str(name): _DTYPES[dtype] for name, dtype in data["fields"].items()},
        row_sliceable=data["row_sliceable"],
        compute_dtype=None if compute_dtype is None else _DTYPES[compute_dtype],
    )


def _shape(sizes: Any) -> tuple[int, ...]:
    # `type`: a bool is an int.
    if not all(type(size) is int and 0 < size < 1 << 63 for size in sizes):
        raise ValueError(f"{sizes!r} is no shape of a packed weight")
    if len(sizes) > _MAX_DIMENSIONS:
        raise ValueError(f"a shape of {len(sizes)} dimensions")
    return tuple(sizes)


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
