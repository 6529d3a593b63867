"""lowbits' own files: what is written comes back bit by bit, and nothing else is believed."""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import schemes
import torch
from files.raw import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbits.core.backend import Packed
from lowbits.core.packing import pack_weight
from lowbits.core.registry import DEFAULT
from lowbits.errors import BackendError, CancelledError, FormatError
from lowbits.files.manifest import MANIFEST
from lowbits.files.own import manifest_of, own_weights
from lowbits.files.own_writer import WriteOptions, write_own
from lowbits.files.safetensors import CHECKSUM
from lowbits.files.sharded import open_tensors
from lowbits.files.weights import Weight
from lowbits.progress import CancelToken, ProgressEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

OPTIONS = WriteOptions({"lowbits": "1.0", "torch": "2.13"})
CPU = torch.device("cpu")


def packed(scheme_name: str, rows: int, row_length: int) -> Packed:
    backend, scheme = DEFAULT.require(scheme_name)
    assert backend
    return pack_weight(torch.randn(rows, row_length), "Linear", scheme, backend, CPU)


def weight_of(name: str, value: Tensor | Packed, **changes: Any) -> Weight:
    if isinstance(value, Packed):
        nbytes = sum(tensor.nbytes for tensor in value.tensors.values())
        made = Weight(name, value.shape, torch.bfloat16, nbytes, lambda: value, value.scheme)
        return replace(made, **changes)
    return Weight(name, tuple(value.shape), value.dtype, value.nbytes, lambda: value)


def weights_of(values: Mapping[str, Tensor | Packed]) -> dict[str, Weight]:
    return {name: weight_of(name, value) for name, value in values.items()}


def opened(path: Path, *, verify: bool = True) -> dict[str, Weight]:
    tensors = open_tensors(path)
    manifest = manifest_of(tensors.files, verify=verify)
    return own_weights(tensors.tensors, manifest, DEFAULT, path)


def assert_same(weight: Weight, expected: Tensor | Packed) -> None:
    found = weight.read()
    if isinstance(expected, Packed):
        assert isinstance(found, Packed)
        assert replace(found, tensors={}) == replace(expected, tensors={})
        assert weight.scheme == expected.scheme
        assert weight.nbytes == sum(tensor.nbytes for tensor in expected.tensors.values())
        assert_same_bits(found.tensors, expected.tensors)
    else:
        assert not isinstance(found, Packed)
        assert_same_bits({"": found}, {"": expected})


@pytest.mark.parametrize("scheme_name", schemes.every_scheme())
def test_every_scheme_comes_back_bit_by_bit(scheme_name: str, tmp_path: Path) -> None:
    _, scheme = DEFAULT.find(scheme_name)
    shapes = [(5, 256), (33, 256), (7, 37), (9, 48), (6, 1)]
    fitting = [shape for shape in shapes if scheme.refusal("Linear", shape[1]) is None]
    values: dict[str, Tensor | Packed] = {"norm.bias": torch.randn(3)}
    values |= {f"{r}x{c}.weight": packed(scheme_name, r, c) for r, c in fitting}
    path = tmp_path / "a.safetensors"
    assert write_own(path, weights_of(values), {}, OPTIONS) == (path,)
    found = opened(path)
    assert set(found) == set(values)
    for name, value in values.items():
        assert found[name].dtype == (torch.bfloat16 if isinstance(value, Packed) else torch.float32)
        assert_same(found[name], value)
    # Others see integers, which no cast of floats would change.
    others = {name: tensor.dtype for name, tensor in load_file(path).items()}
    assert others.pop("norm.bias") == torch.float32
    assert not any(dtype.is_floating_point for dtype in others.values())


def test_what_a_weight_was_is_kept(tmp_path: Path) -> None:
    codes = packed("float8-e4m3fn", 5, 64)
    path = tmp_path / "a.safetensors"
    weights = {
        "conv": weight_of("conv", codes, shape=(5, 4, 4, 4), compute_dtype=torch.float16),
        "unknown": weight_of("unknown", codes, dtype=None),
    }
    write_own(path, weights, {}, OPTIONS)
    found = opened(path)
    assert (found["conv"].shape, found["conv"].compute_dtype) == ((5, 4, 4, 4), torch.float16)
    assert (found["unknown"].dtype, found["unknown"].compute_dtype) == (None, None)
    assert manifest_of([path], verify=True).versions == OPTIONS.versions


