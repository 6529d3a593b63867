"""The header of a GGUF file, read piece by piece and within bounds.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing in it is believed before
it is compared with the bytes that are left; all arithmetic is on Python's integers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from lowbits.core.source import Extent, stamp_of
from lowbits.errors import FormatError
from lowbits.files.gguf_values import (
    ARRAY,
    VALUE_TYPES,
    GgufMetadata,
    GgufValue,
    StoredArray,
    ValueType,
    decode,
)
from lowbits.files.weights import open_file

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
ALIGNMENT_KEY: Final = "general.alignment"
#: ggml holds four; Wan's and HunyuanVideo's convolutions are written in their five.
MAX_DIMENSIONS: Final = 5

# What a file may ask for. Real ones: below 100 keys, 10 000 tensors, 1 M strings of a tokenizer.
_MAX_ALIGNMENT: Final = 1 << 20
_MAX_KEYS: Final = 1 << 16
_MAX_TENSORS: Final = 1 << 16
_MAX_STRINGS: Final = 1 << 21
#: The specification's bound on keys. For tensors ggml's is 64 or 128, that of other readers none.
MAX_KEY_BYTES: Final = (1 << 16) - 1
#: Of names, infos and single values together; arrays that are not decoded do not count.
_MAX_DECODED_BYTES: Final = 1 << 25
_MAX_ELEMENTS: Final = (1 << 63) - 1

#: The shortest records: a name of one byte, and a bool; or a tensor without dimensions.
_KEY_BYTES: Final = 8 + 1 + 4 + 1
_INFO_BYTES: Final = 8 + 1 + 4 + 4 + 8
#: Bytes of the header that are read at once.
_PIECE_BYTES: Final = 1 << 18
#: Arrays of numbers up to here are decoded on the spot: shapes, mostly.
_SMALL_BYTES: Final = 256


@final
@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor.

    Attributes:
        name: of the tensor.
        shape: in torch's order, which is the reverse of the file's.
        number: of its type.
        offset: of its data, from the beginning of all data.
        position: of this record in the file.
    """

    name: str
    shape: tuple[int, ...]
    number: int
    offset: int
    position: int


@final
@dataclass(frozen=True)
class Header:
    """A file's header.

    Attributes:
        version: 2 or 3.
        order: of its bytes: ``"<"`` or ``">"``, as in `struct`.
        metadata: of the file.
        infos: of its tensors, as they come.
        alignment: that data stand at.
        data_start: where they begin.
        size: bytes of the file.
        stamp: of the file, as in `Extent`.
    """

    version: int
    order: str
    metadata: GgufMetadata
    infos: tuple[TensorInfo, ...]
    alignment: int
    data_start: int
    size: int
    stamp: tuple[int, int, int]


