"""Rows of a file's tensors put into layers that have them in parts, or in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from files.plain import (
    WIDTH,
    assert_untouched,
    load_rows,
    pack,
    state,
    unpacked,
)
from torch import nn

from lowbits.core.packed import PackedLayer, packed_weight
from lowbits.errors import (
    FormatError,
)
from lowbits.files.rows import Segment

#: Schemes whose rows can be told apart, one for each way of storing them.
SLICEABLE = ("bnb-nf4", "torchao-int8", "quanto-int4", "float8-e4m3fn", "float8-e5m2-raw",
             "gguf-q8_0")  # fmt: skip


# Rows of other tensors


def fused_model() -> Any:
    return nn.ModuleDict({name: nn.Linear(WIDTH, 32, bias=False) for name in "qkv"})


QKV = {f"{name}.weight": [Segment("qkv", at, at + 32)] for at, name in ((0, "q"), (32, "k"))}
QKV["v.weight"] = [Segment("qkv", 64, 96)]


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
    values = unpacked(whole)
    assert torch.equal(into["q"].weight, torch.cat([values[::2], values[1::2]]))
    assert isinstance(into["q"], PackedLayer)


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


def test_progress_of_split_rows_counts_each_byte_once() -> None:
    whole = pack(torch.randn(96, WIDTH), "gguf-q8_0")
    events: list[Any] = []
    load_rows(fused_model(), {"qkv": whole}, QKV, progress=events.append)
    assert events[-1].done_bytes == events[-1].total_bytes == whole["qdata"].nbytes
