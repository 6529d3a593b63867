"""Weights of files put into plain modules: as they are stored, in the right places, all or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lowbits
from lowbits.core.backend import Packed
from lowbits.core.packed import PackedLayer, packed_weight
from lowbits.core.registry import DEFAULT
from lowbits.errors import (
    AlreadyPatchedError,
    CancelledError,
    ConfigError,
    FormatError,
    NotPatchedError,
)
from lowbits.files.load import LoadOptions, install, stage
from lowbits.files.own_writer import WriteOptions, write_own
from lowbits.files.rows import Segment
from lowbits.files.weights import Weight

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lowbits.core.report import LayerReport, Report

WIDTH = 64
#: Schemes whose rows can be told apart, one for each way of storing them.
SLICEABLE = ("bnb-nf4", "torchao-int8", "quanto-int4", "float8-e4m3fn", "float8-e5m2-raw",
             "gguf-q8_0")  # fmt: skip


class Model(nn.Module):
    """One of each thing that a module may hold."""

    table: Tensor
    count: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(WIDTH, 10, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.shift = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.register_buffer("table", torch.randn(3, 5))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("cache", torch.full((4,), 3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * self.gain
        y: Tensor = self.head(self.norm(x + self.shift[0, 0]))
        return y + self.cache.sum() + self.table.mean() + self.count


IDS = torch.arange(10)


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = Model()
    if seed:  # what files bring must differ from what is there
        made.count += seed
        made.gain.data += seed
    return made


def on_meta() -> Any:
    """Return a model without data, as accelerate's ``init_empty_weights`` makes it."""
    made = model()
    cache = made.cache
    made.to("meta").cache = cache
    made.head.weight = made.embed.weight  # a move to meta makes two of it
    return made


@torch.no_grad()
def out(module: nn.Module) -> Tensor:
    y: Tensor = module(IDS)
    return y


def saved(path: Path, module: nn.Module, scheme: str = "") -> Path:
    """Write a module, quantized if it is to be, and leave it so."""
    if scheme:
        lowbits.quantize(module, scheme, rules={"*": scheme})
    file = path / "m.safetensors"
    lowbits.save(module, file)
    return file


