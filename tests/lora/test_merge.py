"""W + what an adapter adds, quantized from W: what survives, and what is bit for bit the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from schemes import every_scheme
from torch import Tensor, nn

from lowbits.core import packing
from lowbits.core.packing import pack_weight
from lowbits.core.registry import DEFAULT
from lowbits.errors import NonFiniteWeightError
from lowbits.lora.merge import Decomposed, Delta, Dense, LowRank, MergedWeight, Survival

CPU = torch.device("cpu")
SIZE = 512
#: Codes that shrink what they hold, so that a delta shrinks with it.
SHRINKING = {"gguf-mxfp4": 0.95, "gguf-nvfp4": 0.97}


def weight(rows: int = SIZE, columns: int = SIZE) -> Tensor:
    return torch.randn(rows, columns) * 0.02


def lora(like: Tensor, share: float, rank: int = 16) -> LowRank:
    """Return a LoRA whose product has a share of a weight's norm."""
    up, down = torch.randn(like.shape[0], rank), torch.randn(rank, like.shape[1])
    return LowRank(up, down, share * float(like.norm() / (up @ down).norm()))


def survival(scheme_name: str, values: Tensor, delta: Delta) -> float:
    backend, scheme = DEFAULT.require(scheme_name)
    assert backend
    merged = MergedWeight(values, (delta,), CPU)
    counted = Survival()
    before = pack_weight(values, "Linear", scheme, backend, CPU)
    counted.add(merged, before, merged.pack(scheme, backend), backend)
    return counted.share


@pytest.mark.parametrize("scheme_name", every_scheme())
def test_a_delta_survives_and_nothing_added_changes_nothing(scheme_name: str) -> None:
    backend, scheme = DEFAULT.require(scheme_name)
    assert backend
    size = 256 if scheme_name.endswith("-best") else SIZE
    values = weight(size, size)
    before = pack_weight(values, "Linear", scheme, backend, CPU)
    (same,) = MergedWeight(values, (), CPU).pack(scheme, backend)
    for name, tensor in before.tensors.items():
        assert torch.equal(tensor.view(torch.uint8), same[name].view(torch.uint8))
    error = float((backend.unpack(before, torch.float32) - values).norm() / values.norm())
    bits = backend.packed_bytes(scheme, *values.shape) * 8 / values.numel()
    least = SHRINKING.get(scheme_name, 0.99 if error <= 0.06 else 0.97 if bits >= 4 else 0.6)
    # What quantizing adds is as large as the delta at 3 %: a 512th of it counts by chance.
    for share in (0.03, 0.1):
        assert survival(scheme_name, values, lora(values, share)) >= least - 0.005


def test_of_a_dequantized_weight_a_delta_is_lost() -> None:
    values = weight()
    backend, scheme = DEFAULT.require("bnb-nf4")
    assert backend
    packed = pack_weight(values, "Linear", scheme, backend, CPU)
    delta = lora(values, 0.01)
    assert survival("bnb-nf4", backend.unpack(packed, torch.float32), delta) < 0.1
    assert survival("bnb-nf4", values, delta) > 0.95


def test_the_sum_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = weight(40, 64).bfloat16()
    delta = lora(values.float(), 0.1)
    backend, scheme = DEFAULT.require("torchao-int8")
    assert backend
    (whole,) = MergedWeight(values, (delta,), CPU).pack(scheme, backend)
    monkeypatch.setattr(packing, "part_weights", lambda _: 7 * 64)
    parts = MergedWeight(values, (delta,), CPU).pack(scheme, backend)
    assert [part.shape for part in parts] == [(7, 64)] * 5 + [(5, 64)]
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts]))
    dense = Dense(delta.up @ delta.down, delta.scale)
    for start, stop in ((0, 7), (35, 40)):
        rows = values[start:stop].float()
        expected = rows.clone()
        dense.add_to(expected, rows, start, stop)
        merged = MergedWeight(values, (delta,), CPU).rows(start, stop)
        assert torch.allclose(merged, expected, atol=1e-6)


def test_a_16_bit_weight_is_summed_in_float32() -> None:
    values = weight(32, 64).bfloat16()
    before = values.clone()
    low_rank = lora(values.float(), 0.1)
    dense = Dense(low_rank.up @ low_rank.down, low_rank.scale)
    for delta in (low_rank, dense, Decomposed(low_rank, torch.rand(32))):
        merged = MergedWeight(values, (delta,), CPU)
        wide = MergedWeight(values.float(), (delta,), CPU)
        assert torch.equal(merged.rows(3, 20).clone(), wide.rows(3, 20))
        assert torch.equal(merged.added(3, 20), wide.added(3, 20))
        assert torch.equal(values, before)


def test_several_deltas_add_up() -> None:
    values = weight(32, 64)
    deltas = [lora(values, 0.1, rank=2) for _ in range(3)]
    expected = values + sum(d.scale * d.up @ d.down for d in deltas)
    assert torch.allclose(MergedWeight(values, deltas, CPU).rows(0, 32), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_decomposed_delta_is_that_of_peft(kind: str) -> None:
    layer: Any = nn.Linear(24, 16) if kind == "linear" else nn.Conv2d(4, 16, 3)
    original = layer.weight.detach().clone()
    config = LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model: Any = get_peft_model(nn.Sequential(layer), config)
    wrapper = model.base_model.model[0]
    magnitude = wrapper.lora_magnitude_vector["default"].weight.detach() * 1.3
    wrapper.lora_magnitude_vector["default"].weight.data = magnitude
    low_rank = LowRank(
        wrapper.lora_B["default"].weight.detach().flatten(1),
        wrapper.lora_A["default"].weight.detach().flatten(1),
        wrapper.scaling["default"],
    )
    delta = Decomposed(low_rank, magnitude.flatten())
    merged = MergedWeight(original.flatten(1), (delta,), CPU).rows(0, 16)
    model.merge_adapter()
    assert torch.allclose(merged, layer.weight.flatten(1), atol=1e-6)


def test_what_is_not_finite_is_refused() -> None:
    values = weight(8, 64)
    delta = LowRank(torch.full((8, 1), torch.inf), torch.ones(1, 64), 1.0)
    backend, scheme = DEFAULT.require("float8-e4m3fn")
    assert backend
    with pytest.raises(NonFiniteWeightError):
        MergedWeight(values, (delta,), CPU).pack(scheme, backend)