@final
class _Cursor:
    """A place in a header; holds a piece of the file from about there on."""

    def __init__(self, file: BinaryIO, path: Path, stamp: tuple[int, int, int]) -> None:
        self.path, self.stamp, self.order = path, stamp, "<"
        self.size = stamp[1]
        self.position = 0
        self._file, self._piece, self._start = file, b"", 0
        self._decoded_bytes, self._strings = 0, 0

    def error(self, message: str, tensor: str = "", position: int | None = None) -> FormatError:
        at = self.position if position is None else position
        return FormatError(message, self.path, tensor, at)

    def require(self, nbytes: int, what: str) -> None:
        """Raise where the file has no such number of bytes left."""
        if self.position + nbytes > self.size:
            needed = self.position + nbytes
            raise self.error(f"the file is truncated: {what} needs {needed} bytes, has {self.size}")

    def take(self, nbytes: int, what: str) -> bytes:
        self.require(nbytes, what)
        self._decoded_bytes += nbytes
        if self._decoded_bytes > _MAX_DECODED_BYTES:
            raise self.error(f"names and values take more than {_MAX_DECODED_BYTES} bytes")
        at = self._reach(nbytes)
        self.position += nbytes
        return self._piece[at : at + nbytes]

    def numbers(self, codes: str, what: str) -> tuple[int, ...]:
        layout = self.order + codes
        values: tuple[int, ...] = struct.unpack(layout, self.take(struct.calcsize(layout), what))
        return values

    def number(self, code: str, what: str) -> int:
        return self.numbers(code, what)[0]

    def string(self, what: str) -> str:
        start = self.position
        data = self.take(self.number("Q", f"the length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {error.reason}", position=start) from error

    def name(self, what: str) -> str:
        start = self.position
        name = self.string(what)
        size = self.position - start - 8
        if not 0 < size <= MAX_KEY_BYTES:
            raise self.error(
                f"{what} has {size} bytes; expected 1 to {MAX_KEY_BYTES}", position=start
            )
        return name

    def skip(self, nbytes: int, what: str) -> None:
        self.require(nbytes, what)
        self.position += nbytes

    def skip_strings(self, count: int, what: str) -> None:
        """Go on to the end of some strings: only their lengths are looked at."""
        self.require(count * 8, what)
        self._strings += count
        if self._strings > _MAX_STRINGS:
            raise self.error(f"arrays hold more than {_MAX_STRINGS} strings")
        length = struct.Struct(self.order + "Q")
        while count:
            self.require(8, what)
            at = self._reach(8)
            at, count = _walk(self._piece, at, count, length)
            self.position = self._start + at
        self.require(0, what)

    def _reach(self, nbytes: int) -> int:
        """Have the next bytes, which the file has, in the piece; return where in it they begin."""
        at = self.position - self._start
        if not 0 <= at <= at + nbytes <= len(self._piece):
            self._file.seek(self.position)
            room = min(self.size - self.position, max(nbytes, _PIECE_BYTES))
            self._start, self._piece, at = self.position, self._file.read(room), 0
            if len(self._piece) < nbytes:
                raise self.error("the file became shorter while it was read")
        return at


def _walk(piece: bytes, at: int, count: int, length: struct.Struct) -> tuple[int, int]:
    """Go over strings until a length is beyond the piece; return where, and how many are left."""
    # All that it costs to open a file with a tokenizer: 0.1 us a string.
    last, unpack = len(piece) - 8, length.unpack_from
    for left in range(count - 1, -1, -1):
        at += 8 + unpack(piece, at)[0]
        if at > last:
            return at, left
    return at, 0


def read_header(path: Path) -> Header:
    """Read a file's header.

    Raises:
        FormatError: no regular file, no GGUF file, or a header that does not fit into its file.
        OSError: the file is not there, a folder, or may not be read.
    """
    with open_file(path) as file:
        return _header(_Cursor(file, path, stamp_of(file)))


def _header(cursor: _Cursor) -> Header:
    version = _version(cursor)
    tensors, keys = cursor.numbers("QQ", "the numbers of tensors and metadata values")
    for count, limit, nbytes, what in (
        (keys, _MAX_KEYS, _KEY_BYTES, "metadata values"),
        (tensors, _MAX_TENSORS, _INFO_BYTES, "tensors"),
    ):
        cursor.require(count * nbytes, f"a header of {count} {what}")
        if count > limit:
            raise cursor.error(f"{count} {what}; at most {limit} are read")
    entries: dict[str, GgufValue | StoredArray] = {}
    for _ in range(keys):
        start = cursor.position
        key = cursor.name("a metadata key")
        if key in entries:
            raise cursor.error(f"metadata {key!r} is there twice", position=start)
        entries[key] = _value(cursor, key)
    alignment = _alignment(cursor, entries.get(ALIGNMENT_KEY))
    infos = tuple(_info(cursor) for _ in range(tensors))
    start = -(-cursor.position // alignment) * alignment
    metadata = GgufMetadata(entries)
    size, stamp = cursor.size, cursor.stamp
    return Header(version, cursor.order, metadata, infos, alignment, start, size, stamp)


def _version(cursor: _Cursor) -> int:
    if not cursor.size:
        raise cursor.error("the file is empty")
    magic = cursor.take(min(4, cursor.size), "the magic")
    if magic != MAGIC[: len(magic)]:
        raise cursor.error(f"not a GGUF file: it begins with {magic!r}", position=0)
    cursor.require(4, "the version")
    version = cursor.number("I", "the version")
    if version and not version & 0xFFFF:
        # The number is small: in the other order its zeros come first.
        cursor.order = ">"
        version = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in VERSIONS:
        raise cursor.error(f"GGUF version {version}; versions 2 and 3 are read", position=4)
    return version


def _value(cursor: _Cursor, key: str) -> GgufValue | StoredArray:
    what = f"metadata {key!r}"
    kind = _value_type(cursor, what)
    if kind is not None and kind.code:
        return _numbers(cursor, key, kind, 1, is_array=False)
    if kind is not None:
        return GgufValue(kind.name, cursor.string(what))
    element = _value_type(cursor, what)
    if element is None:
        raise cursor.error(f"{what} is an array of arrays, which are not read")
    count = cursor.number("Q", f"the length of {what}")
    nbytes, start = count * element.nbytes, cursor.position
    if element.code and nbytes <= _SMALL_BYTES:
        return _numbers(cursor, key, element, count, is_array=True)
    if element.code:
        cursor.skip(nbytes, what)
    else:
        cursor.skip_strings(count, what)
    extent = Extent(cursor.path, start, cursor.position - start, cursor.stamp)
    return StoredArray(key, element, count, cursor.order, extent)


def _value_type(cursor: _Cursor, what: str) -> ValueType | None:
    """Return a type; None: an array."""
    start = cursor.position
    number = cursor.number("I", what)
    if number != ARRAY and number not in VALUE_TYPES:
        raise cursor.error(f"{what} is of the unknown type {number}", position=start)
    return VALUE_TYPES.get(number)


def _numbers(
    cursor: _Cursor, key: str, kind: ValueType, count: int, *, is_array: bool
) -> GgufValue:
    start = cursor.position
    data = cursor.take(count * kind.nbytes, f"metadata {key!r}")
    try:
        values = decode(data, kind, count, cursor.order)
    except ValueError as error:
        raise cursor.error(f"metadata {key!r}: {error}", position=start) from error
    return GgufValue(kind.name, values if is_array else values[0])


def _alignment(cursor: _Cursor, entry: GgufValue | StoredArray | None) -> int:
    if entry is None:
        return DEFAULT_ALIGNMENT
    value = entry.value if isinstance(entry, GgufValue) and entry.kind == "u32" else None
    if not isinstance(value, int):
        raise cursor.error(f"{ALIGNMENT_KEY} is not of type u32")
    if not 8 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise cursor.error(
            f"{ALIGNMENT_KEY} is {value}; expected a power of two from 8 to {_MAX_ALIGNMENT}"
        )
    return value


def _info(cursor: _Cursor) -> TensorInfo:
    start = cursor.position
    name = cursor.name("a tensor's name")
    dimensions = cursor.number("I", f"tensor {name!r}")
    if dimensions > MAX_DIMENSIONS:
        raise cursor.error(
            f"it has {dimensions} dimensions; at most {MAX_DIMENSIONS} are read", name, start
        )
    sizes = cursor.numbers(f"{dimensions}Q", f"the shape of tensor {name!r}")
    elements = 1
    for size in sizes:
        elements *= size
        if not size or elements > _MAX_ELEMENTS:
            raise cursor.error(f"its shape {sizes[::-1]} holds no values, or too many", name, start)
    number, offset = cursor.numbers("IQ", f"type and offset of tensor {name!r}")
    return TensorInfo(name, sizes[::-1], number, offset, start)
