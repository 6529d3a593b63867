"""Safetensors files, folders and indices, read as they are meant."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from files.forked import become_nobody, in_child, needs_fork
from files.raw import assert_same_bits, entry, file_of, random_bytes
from safetensors.torch import load_file, save_file
from torch import nn

from lowbits.core.memory import bytes_of
from lowbits.core.source import Extent
from lowbits.errors import FormatError
from lowbits.files.pickles import open_pickle
from lowbits.files.safetensors import DTYPES, read_safetensors
from lowbits.files.sharded import open_tensors
from lowbits.files.weights import plain_weights, read_into

if TYPE_CHECKING:
    from collections.abc import Callable


def save(path: Path, **names: int) -> None:
    """Write a file of small tensors, each of one value."""
    save_file({name: torch.full((2,), float(value)) for name, value in names.items()}, path)


def values(path: Path, variant: str | None = None) -> dict[str, float]:
    opened = open_tensors(path, variant)
    return {name: stored.read()[0].item() for name, stored in opened.tensors.items()}


def index(path: Path, **weight_map: str) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def test_every_dtype_is_read_as_the_safetensors_package_reads_it(tmp_path: Path) -> None:
    tensors = {str(dtype): random_bytes(dtype, 3, 4) for dtype in DTYPES.values()}
    path = tmp_path / "ünï côdé.safetensors"
    save_file(tensors, path, {"format": "pt"})
    opened = read_safetensors(path)
    assert opened.metadata == {"format": "pt"}
    found = {name: stored.read() for name, stored in opened.tensors.items()}
    assert_same_bits(found, load_file(path))
    assert_same_bits(found, tensors)


def test_a_dtype_that_torch_lacks_is_told(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    header = {
        "a": entry("F6_E3M2", [4], 0, 3),
        "b": entry("U8", [1], 3, 4),
        "c": entry("F4", [2, 1], 4, 5),
    }
    path.write_bytes(file_of(header, bytes(5)))
    opened = open_tensors(path)
    assert list(opened.tensors) == ["b"]
    assert opened.problems["a"].startswith("dtype 'F6_E3M2', which torch")
    assert opened.problems["c"].startswith("F4 with rows of")
    with pytest.raises(FormatError, match="a: dtype 'F6_E3M2', which torch"):
        opened.require_readable()
    save(path, x=1)
    open_tensors(path).require_readable()


def test_plain_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(6, dtype=torch.bfloat16).view(2, 3)}, path)
    weight = plain_weights(read_safetensors(path).tensors)["w"]
    assert (weight.name, weight.shape, weight.dtype) == ("w", (2, 3), torch.bfloat16)
    assert (weight.nbytes, weight.scheme) == (12, None)
    found = weight.read()
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]


def change(path: Path, how: str) -> None:
    """Change a file that was opened, its size too or not."""
    old = path.read_bytes()
    if how == "cut":
        path.write_bytes(old[:-1])
    elif how == "written over":
        path.write_bytes(old[:-4] + bytes(4))
        os.utime(path, ns=(1, 1))
    elif how == "replaced":
        status = path.stat()
        other = path.with_name("other")
        other.write_bytes(old[:-4] + bytes(4))
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(path)
    elif how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "written over", "replaced", "a pipe", "gone"])
def test_a_file_that_was_changed_since_it_was_opened(how: str, tmp_path: Path) -> None:
    if how == "a pipe" and sys.platform == "win32":
        pytest.skip("Windows has no pipes in folders")
    path = tmp_path / "a.safetensors"
    save(path, a=1)
    stored = read_safetensors(path).tensors["a"]
    assert stored.read().tolist() == [1, 1]
    change(path, how)
    message = {"a pipe": "not a regular file", "gone": "No such file"}
    with pytest.raises((FormatError, FileNotFoundError), match=message.get(how, "changed or rep")):
        stored.read()


def test_a_part_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    with pytest.raises(FormatError, match="w: the file ends after 2 of 4 bytes of it .at byte 3"):
        read_into(torch.empty(4, dtype=torch.uint8), Extent(path, 3, 4), "w")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes in folders")
def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(FormatError, match="not a regular file"):
            read_safetensors(path)
        with pytest.raises(FormatError, match="not a regular file"):
            open_pickle(path)
    with pytest.raises(IsADirectoryError):
        read_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_tensors(tmp_path / "none.safetensors")


def read_as_nobody(path: Path) -> None:
    become_nobody()
    read_safetensors(path)


@needs_fork
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, a=1)
    path.chmod(0)
    with pytest.raises(PermissionError):
        in_child(lambda: read_as_nobody(path))


def test_a_folder_of_one_file(tmp_path: Path) -> None:
    save(tmp_path / "diffusion_pytorch_model.safetensors", a=1)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "._diffusion_pytorch_model.safetensors").write_bytes(b"of a Mac")
    opened = open_tensors(tmp_path)
    assert opened.files == (tmp_path / "diffusion_pytorch_model.safetensors",)
    assert values(tmp_path) == {"a": 1}


def test_a_folder_of_files_of_different_names(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors", {"k": "1", "x": "1"})
    save_file({"b": torch.ones(1)}, tmp_path / "two.v1-5.safetensors", {"k": "2", "y": "2"})
    opened = open_tensors(tmp_path)
    assert list(opened.tensors) == ["a", "b"]
    assert opened.metadata == {"k": "1", "x": "1", "y": "2"}
    save(tmp_path / "zwei.safetensors", b=1)
    with pytest.raises(FormatError, match="b: two.v1-5.safetensors holds it too"):
        open_tensors(tmp_path)


def test_a_folder_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no file in it ends with .safetensors"):
        open_tensors(tmp_path)


def test_variants(tmp_path: Path) -> None:
    save(tmp_path / "model.fp16.safetensors", a=16)
    assert values(tmp_path) == {"a": 16}
    save(tmp_path / "model.bf16.safetensors", a=17)
    with pytest.raises(FormatError, match="no file without a variant; variants there: bf16, fp16"):
        open_tensors(tmp_path)
    save(tmp_path / "model.safetensors", a=32)
    assert values(tmp_path) == {"a": 32}
    assert values(tmp_path, "bf16") == {"a": 17}
    with pytest.raises(FormatError, match="of variant 'ema'; variants there: bf16, fp16, none"):
        open_tensors(tmp_path, "ema")


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("m.safetensors.index.fp16.json", "m-0000{}-of-00002.fp16.safetensors"),
        ("m.safetensors.index.fp16.json", "m.fp16-0000{}-of-00002.safetensors"),
        ("m.fp16.safetensors.index.json", "m.fp16-0000{}-of-00002.safetensors"),
    ],
)
def test_shards_of_a_variant(name: str, shard: str, tmp_path: Path) -> None:
    save(tmp_path / "m.safetensors", a=32, b=32)
    save(tmp_path / shard.format(1), a=1)
    save(tmp_path / shard.format(2), b=2)
    with pytest.raises(FormatError, match="the index of m"):
        open_tensors(tmp_path, "fp16")
    index(tmp_path / name, a=shard.format(1), b=shard.format(2))
    assert values(tmp_path) == {"a": 32, "b": 32}
    assert values(tmp_path, "fp16") == values(tmp_path / name) == {"a": 1, "b": 2}


def test_an_index_is_found_where_its_file_would_be(tmp_path: Path) -> None:
    save(tmp_path / "part.safetensors", a=1)
    index(tmp_path / "m.safetensors.index.json", a="part.safetensors")
    opened = open_tensors(tmp_path / "m.safetensors")
    assert opened.path == tmp_path / "m.safetensors"
    assert opened.files == (tmp_path / "part.safetensors",)
    # Beside an index, other files are others' business; not so one of the same name.
    save(tmp_path / "consolidated.safetensors", a=5)
    assert values(tmp_path) == {"a": 1}
    save(tmp_path / "m.safetensors", a=6)
    with pytest.raises(FormatError, match="it holds m.safetensors.index.json and m.safetensors:"):
        open_tensors(tmp_path)
    assert values(tmp_path / "m.safetensors") == {"a": 6}


def test_what_an_index_does_not_list_is_there(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save(tmp_path / "sub" / "part.safetensors", a=1, b=2)
    index(tmp_path / "m.safetensors.index.json", a="sub/part.safetensors")
    assert values(tmp_path) == {"a": 1, "b": 2}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows needs a privilege for links")
def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    """The hub's cache is made of them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save(tmp_path / "blobs" / "0a1b", a=1)
    (tmp_path / "snapshot" / "m.safetensors").symlink_to("../blobs/0a1b")
    index(tmp_path / "snapshot" / "x.safetensors.index.json", a="m.safetensors")
    assert values(tmp_path / "snapshot") == {"a": 1}


