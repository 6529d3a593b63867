"""Weights of quanto in files. Its own decoder of 2 and 4 bits compiles C++: its formula instead."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from stored import recognised, values_of, written
from torch import nn

from lowbits.backends.quanto import regrouped
from lowbits.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")


def unpacked(data: Tensor, bits: int, rows: int) -> Tensor:
    """Return the codes of ``PackedTensor``, without quanto's extension."""
    parts = [(data >> bits * i) & (2**bits - 1) for i in range(8 // bits)]
    return torch.cat(parts)[:rows]


def decoded(weight: Any) -> Tensor:
    """Return the values of a weight of 2 or 4 bits, by ``QBitsDequantizer``'s formula."""
    scale, shift = weight._scale.float(), weight._shift.float()
    codes = unpacked(weight._data._data, weight._qtype.bits, scale.shape[0])
    values: Tensor = scale * codes - shift
    return values.reshape(weight.shape)


def model(kind: str, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Module:
    layers = nn.Sequential(nn.Linear(256, 48, bias=bias), nn.LayerNorm(48), nn.Linear(48, 20))
    layers = layers.to(dtype)
    quanto.quantize(layers, weights=getattr(quanto, kind))
    quanto.freeze(layers)
    return layers


def state_of(layers: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layers.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("qint8", "quanto-int8"),
        ("qfloat8_e4m3fn", "quanto-float8"),
        ("qfloat8_e5m2", "float8-e5m2"),
    ],
)
def test_bytes(tmp_path: Path, kind: str, scheme: str, dtype: torch.dtype) -> None:
    layers = model(kind, dtype)
    weights = written(tmp_path, state_of(layers))
    assert "0.input_scale" not in weights
    for name in ("0.weight", "2.weight"):
        weight: Any = layers.get_parameter(name)
        assert weights[name].scheme == scheme
        assert weights[name].dtype == dtype
        expected = weight._data.float() * weight._scale.float()
        assert torch.equal(values_of(weights[name]), expected)
    assert {"0.bias", "2.bias"} <= set(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["qint4", "qint2"])
def test_bits(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """The first layer has two groups in a row, the second one row of no group."""
    layers = model(kind, dtype)
    weights = written(tmp_path, state_of(layers))
    for name, shape in (("0.weight", (48, 256)), ("2.weight", (20, 48))):
        weight: Any = layers.get_parameter(name)
        assert weights[name].scheme == f"quanto-{kind.removeprefix('q')}"
        assert weights[name].shape == shape
        assert torch.equal(values_of(weights[name]), decoded(weight))


def test_bits_in_bfloat16(tmp_path: Path) -> None:
    """Groups of 128 in bfloat16 are of quanto's tinygemm class, which it undoes when it saves."""
    layers = model("qint4", torch.bfloat16)
    weights = written(tmp_path, state_of(layers))
    weight: Any = layers.get_parameter("0.weight")
    assert type(weight).__name__ == "TinyGemmWeightQBitsTensor"
    assert torch.equal(values_of(weights["0.weight"]), decoded(weight.weight_qbits_tensor()))


@pytest.mark.parametrize("kind", ["qint4", "qint2"])
def test_bits_without_a_bias_have_groups_for_rows(tmp_path: Path, kind: str) -> None:
    layers = model(kind, bias=False)
    weight = written(tmp_path, state_of(layers))["0.weight"]
    assert weight.shape == (96, 128)
    packed: Any = weight.read()
    again = regrouped(packed, (48, 256))
    from lowbits.core.registry import DEFAULT

    backend, _ = DEFAULT.find(again.scheme)
    assert backend is not None
    values = backend.unpack(again, torch.float32)
    assert torch.equal(values, decoded(layers.get_parameter("0.weight")))
    for shape in ((36, 256), (0, 0), (192, 64), (-48, -256)):
        with pytest.raises(FormatError, match="do not make"):
            regrouped(packed, shape)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["qint4", "qint2"])
def test_rows_that_do_not_fill_a_byte(tmp_path: Path, kind: str, rows: int) -> None:
    weight = torch.randn(rows, 64)
    qtype: Any = getattr(quanto, kind)
    scale, shift = quanto.MaxOptimizer().optimize(weight, qtype, 0)
    codes = torch.ops.quanto.quantize_affine(weight, qtype.bits, 0, None, scale, shift)
    packed = quanto.tensor.packed.pack_weights(codes, qtype.bits)
    tensors = {"x.weight._data._data": packed, "x.weight._scale": scale, "x.weight._shift": shift}
    name = kind.removeprefix("q")
    config = {"quantization_config": {"quant_method": "quanto", "weights_dtype": name}}
    found = written(tmp_path, tensors, config=config)["x.weight"]
    assert found.scheme == f"quanto-{name}"
    assert torch.equal(values_of(found), scale * codes - shift)
    if rows < 3:
        with pytest.raises(FormatError, match="neither int4 nor int2"):
            written(tmp_path, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_integer_shifts(tmp_path: Path, dtype: torch.dtype) -> None:
    """float32 holds the products with 16-bit scales, and no others."""
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8)
    scale, shift = torch.rand(8, 1).to(dtype), torch.randint(-8, 8, (8, 1), dtype=torch.int8)
    packed = quanto.tensor.packed.pack_weights(codes, 4)
    tensors = {"x.weight._data._data": packed, "x.weight._scale": scale, "x.weight._shift": shift}
    found = written(tmp_path, tensors)["x.weight"]
    if dtype == torch.float32:
        with pytest.raises(FormatError, match="x.weight: integer shifts with float32 scales"):
            found.read()
    else:
        expected = scale.float() * (codes.to(torch.int8) - shift).float()
        assert torch.equal(values_of(found), expected)


@pytest.mark.parametrize("kind", ["int8", "float8", "int4", "int2"])
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_folders_of_diffusers(tmp_path: Path, kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    from pipelines import PIPELINES

    plain = PIPELINES["flux"].build().transformer
    plain.save_pretrained(tmp_path / "plain")
    quantized = type(plain).from_pretrained(
        tmp_path / "plain", quantization_config=diffusers.QuantoConfig(weights_dtype=kind)
    )
    quantized.save_pretrained(tmp_path / kind)
    config = json.loads((tmp_path / kind / "config.json").read_text())
    weights = recognised(tmp_path / kind / "diffusion_pytorch_model.safetensors", config)
    assert set(weights) == set(plain.state_dict())
    packed = {name for name, weight in weights.items() if weight.scheme}
    assert len(packed) > 20
    for name in packed:
        weight: Any = quantized.get_parameter(name)
        is_small = kind.startswith("int") and kind != "int8"
        expected = decoded(weight) if is_small else weight._data.float() * weight._scale
        assert torch.equal(values_of(weights[name]), expected), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("0.weight._scale"), "0.weight._scale is missing"),
        (lambda t: t.pop("0.weight._shift"), "0.weight._shift is missing"),
        (lambda t: t.update({"0.weight._shift": torch.zeros(5, 1)}), "shifts of"),
        (lambda t: t.update({"0.weight._scale": torch.zeros(96, 1).int()}), "shifts of"),
        (lambda t: t.update({"0.weight._data._data": torch.zeros(7, 128).byte()}), "neither int4"),
        (lambda t: t.update({"0.weight._data._data": torch.zeros(0, 128).byte()}), "of shape"),
    ],
)
def test_broken_parts_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = state_of(model("qint4"))
    change(tensors)
    with pytest.raises(FormatError, match=message) as caught:
        written(tmp_path, tensors)
    assert caught.value.tensor.startswith("0.weight")