def test_ties_are_stored_once_in_the_shard_of_their_weight(tmp_path: Path) -> None:
    values: dict[str, Tensor | Packed] = {
        "embedding": packed("gguf-q5_1", 5, 64),
        "bias": torch.randn(3),
    }
    ties = {"head": "embedding", "first": "bias", "second": "bias", "gone": "another"}
    path = tmp_path / "m.safetensors"
    _, *shards = write_own(path, weights_of(values), ties, replace(OPTIONS, max_shard_bytes=1))
    found = opened(path)
    assert set(found) == {"embedding", "bias", "head", "first", "second"}
    for alias, name in list(ties.items())[:3]:
        assert_same(found[alias], values[name])
    listed = [manifest_of([shard], verify=True).ties for shard in shards]
    assert listed == [{"head": "embedding"}, {"first": "bias", "second": "bias"}]


def test_a_packed_weight_is_in_one_shard(tmp_path: Path) -> None:
    values: dict[str, Tensor | Packed] = {}
    for number in range(5):
        values[f"{number}.weight"] = packed("torchao-int4", 5 + number, 64)
        values[f"{number}.bias"] = torch.randn(number)
    path = tmp_path / "m.safetensors"
    _, *shards = write_own(path, weights_of(values), {}, replace(OPTIONS, max_shard_bytes=300))
    assert len(shards) > 2
    for shard in shards:
        manifest = manifest_of([shard], verify=True)
        stored = set(load_file(shard))
        for name, entry in manifest.weights.items():
            fields = {f"{name}_{field}" for field in entry.fields}
            assert len(fields) > 1
            assert fields <= stored
            stored -= fields
        assert stored <= {name for name in values if name.endswith("bias")}
    for name, weight in opened(path).items():
        assert_same(weight, values[name])


def test_saving_over_the_shards_that_are_read(tmp_path: Path) -> None:
    values: dict[str, Tensor | Packed] = {
        "a.weight": packed("quanto-int8", 7, 37),
        "a.bias": torch.randn(7),
    }
    path = tmp_path / "m.safetensors"
    write_own(path, weights_of(values), {}, OPTIONS)
    for limit in (1, 10**9, 100):
        write_own(path, opened(path), {}, replace(OPTIONS, max_shard_bytes=limit))
        for name, weight in opened(path).items():
            assert_same(weight, values[name])


class Counted:
    """Makes packed weights, and knows how many of them live."""

    def __init__(self) -> None:
        self.live = self.most = 0

    def make(self) -> Packed:
        tensors = {"qdata": torch.ones(5, 64).byte(), "scale": torch.ones(5, 1)}
        self.live += 1
        self.most = max(self.most, self.live)
        weakref.finalize(tensors["qdata"].untyped_storage(), self._gone)
        return Packed("float8-e4m3fn", (5, 64), tensors)

    def _gone(self) -> None:
        self.live -= 1


def test_one_weight_lives_at_a_time(tmp_path: Path) -> None:
    counted = Counted()
    weights = {
        f"w{n}": Weight(f"w{n}", (5, 64), torch.float32, 340, counted.make, "float8-e4m3fn")
        for n in range(6)
    }
    write_own(tmp_path / "a.safetensors", weights, {}, replace(OPTIONS, max_shard_bytes=800))
    assert (counted.most, counted.live) == (1, 0)


def test_progress_and_cancel(tmp_path: Path) -> None:
    path, token = tmp_path / "a.safetensors", CancelToken()
    weights = weights_of({"a": packed("float8-e5m2-raw", 5, 64), "b": torch.ones(3)})
    events: list[ProgressEvent] = []
    write_own(path, weights, {}, replace(OPTIONS, stage="convert", progress=events.append))
    assert events == [
        ProgressEvent("convert", "a", 320, 332),
        ProgressEvent("convert", "b", 332, 332),
    ]
    before = path.read_bytes()
    token.cancel()
    with pytest.raises(CancelledError, match="save was cancelled"):
        write_own(path, weights, {}, replace(OPTIONS, cancel=token))
    assert path.read_bytes() == before


