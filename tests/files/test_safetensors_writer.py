"""Safetensors files written tensor by tensor, as other libraries read them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from files.forked import DiedError, in_child, limit_files, needs_fork
from files.raw import assert_same_bits, random_bytes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lowbits.errors import BackendError, CancelledError, ConfigError, FormatError
from lowbits.files.safetensors import CHECKSUM, DTYPES, read_safetensors
from lowbits.files.safetensors_writer import (
    Metadata,
    TensorGroup,
    header_bytes,
    plain_group,
    write_safetensors,
)
from lowbits.files.sharded import open_tensors
from lowbits.progress import CancelToken, ProgressEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX system")


def same(tensor: Tensor) -> Tensor:
    return tensor


def groups(tensors: Mapping[str, Tensor]) -> list[TensorGroup]:
    return [
        plain_group(name, tensor.dtype, tensor.shape, partial(same, tensor))
        for name, tensor in tensors.items()
    ]


def read(path: Path) -> dict[str, Tensor]:
    return {name: stored.read() for name, stored in open_tensors(path).tensors.items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_layout(path: Path) -> None:
    """See that tensors are aligned and lie one behind the other, and that the checksum is right."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__")
    offset = 0
    for entry in header.values():
        begin, end = entry["data_offsets"]
        assert begin == offset
        assert (start + begin) % DTYPES[entry["dtype"]].itemsize == 0
        offset = end
    assert start + offset == len(raw)
    assert metadata[CHECKSUM] == hashlib.blake2b(raw[start:], digest_size=16).hexdigest()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {'ä"\x01\x7f\u2028\\/': "漢字🙂"}])
def test_the_safetensors_package_reads_every_dtype_and_odd_sizes(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    tensors = {}
    for number, dtype in enumerate(DTYPES.values()):
        tensors[f"{number}.weight"] = random_bytes(dtype, 3, 5)
        tensors[f"ä{number}"] = random_bytes(dtype, 2)
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(3), 'Z🙂"\\\n': torch.ones(1)}
    path = tmp_path / "ours.safetensors"
    assert write_safetensors(path, groups(tensors), metadata) == (path,)
    check_layout(path)
    assert_same_bits(load_file(path), tensors)
    assert_same_bits(read(path), tensors)
    found = dict(read_safetensors(path).metadata)
    assert found.pop(CHECKSUM)
    assert found == (metadata or {})