def test_broken_parts_that_are_read(tmp_path: Path) -> None:
    codes = torch.zeros(4, 63, dtype=torch.uint8)
    scale, shift = torch.ones(8, 1), torch.zeros(8, 1)
    tensors = {"x.weight._data._data": codes, "x.weight._scale": scale, "x.weight._shift": shift}
    with pytest.raises(FormatError, match="x.weight: groups of 63 codes of 4 bits"):
        written(tmp_path, tensors)["x.weight"].read()
    tensors["x.weight._data._data"] = torch.zeros(4, 64)
    with pytest.raises(FormatError, match="x.weight: int4 codes of 8 groups"):
        written(tmp_path, tensors)["x.weight"].read()
    tensors["x.weight._data._data"] = torch.zeros(4, 64, dtype=torch.uint8)
    tensors["x.weight._scale"][1] = torch.inf
    with pytest.raises(FormatError, match="x.weight: 1 of its quanto-int4 scales"):
        written(tmp_path, tensors)["x.weight"].read()


def test_bytes_of_no_scheme(tmp_path: Path) -> None:
    tensors = {"x.weight._data": torch.zeros(4, 8), "x.weight._scale": torch.ones(4, 1)}
    weight = written(tmp_path, tensors)["x.weight"]
    assert weight.scheme == "quanto:torch.float32"
    with pytest.raises(FormatError, match="quanto's codes of torch.float32 are of no scheme"):
        weight.read()
    tensors = {"x.weight._data": torch.zeros(4, 8).char(), "x.weight._scale": torch.ones(3, 1)}
    with pytest.raises(FormatError, match="x.weight._scale: .* for 4 rows"):
        written(tmp_path, tensors)


def test_two_forms_of_one_weight(tmp_path: Path) -> None:
    tensors = state_of(model("qint8")) | {"0.weight": torch.ones(2, 2)}
    with pytest.raises(FormatError, match="0.weight: two weights of this name"):
        written(tmp_path, tensors)