def read_with_few_files(folder: Path) -> tuple[int, int]:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    opened = open_tensors(folder)
    return len(opened.files), sum(int(stored.read()[0]) for stored in opened.tensors.values())


@needs_fork
def test_a_hundred_shards_and_32_open_files(tmp_path: Path) -> None:
    names = [f"m-{number:05}-of-00100.safetensors" for number in range(1, 101)]
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.ones(1)}, tmp_path / name)
    index(tmp_path / "m.safetensors.index.json", **{f"t{n}": name for n, name in enumerate(names)})
    assert in_child(lambda: read_with_few_files(tmp_path)) == (100, 100)


def test_pickles(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    tensors = {"a": torch.ones(2, 3), "b": torch.arange(3), "t": torch.ones(3, 2).T}
    for saved in (tensors, {"epoch": 3, "state_dict": tensors}):
        for is_zip in (True, False):
            torch.save(saved, path, _use_new_zipfile_serialization=is_zip)
            weights = open_pickle(path)
            found: dict[str, Any] = {name: weight.read() for name, weight in weights.items()}
            assert_same_bits(found, tensors)
            assert weights["a"].nbytes == 24
            with pytest.raises(FormatError, match="read only where that is asked for"):
                open_tensors(path)


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_runs_no_code(is_zip: bool, tmp_path: Path) -> None:  # noqa: FBT001 - a case
    path, sentinel = tmp_path / "evil.pt", tmp_path / "sentinel"
    saved = {"a": torch.ones(1), "evil": Evil(sentinel)}
    torch.save(saved, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(FormatError, match="torch cannot read it"):
        open_pickle(path)
    with pytest.raises(FormatError):
        open_tensors(path)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([torch.ones(1)], "expected a dict of tensors, got a list"),
        ({}, "expected a dict of tensors"),
        ({"a": torch.ones(1), "step": 3}, "step: expected names and tensors, got a int"),
        ({1: torch.ones(1)}, "expected names and tensors"),
        ({"state_dict": {"model": {}}}, "model: expected names and tensors, got a dict"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a: .* it is stored as torch.sparse_coo"),
    ],
)
def test_pickles_of_other_things(saved: Any, message: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=message):
        open_pickle(tmp_path / "a.pt")


#: Tensors whose bytes are not their values, and what is said of them.
NOT_PLAIN: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "expanded": (lambda: torch.zeros(1).expand(10**12), "it has 4 bytes for 4000000000000: save"),
    "overlapping": (lambda: torch.ones(3).as_strided((2, 2), (1, 1)), "it has 12 bytes for 16"),
    "meta": (lambda: torch.zeros(3, device="meta"), r"it has no data \(meta device\)"),
    "a Parameter on meta": (lambda: nn.Parameter(torch.zeros(3, device="meta")), "it has no data"),
    "sparse rows": (lambda: torch.ones(2, 2).to_sparse_csr(), "it is stored as torch.sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "it is nested"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
        "it is quantized",
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch's, about half of these kinds
@pytest.mark.parametrize("name", NOT_PLAIN)
def test_pickled_tensors_that_are_not_plain(name: str, tmp_path: Path) -> None:
    make, message = NOT_PLAIN[name]
    torch.save({"first": torch.ones(1), "a": make()}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=f"a: expected a plain tensor .*, {message}"):
        open_pickle(tmp_path / "a.pt")


def test_pickled_views_whose_signs_are_not_in_their_bytes(tmp_path: Path) -> None:
    values = torch.complex(torch.ones(3), torch.arange(3.0))
    saved = {"a": values.conj(), "b": values.clone().conj().imag}
    assert saved["a"].is_conj()
    assert saved["b"].is_neg()
    torch.save(saved, tmp_path / "a.pt")
    found: Any = {name: weight.read() for name, weight in open_pickle(tmp_path / "a.pt").items()}
    negated = found["b"].contiguous()
    assert bytes(bytes_of(found["a"])) == struct.pack("<6f", 1, -0.0, 1, -1, 1, -2)
    assert bytes(bytes_of(negated)) == struct.pack("<3f", -0.0, -1, -2)


def test_broken_pickles(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(8)}, path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 17):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            open_pickle(path)