def state(module: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_untouched(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    now = module.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert not any(isinstance(part, PackedLayer) for part in module.modules())
    assert lowbits.handle(module) is None


def pack(values: Tensor, scheme: str) -> Packed:
    backend, found = DEFAULT.find(scheme)
    assert backend
    return backend.pack(values.float(), found)


def unpacked(packed: Packed) -> Tensor:
    backend, _ = DEFAULT.find(packed.scheme)
    assert backend
    return backend.unpack(packed, torch.float32)


def weight_of(name: str, value: Tensor | Packed, dtype: torch.dtype | None = None) -> Weight:
    """Return a weight as a reader gives it."""
    if isinstance(value, Packed):
        nbytes = sum(tensor.nbytes for tensor in value.tensors.values())
        return Weight(name, value.shape, dtype, nbytes, lambda: value, value.scheme)
    return Weight(name, tuple(value.shape), value.dtype, value.nbytes, lambda: value)


def file_of(path: Path, weights: Mapping[str, Tensor | Packed]) -> Path:
    """Write a file of lowbits' own with these weights."""
    made = {
        name: weight_of(name, value, torch.float32 if isinstance(value, Packed) else None)
        for name, value in weights.items()
    }
    file = path / "f.safetensors"
    write_own(file, made, {}, WriteOptions({}))
    return file


def rows_by_name(report: Report) -> dict[str, LayerReport]:
    return {layer.fqn: layer for layer in report.layers}


# What is there, everything


@pytest.mark.parametrize("make", [lambda: model(1), on_meta], ids=["data", "meta"])
@pytest.mark.parametrize("scheme", ["", "bnb-nf4", "gguf-q8_0"])
def test_everything_a_module_holds(tmp_path: Path, scheme: str, make: Any) -> None:
    source = model()
    file = saved(tmp_path, source, scheme)
    expected, before = out(source), state(source)
    into = make()
    into.train()
    assert scheme or make is on_meta or not torch.equal(out(into), expected)
    lowbits.load(file, into=into)
    assert torch.equal(out(into), expected)
    now = into.state_dict()
    assert set(now) == set(before)
    for name, tensor in before.items():
        assert now[name].dtype == tensor.dtype, name
        assert torch.equal(now[name], tensor), name
    assert into.training
    assert into.gain.shape == into.count.shape == ()


def test_what_no_file_holds_stays(tmp_path: Path) -> None:
    file = saved(tmp_path, model())
    into = model(1)
    into.cache.fill_(9)
    cache = into.cache
    lowbits.load(file, into=into)
    assert into.cache is cache
    assert torch.equal(cache, torch.full((4,), 9.0))
    assert "cache" not in into.state_dict()


@pytest.mark.parametrize("scheme", ["", "bnb-nf4"])
def test_ties_are_stored_once_and_tied_again(tmp_path: Path, scheme: str) -> None:
    source = model()
    file = saved(tmp_path, source, scheme)
    into = on_meta()
    report = lowbits.load(file, into=into)
    for name, parameter in into.embed._parameters.items():
        assert into.head._parameters[name] is parameter
    assert torch.equal(into.embed.weight, source.embed.weight)
    with safe_open(file, framework="pt") as opened:
        assert not any(name.startswith("head") for name in opened.keys())  # noqa: SIM118
    assert [layer.fqn for layer in report.layers].count("embed") == 1
    assert "head" not in rows_by_name(report)


@pytest.mark.parametrize("scheme", ["", "bnb-nf4"])
def test_a_tie_of_the_file_fills_both_of_a_module_without(tmp_path: Path, scheme: str) -> None:
    source = model()
    file = saved(tmp_path, source, scheme)
    into = model(1)
    into.head = nn.Linear(WIDTH, 10, bias=False)
    lowbits.load(file, into=into)
    assert torch.equal(out(into), out(source))


def test_a_tied_module_needs_one_of_the_names(tmp_path: Path) -> None:
    source = model()
    for name in ("embed.weight", "head.weight"):
        tensors = {n: t for n, t in source.state_dict().items() if n in (name, "x")}
        rest = {n: t for n, t in source.state_dict().items() if not n.startswith(("embed", "head"))}
        file = tmp_path / f"{name}.safetensors"
        save_file({**rest, **tensors}, file)
        into = model(1)
        lowbits.load(file, into=into)
        assert into.head.weight is into.embed.weight
        assert torch.equal(out(into), out(source)), name


# Where a layer cannot hold a weight as it is stored


def test_packed_norms_and_biases_are_decoded_and_reported(tmp_path: Path) -> None:
    source = model()
    norm, bias = pack(torch.rand(1, WIDTH) + 1, "gguf-q8_0"), pack(torch.rand(1, WIDTH), "bnb-nf4")
    weights: dict[str, Tensor | Packed] = {
        **{name: tensor for name, tensor in source.state_dict().items() if name != "head.weight"},
        "norm.weight": norm,
        "layers.1.bias": bias,
    }
    into = on_meta()
    report = rows_by_name(lowbits.load(file_of(tmp_path, weights), into=into))
    assert type(into.norm) is nn.LayerNorm
    assert torch.equal(into.norm.weight, unpacked(norm)[0])
    assert torch.equal(into.layers[1].bias, unpacked(bias)[0])
    assert into.norm.weight.dtype == torch.float32
    for name, scheme in (("norm", "gguf-q8_0"), ("layers.1.bias", "bnb-nf4")):
        row = report[name]
        assert (row.scheme, row.source) == ("native", "-")
        assert row.reason.startswith(f"decoded from {scheme}: ")
        assert row.bytes_after == WIDTH * 4
    assert not any(isinstance(part, PackedLayer) for part in into.modules())


def test_an_embedding_that_rewrites_its_weight_is_decoded(tmp_path: Path) -> None:
    packed = pack(torch.randn(10, WIDTH), "bnb-nf4")
    into: Any = nn.ModuleDict({"e": nn.Embedding(10, WIDTH, max_norm=1.0)})
    report = lowbits.load(file_of(tmp_path, {"e.weight": packed}), into=into)
    assert torch.equal(into["e"].weight, unpacked(packed))
    assert "max_norm" in report.layers[0].reason


@pytest.mark.parametrize("shape", [(2, WIDTH), (1, 1, 2, WIDTH)])
def test_leading_dims_of_one_may_be_absent(tmp_path: Path, shape: tuple[int, ...]) -> None:
    source = model()
    tensors = {n: t for n, t in source.state_dict().items() if n != "head.weight"}
    file = tmp_path / "m.safetensors"
    save_file({**tensors, "shift": source.shift.detach().reshape(shape)}, file)
    into = on_meta()
    lowbits.load(file, into=into)
    assert into.shift.shape == (1, 2, WIDTH)
    assert torch.equal(out(into), out(source))


def test_a_packed_convolution_keeps_its_shape(tmp_path: Path) -> None:
    packed = pack(torch.randn(4, 18), "torchao-int8")
    conv: Any = nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3, bias=False)})
    weight = Weight("conv.weight", (4, 2, 3, 3), torch.float32, 0, lambda: packed, packed.scheme)
    write_own(tmp_path / "c.safetensors", {"conv.weight": weight}, {}, WriteOptions({}))
    lowbits.load(tmp_path / "c.safetensors", into=conv)
    assert isinstance(conv["conv"], PackedLayer)
    x = torch.randn(1, 2, 5, 5)
    expected = nn.functional.conv2d(x, unpacked(packed).view(4, 2, 3, 3))
    torch.testing.assert_close(conv["conv"](x), expected)


