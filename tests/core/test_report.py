"""Every byte is accounted for."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lowbits
from lowbits.core.memory import storage_bytes
from lowbits.core.report import format_bytes
from lowbits.testing.layers import Model


def test_bytes_are_those_of_the_storages() -> None:
    model = Model()
    tensors = [*model.parameters(), *model.buffers()]
    before, count = storage_bytes(tensors), sum(p.numel() for p in model.parameters())
    report = lowbits.quantize(model, "bnb-nf4", rules={"*": "bnb-nf4"}).report()
    assert report.bytes_before == before
    assert report.bytes_after == storage_bytes([*model.parameters(), *model.buffers()])
    assert report.parameters == count


def test_the_table_groups_blocks_and_says_why() -> None:
    model = nn.ModuleList([nn.Linear(64, 64) for _ in range(12)])
    table = lowbits.quantize(model, "bnb-nf4", skip=("3",)).report().table()
    lines = table.splitlines()
    assert lines[0].split() == [
        "layer",
        "n",
        "kind",
        "shape",
        "scheme",
        "before",
        "after",
        "bits",
        "source",
        "why",
    ]
    packed = next(line for line in lines if "memory" in line)
    assert packed.split()[:5] == ["*", "11", "Linear", "64x64", "bnb-nf4"]
    assert "4.500" in packed
    assert any("skipped by '3'" in line for line in lines)
    assert lines[-1].startswith("model: 195.00 KiB -> 43.75 KiB")


def test_to_dict_is_plain_json() -> None:
    report = lowbits.quantize(nn.Linear(64, 64), "gguf-q8_0").report()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"][0] == {
        "fqn": "",
        "component": "",
        "kind": "Linear",
        "shape": [64, 64],
        "scheme": "gguf-q8_0",
        "bytes_before": 16384,
        "bytes_after": 4352,
        "bits_per_weight": 8.5,
        "source": "memory",
        "reason": "",
    }
    assert str(report) == report.table()


def test_bits_of_an_empty_tensor() -> None:
    model = nn.ModuleList([nn.Linear(1, 8), nn.Linear(64, 64)])
    model[0].weight = nn.Parameter(torch.zeros(8, 0))
    report = lowbits.quantize(model, "bnb-nf4", rules={"*": "bnb-nf4"}).report()
    assert report.layers[0].reason == "empty"
    assert report.layers[0].bits_per_weight == 0.0


def test_units() -> None:
    assert format_bytes(0) == "0 B"
    assert format_bytes(1023) == "1023 B"
    assert format_bytes(1536) == "1.50 KiB"
    assert format_bytes(3 * 1024**3) == "3.00 GiB"
    assert format_bytes(5 * 1024**4) == "5.00 TiB"


def test_shared_storage_counts_once() -> None:
    whole = torch.zeros(10)
    assert storage_bytes([whole, whole[:5]]) == 40


@pytest.mark.parametrize("scheme", ["native", None])
def test_what_was_packed_before_is_told_as_packed(scheme: str | None) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    full = sum(parameter.nbytes for parameter in model.parameters())
    before = lowbits.quantize(model, "bnb-nf4").report()
    loaded = copy.deepcopy(model)
    report = (lowbits.apply(loaded, scheme) if scheme else lowbits.apply(loaded)).report()
    assert report.bytes_before == before.bytes_before == full
    assert report.bytes_after == before.bytes_after
    assert [layer.scheme for layer in report.kept] == ["bnb-nf4"] * 2
    assert report.packed == before.kept == ()
    assert report.summary().endswith("0 weights packed; 2 were packed before, as bnb-nf4")
    more = lowbits.quantize(nn.Sequential(copy.deepcopy(model), nn.Linear(64, 64)), "bnb-nf4")
    assert (
        more.report()
        .summary()
        .endswith(
            "1 weights packed as bnb-nf4, originals: memory; 2 were packed before, as bnb-nf4"
        )
    )


def test_a_tied_weight_is_one() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    report = lowbits.quantize(model, "bnb-nf4").report()
    assert [layer.scheme for layer in report.packed] == ["bnb-nf4"] * 2
    assert ", 1 weights packed as bnb-nf4" in report.summary()
    assert "; 1 were packed before" in lowbits.apply(copy.deepcopy(model)).report().summary()


def test_tensors_of_other_kinds_count_as_what_they_hold() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model.register_buffer("sparse", torch.eye(64).to_sparse())
    report = lowbits.quantize(model, "bnb-nf4").report()
    held = 64 * 4 + 2 * 64 * 8  # values, and indices
    assert next(layer for layer in report.layers if layer.fqn == "sparse").bytes_before == held
    assert report.bytes_before == 2 * (64 * 64 + 64) * 4 + held


def test_what_another_library_quantized_counts_as_that() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    held = storage_bytes(model.parameters())
    report = lowbits.apply(model, "native", device="cpu").report()
    assert report.bytes_before == report.bytes_after == held < 2 * (64 * 64 + 64) * 2
