"""Files that lie: refused with the typed error, or loaded right, soon and in little memory."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from files.forked import in_child, needs_fork
from files.raw import entry, file_of, good
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbits.errors import FormatError
from lowbits.files.safetensors import read_safetensors
from lowbits.files.sharded import open_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

F32 = entry("F32", [2, 2], 0, 16)
DATA = bytes(range(16))


def zipped() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    return buffer.getvalue()


def polyglot() -> bytes:
    """Append a zip archive: a reader of zips would find it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", "y")
    return file_of({"a": F32}, DATA) + buffer.getvalue()


def ascii_of(size: int, unit: bytes) -> bytes:
    return b'{"a":' + unit * (size // len(unit)) + b"}"


def many(count: int) -> bytes:
    """Return a file of as many tensors with nothing in them."""
    text = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    return file_of(f"{{{','.join(map(text.format, range(count)))}}}".encode())


#: What is made, by what is wrong with it, and a part of the message.
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty"),
    "three bytes": (lambda: b"abc", "3 bytes hold no header"),
    "length alone": (lambda: bytes(8), "8 bytes hold no header"),
    "length 0": (lambda: bytes(16), "does not begin with"),
    "length 2**63": (lambda: file_of(b"{}", length=2**63), "does not fit"),
    "length 2**64 - 1": (lambda: file_of(b"{}", length=2**64 - 1), "does not fit"),
    "length past the end": (lambda: file_of(b"{}", length=3), "does not fit"),
    "101 MB of header": (lambda: file_of(b"{" + b" " * 101_000_000), "100000000 are allowed"),
    "zip of torch": (zipped, "zip archive"),
    "old pickle": (lambda: b"\x80\x02}q\x00X\x01\x00\x00\x00a", "a pickle, as torch.save"),
    "newer pickle": (lambda: pickle.dumps({"a": [1.0] * 99}), "a pickle, as torch.save"),
    "gguf": (lambda: b"GGUF\x03\x00\x00\x00" + bytes(64), "a GGUF file"),
    "git-lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
    "web page": (lambda: b"<!DOCTYPE html><html></html>", "web site"),
    "json alone": (lambda: b'{"weight_map": {}}', "index of shards"),
    "not json": (lambda: file_of(b"{a: 1}"), "not strict JSON"),
    "cut json": (lambda: file_of(b'{"a":'), "not strict JSON"),
    "json and more": (lambda: file_of(b"{}{}"), "not strict JSON"),
    "header ends with zeros": (lambda: file_of(b"{}\0\0"), "not strict JSON"),
    "not utf-8": (lambda: file_of(b'{"\xff\xfe":1}'), "not strict JSON"),
    "NaN": (lambda: file_of(b'{"a":NaN}'), "NaN is no integer"),
    "float": (lambda: file_of(b'{"a":1e400}'), "1e400 is no integer"),
    "long integer": (lambda: file_of(b'{"a":' + b"9" * 5000 + b"}"), "not strict JSON"),
    "nested arrays": (lambda: file_of(ascii_of(10_000, b"[")), "not strict JSON"),
    "nested objects": (lambda: file_of(b'{"a":' * 50_000), "not strict JSON"),
    "a million brackets": (lambda: file_of(ascii_of(1_000_000, b"[")), "not strict JSON"),
    "90 MB of values": (lambda: file_of(ascii_of(90_000_000, b"[],")), "more than"),
    "200 000 tensors": (partial(many, 200_000), "more than"),
    "10 MB of one key": (lambda: file_of(ascii_of(10_000_000, b'{"a":')), "more than"),
    "90 MB of text": (
        lambda: file_of(ascii_of(90_000_000, '"ü"'.encode())),
        "bytes of JSON are too many",
    ),
    "name twice": (lambda: file_of(b'{"a":1,"a":2}'), "'a' is there twice"),
    "metadata twice": (
        lambda: file_of(b'{"__metadata__":{},"__metadata__":{}}'),
        "'__metadata__' is there twice",
    ),
    "dtype twice": (
        lambda: file_of(b'{"a":{"dtype":"F32","dtype":"U8"}}'),
        "'dtype' is there twice",
    ),
    "metadata of numbers": (lambda: file_of({"__metadata__": {"a": 1}}), "object of strings"),
    "metadata a list": (lambda: file_of({"__metadata__": []}), "object of strings"),
    "half a surrogate": (lambda: file_of({"__metadata__": {"a": "\ud800"}}), "surrogates"),
    "no name": (lambda: file_of({"": F32}, DATA), "has no name"),
    "surrogate name": (lambda: file_of({"\udfff": F32}, DATA), "surrogates"),
    "tensor a list": (lambda: file_of({"a": [1]}), "expected an object"),
    "tensor empty": (lambda: file_of({"a": {}}), "dtype: expected a string"),
    "dtype a number": (lambda: file_of({"a": F32 | {"dtype": 1}}, DATA), "dtype: expected"),
    "shape missing": (lambda: file_of({"a": {"dtype": "F32"}}), "shape: expected"),
    "shape negative": (lambda: file_of({"a": entry("F32", [-2, -2], 0, 16)}, DATA), "shape:"),
    "shape of bools": (lambda: file_of({"a": F32 | {"shape": [True, 4]}}, DATA), "shape:"),
    "shape 2**64": (lambda: file_of({"a": entry("U8", [2**64], 0, 16)}, DATA), "shape:"),
    "shape wraps to 0": (lambda: file_of({"a": entry("U8", [2**32, 2**32], 0, 0)}), "too large"),
    "shape wraps to 16": (
        lambda: file_of({"a": entry("U8", [2**60 + 1, 16], 0, 16)}, DATA),
        "too large",
    ),
    "strides overflow": (
        lambda: file_of({"a": entry("U8", [0, 2**40, 2**40], 0, 0)}),
        "too large",
    ),
    "many large dimensions": (
        lambda: file_of({"a": entry("U8", [2**62] * 100_000, 0, 0)}),
        "too large",
    ),
    "offsets missing": (lambda: file_of({"a": {"dtype": "U8", "shape": []}}), "data_offsets:"),
    "offsets three": (lambda: file_of({"a": F32 | {"data_offsets": [0, 1, 2]}}), "data_offsets:"),
    "offsets reversed": (lambda: file_of({"a": entry("U8", [1], 1, 0)}, b"x"), "data_offsets:"),
    "offsets negative": (lambda: file_of({"a": entry("U8", [1], -1, 0)}), "data_offsets:"),
    "offsets wrap": (
        lambda: file_of({"a": entry("U8", [1], 2**64 - 1, 2**64)}, b"x"),
        "data_offsets:",
    ),
    "offsets past the end": (
        lambda: file_of({"a": entry("U8", [2**40], 0, 2**40)}, DATA),
        "cut off",
    ),
    "too few bytes": (lambda: file_of({"a": entry("F32", [2, 2], 0, 15)}, DATA[:15]), "takes 16"),
    "overlap": (
        lambda: file_of({"a": F32, "b": entry("F32", [2, 2], 8, 24)}, DATA * 2),
        "b: begins 8 bytes before",
    ),
    "same bytes": (lambda: file_of({"a": F32, "b": F32}, DATA), "b: begins 16 bytes before"),
    "gap": (
        lambda: file_of({"a": F32, "b": entry("U8", [1], 17, 18)}, DATA + b"xy"),
        "b: begins 1 bytes after",
    ),
    "hole in front": (lambda: file_of({"a": entry("U8", [1], 1, 2)}, b"xy"), "begins 1 bytes"),
    "bytes behind": (lambda: file_of({"a": F32}, DATA + b"more"), "4 bytes follow"),
    "zip behind": (polyglot, "follow the last tensor"),
    "data of no tensor": (lambda: file_of({}, b"x"), "1 bytes follow"),
}