# Rows of other tensors


def fused_model() -> Any:
    return nn.ModuleDict({name: nn.Linear(WIDTH, 32, bias=False) for name in "qkv"})


QKV = {f"{name}.weight": [Segment("qkv", at, at + 32)] for at, name in ((0, "q"), (32, "k"))}
QKV["v.weight"] = [Segment("qkv", 64, 96)]


def load_rows(into: nn.Module, weights: Mapping[str, Any], key_map: Any, **options: Any) -> Report:
    """Load by a key map of one's own."""
    found = {name: weight_of(name, value, torch.float32) for name, value in weights.items()}
    return install([stage(into, found, key_map, LoadOptions(DEFAULT, **options))])


@pytest.mark.parametrize("scheme", SLICEABLE)
def test_rows_of_a_fused_weight_stay_packed(scheme: str) -> None:
    whole = pack(torch.randn(96, WIDTH), scheme)
    into = fused_model()
    report = load_rows(into, {"qkv": whole}, QKV)
    for at, name in enumerate("qkv"):
        layer: Any = into[name]
        part = packed_weight(layer)
        assert part.scheme == scheme
        for field, tensor in whole.tensors.items():
            rows = tensor[32 * at : 32 * at + 32]
            assert torch.equal(part[field].view(torch.uint8), rows.contiguous().view(torch.uint8))
            # A copy: a view would keep all rows in memory for each of its parts.
            assert part[field].untyped_storage().nbytes() == rows.nbytes
    assert {layer.scheme for layer in report.layers} == {scheme}
    assert report.bytes_after == sum(t.nbytes for t in whole.tensors.values())


def test_plain_rows_are_copies() -> None:
    whole = torch.randn(96, WIDTH)
    into = fused_model()
    load_rows(into, {"qkv": whole}, QKV)
    for at, name in enumerate("qkv"):
        weight: Any = into[name].weight
        assert torch.equal(weight, whole[32 * at : 32 * at + 32])
        assert weight.untyped_storage().nbytes() == 32 * WIDTH * 4