@pytest.mark.property
@given(
    sizes=st.lists(st.integers(0, 40), max_size=12),
    limit=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_whatever_the_split_everything_comes_back(
    sizes: list[int], limit: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.manual_seed(seed)
    dtypes = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn]
    tensors = {
        f"t{number}": random_bytes(dtypes[(number + seed) % 5], size)
        for number, size in enumerate(sizes)
    }
    path = tmp_path_factory.mktemp("split") / "m.safetensors"
    written = write_safetensors(path, groups(tensors), {"a": "b"}, max_shard_bytes=limit)
    assert_same_bits(read(path), tensors)
    assert_same_bits(read(path.parent), tensors)
    assert names(path.parent) == sorted(file.name for file in written)
    for file in written:
        if file.suffix == ".safetensors":
            check_layout(file)
            taken = [tensor.nbytes for tensor in load_file(file).values()]
            assert sum(taken) <= limit or len([n for n in taken if n]) == 1 or len(written) == 1
            assert read_safetensors(file).metadata["a"] == "b"


def test_tensors_of_all_kinds_are_copied_one_at_a_time(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    wave = torch.tensor([1 + 2j, 3 - 4j])
    tensors = {
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": torch.ones(1).expand(3),
        "slice": base[1:],
        "parameter": torch.nn.Parameter(base.clone()),
        "conjugated": wave.conj(),
        "negated": wave.conj().imag,
    }
    path = tmp_path / "a.safetensors"
    write_safetensors(path, groups(tensors))
    found = read(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


class Counted:
    """Makes tensors, and knows how many of them live."""

    def __init__(self) -> None:
        self.live = self.most = 0

    def make(self) -> Tensor:
        tensor = torch.ones(100)
        self.live += 1
        self.most = max(self.most, self.live)
        weakref.finalize(tensor.untyped_storage(), self._gone)
        return tensor

    def _gone(self) -> None:
        self.live -= 1


def test_one_tensor_lives_at_a_time(tmp_path: Path) -> None:
    counted = Counted()
    made = [plain_group(f"t{n}", torch.float32, (100,), counted.make) for n in range(9)]
    write_safetensors(tmp_path / "a.safetensors", made, max_shard_bytes=1000)
    assert (counted.most, counted.live) == (1, 0)


def test_what_is_kept_for_alignment_holds_no_more_than_its_bytes(tmp_path: Path) -> None:
    counted = Counted()
    made = [
        plain_group(f"t{n}", torch.float32, (3,), lambda: counted.make()[1:4]) for n in range(9)
    ]
    write_safetensors(tmp_path / "a.safetensors", made)
    assert (counted.most, counted.live) == (1, 0)
    check_layout(tmp_path / "a.safetensors")


def group(name: str, tensors: Mapping[str, Tensor], room: int = 1000) -> TensorGroup:
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return TensorGroup(name, nbytes, room, lambda: tensors)


def test_groups_stay_together_and_metadata_is_made_of_what_was_read(tmp_path: Path) -> None:
    read_names: list[str] = []

    def make(names: Sequence[str]) -> dict[str, str]:
        assert read_names[-len(names) :] == list(names)
        return {"groups": ",".join(names)}

    def reading(name: str) -> dict[str, Tensor]:
        read_names.append(name)
        return {f"{name}_codes": torch.ones(7).byte(), f"{name}_scale": torch.ones(3)}

    made = [TensorGroup(name, 19, 400, partial(reading, name)) for name in "abc"]
    path = tmp_path / "m.safetensors"
    written = write_safetensors(path, made, Metadata(50, make), max_shard_bytes=40)
    assert [read_safetensors(file).metadata["groups"] for file in written[1:]] == ["a,b", "c"]
    assert [sorted(read_safetensors(file).tensors) for file in written[1:]] == [
        ["a_codes", "a_scale", "b_codes", "b_scale"],
        ["c_codes", "c_scale"],
    ]
    for file in written[1:]:
        check_layout(file)


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        ({"a_q": torch.ones(1)}, ConfigError, "name, 'a_q', is there twice"),
        ({"__metadata__": torch.ones(1)}, ConfigError, "name, '__metadata__', is not allowed"),
        ({"\ud800": torch.ones(1)}, ConfigError, "no Unicode text"),
        ({"b_q": torch.ones(1).to(torch.complex128)}, ConfigError, "b_q: safetensors files have"),
        ({f"b_{n}": torch.ones(1) for n in range(99)}, BackendError, "as too many tensors"),
    ],
)
@pytest.mark.parametrize("limit", [1, 10**9])
def test_groups_that_turn_out_to_be_what_cannot_be_written(
    second: dict[str, Tensor], error: type[Exception], message: str, limit: int, tmp_path: Path
) -> None:
    made = [group("a", {"a_q": torch.ones(1)}), group("b", second)]
    with pytest.raises(error, match=message):
        write_safetensors(tmp_path / "a.safetensors", made, max_shard_bytes=limit)
    assert not names(tmp_path)


@pytest.mark.property
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    shape=st.lists(st.integers(0, 3), max_size=8),
    dtype=st.sampled_from(list(DTYPES.values())),
    metadata=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.just('"\\')),
)
def test_the_room_is_enough_for_any_tensor(
    text: str,
    shape: list[int],
    dtype: torch.dtype,
    metadata: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tensors = {text: random_bytes(dtype, *shape, 1)}
    path = tmp_path_factory.mktemp("room") / "m.safetensors"
    write_safetensors(path, groups(tensors), metadata)
    assert_same_bits(read(path), tensors)


def test_the_room_is_enough_for_the_largest_numbers() -> None:
    largest = 2**63 - 1
    entry = {"dtype": "F8_E4M3FNUZ", "shape": [largest * 2] * 3, "data_offsets": [largest] * 2}
    text = json.dumps({"漢\n": entry}, separators=(",", ":"), ensure_ascii=False)
    assert header_bytes("漢\n", dimensions=3) >= len(text.encode())
    assert header_bytes("漢\n", 5, 3) == 5 * header_bytes("漢\n", dimensions=3)


@pytest.mark.parametrize(
    ("tensor", "got"),
    [(torch.ones(2, 3), "float32 of (2, 3)"), (torch.ones(2).half(), "float16 of (2,)")],
)
def test_a_tensor_of_another_kind_than_it_was_said(
    tensor: Tensor, got: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    wrong = [
        *groups({"a": torch.ones(2)}),
        plain_group("w", torch.float32, (2,), partial(same, tensor)),
    ]
    with pytest.raises(FormatError) as caught:
        write_safetensors(path, wrong, max_shard_bytes=1)
    assert f"w: expected torch.float32 of shape (2,), got torch.{got}" in str(caught.value)
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["a.safetensors"])


@pytest.mark.parametrize(
    ("made", "metadata", "message"),
    [
        ({"": torch.ones(1)}, {}, "name, '', is not allowed"),
        ({"__metadata__": torch.ones(1)}, {}, "name, '__metadata__', is not allowed"),
        ({"a": torch.ones(1).to(torch.complex128)}, {}, "a: safetensors files have no torch.comp"),
        ({"a": torch.zeros(1, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)[0]}, {}, "float4"),
        ({"\ud800": torch.ones(1)}, {}, "no Unicode text"),
        ({}, {"a": 1}, "metadata: expected strings"),
        ({}, {"a": "\ud800"}, "no Unicode text"),
    ],
)
def test_what_cannot_be_written(
    made: dict[str, Tensor], metadata: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_safetensors(tmp_path / "a.safetensors", groups(made), metadata)
    assert not names(tmp_path)


def test_names_that_cannot_be_written(tmp_path: Path) -> None:
    twice = [*groups({"a": torch.ones(1)}), *groups({"a": torch.ones(2)})]
    with pytest.raises(ConfigError, match="name, 'a', is there twice"):
        write_safetensors(tmp_path / "a.safetensors", twice)
    with pytest.raises(ConfigError, match="path: expected a name that ends with .safetensors"):
        write_safetensors(tmp_path / "a.bin", [])
    with pytest.raises(ConfigError, match="where the format allows 100000000"):
        write_safetensors(tmp_path / "a.safetensors", [], {"a": "x" * 100_000_000})


def test_progress_and_cancel(tmp_path: Path) -> None:
    path, token = tmp_path / "a.safetensors", CancelToken()
    tensors = {"a": torch.ones(2), "b": torch.ones(4).half()}
    events: list[ProgressEvent] = []
    write_safetensors(path, groups(tensors), progress=events.append, cancel=token)
    assert events == [ProgressEvent("save", "a", 8, 16), ProgressEvent("save", "b", 16, 16)]
    before = path.read_bytes()

    def stop(_: ProgressEvent) -> None:
        token.cancel()

    with pytest.raises(CancelledError, match="convert was cancelled"):
        write_safetensors(path, groups(tensors), progress=stop, cancel=token, stage="convert")
    assert (path.read_bytes(), names(tmp_path)) == (before, ["a.safetensors"])


def test_saving_over_the_file_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.rand(300, 300), "b": torch.rand(7)}
    write_safetensors(path, groups(tensors))
    for limit in (100, 10**9, 1000, 10**9):
        lazy = [
            plain_group(name, stored.dtype, stored.shape, stored.read)
            for name, stored in open_tensors(path).tensors.items()
        ]
        write_safetensors(path, lazy, max_shard_bytes=limit)
        assert_same_bits(read(path), tensors)
        with pytest.raises((FormatError, FileNotFoundError)):
            lazy[0].read()


def test_the_layout_of_shards(tmp_path: Path) -> None:
    tensors = {name: torch.full((4,), float(ord(name))) for name in "cab"}
    path = tmp_path / "model.safetensors"
    written = write_safetensors(path, groups(tensors), max_shard_bytes=32)
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = tmp_path / "model.safetensors.index.json"
    assert written == (index, tmp_path / shards[0], tmp_path / shards[1])
    checksums = {name: read_safetensors(tmp_path / name).metadata[CHECKSUM] for name in shards}
    assert json.loads(index.read_text()) == {
        "metadata": {"total_size": 48, "writer": "lowbits", "checksums": checksums},
        "weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]},
    }
    opened = open_tensors(path)
    assert opened.files == written[1:]
    assert list(opened.tensors) == ["c", "a", "b"]


def test_what_a_former_save_left_is_removed(tmp_path: Path) -> None:
    tensors = {name: torch.full((4,), float(ord(name))) for name in "abcd"}
    path = tmp_path / "m.safetensors"
    others = ["m-00001-of-00009.safetensors", "m2-00001-of-00004.safetensors"]
    for name in others:
        (tmp_path / name).write_bytes(b"of others")
    for limit, count in ((16, 4), (32, 2), (100, 0), (16, 4), (17, 4)):
        write_safetensors(path, groups(tensors), max_shard_bytes=limit)
        ours = [f"m-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
        ours.append("m.safetensors.index.json" if count else "m.safetensors")
        assert names(tmp_path) == sorted(ours + others)
        assert_same_bits(read(path), tensors)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '{"metadata": {}, "weight_map": {"a": "m-00001-of-00002.safetensors"}}',
        '{"metadata": {"writer": "lowbits"}, "weight_map": {"a": "other.safetensors"}}',
        '{"metadata": {"writer": "lowbits"}, "weight_map": {"a": "../x-00001-of-00002"}}',
    ],
)
def test_what_others_left_stays(content: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    kept = ["in/m-00001-of-00002.safetensors", "in/other.safetensors"]
    for name in (*kept, "x-00001-of-00002.safetensors"):
        (tmp_path / name).write_bytes(b"of others")
    (tmp_path / "in" / "m.safetensors.index.json").write_text(content)
    write_safetensors(tmp_path / "in" / "m.safetensors", groups({"a": torch.ones(1)}))
    assert all((tmp_path / name).exists() for name in (*kept, "x-00001-of-00002.safetensors"))


@posix
def test_a_link_is_written_through(tmp_path: Path) -> None:
    link = tmp_path / "a.safetensors"
    link.symlink_to("blob")
    write_safetensors(link, groups({"a": torch.ones(1)}))
    assert link.is_symlink()
    assert_same_bits(read(link), {"a": torch.ones(1)})


def write_too_much(path: Path, limit: int) -> None:
    limit_files(1 << 20)
    tensors = {"a": torch.ones(1 << 16).byte(), "b": torch.ones(1 << 21).byte()}
    write_safetensors(path, groups(tensors), max_shard_bytes=limit)


@needs_fork
@pytest.mark.parametrize("limit", [1, 10**9])
def test_a_full_disk(limit: int, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {"a": torch.ones(3), "b": torch.ones(3)}
    before = write_safetensors(path, groups(tensors), max_shard_bytes=limit)
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
        in_child(partial(write_too_much, path, limit))
    assert caught.value.errno == errno.EFBIG
    assert_same_bits(read(path), tensors)
    assert names(tmp_path) == sorted(file.name for file in before)


def write_and_die(path: Path, limit: int, renames: int) -> None:
    """Save zeros, and die where one more file would be renamed."""
    replace, left = Path.replace, [renames]

    def replace_or_die(source: Path, target: Path) -> Path:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return replace(source, target)

    Path.replace = replace_or_die  # type: ignore[method-assign, assignment]
    tensors = {name: torch.zeros(4) for name in "abc"}
    write_safetensors(path, groups(tensors), max_shard_bytes=limit)


def end_of(function: Callable[[], None]) -> str:
    try:
        in_child(function)
    except DiedError as error:
        return error.signal.name
    return "returned"


def state_of(folder: Path) -> str:
    try:
        found = {float(tensor.sum()) for tensor in read(folder).values()}
    except FormatError as error:
        return str(error).removeprefix(f"{folder}: ")
    return "mixed" if len(found) > 1 else "old" if found == {4.0} else "new"


@needs_fork
@pytest.mark.parametrize("limit", [16, 10**9])
def test_a_process_that_is_killed_leaves_old_or_new_or_what_is_refused(
    limit: int, tmp_path: Path
) -> None:
    """Old shards have the names of the new ones, so that a mixture would be possible."""
    states = []
    for renames in range(6):
        path = tmp_path / str(renames) / "m.safetensors"
        path.parent.mkdir()
        tensors = {name: torch.ones(4) for name in "abc"}
        write_safetensors(path, groups(tensors), max_shard_bytes=limit)
        states.append((end_of(partial(write_and_die, path, limit, renames)), state_of(path.parent)))
    refused = "the index of m-00001-of-00003.safetensors and other shards is missing"
    shards = [("SIGKILL", "old"), *[("SIGKILL", refused)] * 4, ("returned", "new")]
    assert states == (shards if limit == 16 else [("SIGKILL", "old"), *[("returned", "new")] * 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [900, 10**9])
def test_transformers_and_diffusers_load_the_file_and_shards(
    limit: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Biases of three values are among them: bytes that are no multiple of 8."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8,
    )  # fmt: skip
    vae = {"block_out_channels": (4,), "norm_num_groups": 2, "sample_size": 8}
    models = {
        "model": transformers.CLIPTextModel(config),
        "diffusion_pytorch_model": diffusers.AutoencoderKL(**vae),
    }
    for stem, model in models.items():
        folder = tmp_path / stem
        folder.mkdir()
        tensors = model.to(dtype).state_dict()
        path = folder / f"{stem}.safetensors"
        write_safetensors(path, groups(tensors), {"format": "pt"}, max_shard_bytes=limit)
        if stem == "model":
            model.config.save_pretrained(folder)
        else:
            model.save_config(folder)
        assert (len(names(folder)) > 4) == (limit == 900)
        loaded = type(model).from_pretrained(folder, torch_dtype=dtype).state_dict()
        assert_same_bits(loaded, tensors)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, [])
    check_layout(path)
    assert not read(path)
    assert not load_file(path)
