"""GGUF files that are written open in the gguf package, and here, with the same values."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from files.gguf_bytes import PLAIN, small

from lowbits.backends.gguf.backend import GgufBackend
from lowbits.backends.gguf.quantize import QUANTIZERS
from lowbits.errors import ConfigError, FormatError
from lowbits.files.gguf import read_gguf
from lowbits.files.gguf_types import STORED_TYPES
from lowbits.files.gguf_values import GgufValue
from lowbits.files.gguf_writer import TensorToWrite, write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

BACKEND = GgufBackend()
METADATA: dict[str, Any] = {
    "general.architecture": "flux",
    "general.file_type": 7,
    "plain.float": 0.5,
    "plain.bool": True,
    "empty": "",
    "a.u8": GgufValue("u8", 255),
    "an.i8": GgufValue("i8", -128),
    "a.u16": GgufValue("u16", 65535),
    "an.i16": GgufValue("i16", -5),
    "an.i32": GgufValue("i32", -(2**31)),
    "a.u64": GgufValue("u64", 2**64 - 1),
    "an.i64": GgufValue("i64", -(2**63)),
    "an.f64": GgufValue("f64", 0.1),
    "words": GgufValue("str", ("a", "", "\u00fc")),
    "shape": GgufValue("i32", (3, -4)),
    "flags": GgufValue("bool", (True, False)),
    "many": GgufValue("f32", (0.5,) * 100),
    "none": GgufValue("str", ()),
}


def stored(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a random tensor of a type, as a file holds it."""
    values = torch.randn(shape)
    if name in PLAIN:
        return (values * 10).to(PLAIN[name])
    if name in QUANTIZERS:
        return BACKEND.encode(values.view(-1, shape[-1]), name)
    kind = STORED_TYPES[name]
    return torch.zeros(values.numel() // kind.weights, kind.block_bytes, dtype=torch.uint8)


def written(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Write random tensors, by name with type and shape; return what was written."""
    data = {name: stored(*tensor) for name, tensor in tensors.items()}
    infos = [TensorToWrite(name, shape, kind) for name, (kind, shape) in tensors.items()]
    write_gguf(path, metadata, infos, lambda info: data[info.name])
    return data


EVERY_TYPE = {name: (name, (3, max(256, kind.weights))) for name, kind in STORED_TYPES.items()}
SHAPES = {
    "five": ("F32", (4, 3, 1, 2, 2)),
    "convolution": ("F16", (2, 3, 3, 3)),
    "blocks": ("Q8_0", (2, 3, 32)),
    "vector": ("Q4_0", (64,)),
    "scalar": ("F32", ()),
    "n" * 127: ("BF16", (5,)),
}


@pytest.mark.parametrize("tensors", [EVERY_TYPE, SHAPES, {}], ids=["types", "shapes", "none"])
def test_written_files_are_read_here(
    tmp_path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    path = tmp_path / "model.gguf"
    data = written(path, tensors, METADATA)
    file = read_gguf(path)
    assert file.problems == ()
    assert list(file.metadata) == list(METADATA)
    for key, value in METADATA.items():
        assert file.metadata.typed(key) == GgufValue.of(value)
    assert list(file.tensors) == list(tensors)
    for name, (kind, shape) in tensors.items():
        tensor = file.tensors[name]
        assert (tensor.type_name, tensor.shape) == (kind, shape)
        assert tensor.offset % 32 == 0
        read = file.read(name)
        assert torch.equal(
            read.view(torch.uint8) if read.dim() else read, same_form(data[name], read)
        )
    again = tmp_path / "again.gguf"
    typed = {key: file.metadata.typed(key) for key in file.metadata}
    infos = [TensorToWrite(name, t.shape, t.type_name) for name, t in file.tensors.items()]
    write_gguf(again, typed, infos, lambda info: file.read(info.name))
    assert again.read_bytes() == path.read_bytes()


def same_form(data: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    return data.view(read.shape).view(torch.uint8) if read.dim() else data


@pytest.mark.parametrize("tensors", [EVERY_TYPE, SHAPES, {}], ids=["types", "shapes", "none"])
def test_written_files_are_read_by_the_gguf_package(
    tmp_path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    gguf = pytest.importorskip("gguf")
    known = {kind.name for kind in gguf.GGMLQuantizationType}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor[0] in known}
    path = tmp_path / "model.gguf"
    data = written(path, tensors, METADATA)
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        expected = GgufValue.of(value).value
        contents = reader.get_field(key).contents()
        assert contents == (list(expected) if isinstance(expected, tuple) else expected), key
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    for tensor in reader.tensors:
        kind, shape = tensors[tensor.name]
        assert tensor.tensor_type.name == kind
        assert tuple(tensor.shape.tolist()) == shape[::-1]
        expected_bytes = data[tensor.name].contiguous().view(-1).view(torch.uint8).tolist()
        assert tensor.data.reshape(-1).view("uint8").tolist() == expected_bytes


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def read(info: TensorToWrite) -> torch.Tensor:
        gc.collect()
        assert all(tensor() is None for tensor in alive)
        tensor = torch.ones(info.shape)
        alive.append(weakref.ref(tensor))
        return tensor

    infos = [TensorToWrite(f"w{i}", (8, 8), "F32") for i in range(4)]
    write_gguf(tmp_path / "model.gguf", {}, infos, read)
    assert len(alive) == 4


def test_views_and_parameters_are_written(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    infos = [TensorToWrite("w", (3, 2), "F32")]
    write_gguf(tmp_path / "model.gguf", {}, infos, lambda _: weight.t())
    assert torch.equal(read_gguf(tmp_path / "model.gguf").read("w"), weight.detach().t())


def test_tensors_of_a_big_endian_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbits.files.gguf_writer._IS_BIG_ENDIAN", True)
    data = torch.arange(4, dtype=torch.int16)
    infos = [TensorToWrite("w", (4,), "I16")]
    write_gguf(tmp_path / "model.gguf", {}, infos, lambda _: data)
    assert read_gguf(tmp_path / "model.gguf").read("w").tolist() == [0, 256, 512, 768]
    assert data.tolist() == [0, 1, 2, 3]


def write(path: Path, *, metadata: Any = (), tensors: Any = (), data: Any = None) -> None:
    write_gguf(path, dict(metadata), tensors, lambda _: data)


def tensor(name: str = "w", shape: tuple[int, ...] = (2,), kind: str = "F32") -> dict[str, Any]:
    return {"tensors": [TensorToWrite(name, shape, kind)]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tensor(""), "tensor name '' has 0 bytes; expected 1 to 127"),
        (tensor("\u00fc" * 64), "has 128 bytes; expected 1 to 127"),
        (tensor("\udc80"), "cannot be written as UTF-8"),
        (tensor(kind="Q4K"), "w: unknown GGUF type 'Q4K'; did you mean 'Q4_K'"),
        (tensor(kind="Q8_K"), "w: unknown GGUF type 'Q8_K'; .*known: F32, F16"),
        (tensor(shape=(1,) * 6), r"w: cannot write shape \(1, 1, 1, 1, 1, 1\); up to 5"),
        (tensor(shape=(2, 0)), r"w: cannot write shape \(2, 0\)"),
        (tensor(shape=(2, 33), kind="Q8_0"), "w: rows of 33 do not hold whole blocks of Q8_0"),
        (tensor(shape=(), kind="Q8_0"), "w: rows of 1 do not hold whole blocks of Q8_0"),
        ({"tensors": tensor()["tensors"] * 2}, "tensor name 'w' is there twice"),
        ({"metadata": {"": 1}}, "metadata key '' has 0 bytes; expected 1 to 65535"),
        ({"metadata": {"k" * 65536: 1}}, "has 65536 bytes; expected 1 to 65535"),
        ({"metadata": {"k": -1}}, "metadata of type u32 cannot hold -1"),
        ({"metadata": {"k": 2**32}}, "metadata of type u32 cannot hold 4294967296"),
        ({"metadata": {"k": 1e39}}, r"metadata of type f32 cannot hold 1e\+39"),
        ({"metadata": {"k": "\udc80"}}, "metadata of type str cannot hold"),
        ({"metadata": {"k": [1]}}, "metadata is str, bool, int, float or a GgufValue, got list"),
        ({"metadata": {"k": None}}, "got NoneType"),
        ({"metadata": {"k": GgufValue("i33", 1)}}, "unknown metadata type 'i33'; known: u8, i8"),
        ({"metadata": {"k": GgufValue("i8", 128)}}, "metadata of type i8 cannot hold 128"),
        ({"metadata": {"k": GgufValue("i8", True)}}, "metadata of type i8 cannot hold True"),
        ({"metadata": {"k": GgufValue("bool", 1)}}, "metadata of type bool cannot hold 1"),
        ({"metadata": {"k": GgufValue("str", (1,))}}, "metadata of type str cannot hold 1"),
        ({"metadata": {"k": GgufValue("i32", (1, 0.5))}}, "metadata of type i32 cannot hold 0.5"),
        ({"metadata": {"general.alignment": 64}}, "general.alignment is always 32 here, got 64"),
    ],
)
def test_what_cannot_be_written_is_refused_first(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ConfigError, match=message):
        write(path, **content)
    assert [*tmp_path.iterdir()] == []


def test_the_alignment_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, metadata={"general.alignment": 32})
    assert read_gguf(path).metadata["general.alignment"] == 32


@pytest.mark.parametrize(
    ("content", "data"),
    [
        (tensor(), torch.zeros(3)),
        (tensor(), torch.zeros(2, dtype=torch.float16)),
        (tensor(), torch.zeros(4, dtype=torch.float16)),
        (tensor(shape=(2, 3)), torch.zeros(3, 2)),
        (tensor(shape=(1, 32), kind="Q8_0"), torch.zeros(33, dtype=torch.uint8)),
        (tensor(shape=(1, 32), kind="Q8_0"), torch.zeros(34, dtype=torch.int8)),
    ],
)
def test_other_bytes_than_announced_leave_the_old_file(
    tmp_path: Path, content: dict[str, Any], data: torch.Tensor
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(small().bytes())
    with pytest.raises(FormatError, match=r"model.gguf: w: .* of shape .* is \d+ bytes of .*; got"):
        write(path, **content, data=data)
    assert path.read_bytes() == small().bytes()
    assert [*tmp_path.iterdir()] == [path]


def failing(error: BaseException) -> Callable[[TensorToWrite], torch.Tensor]:
    def read(_: TensorToWrite) -> torch.Tensor:
        raise error

    return read


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt(), MemoryError()])
def test_whatever_is_raised_the_old_file_stays(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(small().bytes())
    with pytest.raises(type(error)):
        write_gguf(path, METADATA, tensor()["tensors"], failing(error))
    assert path.read_bytes() == small().bytes()
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_is_written_over_the_one_that_it_is_read_from(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(small().bytes())
    file = read_gguf(path)
    before = {name: file.dequantize(name) for name in file.tensors}
    infos = [TensorToWrite(name, t.shape, "F32") for name, t in file.tensors.items()]
    write_gguf(path, {}, infos, lambda info: file.dequantize(info.name))
    after = read_gguf(path)
    for name, values in before.items():
        assert torch.equal(after.read(name), values)