def test_rows_that_alternate() -> None:
    whole = pack(torch.randn(96, WIDTH), "gguf-q8_0")
    into: Any = nn.ModuleDict({"q": nn.Linear(WIDTH, 48, bias=False)})
    load_rows(into, {"qkv": whole}, {"q.weight": [Segment("qkv", 1, 96, 2)]})
    assert torch.equal(into["q"].weight, unpacked(whole)[1::2])
    into["q"] = nn.Linear(WIDTH, 96, bias=False)
    halves = [Segment("qkv", 0, 96, 2), Segment("qkv", 1, 96, 2)]
    load_rows(into, {"qkv": whole}, {"q.weight": halves})
    assert isinstance(into["q"], PackedLayer)
    values = unpacked(whole)
    assert torch.equal(into["q"].weight, torch.cat([values[::2], values[1::2]]))


def test_nested_scales_are_decoded_where_rows_are_taken() -> None:
    whole = pack(torch.randn(96, WIDTH), "bnb-nf4-dq")
    assert not whole.row_sliceable
    into = fused_model()
    load_rows(into, {"qkv": whole}, QKV)
    values = unpacked(whole)
    for at, name in enumerate("qkv"):
        layer: Any = into[name]
        assert packed_weight(layer).scheme == "bnb-nf4"
        assert torch.equal(layer.weight, values[32 * at : 32 * at + 32])
    one: Any = nn.ModuleDict({"q": nn.Linear(WIDTH, 96, bias=False)})
    load_rows(one, {"qkv": whole}, {"q.weight": [Segment("qkv", 0, 96)]})
    assert packed_weight(one["q"]).scheme == "bnb-nf4-dq"


def test_rows_that_cannot_be_told_apart_are_refused_by_name() -> None:
    whole = pack(torch.randn(96, 33), "bnb-nf4-dq")
    into: Any = nn.ModuleDict({"q": nn.Linear(33, 32, bias=False)})
    before = state(into)
    with pytest.raises(FormatError, match="qkv: its rows cannot be told apart in bnb-nf4-dq"):
        load_rows(into, {"qkv": whole}, {"q.weight": [Segment("qkv", 0, 32)]})
    assert_untouched(into, before)


@pytest.mark.parametrize("scheme", SLICEABLE)
def test_parts_in_one_scheme_are_joined_as_they_are(scheme: str) -> None:
    parts = {name: pack(torch.randn(32, WIDTH), scheme) for name in "qkv"}
    into: Any = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 96, bias=False)})
    segments = [Segment(name, 0, 32) for name in "qkv"]
    load_rows(into, parts, {"qkv.weight": segments})
    layer: Any = into["qkv"]
    assert packed_weight(layer).scheme == scheme
    assert torch.equal(layer.weight, torch.cat([unpacked(part) for part in parts.values()]))


@pytest.mark.parametrize("other", ["gguf-q8_0", "native"])
def test_parts_in_several_schemes_are_decoded(other: str) -> None:
    first = pack(torch.randn(32, WIDTH), "bnb-nf4")
    values = torch.randn(32, WIDTH)
    second = values if other == "native" else pack(values, other)
    into: Any = nn.ModuleDict({"qk": nn.Linear(WIDTH, 64, bias=False)})
    segments = [Segment("q", 0, 32), Segment("k", 0, 32)]
    report = load_rows(into, {"q": first, "k": second}, {"qk.weight": segments})
    assert type(into["qk"]) is nn.Linear
    expected = values if isinstance(second, torch.Tensor) else unpacked(second)
    assert torch.equal(into["qk"].weight, torch.cat([unpacked(first), expected]))
    (row,) = report.layers
    assert (row.scheme, row.bytes_after) == ("native", 64 * WIDTH * 4)


