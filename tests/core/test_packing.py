"""A weight packed in parts is the weight packed whole, and layers compute in fast dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowbits
from lowbits import errors
from lowbits.core import packing
from lowbits.core.backend import Packed
from lowbits.core.registry import DEFAULT

CPU = torch.device("cpu")
SCHEMES = [
    info.name
    for info in lowbits.schemes()
    if info.can_quantize and info.backend not in ("-", "toy")
]


@pytest.mark.parametrize("name", SCHEMES)
def test_parts_make_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, scheme = DEFAULT.require(name)
    assert backend is not None
    weight = torch.randn(37, 512 if scheme.row_multiple > 64 else 192)
    whole = packing.pack_weight(weight, "Linear", scheme, backend, CPU)
    monkeypatch.setattr(packing, "part_weights", lambda _: 1000)
    parts = packing.pack_weight(weight, "Linear", scheme, backend, CPU)
    assert parts.shape == whole.shape
    for key, tensor in whole.tensors.items():
        assert torch.equal(parts[key], tensor), key


@pytest.mark.parametrize("name", ["float8-e4m3fn", "quanto-float8", "torchao-float8"])
def test_what_metal_has_no_dtype_for_is_made_on_the_host(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, scheme = DEFAULT.require(name)
    assert backend is not None
    moved: list[torch.device] = []

    def to(packed: Packed, device: torch.device) -> Packed:
        moved.append(device)
        return packed

    monkeypatch.setattr(Packed, "to", to)
    metal, weight = torch.device("mps"), torch.randn(8, 64)
    packed = packing.pack_weight(weight, "Linear", scheme, backend, metal)
    assert moved == [metal]
    whole = packing.pack_weight(weight, "Linear", scheme, backend, CPU)
    assert all(torch.equal(packed[key], tensor) for key, tensor in whole.tensors.items())


def test_a_bad_value_in_the_last_part_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "part_weights", lambda _: 1000)
    layer = nn.Linear(192, 37)
    with torch.no_grad():
        layer.weight[36, 191] = torch.inf
    with pytest.raises(errors.NonFiniteWeightError, match="1 of its values are NaN or infinite"):
        lowbits.quantize(layer, "gguf-q8_0")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_bytes_decode_to_any_shape(kind: str) -> None:
    backend: Any = lowbits.backend("gguf")
    _, scheme = DEFAULT.find(f"gguf-{kind.lower()}")
    packed = backend.pack(torch.randn(6, 64), scheme)
    values = backend.unpack(packed, torch.float32)
    decoded = backend.decode(packed["qdata"], kind, (2, 3, 64), torch.float16)
    assert torch.equal(decoded, values.view(2, 3, 64).half())
    with pytest.raises(
        errors.FormatError, match=r"takes .* bytes .uint8. in rows of whole blocks of 32"
    ):
        backend.decode(packed["qdata"], kind, (6, 32))


def test_gguf_names_the_types_it_knows() -> None:
    backend: Any = lowbits.backend("gguf")
    with pytest.raises(errors.FormatError, match="unknown GGUF type 'Q4_X'; did you mean"):
        backend.decode(torch.zeros(18, dtype=torch.uint8), "Q4_X", (1, 32))


def test_a_module_without_bytes_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(errors.PatchError, match=r"without bytes \(the meta device\): load them"):
        lowbits.apply(model, device="cpu")


def test_a_module_on_several_devices_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64, device="meta"))
    with pytest.raises(errors.ConfigError, match=r"lies on several devices \(cpu, meta\)"):
        lowbits.apply(model, "bnb-nf4", device="cpu")
    assert type(model[0]) is nn.Linear