def test_a_backend_that_stores_too_many_tensors(tmp_path: Path) -> None:
    tensors = {f"part{number}": torch.ones(5) for number in range(99)}
    weights = {"w": weight_of("w", Packed("float8-e4m3fn", (5, 64), tensors))}
    with pytest.raises(BackendError, match="a backend stores a weight as too many tensors"):
        write_own(tmp_path / "a.safetensors", weights, {}, OPTIONS)
    assert not list(tmp_path.iterdir())


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.mark.property
@given(
    names=st.lists(text, min_size=4, max_size=8, unique=True),
    versions=st.dictionaries(text, text),
    is_packed=st.booleans(),
)
def test_the_room_is_enough_for_any_names(
    names: list[str],
    versions: dict[str, str],
    is_packed: bool,  # noqa: FBT001 - hypothesis
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    fields = {f"\\{number}" * 12: torch.ones(5, 1).byte() for number in range(8)}
    codes = Packed("a scheme", (5, 8), fields)
    value = codes if is_packed else torch.ones(1)
    path = tmp_path_factory.mktemp("room") / "m.safetensors"
    ties = dict.fromkeys(names[1:], names[0])
    write_own(path, weights_of({names[0]: value}), ties, WriteOptions(versions))
    manifest = manifest_of([path], verify=True)
    assert (manifest.ties, manifest.versions) == (ties, versions)
    assert set(manifest.weights) == ({names[0]} if is_packed else set())


@pytest.mark.parametrize("limit", [1, 10**9])
def test_a_flipped_bit_is_found(limit: int, tmp_path: Path) -> None:
    values: dict[str, Tensor | Packed] = {
        "w": packed("float8-e4m3fn", 5, 64),
        "bias": torch.randn(5),
    }
    path = tmp_path / "m.safetensors"
    write_own(path, weights_of(values), {}, replace(OPTIONS, max_shard_bytes=limit))
    for file in open_tensors(path).files:
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for place in (start, (start + len(raw)) // 2, len(raw) - 1):
            file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            opened(path, verify=False)
            with pytest.raises(FormatError, match=f"{file.name}: .*its checksum differs"):
                opened(path)
        file.write_bytes(raw)
    opened(path)


@dataclass
class Own:
    """A file of lowbits' that can be changed; its checksum is not."""

    path: Path
    tensors: dict[str, Tensor]
    manifest: Any

    def write(self, manifest: str | None = None) -> None:
        text = json.dumps(self.manifest) if manifest is None else manifest
        save_file(self.tensors, self.path, {MANIFEST: text, CHECKSUM: ""})

    def read(self) -> None:
        for weight in opened(self.path, verify=False).values():
            weight.read()


@pytest.fixture
def own(tmp_path: Path) -> Own:
    values: dict[str, Tensor | Packed] = {
        "w": packed("float8-e4m3fn", 5, 64),
        "b": torch.ones(3),
    }
    path = tmp_path / "m.safetensors"
    write_own(path, weights_of(values), {"tied": "b"}, OPTIONS)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return Own(path, load_file(path), json.loads(metadata[MANIFEST]))


def test_the_form_of_the_manifest(own: Own) -> None:
    """A version of its own, once anything here changes."""
    assert {name: tensor.dtype for name, tensor in own.tensors.items()} == {
        "w_qdata": torch.uint8,
        "w_scale": torch.int32,
        "b": torch.float32,
    }
    assert own.manifest == {
        "version": 1,
        "layout": 1,
        "weights": {
            "w": {
                "scheme": "float8-e4m3fn",
                "shape": [5, 64],
                "rows": [5, 64],
                "dtype": "bfloat16",
                "fields": {"qdata": "uint8", "scale": "float32"},
                "row_sliceable": True,
                "compute_dtype": None,
            }
        },
        "ties": {"tied": "b"},
        "versions": OPTIONS.versions,
    }
    own.write()
    own.read()


def entry(own: Own) -> Any:
    return own.manifest["weights"]["w"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda own: own.manifest.update(version=2),
            "version 2, layout 1; this lowbits reads version 1, layout 1: pip install -U lowbits",
        ),
        (lambda own: own.manifest.update(layout=2), "version 1, layout 2; this lowbits reads"),
        (lambda own: own.manifest.pop("version"), "version None, layout 1; this lowbits reads"),
        (lambda own: entry(own).update(scheme="float9"), "w: is stored as float9: unknown scheme"),
        (lambda own: entry(own).update(scheme="native"), "w: is called packed, and native at once"),
        (
            lambda own: entry(own).update(scheme="float8-e4m3fn-raw"),
            "w: takes 340 bytes; float8-e4m3fn-raw takes 320 for (5, 64)",
        ),
        (lambda own: own.tensors.pop("w_scale"), "w: the file has no scale of it"),
        (
            lambda own: own.manifest["weights"].update(w2=entry(own)),
            "w2: the file has no scale of it",
        ),
        (
            lambda own: own.tensors.update(w_qdata=torch.ones(6, 64).byte()),
            "w: its qdata is torch.uint8 (6, 64), expected torch.uint8 for 5 rows",
        ),
        (
            lambda own: own.tensors.update(w_qdata=torch.tensor(1).byte()),
            "w: its qdata is torch.uint8 (), expected torch.uint8 for 5 rows",
        ),
        (
            lambda own: own.tensors.update(w_qdata=torch.ones(5, 63).byte()),
            "w: takes 335 bytes; float8-e4m3fn takes 340 for (5, 64)",
        ),
        (
            lambda own: own.tensors.update(w_scale=torch.ones(5, 1).half()),
            "w: its scale is torch.float16 (5, 1), expected torch.float32 for 5 rows",
        ),
        (
            lambda own: entry(own)["fields"].update(qdata="float32"),
            "w: its qdata is torch.uint8 (5, 64), expected torch.float32 for 5 rows",
        ),
        (lambda own: entry(own)["fields"].pop("scale"), "w: takes 320 bytes"),
        (lambda own: entry(own)["fields"].update(qdata="qint8"), "cannot be read: KeyError"),
        (lambda own: entry(own).update(rows=[5, 65]), "rows (5, 65) do not make shape (5, 64)"),
        (lambda own: entry(own).update(rows=[5, 64, 1]), "rows (5, 64, 1) do not make shape"),
        (lambda own: entry(own).update(shape=[1] * 65), "a shape of 65 dimensions"),
        (
            lambda own: own.manifest["ties"].update(tied="gone"),
            "tied: is tied to gone, which is not in the file",
        ),
        (
            lambda own: own.tensors.update(w=torch.ones(5, 64)),
            "w: it is there packed, and as it is too",
        ),
        (
            lambda own: own.tensors.update(tied=torch.ones(3)),
            "tied: is tied to b, and in the file too",
        ),
    ],
)
def test_what_does_not_belong_together(
    change: Callable[[Own], object], message: str, own: Own
) -> None:
    change(own)
    own.write()
    with pytest.raises(FormatError) as caught:
        own.read()
    assert str(caught.value).startswith(f"{own.path}: ")
    assert message in str(caught.value)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each place of a JSON value, as a container and a key of it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**63, 2**70, "", "x", "qint8", "uint8", "native", "gguf-q4_k_m", "b",
    [], {}, [1], [5, 64], [2**62, 2**62], [True, 5], [[5], [64]], {"a": "b"}, {"a": {}}, {"": None},
    "load", "tied", "w", {"w": "w"}, {"w_qdata": "b"}, ["x"], "5", {"qdata": "uint8"},
)  # fmt: skip