def test_the_reason_of_parts_in_several_schemes_is_told() -> None:
    into: Any = nn.ModuleDict({"qk": nn.Linear(WIDTH, 64, bias=False)})
    parts = {s: pack(torch.randn(32, WIDTH), s) for s in ("bnb-nf4", "gguf-q8_0")}
    segments = [Segment(name, 0, 32) for name in parts]
    (row,) = load_rows(into, parts, {"qk.weight": segments}).layers
    assert row.reason == "decoded from bnb-nf4, gguf-q8_0: its parts are stored differently"


def test_nested_parts_of_another_block_are_not_joined() -> None:
    parts = {name: pack(torch.randn(32, WIDTH), "bnb-nf4-dq") for name in "qk"}
    into: Any = nn.ModuleDict({"qk": nn.Linear(WIDTH, 64, bias=False)})
    segments = [Segment(name, 0, 32) for name in parts]
    load_rows(into, parts, {"qk.weight": segments})
    expected = torch.cat([unpacked(part) for part in parts.values()])
    assert torch.equal(into["qk"].weight, expected)


# Dtypes and flags


@pytest.mark.parametrize("scheme", ["", "torchao-int8"])
def test_the_modules_dtype_counts(tmp_path: Path, scheme: str) -> None:
    file = saved(tmp_path, model(), scheme)
    into = model(1).bfloat16()
    lowbits.load(file, into=into)
    assert {p.dtype for p in into.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert into.layers[0].weight.dtype == torch.bfloat16
    assert into.table.dtype == torch.bfloat16
    assert into.count.dtype == torch.int64


@pytest.mark.parametrize("scheme", ["", "torchao-int8"])
def test_on_meta_the_files_dtype_counts(tmp_path: Path, scheme: str) -> None:
    file = saved(tmp_path, model().half(), scheme)
    into = on_meta()
    lowbits.load(file, into=into)
    assert {p.dtype for p in into.parameters() if p.is_floating_point()} == {torch.float16}
    assert into.layers[0].weight.dtype == into.table.dtype == torch.float16


def test_on_meta_what_says_no_dtype_is_as_the_rest(tmp_path: Path) -> None:
    """Plain float8 beside biases in bfloat16, as it is common."""
    source = model()
    tensors = {n: t.bfloat16() for n, t in source.state_dict().items() if n != "head.weight"}
    tensors |= {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items() if n[:6] == "layers"}
    file = tmp_path / "m.safetensors"
    save_file(tensors, file)
    into = on_meta()
    lowbits.load(file, into=into)
    assert {p.dtype for p in into.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert isinstance(into.layers[0], PackedLayer)
    assert into.layers[0].weight.dtype == torch.bfloat16
    assert out(into).isfinite().all()


@pytest.mark.parametrize("make", [lambda: model(1), on_meta], ids=["data", "meta"])
@pytest.mark.parametrize("scheme", ["", "torchao-int8"])
def test_a_dtype_that_is_asked_for_wins(tmp_path: Path, scheme: str, make: Any) -> None:
    file = saved(tmp_path, model(), scheme)
    into = make()
    lowbits.load(file, into=into, dtype=torch.bfloat16)
    assert {p.dtype for p in into.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert into.layers[0].weight.dtype == into.table.dtype == torch.bfloat16
    assert into.count.dtype == torch.int64
    assert int(into.count) == 7


def test_names_that_are_kept_in_float32() -> None:
    into: Any = nn.ModuleDict({name: nn.Linear(WIDTH, 8, bias=False) for name in ("wo", "wi")})
    weights = {f"{name}.weight": torch.randn(8, WIDTH) for name in into}
    key_map = {name: [Segment(name, 0, 8)] for name in weights}
    load_rows(into, weights, key_map, kept_in_fp32=("wo",), dtype=torch.float16)
    assert into["wo"].weight.dtype == torch.float32
    assert into["wi"].weight.dtype == torch.float16


def test_what_is_trained_stays_so(tmp_path: Path) -> None:
    file = saved(tmp_path, model())
    into = model(1)
    into.requires_grad_(False)
    into.gain.requires_grad_(True)
    lowbits.load(file, into=into)
    trained = [name for name, p in into.named_parameters() if p.requires_grad]
    assert trained == ["gain"]
    assert all(p.is_leaf for p in into.parameters())
    assert not into.table.requires_grad
    assert not isinstance(into.table, nn.Parameter)


# What is told


def test_the_report_counts_each_byte(tmp_path: Path) -> None:
    source = model()
    file = saved(tmp_path, source, "torchao-int8")
    kept = lowbits.handle(source)
    assert kept
    into = model(1)
    before = {id(t): t.nbytes for t in (*into.parameters(), into.table, into.count)}
    report = lowbits.load(file, into=into)
    held = {id(t): t.nbytes for t in (*into.parameters(), into.table, into.count)}
    assert report.bytes_before == sum(before.values())
    assert report.bytes_after == sum(held.values())
    assert report.parameters == kept.report().parameters
    assert not report.restorable
    assert report.warnings == ()
    rows = rows_by_name(report)
    assert len(rows) == len(report.layers) == len(before)
    linear = rows["layers.0"]
    assert linear.kind == "Linear"
    assert (linear.scheme, linear.source, linear.reason) == ("torchao-int8", "none", "")
    assert linear.shape == (WIDTH, WIDTH)
    assert linear.bytes_before == WIDTH * WIDTH * 4
    assert linear.bytes_after == WIDTH * WIDTH + WIDTH * 4
    assert linear.bits_per_weight == linear.bytes_after * 8 / WIDTH**2
    assert (rows["conv"].kind, rows["conv"].shape) == ("Conv2d", (4, 2, 3, 3))
    assert (rows["table"].kind, rows["table"].reason) == ("buffer", "buffer")
    assert (rows["norm"].scheme, rows["norm"].reason) == ("native", "norm")
    assert rows["layers.0.bias"].reason == "bias"
    assert "Linear" in report.table()


def test_progress_ends_where_it_says(tmp_path: Path) -> None:
    file = saved(tmp_path, model(), "bnb-nf4")
    events: list[Any] = []
    report = lowbits.load(file, into=on_meta(), progress=events.append)
    assert len(events) == len(report.layers)
    assert {event.stage for event in events} == {"load"}
    done = [event.done_bytes for event in events]
    assert done == sorted(done)
    assert {event.total_bytes for event in events} == {done[-1]}
    assert done[-1] > 0


def test_progress_of_split_rows_counts_each_byte_once() -> None:
    whole = pack(torch.randn(96, WIDTH), "gguf-q8_0")
    events: list[Any] = []
    load_rows(fused_model(), {"qkv": whole}, QKV, progress=events.append)
    assert events[-1].done_bytes == events[-1].total_bytes == whole["qdata"].nbytes


def test_what_is_not_used_is_told() -> None:
    whole = torch.randn(32, WIDTH)
    into: Any = nn.ModuleDict({"q": nn.Linear(WIDTH, 32, bias=False)})
    extra = {name: torch.zeros(1) for name in ("b", "a", "d", "c")}
    report = load_rows(
        into, {"q.weight": whole, **extra}, {"q.weight": [Segment("q.weight", 0, 32)]}
    )
    assert report.warnings == ("not used: a, b, c and 1 more",)


# Afterwards


def test_it_has_no_handle_and_can_be_placed(tmp_path: Path) -> None:
    source = model()
    file = saved(tmp_path, source, "bnb-nf4")
    into = on_meta()
    lowbits.load(file, into=into)
    assert lowbits.handle(into) is None
    with pytest.raises(NotPatchedError, match="has no handle"):
        lowbits.restore(into)
    with pytest.raises(lowbits.errors.InsufficientMemoryError) as caught:
        lowbits.apply(into, "native", device="cpu", gpu_weights=0)
    handle = lowbits.apply(into, "native", device="cpu", gpu_weights=caught.value.needed_bytes)
    assert torch.equal(out(into), out(source))
    assert handle.stats().copied_bytes > 0
    handle.restore()
    assert torch.equal(out(into), out(source))


def test_it_can_be_turned_into_ordinary_layers(tmp_path: Path) -> None:
    source = model()
    file = saved(tmp_path, source, "bnb-nf4")
    into = on_meta()
    lowbits.load(file, into=into)
    values = source.layers[0].weight + 0
    lowbits.dequantize(into)
    assert not any(isinstance(part, PackedLayer) for part in into.modules())
    assert torch.equal(into.layers[0].weight, values)
    assert into.head.weight is into.embed.weight
    lowbits.load(saved(tmp_path, model(2)), into=into)
    assert torch.equal(out(into), out(model(2)))


def test_saved_again_it_is_the_same(tmp_path: Path) -> None:
    first = saved(tmp_path, model(), "bnb-nf4").read_bytes()
    into = on_meta()
    lowbits.load(tmp_path / "m.safetensors", into=into)
    lowbits.save(into, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == first


# What is refused, and leaves no trace


def test_a_packed_module_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, model())
    into = model(1)
    handle = lowbits.quantize(into, "bnb-nf4", rules={"*": "bnb-nf4"})
    before = out(into)
    with pytest.raises(AlreadyPatchedError, match="lowbits.restore.*or lowbits.dequantize"):
        lowbits.load(file, into=into)
    assert torch.equal(out(into), before)
    handle.restore()
    lowbits.load(file, into=into)
    loaded = model(1)
    lowbits.load(saved(tmp_path, model(), "bnb-nf4"), into=loaded)
    with pytest.raises(AlreadyPatchedError, match="Model holds packed layers"):
        lowbits.load(file, into=loaded)


@pytest.mark.parametrize("scheme", ["", "bnb-nf4"])
@pytest.mark.parametrize("budget", [None, 60_000])
def test_a_module_with_a_handle_is_refused(tmp_path: Path, scheme: str, budget: int | None) -> None:
    """Placed or streamed in its own precision: its handle would know nothing of what is new."""
    file = saved(tmp_path, model(), scheme)
    into = model(1)
    expected = out(into)
    options: dict[str, Any] = {} if budget is None else {"gpu_weights": budget}
    handle = lowbits.apply(into, "native", device="cpu", **options)
    with pytest.raises(AlreadyPatchedError, match="Model"):
        lowbits.load(file, into=into)
    assert torch.equal(out(into), expected)
    handle.restore()
    assert torch.equal(out(into), expected)
    lowbits.load(file, into=into)


def test_a_streamed_module_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, model())
    into = model(1)
    expected = out(into)
    with lowbits.LayerStreamer(into, device="cpu", budget=60_000):
        with pytest.raises(AlreadyPatchedError, match="is streamed already"):
            lowbits.load(file, into=into)
        assert torch.equal(out(into), expected)


def without(name: str) -> dict[str, Tensor]:
    return {n: t for n, t in model().state_dict().items() if n not in (name, "head.weight")}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("layers.2.weight"), "lacks 1 of the .* layers.2.weight"),
        (without("count"), "lacks 1 of the .* count"),
        (without("gain") | {"gain": torch.zeros(2)}, r"gain.*\[2\].*\[\]"),
        (
            without("layers.0.weight") | {"layers.0.weight": torch.zeros(WIDTH, 32)},
            r"layers.0.weight.*\[64, 32\].*\[64, 64\]",
        ),
        (without("") | {"layers.3.weight": torch.zeros(2, 2)}, "holds 1 .* layers.3.weight"),
    ],
    ids=["missing", "missing-buffer", "shape", "wide", "more"],
)
def test_a_file_of_another_model(tmp_path: Path, tensors: Any, message: str) -> None:
    file = tmp_path / "m.safetensors"
    save_file(tensors, file)
    into = model(1)
    before = state(into)
    with pytest.raises(FormatError, match=message):
        lowbits.load(file, into=into)
    assert_untouched(into, before)


