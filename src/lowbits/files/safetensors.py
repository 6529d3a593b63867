"""Safetensors files, read without believing what they say about themselves.

Source: https://huggingface.co/docs/safetensors, "Format": eight bytes give the length of a JSON
object, in which each tensor has a dtype, a shape, and offsets into the bytes behind it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeGuard, final

import torch

from lowbits.core.source import Extent, stamp_of
from lowbits.errors import FormatError
from lowbits.files.weights import StoredTensor, open_file

if TYPE_CHECKING:
    import io
    from collections.abc import Mapping

#: The format's names, in the order of its own list: files hold tensors in the reverse one.
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}

#: Key of a header that is no tensor's name.
METADATA: Final = "__metadata__"

#: Key of a file's metadata: the BLAKE2b digest, of 16 bytes, of everything behind the header.
CHECKSUM: Final = "lowbits_blake2b"

#: The format's own limit; here also of the text's size in memory.
MAX_HEADER_BYTES: Final = 100_000_000

#: Of any number in a header, and of a tensor's elements.
_LARGEST: Final = 2**63 - 1

#: Values, keys and brackets that a JSON text may hold: a header has about twelve for each tensor.
_MAX_JSON_PARTS: Final = 1_500_000

_PICKLE: Final = (
    "as torch.save writes; pickles can run code, and are read only where that is asked for"
)

#: What files begin with that are taken for safetensors, and are none.
_STRANGERS: Final = {
    b"PK\x03\x04": f"a zip archive of a pickle, {_PICKLE}",
    **{bytes((0x80, protocol)): f"a pickle, {_PICKLE}" for protocol in range(2, 6)},
    b"GGUF": "a GGUF file",
    b"version ": "a pointer of git-lfs: the file itself was not downloaded",
    b"<": "a page of a web site: it was not downloaded as a file",
    b"{": "text: JSON, perhaps an index of shards",
}


@final
@dataclass(frozen=True)
class SafetensorsFile:
    """What the header of a file says, checked.

    Attributes:
        path: of the file.
        tensors: by name, in the order in which the file holds them.
        metadata: of the file.
        problems: tensors that cannot be read, by name, and why.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    problems: Mapping[str, str]


def read_safetensors(path: str | Path) -> SafetensorsFile:
    """Read the header of a safetensors file, and nothing else.

    Costs a few times the header's bytes in memory while it lasts, and nothing that a number in it
    could make larger. Unlike the safetensors package it refuses names that are there twice.

    Raises:
        FormatError: the file is not whole, not safetensors, or does not fit its own header.
        OSError: it is missing, a folder, or may not be read.
    """
    path = Path(path)
    with open_file(path) as file:
        stamp = stamp_of(file)
        data_start, raw = _raw_header(file, stamp[1], path)
    header = parse_json(raw, path)
    metadata = _metadata(header.pop(METADATA, None), path)
    places = [_place(name, entry, path) for name, entry in header.items()]
    places.sort(key=lambda place: (place.start, place.stop))
    _check_coverage(places, data_start, stamp[1], path)
    tensors, problems = {}, {}
    for place in places:
        extent = Extent(path, data_start + place.start, place.stop - place.start, stamp)
        problem = _problem(place, extent)
        if problem:
            problems[place.name] = problem
        else:
            tensors[place.name] = _stored(place, extent)
    return SafetensorsFile(path, tensors, metadata, problems)


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """Return the object that a JSON text holds, at most `MAX_HEADER_BYTES` of it.

    Raises:
        FormatError: it is not UTF-8, not strict JSON, too large, or a key is there twice.
    """
    # Text that is not ASCII may take four bytes a character.
    if len(raw) * (1 if raw.isascii() else 4) > MAX_HEADER_BYTES:
        raise FormatError(f"{len(raw)} bytes of JSON are too many", path)
    if sum(map(raw.count, (b",", b":", b"[", b"{"))) > _MAX_JSON_PARTS:
        raise FormatError(f"its JSON holds more than {_MAX_JSON_PARTS} values", path)
    try:
        value = json.loads(
            raw.decode(), object_pairs_hook=_object, parse_float=_refuse, parse_constant=_refuse
        )
        if b"\\u" in raw:
            # Escapes can make halves of surrogate pairs, which nothing could print.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not strict JSON: {error}", path) from error
    if not isinstance(value, dict):
        raise FormatError(f"expected a JSON object, got a {type(value).__name__}", path)
    return value


