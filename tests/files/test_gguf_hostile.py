"""Files made to hurt: each is refused with the typed error, or loads right, fast and in little."""

from __future__ import annotations

import os
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from files.forked import DiedError, in_child, needs_fork
from files.gguf_bytes import (
    F32,
    Q8_0,
    Gguf,
    array_head,
    floats,
    info,
    key,
    q8_0,
    small,
    string,
)

from lowbits.errors import FormatError
from lowbits.files import gguf_header
from lowbits.files.gguf import read_gguf

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_fork

HUGE = 2**63
SCALAR = [info("w", (1,))]
ONE = floats(1)


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Open a file, decode all metadata, and read every tensor in each way there is."""
    file = read_gguf(path)
    for name in file.metadata:
        file.metadata.typed(name)
    for weight in file.weights().values():
        weight.read()
    return {name: file.dequantize(name) for name in file.tensors}


def one(**values: Any) -> bytes:
    """Return a file of one float, with something changed."""
    return Gguf(**{"infos": SCALAR, "data": ONE} | values).bytes()


def keyed(*keys: bytes) -> bytes:
    return one(keys=list(keys))


def shaped(dims: tuple[int, ...], number: int = F32, data: bytes = bytes(64), **more: Any) -> bytes:
    return Gguf([], [info("w", dims, number, **more)], data).bytes()


def two(first: int, second: int, data: bytes = bytes(128)) -> bytes:
    """Return a file of two tensors of 64 bytes at some offsets."""
    infos = [info("a", (16,), F32, first), info("b", (16,), F32, second)]
    return Gguf([], infos, data).bytes()


def nested(depth: int) -> bytes:
    head = struct.pack("<IQ", 9, 1)
    return keyed(string("k") + struct.pack("<I", 9) + head * depth + struct.pack("<IQI", 4, 1, 0))


def short(data: bytes, nbytes: int) -> bytes:
    return data[:-nbytes]


ALIGNMENT = "general.alignment"
TRUNCATED = "the file is truncated: .*needs {} bytes, has"

#: What is wrong, the bytes, and what the error says.
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "three bytes": (b"GGU", r"the version needs 7 bytes, has 3"),
    "magic only": (b"GGUF", TRUNCATED.format(8)),
    "another magic": (b"PK\x03\x04" + bytes(60), r"not a GGUF file: it begins with b'PK.x03.x04'"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "not a GGUF file"),
    "magic in the other order": (one(magic=b"FUGG"), "not a GGUF file"),
    "version 0": (one(version=0), r"GGUF version 0; versions 2 and 3 are read \(at byte 4\)"),
    "version 1": (one(version=1), "GGUF version 1;"),
    "version 4": (one(version=4), "GGUF version 4;"),
    "version 2^32-1": (one(version=2**32 - 1), "GGUF version 4294967295;"),
    "big-endian version 4": (one(version=4, order=">"), "GGUF version 4;"),
    "2^63 keys": (one(key_count=HUGE), "a header of 9223372036854775808 metadata values needs"),
    "2^64-1 keys": (one(key_count=2 * HUGE - 1), TRUNCATED.format(r"\d+")),
    "one key too many": (one(key_count=1), "a tensor's name has 0 bytes"),
    "2^40 tensors and a zero tail": (one(tensor_count=2**40, data=bytes(1 << 20)), "tensors needs"),
    "2^63 tensors": (one(tensor_count=HUGE), "9223372036854775808 tensors needs"),
    "100 000 tensors": (one(tensor_count=100_000, data=bytes(1 << 22)), "at most 65536 are read"),
    "100 000 keys": (one(key_count=100_000, data=bytes(1 << 22)), "100000 metadata values; at"),
    "array of 2^62": (keyed(array_head("k", "u8", 2**62)), r"metadata 'k' needs \d+ bytes, has"),
    "array of 2^40 strings": (keyed(array_head("k", "str", 2**40)), "metadata 'k' needs"),
    "array of 2^64-1 doubles": (keyed(array_head("k", "f64", 2 * HUGE - 1)), "metadata 'k' needs"),
    "3 M strings": (
        keyed(array_head("k", "str", 3_000_000) + bytes(24_000_000)),
        "arrays hold more than 2097152 strings",
    ),
    "a string in an array of 2^63": (
        keyed(array_head("k", "str", 2) + struct.pack("<Q", HUGE) + bytes(100)),
        "metadata 'k' needs",
    ),
    "nested arrays": (nested(1), "metadata 'k' is an array of arrays, which are not read"),
    "5000 nested arrays": (nested(5000), "array of arrays"),
    "key of 2^63 bytes": (keyed(struct.pack("<Q", HUGE) + bytes(50)), "a metadata key needs"),
    "key without a name": (keyed(key("", "u8", 1)), "a metadata key has 0 bytes; expected 1 to"),
    "key of 100 000 bytes": (keyed(key("k" * 100_000, "u8", 1)), "has 100000 bytes; expected 1 to"),
    "key that is not UTF-8": (keyed(key(b"\xff\xfe", "u8", 1)), "a metadata key is not UTF-8"),
    "value that is not UTF-8": (keyed(key("k", "str", b"\xc3")), "metadata 'k' is not UTF-8"),
    "string past the end": (
        keyed(string("k") + struct.pack("<IQ", 8, 2**40)),
        r"metadata 'k' needs 109\d+ bytes",
    ),
    "40 MB in a string": (keyed(key("k", "str", "x" * 40_000_000)), "values take more than"),
    "key of an unknown type": (
        keyed(string("k") + struct.pack("<IQ", 13, 0)),
        "metadata 'k' is of the unknown type 13",
    ),
    "bool of 2": (keyed(string("k") + struct.pack("<IB", 7, 2)), "a bool is 0 or 1, got 2"),
    "key twice": (keyed(key("k", "u8", 1), key("k", "u8", 2)), "metadata 'k' is there twice"),
    "alignment 0": (keyed(key(ALIGNMENT, "u32", 0)), "general.alignment is 0; expected a power"),
    "alignment 1": (keyed(key(ALIGNMENT, "u32", 1)), "general.alignment is 1"),
    "alignment 48": (keyed(key(ALIGNMENT, "u32", 48)), "general.alignment is 48"),
    "alignment 2^31": (keyed(key(ALIGNMENT, "u32", 2**31)), "general.alignment is 2147483648"),
    "alignment of type u64": (keyed(key(ALIGNMENT, "u64", 32)), "general.alignment is not of type"),
    "alignment of type bool": (keyed(key(ALIGNMENT, "bool", True)), "is not of type u32"),
    "array of alignments": (keyed(key(ALIGNMENT, "u32", [32])), "is not of type u32"),
    "tensor twice": (
        Gguf([], [info("w", (1,)), info("w", (1,), offset=32)], bytes(64)).bytes(),
        r"w: it is there twice \(at byte 57\)",
    ),
    "tensor without a name": (one(infos=[info("", (1,))]), "a tensor's name has 0 bytes"),
    "tensor name of 1 MB": (one(infos=[info("n" * 2**20, (1,))]), "name has 1048576 bytes"),
    "tensor name of 2^63 bytes": (
        one(infos=[struct.pack("<Q", HUGE) + bytes(40)]),
        "a tensor's name needs",
    ),
    "tensor name that is not UTF-8": (one(infos=[info(b"\x80", (1,))]), "name is not UTF-8"),
    "6 dimensions": (shaped((1,) * 6), "w: it has 6 dimensions; at most 5 are read"),
    "100 dimensions": (shaped((1,), dimensions=100), "w: it has 100 dimensions"),
    "2^31 dimensions": (shaped((1,), dimensions=2**31), "w: it has 2147483648 dimensions"),
    "dimension 0": (shaped((0,)), r"w: its shape \(0,\) holds no values, or too many"),
    "dimension 0 and 2^63": (shaped((HUGE, 0)), r"w: its shape \(0, 9223372036854775808\)"),
    "dimension -1": (shaped((2**64 - 1,)), r"w: its shape \(18446744073709551615,\)"),
    "2^32 x 2^32": (shaped((2**32, 2**32)), r"w: its shape \(4294967296, 4294967296\) holds no"),
    "wraps to 16": (shaped((16, 2**60 + 1)), "w: its shape"),
    "2^63-1 x 2": (shaped((2**63 - 1, 2)), "w: its shape"),
    "bytes wrap": (shaped((2**62,)), r"w: the file is truncated: needs 18446744073709551680 bytes"),
    "Q8_0 wraps": (shaped((2**63 - 32,), Q8_0), "w: the file is truncated: needs"),
    "broken blocks": (shaped((33,), Q8_0), "w: its rows of 33 do not hold whole blocks of Q8_0"),
    "blocks without dimensions": (shaped((), Q8_0), "w: its rows of 1 do not hold whole blocks"),
    "blocks across rows": (shaped((16, 2), Q8_0), "w: its rows of 16 do not hold whole blocks"),
    "offset beyond the end": (shaped((16,), offset=64), "w: the file is truncated: needs 192"),
    "offset 2^64-64": (shaped((16,), offset=2**64 - 64), "w: the file is truncated: needs 184"),
    "offset 2^63": (shaped((16,), offset=HUGE), "w: the file is truncated: needs 922"),
    "unknown type beyond the end": (shaped((16,), 99, offset=2**40), "w: the file is truncated"),
    "offset 4": (shaped((8,), offset=4), "w: its offset 4 is not a multiple of 32"),
    "same offset twice": (two(0, 0), "a: its bytes overlap those of b .at byte 96.$"),
    "half of a tensor shared": (two(0, 32), "a: its bytes overlap those of b .at byte 96.$"),
    "shared, in the other order": (two(32, 0), "b: its bytes overlap those of a .at byte 96.$"),
    "last byte missing": (
        short(two(0, 64), 1),
        "b: the file is truncated: needs 224 bytes, has",
    ),
    "no data": (Gguf([], SCALAR).header(), "w: the file is truncated: needs 68 bytes, has 57"),
    "unknown type": (shaped((16,), 77), "w: it cannot be read: its type 77 is not known"),
    "removed type": (shaped((16,), 31), "w: it cannot be read: its type Q4_0_4_4 was taken out"),
    "type of activations": (shaped((16,), 15), "w: it cannot be read: its type Q8_K is one of"),
    "NaN": (one(data=floats(float("nan"))), "w: it holds NaN or infinity"),
    "infinite scale": (
        shaped((32,), Q8_0, q8_0(float("inf"), [0] * 32)),
        "w: it holds NaN or infinity",
    ),
    "original shape of 2^62": (
        keyed(key("comfy.gguf.orig_shape.w", "i64", [2**62])),
        r"w: its original shape \(4611686018427387904,\) is none of 1 values",
    ),
    "original shape of many": (
        keyed(array_head("comfy.gguf.orig_shape.w", "i32", 100_000) + bytes(400_000)),
        "w: its original shape",
    ),
    "big-endian counts in a little-endian file": (
        b"GGUF" + struct.pack("<I", 3) + struct.pack(">QQ", 1, 0) + bytes(64),
        "the file is truncated: a header of",
    ),
}

ARCHIVE = BytesIO()
with zipfile.ZipFile(ARCHIVE, "w") as archive:
    archive.writestr("payload.txt", "x")

#: What looks wrong and is not: the values that come out.
LOADED: dict[str, tuple[bytes, dict[str, list[float]]]] = {
    "nothing in it": (Gguf().bytes(), {}),
    "no padding after the header": (Gguf().header(), {}),
    "an archive behind it": (one() + ARCHIVE.getvalue(), {"w": [1]}),
    "4 KB behind it": (one() + bytes(4096), {"w": [1]}),
    "a name that is a path": (one(infos=[info("../../etc/w", (1,))]), {"../../etc/w": [1]}),
    "a name with a zero byte": (one(infos=[info("a\0b", (1,))]), {"a\0b": [1]}),
    "a name of 60 000 bytes": (one(infos=[info("n" * 60_000, (1,))]), {"n" * 60_000: [1]}),
    "no dimensions": (one(infos=[info("w", ())]), {"w": [1]}),
    "5 dimensions": (one(infos=[info("w", (1, 2, 1, 2, 1))], data=floats(*range(4))),
                     {"w": [0, 1, 2, 3]}),
    "empty strings and arrays": (
        keyed(key("a", "str", ""), key("b", "str", []), key("c", "u8", [])),
        {"w": [1]},
    ),
    "2 M empty strings": (keyed(array_head("k", "str", 1 << 21) + bytes(8 << 21)), {"w": [1]}),
    "8 MB of bytes in an array": (keyed(array_head("k", "u8", 8 << 20) + bytes(8 << 20)),
                                  {"w": [1]}),
    "an infinite float in metadata": (keyed(key("k", "f32", float("inf"))), {"w": [1]}),
    "big-endian": (small(">").bytes(), {"norm.weight": [1, 2, 3, -4]}),
    "version 2": (small(version=2).bytes(), {"norm.weight": [1, 2, 3, -4]}),
}  # fmt: skip


def outcome(path: Path) -> Callable[[], dict[str, list[float]]]:
    return lambda: {name: values.flatten().tolist() for name, values in read_all(path).items()}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    data, message = REFUSED[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        in_child(outcome(path))
    assert caught.value.path == str(path)
    assert caught.value.offset is not None


@pytest.mark.parametrize("name", LOADED)
def test_loaded(name: str, tmp_path: Path) -> None:
    data, expected = LOADED[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    values = in_child(outcome(path))
    assert {name: values[name] for name in expected} == expected


def test_enough_of_them() -> None:
    assert len(REFUSED) + len(LOADED) >= 80


@pytest.mark.parametrize("count", [2**40, 2**27])
@pytest.mark.parametrize("kind", ["keys", "tensors", "strings", "bytes"])
def test_sparse_file_of_8_gb(tmp_path: Path, kind: str, count: int) -> None:
    """As many bytes as a count may need: bounded by what is left, it would take an hour."""
    heads = {
        "keys": Gguf(key_count=count).header(),
        "tensors": Gguf(tensor_count=count).header(),
        "strings": Gguf([array_head("k", "str", count)]).header(),
        "bytes": Gguf([array_head("k", "u8", count)]).header(),
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(heads[kind])
    os.truncate(path, 8 << 30)
    message = "is truncated: |at most 65536 are|more than 2097152 strings|at most 16777216 are"
    with pytest.raises(FormatError, match=message):
        in_child(outcome(path))


#: Values that a file is opened by, and what is said where they are long arrays.
LONG_ARRAYS = {
    "general.architecture": "general.architecture is not a string",
    "general.alignment": "general.alignment is not of type u32",
    "split.count": "split.count is not a number",
    "comfy.gguf.orig_shape.w": "w: its original shape is none of 1 values",
    "comfy.gguf.orig_shape.gone": "comfy.gguf.orig_shape.gone is about no tensor",
}


@pytest.mark.parametrize("kind", ["f32", "u32", "str"])
@pytest.mark.parametrize("name", LONG_ARRAYS)
def test_long_arrays_are_not_decoded_to_open_a_file(tmp_path: Path, name: str, kind: str) -> None:
    count, nbytes = (1, 300 << 20) if kind == "str" else (16_000_000, 64_000_000)
    array = array_head(name, kind, count) + (struct.pack("<Q", nbytes) if kind == "str" else b"")
    start = Gguf([array], tensor_count=1).header()
    path = tmp_path / "model.gguf"
    path.write_bytes(start)
    os.truncate(path, len(start) + nbytes)
    with path.open("ab") as file:
        file.write(SCALAR[0] + bytes(64))

    def said() -> str:
        try:
            return "; ".join(read_gguf(path).problems)
        except FormatError as error:
            return str(error)

    assert LONG_ARRAYS[name] in in_child(said)


def test_sparse_tensor_of_8_gb_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(Gguf([], [info("w", (1 << 31,))]).bytes())
    os.truncate(path, (8 << 30) + 64)

    def shape() -> tuple[int, ...]:
        return read_gguf(path).tensors["w"].shape

    assert in_child(shape) == (1 << 31,)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def linked_fifo(path: Path) -> None:
    os.mkfifo(path.with_suffix(".fifo"))
    path.symlink_to(path.with_suffix(".fifo"))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "error"),
    [(Path.mkdir, OSError), (fifo, FormatError), (linked_fifo, FormatError), (device, FormatError)],
)
def test_what_is_no_file(
    tmp_path: Path, make: Callable[[Path], None], error: type[Exception]
) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    with pytest.raises(error, match="not a regular file|Is a directory"):
        in_child(outcome(path))


def test_what_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(one())
    path.chmod(0)
    if os.access(path, os.R_OK):
        path.chmod(0o600)
        pytest.skip("needs a user who is not root")
    with pytest.raises(PermissionError):
        read_gguf(path)


def test_cut_at_every_byte(tmp_path: Path) -> None:
    """Whatever is missing is noticed, down to the last byte, and where is said."""
    data = small().bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert set(read_all(path)) == {"norm.weight", "proj.weight"}
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match="truncated|the file is empty") as caught:
            read_gguf(path)
        assert caught.value.offset is not None
        assert caught.value.offset <= len(data)


def test_a_file_cut_while_its_header_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(small().bytes())
    status = path.stat()
    stamp = status.st_mtime_ns, status.st_size, status.st_ino
    path.write_bytes(small().bytes()[:100])
    monkeypatch.setattr(gguf_header, "stamp_of", lambda _: stamp)
    with pytest.raises(FormatError, match="the file became shorter while it was read"):
        read_gguf(path)


def test_the_harness_notices(tmp_path: Path) -> None:
    def hang() -> None:
        while True:
            pass

    with pytest.raises(DiedError, match="ended by SIGPROF"):
        in_child(hang)
    with pytest.raises((MemoryError, RuntimeError)):
        in_child(lambda: torch.ones(1 << 28).sum().item())
    assert in_child(lambda: 5) == 5
