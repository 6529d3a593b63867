"""Weights of files put into plain modules: as they are stored, in the right places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from files.plain import (
    WIDTH,
    file_of,
    load_rows,
    model,
    on_meta,
    out,
    pack,
    rows_by_name,
    saved,
    state,
    unpacked,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lowbits
from lowbits.core.packed import PackedLayer
from lowbits.errors import (
    NotPatchedError,
)
from lowbits.files.own_writer import WriteOptions, write_own
from lowbits.files.rows import Segment
from lowbits.files.weights import Weight

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lowbits.core.backend import Packed


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


def whole(weights: dict[str, Any]) -> dict[str, list[Segment]]:
    return {name: [Segment(name, 0, value.shape[0])] for name, value in weights.items()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_names_are_kept_in_float32_where_float16_is_asked_for_alone(dtype: Any) -> None:
    into: Any = nn.ModuleDict({"wo": nn.Linear(WIDTH, 8, bias=False).bfloat16()})
    weights = {"wo.weight": torch.randn(8, WIDTH)}
    load_rows(into, weights, whole(weights), kept_in_fp32=("wo",), dtype=dtype)
    assert into["wo"].weight.dtype == torch.bfloat16


def test_packed_layers_know_that_they_are_kept_in_float32() -> None:
    into: Any = nn.ModuleDict({name: nn.Linear(WIDTH, 8, bias=False) for name in ("wo", "wi")})
    weights = {f"{name}.weight": pack(torch.randn(8, WIDTH), "torchao-int8") for name in into}
    load_rows(into, weights, whole(weights), kept_in_fp32=("wo",))
    kept = {name: layer.lowbits_layouts["weight"].keeps_fp32 for name, layer in into.items()}
    assert kept == {"wo": True, "wi": False}


@pytest.mark.parametrize("names", [("embed", "head"), ("head", "embed")])
@pytest.mark.parametrize("stored", ["embed", "head"])
def test_a_weight_that_only_one_of_its_layers_can_hold_is_decoded(
    names: tuple[str, str], stored: str
) -> None:
    made: dict[str, Any] = {
        "embed": nn.Embedding(16, WIDTH),
        "head": nn.Linear(WIDTH, 16, bias=False),
    }
    made["head"].weight = made["embed"].weight
    into: Any = nn.ModuleDict({name: made[name] for name in names})
    weights = {f"{stored}.weight": pack(torch.randn(16, WIDTH), "torchao-int8-dynamic")}
    report = load_rows(into, weights, whole(weights))
    assert not any(isinstance(layer, PackedLayer) for layer in into.values())
    assert into["head"].weight is into["embed"].weight
    assert report.layers[0].reason.startswith("decoded from torchao-int8-dynamic")


def test_on_meta_what_says_no_dtype_is_as_most_of_the_rest() -> None:
    into = on_meta()
    state: dict[str, Tensor] = {
        name: torch.zeros(t.shape, dtype=t.dtype if name == "count" else torch.bfloat16)
        for name, t in into.state_dict().items()
        if name != "head.weight"
    }
    for name in ("gain", "embed.weight"):
        state[name] = state[name].float()
    state["layers.0.weight"] = state["layers.0.weight"].to(torch.float8_e4m3fn)
    rows = {n: [Segment(n, 0, t.shape[0] if t.ndim else 1)] for n, t in state.items()}
    load_rows(into, state, rows)
    assert into.embed.weight.dtype == torch.float32
    assert into.layers[0].weight.dtype == torch.bfloat16


class Raw(nn.Module):
    """Has a weight of its own that is tied to a layer's."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.table = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) @ self.table
        return y


def test_a_tie_between_different_names_is_filled() -> None:
    into = Raw(nn.Linear(WIDTH, 16, bias=False))
    packed = pack(torch.randn(16, WIDTH), "bnb-nf4")
    weights = {"layer.weight": packed}
    load_rows(into, weights, whole(weights))
    assert into(torch.ones(2, WIDTH)).isfinite().all()
    assert torch.equal(into.table, into.layer.weight)


def test_a_dtype_that_was_asked_for_to_compute_in_is_read(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    lowbits.quantize(
        source, "torchao-int8", rules={"*": "torchao-int8"}, compute_dtype=torch.float32
    )
    lowbits.save(source, tmp_path / "x.safetensors")
    into: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    lowbits.load(tmp_path / "x.safetensors", into=into)
    assert into[0].lowbits_layouts["weight"].compute_dtype == torch.float32