#: What is made, and the names of its tensors.
LOADED: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "good": (good, ["a", "b"]),
    "no tensors": (lambda: file_of({}), []),
    "padded": (lambda: file_of(json.dumps({"a": F32}).encode() + b" " * 99, DATA), ["a"]),
    "metadata null": (lambda: file_of({"__metadata__": None, "a": F32}, DATA), ["a"]),
    "more keys": (lambda: file_of({"a": F32 | {"more": "keys"}}, DATA), ["a"]),
    "scalar": (lambda: file_of({"a": entry("I64", [], 0, 8)}, bytes(8)), ["a"]),
    "nothing in it": (lambda: file_of({"a": entry("F32", [0, 2**40], 0, 0)}), ["a"]),
    "any order": (
        lambda: file_of({"z": entry("U8", [1], 16, 17), "a": F32}, DATA + b"x"),
        ["a", "z"],
    ),
    "a path": (lambda: file_of({"../../etc/passwd": F32}, DATA), ["../../etc/passwd"]),
    "long name": (lambda: file_of({"n" * 1_000_000: F32}, DATA), ["n" * 1_000_000]),
    "90 MB of spaces": (lambda: file_of(b"{}" + b" " * 90_000_000), []),
    "20 000 tensors": (partial(many, 20_000), [str(i) for i in range(20_000)]),
    "dimensions of one": (
        lambda: file_of({"a": entry("U8", [1] * 1000, 0, 1)}, b"x"),
        ["a"],
    ),
}


def read_all(path: Path) -> list[str]:
    """Read a file's tensors as well, and return their names."""
    tensors = read_safetensors(path).tensors
    return [name for name, stored in tensors.items() if stored.read().nbytes >= 0]


@needs_fork
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(make())
    with pytest.raises(FormatError) as caught:
        in_child(partial(read_all, path))
    assert caught.type is FormatError
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 1000


@needs_fork
@pytest.mark.parametrize("case", LOADED)
def test_loaded(case: str, tmp_path: Path) -> None:
    make, names = LOADED[case]
    path = tmp_path / "odd.safetensors"
    path.write_bytes(make())
    assert in_child(partial(read_all, path)) == names


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "cut.safetensors", good()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            read_safetensors(path)