class StopError(Exception):
    """What a callback raises."""


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 5, 12])
@pytest.mark.parametrize("scheme", ["", "bnb-nf4"])
def test_a_callback_that_raises(
    tmp_path: Path, scheme: str, at: int, error: type[BaseException]
) -> None:
    file = saved(tmp_path, model(), scheme)
    into = model(1)
    seen: list[Any] = []
    before = state(into)

    def progress(event: Any) -> None:
        seen.append(event)
        if len(seen) == at:
            raise error

    with pytest.raises(error):
        lowbits.load(file, into=into, progress=progress)
    assert_untouched(into, before)
    assert into.head.weight is into.embed.weight


def test_cancelled_midway(tmp_path: Path) -> None:
    file = saved(tmp_path, model(), "bnb-nf4")
    into, token = model(1), lowbits.CancelToken()
    seen: list[Any] = []
    before = state(into)

    def progress(event: Any) -> None:
        seen.append(event)
        if len(seen) == 3:
            token.cancel()

    with pytest.raises(CancelledError):
        lowbits.load(file, into=into, progress=progress, cancel=token)
    assert len(seen) == 3
    assert_untouched(into, before)


def test_the_last_tensor_is_broken(tmp_path: Path) -> None:
    file = saved(tmp_path, model(), "bnb-nf4")
    into = model(1)
    before = state(into)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError, match="m.safetensors"):
        lowbits.load(file, into=into)
    assert_untouched(into, before)


