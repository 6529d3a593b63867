"""Metadata of GGUF files: typed values, and arrays that are decoded when they are asked for."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.core.memory import bytes_of
from lowbits.errors import ConfigError, FormatError
from lowbits.files.weights import read_into

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lowbits.core.source import Extent

Scalar = str | bool | int | float
Value = Scalar | tuple[Scalar, ...]

STRING: Final = 8
ARRAY: Final = 9


@final
@dataclass(frozen=True)
class ValueType:
    """A type of metadata: its name here, and its character in `struct`; none for strings."""

    name: str
    code: str

    @property
    def nbytes(self) -> int:
        """Bytes of one value; of a string, those of its length."""
        return struct.calcsize("=" + (self.code or "Q"))


#: By number; source: ``gguf_metadata_value_type`` of the GGUF specification.
VALUE_TYPES: Final = {
    0: ValueType("u8", "B"), 1: ValueType("i8", "b"), 2: ValueType("u16", "H"),
    3: ValueType("i16", "h"), 4: ValueType("u32", "I"), 5: ValueType("i32", "i"),
    6: ValueType("f32", "f"), 7: ValueType("bool", "B"), STRING: ValueType("str", ""),
    10: ValueType("u64", "Q"), 11: ValueType("i64", "q"), 12: ValueType("f64", "d"),
}  # fmt: skip
_NUMBERS: Final = {kind.name: number for number, kind in VALUE_TYPES.items()}

#: Elements of an array that is handed out, at most: tuples take 8 to 40 bytes each.
MAX_ELEMENTS: Final = 1 << 24


@final
@dataclass(frozen=True)
class GgufValue:
    """A value of metadata with its type.

    Attributes:
        kind: ``"u8"`` to ``"u64"``, ``"i8"`` to ``"i64"``, ``"f32"``, ``"f64"``, ``"bool"`` or
            ``"str"``; of an array, that of its elements.
        value: a tuple is an array.
    """

    kind: str
    value: Value

    @staticmethod
    def of(value: GgufValue | Scalar) -> GgufValue:
        """Give a plain value its usual type: integers are ``u32``, floats ``f32``."""
        if isinstance(value, GgufValue):
            return value
        kinds: dict[type[Scalar], str] = {str: "str", bool: "bool", int: "u32", float: "f32"}
        if type(value) not in kinds:
            raise ConfigError(
                f"metadata is str, bool, int, float or a GgufValue, got {type(value).__name__}"
            )
        return GgufValue(kinds[type(value)], value)

    def encode(self) -> bytes:
        """Return type and value as they stand in a file, lowest byte first.

        Raises:
            ConfigError: an unknown type, or a value that it does not hold.
        """
        if self.kind not in _NUMBERS:
            raise ConfigError(f"unknown metadata type {self.kind!r}; known: {', '.join(_NUMBERS)}")
        number = _NUMBERS[self.kind]
        if isinstance(self.value, tuple):
            head = struct.pack("<IIQ", ARRAY, number, len(self.value))
            return head + b"".join(self._element(element) for element in self.value)
        return struct.pack("<I", number) + self._element(self.value)

    def _element(self, value: Scalar) -> bytes:
        if (self.kind == "str") != isinstance(value, str) or (
            (self.kind == "bool") != isinstance(value, bool)
        ):
            raise ConfigError(f"metadata of type {self.kind} cannot hold {value!r}")
        try:
            if isinstance(value, str):
                data = value.encode()
                return struct.pack("<Q", len(data)) + data
            return struct.pack("<" + VALUE_TYPES[_NUMBERS[self.kind]].code, value)
        except (struct.error, OverflowError, UnicodeEncodeError) as error:
            raise ConfigError(f"metadata of type {self.kind} cannot hold {value!r}") from error


@final
@dataclass(frozen=True)
class StoredArray:
    """An array of metadata that was not decoded yet.

    Attributes:
        key: of the metadata.
        kind: of an element.
        count: of its elements.
        order: ``"<"`` or ``">"``, as in `struct`.
        extent: of the elements; the length of each string stands before it.
    """

    key: str
    kind: ValueType
    count: int
    order: str
    extent: Extent

    def read(self) -> GgufValue:
        """Read and decode the elements.

        Raises:
            FormatError: there are too many, or bytes that are none of the type.
        """
        if self.count > MAX_ELEMENTS:
            raise FormatError(
                f"metadata {self.key!r} has {self.count} elements; at most {MAX_ELEMENTS} are read",
                self.extent.path,
                offset=self.extent.offset,
            )
        data = torch.empty(self.extent.nbytes, dtype=torch.uint8, device="cpu")
        read_into(data, self.extent)
        return self.decode(bytes(bytes_of(data)))

    def decode(self, data: bytes) -> GgufValue:
        """Decode elements that were read already."""
        try:
            return GgufValue(self.kind.name, decode(data, self.kind, self.count, self.order))
        except ValueError as error:
            raise FormatError(
                f"metadata {self.key!r}: {error}", self.extent.path, offset=self.extent.offset
            ) from error


def decode(data: bytes, kind: ValueType, count: int, order: str) -> tuple[Scalar, ...]:
    """Decode values.

    Args:
        data: of exactly these values.
        kind: of them.
        count: of them.
        order: ``"<"`` or ``">"``.

    Raises:
        ValueError: a string is not UTF-8 or longer than the data, or a bool neither 0 nor 1.
    """
    if kind.name == "str":
        return _strings(data, count, order)
    values: tuple[int | float, ...] = struct.unpack(f"{order}{count}{kind.code}", data)
    if kind.name != "bool":
        return values
    if max(data, default=0) > 1:
        raise ValueError(f"a bool is 0 or 1, got {max(data)}")
    return tuple(map(bool, values))


def _strings(data: bytes, count: int, order: str) -> tuple[str, ...]:
    length = struct.Struct(order + "Q").unpack_from
    values, at = [], 0
    for _ in range(count):
        # The file may have changed since its strings were counted.
        start = at + 8
        at = start + length(data, at)[0] if start <= len(data) else start
        if at > len(data):
            raise ValueError("the strings end too late: the file was changed")
        values.append(data[start:at].decode())
    return tuple(values)


@final
class GgufMetadata(Mapping[str, Value]):
    """A file's metadata; arrays are tuples, and longer ones are decoded when first asked for."""

    def __init__(self, entries: dict[str, GgufValue | StoredArray]) -> None:
        self._entries = entries

    def __getitem__(self, key: str) -> Value:
        return self.typed(key).value

    def __contains__(self, key: object) -> bool:
        # A Mapping's own would decode the value.
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{len(self)} metadata values: {', '.join(self)}>"

    def at_hand(self, key: str) -> Value | None:
        """Return a value that is decoded already; None: a longer array, or there is none.

        What a file is opened by is looked at through this: nothing is read, however long it is.
        """
        entry = self._entries.get(key)
        return entry.value if isinstance(entry, GgufValue) else None

    def typed(self, key: str) -> GgufValue:
        """Return a value with its type, to be written again as it is.

        Raises:
            KeyError: there is none of this name.
            FormatError: an array whose bytes are none of its type.
        """
        entry = self._entries[key]
        if isinstance(entry, StoredArray):
            entry = self._entries[key] = entry.read()
        return entry
