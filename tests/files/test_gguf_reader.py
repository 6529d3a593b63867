"""What GGUF files hold is read right: values, shapes, byte orders, weights."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from files.gguf_bytes import (
    F32,
    KINDS,
    PLAIN,
    Q8_0,
    Gguf,
    array_head,
    floats,
    info,
    key,
    opened,
    q8_0,
    small,
    string,
)

from lowbits.backends.gguf.backend import GgufBackend
from lowbits.backends.gguf.quantize import QUANTIZERS
from lowbits.core.source import Extent
from lowbits.errors import FormatError
from lowbits.files import gguf_values
from lowbits.files.gguf import read_gguf
from lowbits.files.gguf_types import STORED_TYPES
from lowbits.files.gguf_values import STRING, VALUE_TYPES, GgufValue, StoredArray

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BACKEND = GgufBackend()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [2, 3])
def test_a_small_file(tmp_path: Path, order: str, version: int) -> None:
    file = opened(tmp_path, small(order, version))
    assert (file.version, file.byte_order) == (version, "little" if order == "<" else "big")
    assert file.architecture == "flux"
    assert dict(file.metadata) == {
        "general.architecture": "flux",
        "general.file_type": 7,
        "a.bool": True,
        "an.i64": -5,
        "an.f64": 0.25,
        "tokens": ("a", "", "\u00e9t\u00e9"),
        "numbers": (1, -2, 3),
    }
    assert file.problems == ()
    assert {name: (t.shape, t.type_name, t.nbytes) for name, t in file.tensors.items()} == {
        "norm.weight": ((4,), "F32", 16),
        "proj.weight": ((2, 32), "Q8_0", 68),
    }
    assert torch.equal(file.dequantize("norm.weight"), torch.tensor([1.0, 2, 3, -4]))
    codes = torch.arange(32.0)
    expected = torch.stack([0.5 * codes, -2 * (codes - 32)])
    assert torch.equal(file.dequantize("proj.weight"), expected)
    assert torch.equal(file.dequantize("proj.weight", torch.float16), expected.half())
    assert file.read("proj.weight").shape == (2, 34)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("str", "array", "bool")])
@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_of_each_type(tmp_path: Path, kind: str, order: str) -> None:
    top = 0.5 if kind in ("f32", "f64") else 2 ** (int(kind[1:]) - 1) - 1
    keys = [key("one", kind, top, order), key("some", kind, [top, 0], order)]
    keys.append(key("many", kind, [top] * 100, order))
    metadata = opened(tmp_path, Gguf(keys, order=order)).metadata
    assert metadata.typed("one") == GgufValue(kind, top)
    assert metadata.typed("some") == GgufValue(kind, (top, 0))
    assert metadata["many"] == (top,) * 100
    assert len(metadata) == 3
    assert "3 metadata values: one, some, many" in repr(metadata)


def test_a_header_longer_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbits.files.gguf_header._PIECE_BYTES", 24)
    words = [f"word {i}" * (i % 5) for i in range(50)]
    file = small()
    file.keys += [key("words", "str", words), key("long", "str", "x" * 100)]
    read = opened(tmp_path, file)
    assert read.metadata["words"] == tuple(words)
    assert read.metadata["long"] == "x" * 100
    assert torch.equal(read.dequantize("norm.weight"), torch.tensor([1.0, 2, 3, -4]))


def test_long_arrays_are_decoded_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = gguf_values.decode

    def counting(data: bytes, kind: Any, count: int, order: str) -> Any:
        decoded.append(count)
        return decode(data, kind, count, order)

    monkeypatch.setattr(gguf_values, "decode", counting)
    monkeypatch.setattr("lowbits.files.gguf_header.decode", counting)
    tokens = b"".join(string(f"token{i}") for i in range(200_000))
    keys = [
        array_head("tokenizer.ggml.tokens", "str", 200_000) + tokens,
        array_head("bytes", "u8", 8 << 20) + bytes(8 << 20),
        array_head("scores", "f32", 100) + floats(*range(100)),
        key("shape", "i32", [3, 4]),
    ]
    file = opened(tmp_path, Gguf(keys))
    assert decoded == [2]
    assert file.metadata["scores"] == tuple(range(100))
    assert file.metadata["scores"] is file.metadata["scores"]
    assert decoded == [2, 100]
    words = file.metadata["tokenizer.ggml.tokens"]
    assert isinstance(words, tuple)
    assert (len(words), words[-1]) == (200_000, "token199999")
    assert file.metadata["bytes"] == (0,) * (8 << 20)
    assert decoded == [2, 100, 200_000, 8 << 20]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("order", ["<", ">"])
def test_ordinary_types(tmp_path: Path, name: str, order: str) -> None:
    values = torch.arange(-3, 9).view(2, 2, 3).to(PLAIN[name])
    raw = values.view(-1).view(torch.uint8).view(12, -1)
    data = bytes((raw if order == "<" else raw.flip(1)).flatten().tolist())
    number = STORED_TYPES[name].number
    file = opened(tmp_path, Gguf([], [info("w", (3, 2, 2), number, 0, order)], data, order=order))
    assert file.tensors["w"].type_name == name
    assert file.read("w").dtype == PLAIN[name]
    assert torch.equal(file.read("w"), values)
    assert torch.equal(file.dequantize("w"), values.float())
    weight = file.weights()["w"]
    read = weight.read()
    assert (weight.scheme, weight.dtype, weight.shape) == (None, PLAIN[name], (2, 2, 3))
    assert isinstance(read, torch.Tensor)
    assert torch.equal(read, values)


def test_dimensions_from_none_to_five(tmp_path: Path) -> None:
    infos = [
        info("scalar", (), F32, 0),
        info("five", (2, 2, 1, 3, 1), F32, 32),
    ]
    file = opened(tmp_path, Gguf([], infos, floats(7) + bytes(28) + floats(*range(12))))
    assert torch.equal(file.dequantize("scalar"), torch.tensor(7.0))
    assert torch.equal(file.dequantize("five"), torch.arange(12.0).view(1, 3, 1, 2, 2))


def test_alignment_is_the_files(tmp_path: Path) -> None:
    keys = [key("general.alignment", "u32", 64)]
    infos = [info("a", (1,), F32, 0), info("b", (1,), F32, 64)]
    data = floats(1) + bytes(60) + floats(2)
    file = opened(tmp_path, Gguf(keys, infos, data, alignment=64))
    assert [file.dequantize(name).item() for name in "ab"] == [1, 2]
    assert all(tensor.offset % 64 == 0 for tensor in file.tensors.values())


def test_what_is_strange_is_reported(tmp_path: Path) -> None:
    keys = [
        key("general.architecture", "u32", 3),
        key("split.count", "u16", 3),
        key("comfy.gguf.orig_shape.gone", "i32", [1]),
    ]
    infos = [info("a", (1,), F32, 0), info("b", (1,), F32, 96), info("c", (8,), 77, 128)]
    data = floats(1) + bytes(92) + floats(2) + bytes(28) + bytes(40)
    file = opened(tmp_path, Gguf(keys, infos, data))
    assert file.architecture is None
    assert file.tensors["c"].nbytes == 40
    assert file.problems == (
        "64 bytes before b are of no tensor",
        "c cannot be read: its type 77 is not known; a newer version of lowbits may read it",
        "general.architecture is not a string",
        "it is one of 3 parts of a model; the others are not read",
        "comfy.gguf.orig_shape.gone is about no tensor",
    )
    trailing = opened(tmp_path, small().bytes() + bytes(60) + b"PK\x03\x04")
    assert trailing.problems == ("36 bytes follow the last tensor",)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (4, "its type Q4_2 was taken out of GGUF; quantize the model again"),
        (38, "its type IQ4_NL_8_8 was taken out of GGUF"),
        (9, "its type Q8_1 is one of activations, not of weights"),
        (2**32 - 1, "its type 4294967295 is not known; a newer version of lowbits may read it"),
    ],
)
def test_types_that_cannot_be_read_are_listed(tmp_path: Path, number: int, reason: str) -> None:
    file = opened(tmp_path, Gguf([], [info("w", (32,), number)], bytes(64)))
    weight = file.weights()["w"]
    assert weight.nbytes == file.tensors["w"].nbytes == 64
    pattern = f"model.gguf: w: it cannot be read: {reason}.* \\(at byte 64\\)"
    for read in (lambda: file.read("w"), lambda: file.dequantize("w"), weight.read):
        with pytest.raises(FormatError, match=pattern):
            read()


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    file = small()
    file.keys.append(array_head("many", "u8", 1000) + bytes(1000))
    read = opened(tmp_path, file)
    read.path.write_bytes(file.bytes()[:300])
    with pytest.raises(FormatError, match="proj.weight: the file was changed or replaced"):
        read.dequantize("proj.weight")
    with pytest.raises(FormatError, match="the file was changed or replaced"):
        read.metadata["many"]


@pytest.mark.parametrize("order", "<>")
def test_a_file_that_another_one_took_the_place_of(tmp_path: Path, order: str) -> None:
    """Of the same names and size, and with tensors where the others are."""

    def content(*values: float) -> Gguf:
        array = key("many", "f32", [*values] * 65, order)
        infos = [info("a", (1,), order=order), info("b", (1,), F32, 32, order)]
        data = floats(values[0], order=order) + bytes(28) + floats(values[1], order=order)
        return Gguf([array], infos, data, order=order)

    read = opened(tmp_path, content(1, 2))
    weights = read.weights()
    other = tmp_path / "other"
    other.write_bytes(content(2, 1).bytes())
    other.replace(read.path)
    asked: list[Callable[[], Any]] = [
        lambda: read.read("a"),
        lambda: read.dequantize("a"),
        weights["b"].read,
        lambda: read.metadata["many"],
    ]
    for ask in asked:
        with pytest.raises(FormatError, match="the file was changed or replaced since it was op"):
            ask()
    again = read_gguf(read.path)
    assert again.dequantize("a").tolist() == [2]
    assert again.metadata["many"] == (2, 1) * 65


def test_strings_that_end_behind_their_array(tmp_path: Path) -> None:
    """Their lengths were looked at once: a file may have changed within one tick of its clock."""
    array = StoredArray("tokens", VALUE_TYPES[STRING], 1, "<", Extent(tmp_path, 0, 12))
    with pytest.raises(FormatError, match="metadata 'tokens': the strings end too late"):
        array.decode(struct.pack("<Q", 200) + b"abcd")


def test_a_bad_array_is_found_when_it_is_asked_for(tmp_path: Path) -> None:
    keys = [key("tokens", "str", ["a", b"\xff"]), array_head("flags", "bool", 300) + b"\2" * 300]
    file = opened(tmp_path, Gguf(keys))
    with pytest.raises(FormatError, match=r"metadata 'tokens': 'utf-8' .* \(at byte 5\d\)"):
        file.metadata["tokens"]
    with pytest.raises(FormatError, match="metadata 'flags': a bool is 0 or 1, got 2"):
        file.metadata["flags"]


def test_names_that_are_not_there(tmp_path: Path) -> None:
    file = opened(tmp_path, small())
    for read in (file.read, file.dequantize):
        with pytest.raises(KeyError, match="gone"):
            read("gone")
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "gone.gguf")


def test_files_of_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "flux")
    writer.add_array("words", ["one", "two"])
    writer.add_float32("a.float", 0.5)
    weights, names = torch.randn(4, 256).numpy(), []
    for kind in gguf.GGMLQuantizationType:
        if kind.name in QUANTIZERS and kind.name not in ("F16", "Q1_0"):
            data = BACKEND.encode(torch.from_numpy(weights), kind.name).numpy()
            writer.add_tensor(kind.name, data, raw_dtype=kind)
            names.append(kind.name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "model.gguf")
    assert file.metadata["words"] == ("one", "two")
    assert file.architecture == "flux"
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert list(file.tensors) == list(theirs) == names
    for name, tensor in file.tensors.items():
        other = theirs[name]
        assert (tensor.offset, tensor.nbytes) == (other.data_offset, other.n_bytes)
        raw = file.read(name).contiguous().view(torch.uint8).flatten()
        assert raw.tolist() == other.data.view("uint8").flatten().tolist()
        expected = torch.from_numpy(gguf.quants.dequantize(other.data, other.tensor_type))
        bits = file.dequantize(name).view(torch.int32)
        assert torch.equal(bits, expected.view(4, 256).view(torch.int32))


def test_files_that_the_gguf_package_quantized(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "flux", endianess=gguf.GGUFEndian.LITTLE)
    weight = torch.randn(4, 256)
    names = ("BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "TQ1_0", "TQ2_0", "MXFP4")
    for name in names:
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "model.gguf")
    for name in names:
        ours = BACKEND.encode(weight, name)
        assert torch.equal(file.read(name).view(torch.uint8).view(4, -1), ours), name


def test_big_endian_files_of_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "flux", endianess=gguf.GGUFEndian.BIG)
    writer.add_uint32("number", 5)
    weight = torch.randn(4, 6)
    writer.add_tensor("f32", weight.numpy())
    writer.add_tensor("f16", weight.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(str(tmp_path / "model.gguf"))
    assert file.byte_order == "big"
    assert file.metadata["number"] == 5
    assert torch.equal(file.read("f32"), weight)
    assert torch.equal(file.read("f16"), weight.half())
    assert re.search("flux", str(file.metadata["general.architecture"]))


def test_tensors_may_come_in_any_order(tmp_path: Path) -> None:
    infos = [info("second", (32,), Q8_0, 64), info("first", (1,), F32, 0)]
    data = floats(3) + bytes(60) + q8_0(1, [1] * 32)
    file = opened(tmp_path, Gguf([], infos, data))
    assert file.dequantize("first").item() == 3
    assert file.dequantize("second").sum() == 32
    assert file.problems == ("32 bytes before second are of no tensor",)