def test_the_file_is_cut_while_it_is_read(tmp_path: Path) -> None:
    file = saved(tmp_path, model(), "bnb-nf4")
    into = model(1)
    seen: list[Any] = []
    before = state(into)

    def progress(event: Any) -> None:
        if not seen:
            file.write_bytes(file.read_bytes()[:-1])
        seen.append(event)

    with pytest.raises(FormatError, match="changed or replaced"):
        lowbits.load(file, into=into, progress=progress)
    assert seen
    assert_untouched(into, before)


@pytest.mark.parametrize(("scheme", "field"), [("bnb-nf4", "scale"), ("gguf-q8_0", "qdata")])
def test_scales_that_are_not_finite(tmp_path: Path, scheme: str, field: str) -> None:
    weight = pack(torch.randn(8, WIDTH), scheme)
    weight[field].view(torch.float16 if field == "qdata" else weight[field].dtype).view(-1)[0] = (
        torch.nan
    )
    file = file_of(tmp_path, {"q.weight": weight})
    into: Any = nn.ModuleDict({"q": nn.Linear(WIDTH, 8, bias=False)})
    before = state(into)
    with pytest.raises(FormatError, match="q.weight.*NaN"):
        lowbits.load(file, into=into)
    assert_untouched(into, before)
    lowbits.load(file, into=into, allow_nonfinite=True)
    assert into["q"].weight.isnan().any()


# Pickles


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_pickles_only_on_demand(tmp_path: Path, suffix: str, *, wrapped: bool, old: bool) -> None:
    source, into = model(), model(1)
    tensors = {n: t for n, t in source.state_dict().items() if n != "head.weight"}
    file = tmp_path / f"m{suffix}"
    torch.save(
        {"state_dict": tensors} if wrapped else tensors,
        file,
        _use_new_zipfile_serialization=not old,
    )
    before = state(into)
    with pytest.raises(ConfigError, match="allow_pickle=True"):
        lowbits.load(file, into=into)
    assert_untouched(into, before)
    lowbits.load(file, into=into, allow_pickle=True)
    assert torch.equal(out(into), out(source))


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


def test_pickles_that_run_code_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, into = tmp_path / "m.pt", model(1)
    torch.save({"a": Evil()}, file)
    before = state(into)
    with pytest.raises(FormatError, match="m.pt"):
        lowbits.load(file, into=into, allow_pickle=True)
    assert "unpickled" not in capsys.readouterr().out
    assert_untouched(into, before)