def test_whatever_stands_in_a_manifest_nothing_but_a_format_error_comes_of_it(own: Own) -> None:
    outcomes = []
    for container, key in list(places(own.manifest)):
        before = container[key]
        for value in VALUES:
            container[key] = value
            own.write()
            outcomes.append(is_refused(own))
        del container[key]
        own.write()
        outcomes.append(is_refused(own))
        if isinstance(container, list):
            container.insert(key, before)
        else:
            container[key] = before
    assert 0.7 < sum(outcomes) / len(outcomes) < 1


def is_refused(own: Own) -> bool:
    try:
        own.read()
    except FormatError:
        return True
    return False


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.property
@given(
    manifest=st.fixed_dictionaries(
        {"version": st.just(1), "layout": st.just(1)},
        optional={"weights": json_values, "ties": json_values, "versions": json_values},
    )
)
def test_any_json_for_a_manifest(manifest: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("json") / "m.safetensors"
    save_file({"w": torch.ones(1)}, path, {MANIFEST: json.dumps(manifest)})
    is_refused(Own(path, {}, manifest))


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "[]", "1", "[" * 200_000, '{"version": 1, "version": 1}', '{"a": "\\ud800"}', "{1}"],
)
def test_a_manifest_that_is_no_json_object(manifest: str, own: Own) -> None:
    own.write(manifest)
    with pytest.raises(FormatError, match="m.safetensors: "):
        own.read()


def test_a_shard_of_others_among_those_of_lowbits(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    weights = weights_of({"a": torch.ones(1), "b": torch.ones(2)})
    _, first, second = write_own(path, weights, {}, replace(OPTIONS, max_shard_bytes=1))
    save_file({"b": torch.ones(2)}, second)
    with pytest.raises(FormatError, match=f"{second.name}: it has no manifest"):
        manifest_of([first, second], verify=False)


def test_shards_of_two_saves(tmp_path: Path) -> None:
    """Two processes that save to one path at once may leave shards of both."""
    for value, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        weights = weights_of({name: torch.full((4,), float(value)) for name in "ab"})
        options = replace(OPTIONS, max_shard_bytes=16)
        _, _, second = write_own(tmp_path / name / "m.safetensors", weights, {}, options)
    (tmp_path / "one" / second.name).replace(second)
    with pytest.raises(FormatError, match=f"{second.name}: .* another time than its index"):
        opened(second.parent)
    save_file({"b": torch.ones(4)}, second)  # by others, who write no checksum
    assert open_tensors(second.parent).files[1] == second