class _Place(NamedTuple):
    """What a header says about a tensor: its bytes lie from `start` to `stop` of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _raw_header(file: io.BufferedReader, size: int, path: Path) -> tuple[int, bytes]:
    """Return where the data begins, and the header in front of it."""
    start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or length > min(MAX_HEADER_BYTES, size - 8) or start[8:] != b"{":
        raise FormatError(f"not a safetensors file{_reason(start, length, size)}", path)
    file.seek(8)
    raw = file.read(length)
    if len(raw) < length:
        raise FormatError("the file became shorter while it was read", path)
    return 8 + length, raw


def _reason(start: bytes, length: int, size: int) -> str:
    if not size:
        return ": it is empty"
    for magic, what in _STRANGERS.items():
        if start.startswith(magic) and start[8:] != b"{":
            return f", but {what}"
    if len(start) < 9:
        return f": {size} bytes hold no header"
    if length > size - 8:
        return f", or cut off: a header of {length} bytes does not fit into {size}"
    if length > MAX_HEADER_BYTES:
        return f": a header of {length} bytes, where {MAX_HEADER_BYTES} are allowed"
    return ": its header does not begin with '{'"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name[:100]!r} is there twice")
        made[name] = value
    return made


def _refuse(text: str) -> None:
    raise ValueError(f"{text[:100]} is no integer")


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"{METADATA} is not an object of strings", path)
    return value


def _place(name: str, entry: Any, path: Path) -> _Place:
    """Check what is said about one tensor, but for where other tensors lie."""
    if not name:
        raise FormatError("a tensor has no name", path)
    if not isinstance(entry, dict):
        raise FormatError(f"expected an object, got {_brief(entry)}", path, name)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise FormatError(f"dtype: expected a string, got {_brief(dtype)}", path, name)
    if not _is_integers(shape):
        raise FormatError(f"shape: expected integers, got {_brief(shape)}", path, name)
    if not _is_integers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(
            f"data_offsets: expected start and stop, got {_brief(offsets)}", path, name
        )
    return _Place(name, dtype, tuple(shape), *offsets)


def _is_integers(value: Any) -> TypeGuard[list[int]]:
    # `type`: a bool is an int.
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= _LARGEST for v in value)


def _brief(value: Any) -> str:
    text = repr(value) if isinstance(value, (int, str)) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _check_coverage(places: list[_Place], data_start: int, size: int, path: Path) -> None:
    """Raise where tensors overlap, leave gaps, or do not end with the file."""
    end = 0
    for place in places:
        if place.start != end:
            raise FormatError(
                f"begins {abs(place.start - end)} bytes "
                f"{'before' if place.start < end else 'after'} the end of the tensor before it",
                path,
                place.name,
                data_start + place.start,
            )
        end = place.stop
        if data_start + end > size:
            raise FormatError(
                f"the file is cut off: it ends {data_start + end - size} bytes before this tensor",
                path,
                place.name,
                data_start + place.start,
            )
    if data_start + end < size:
        raise FormatError(
            f"{size - data_start - end} bytes follow the last tensor", path, "", data_start + end
        )


def _problem(place: _Place, extent: Extent) -> str:
    """Return why a tensor cannot be read, empty where it can; raise where it contradicts itself."""
    if place.dtype not in DTYPES:
        return f"dtype {place.dtype[:100]!r}, which torch {torch.__version__} does not have"
    elements = 1
    for dimension in place.shape:
        # Zeros count as ones: torch multiplies the others for the strides.
        elements *= max(dimension, 1)
        if elements > _LARGEST:
            raise FormatError(
                f"shape: {_brief(list(place.shape))} is too large", extent.path, place.name
            )
    if 0 in place.shape:
        elements = 0
    bits = 4 if place.dtype == "F4" else 8 * DTYPES[place.dtype].itemsize
    if elements * bits != 8 * extent.nbytes:
        raise FormatError(
            f"{place.dtype} of shape {_brief(list(place.shape))} takes {elements * bits // 8} "
            f"bytes, but has {extent.nbytes}",
            extent.path,
            place.name,
            extent.offset,
        )
    if place.dtype == "F4" and (not place.shape or place.shape[-1] % 2):
        return f"F4 with rows of {place.shape[-1:]}: torch holds two values in a byte"
    return ""


def _stored(place: _Place, extent: Extent) -> StoredTensor:
    shape = place.shape
    if place.dtype == "F4":
        shape = (*shape[:-1], shape[-1] // 2)
    return StoredTensor(place.name, DTYPES[place.dtype], shape, extent)