INDEX = {"metadata": {"total_size": 32}, "weight_map": {"a": "one.safetensors"}}

#: Indices, and a part of the message; ``one.safetensors`` holds a, ``two.safetensors`` a and b.
BAD_INDICES: dict[str, tuple[Any, str]] = {
    "not json": (b"\x00\x01", "not strict JSON"),
    "empty": (b"", "not strict JSON"),
    "a list": (b"[]", "expected a JSON object, got a list"),
    "no map": ({"metadata": {}}, "expected an object 'weight_map'"),
    "map a list": ({"weight_map": ["a"]}, "expected an object 'weight_map'"),
    "map of numbers": ({"weight_map": {"a": 1}}, "expected an object 'weight_map'"),
    "map empty": ({"weight_map": {}}, "lists no tensors"),
    "name twice": (b'{"weight_map":{"a":"one.safetensors","a":"x"}}', "'a' is there twice"),
    "shard missing": ({"weight_map": {"a": "none.safetensors"}}, "'none.safetensors' is missing"),
    "shard without a name": ({"weight_map": {"a": ""}}, "is no name of a file"),
    "shard a folder": ({"weight_map": {"a": "."}}, "is missing"),
    "parent": ({"weight_map": {"a": "../one.safetensors"}}, "is no name of a file"),
    "parent later": ({"weight_map": {"a": "x/../../one.safetensors"}}, "is no name of a file"),
    "parent of Windows": ({"weight_map": {"a": "..\\one.safetensors"}}, "is no name of a file"),
    "absolute": ({"weight_map": {"a": "/one.safetensors"}}, "is no name of a file"),
    "drive": ({"weight_map": {"a": "C:one.safetensors"}}, "is no name of a file"),
    "zero byte": ({"weight_map": {"a": "one\0.safetensors"}}, "is no name of a file"),
    "surrogate": ({"weight_map": {"a": "\ud800"}}, "surrogates"),
    "absent in its shard": (
        {"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}},
        "lists it, but it is not there",
    ),
    "in two shards": (
        {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}},
        "one.safetensors holds it too",
    ),
    "in the other shard": (
        {"weight_map": {"c": "one.safetensors", "a": "three.safetensors"}},
        "lists it, but it is not there",
    ),
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_bad_index(case: str, tmp_path: Path) -> None:
    index, message = BAD_INDICES[case]
    (tmp_path / "in").mkdir()
    shards = {
        "in/one": {"a": F32},
        "in/two": {"a": F32, "b": entry("U8", [1], 16, 17)},
        "in/three": {"c": F32},
        "one": {"a": F32},
    }
    for name, header in shards.items():
        data = DATA + b"x" * (len(header) - 1)
        (tmp_path / f"{name}.safetensors").write_bytes(file_of(header, data))
    path = tmp_path / "in" / "model.safetensors.index.json"
    path.write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    with pytest.raises(FormatError, match=message):
        open_tensors(path)


SEEDS = (
    good(),
    file_of({"w": entry("F16", [3, 2], 0, 12), "v": entry("F8_E4M3", [4], 12, 16)}, DATA),
    file_of({"a": F32, "e": entry("I64", [0], 16, 16)}, DATA),
)
TOKENS = (
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\xff", b"-", b"0"),
    *(b"1e9", b"NaN", b"null", b"true", b"[]", b"{}", b'"F64"', b'"F4"', b'"shape"', b'"a"'),
    *(str(2**n + d).encode() for n in (31, 32, 63, 64) for d in (-1, 0, 1)),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    raw = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        span = draw(st.integers(0, 8))
        kind = draw(st.sampled_from(["token", "bytes", "cut", "copy", "length"]))
        if kind == "token":
            raw[at : at + span] = draw(st.sampled_from(TOKENS))
        elif kind == "bytes":
            raw[at : at + span] = draw(st.binary(max_size=8))
        elif kind == "cut":
            del raw[at:]
        elif kind == "copy":
            source = draw(st.integers(0, len(raw)))
            raw[at:at] = raw[source : source + 4 * span]
        else:
            # The length fits again, so that what is behind it is looked at.
            raw[:8] = max(0, raw.rfind(b"}") - 7).to_bytes(8, "little")
    return bytes(raw)


@pytest.mark.property
@settings(max_examples=max(300, settings.default.max_examples if settings.default else 0))
@given(raw=mutated())
def test_mutations_load_or_raise_the_typed_error(
    raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw)
    try:
        found = read_safetensors(path)
        taken = sum(stored.read().nbytes for stored in found.tensors.values())
    except FormatError as error:
        message = str(error)
    else:
        # Where the file is right, every byte behind the header is a tensor's.
        header = int.from_bytes(raw[:8], "little")
        assert found.problems or taken == len(raw) - 8 - header
        return
    assert message.startswith(str(path))
