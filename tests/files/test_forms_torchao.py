"""Weights of torchao in files, against its own decoder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from stored import packed_of, recognised, values_of, written
from torch import nn

from lowbits.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from lowbits.files.weights import Weight

quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
flat = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")

PER_16 = quantization.PerGroup(16)
INT4 = getattr(torch, "int4")  # noqa: B009 - torch's stubs lack it


def model(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48), nn.Linear(48, 32, bias=False))
    quantization.quantize_(layers.to(dtype), config)
    return layers


def saved(path: Path, layers: nn.Module) -> dict[str, Weight]:
    state = {name: tensor.detach() for name, tensor in layers.state_dict().items()}
    tensors, metadata = flat.flatten_tensor_state_dict(state)
    return written(path, tensors, metadata)


def weight_only(name: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        resolved = {
            key: getattr(quantization, value)() if isinstance(value, str) else value
            for key, value in options.items()
        }
        return getattr(quantization, name)(**resolved)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (weight_only("Int8WeightOnlyConfig"), "torchao-int8"),
        (weight_only("Int8WeightOnlyConfig", granularity="PerTensor"), "torchao-int8"),
        (
            weight_only("Int8WeightOnlyConfig", granularity=quantization.PerGroup(16)),
            "torchao-int8",
        ),
        (weight_only("IntxWeightOnlyConfig", weight_dtype=INT4), "torchao-int8"),
        (
            weight_only("IntxWeightOnlyConfig", granularity=quantization.PerGroup(8)),
            "torchao-int8",
        ),
        (weight_only("Int8DynamicActivationInt8WeightConfig"), "torchao-int8-dynamic"),
        (weight_only("Float8WeightOnlyConfig"), "torchao-float8"),
        (weight_only("Float8WeightOnlyConfig", weight_dtype=torch.float8_e5m2), "float8-e5m2"),
    ],
)
def test_values_are_those_of_torchao(
    tmp_path: Path, config: Callable[[], Any], scheme: str, dtype: torch.dtype
) -> None:
    layers = model(config(), dtype)
    weights = saved(tmp_path, layers)
    assert set(weights) == set(layers.state_dict())
    for name in ("0.weight", "2.weight"):
        weight: Any = layers.get_parameter(name)
        assert weights[name].scheme == scheme
        assert weights[name].dtype == dtype
        assert weights[name].shape == tuple(weight.shape)
        if "Intx" in type(weight).__name__:  # decodes to its own dtype only
            assert torch.equal(values_of(weights[name]).to(dtype), weight.dequantize())
        else:
            expected = weight.dequantize(output_dtype=torch.float32)
            assert torch.equal(values_of(weights[name]), expected)
    assert weights["1.weight"].scheme is None


@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
def test_activations_are_quantized_where_each_row_is(tmp_path: Path, granularity: str) -> None:
    """Rows of 64 are whole products of 16, those of 40 are not."""
    layers = nn.Sequential(nn.Linear(64, 16), nn.Linear(40, 16))
    quantization.quantize_(layers, quantization.Float8WeightOnlyConfig())
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    how = QuantizeTensorToFloat8Kwargs(granularity=getattr(quantization, granularity)())
    for layer in layers:
        layer.weight.act_quant_kwargs = how  # type: ignore[union-attr]
    weights = saved(tmp_path, layers)
    schemes = [packed_of(weights[name]).scheme for name in ("0.weight", "1.weight")]
    suffix = "-dynamic" if granularity == "PerRow" else ""
    assert schemes == [f"torchao-float8{suffix}", "torchao-float8"]


def int4(rows: int = 8, row_length: int = 64, group: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    """Return what ``Int4Tensor`` holds, packed as its kernels do, and the values."""
    codes = torch.randint(-8, 8, (rows, row_length))
    scale = torch.rand(row_length // group, rows).bfloat16()
    zero = torch.randn(row_length // group, rows).bfloat16()
    packed = ((codes[:, 1::2] << 4) | (codes[:, ::2] & 0xF)).to(torch.int8)
    by_row = [t.t().float().repeat_interleave(group, 1) for t in (scale, zero)]
    return {"qdata": packed, "scale": scale, "zero_point": zero}, codes * by_row[0] + by_row[1]


def int4_file(path: Path, parts: dict[str, Tensor], **options: Any) -> dict[str, Weight]:
    tensor = quantization.Int4Tensor(
        *parts.values(), block_size=[1, 32], shape=torch.Size((8, 64)), **options
    )
    tensors, metadata = flat.flatten_tensor_state_dict({"x.weight": tensor})
    return written(path, tensors, metadata)


def test_int4(tmp_path: Path) -> None:
    parts, values = int4()
    weight = int4_file(tmp_path, parts)["x.weight"]
    assert weight.scheme == "torchao-int4"
    assert weight.shape == (8, 64)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(values_of(weight), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_folders_of_diffusers(tmp_path: Path, dtype: torch.dtype) -> None:
    diffusers = pytest.importorskip("diffusers")
    from pipelines import PIPELINES

    plain = PIPELINES["flux"].build().transformer
    plain.save_pretrained(tmp_path / "plain")
    config = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = type(plain).from_pretrained(
        tmp_path / "plain", quantization_config=config, torch_dtype=dtype
    )
    quantized.save_pretrained(tmp_path / "int8")
    file = tmp_path / "int8" / "diffusion_pytorch_model.safetensors"
    weights = recognised(file, json.loads((tmp_path / "int8" / "config.json").read_text()))
    assert set(weights) == set(plain.state_dict())
    checked = 0
    for key, parameter in quantized.named_parameters():
        if weights[key].scheme:
            expected = parameter.dequantize(output_dtype=torch.float32)
            assert torch.equal(values_of(weights[key]), expected), key
            checked += 1
    assert checked > 20


def test_classes_of_no_scheme_are_listed(tmp_path: Path) -> None:
    layers = model(quantization.Int8WeightOnlyConfig())
    state = {name: tensor.detach() for name, tensor in layers.state_dict().items()}
    tensors, metadata = flat.flatten_tensor_state_dict(state)
    described = metadata["0.weight"].replace("Int8Tensor", "NVFP4Tensor")
    weight = written(tmp_path, tensors, {**metadata, "0.weight": described})["0.weight"]
    assert weight.scheme == "torchao:NVFP4Tensor"
    assert weight.shape == (48, 64)
    with pytest.raises(FormatError, match="torchao's NVFP4Tensor of torch.int8 is of no scheme"):
        weight.read()


def test_asymmetric_and_prescaled_weights_are_refused(tmp_path: Path) -> None:
    layers = model(quantization.Int8WeightOnlyConfig())
    weight: Any = layers.get_parameter("0.weight")
    weight.zero_point[0] = 1
    with pytest.raises(FormatError, match="0.weight: its zero point is not 0"):
        saved(tmp_path, layers)["0.weight"].read()
    parts, _ = int4()
    found = int4_file(tmp_path, parts, act_pre_scale=torch.ones(64))["x.weight"]
    with pytest.raises(FormatError, match="x.weight: this Int4Tensor is for inputs"):
        found.read()


def test_scales_of_blocks_are_refused(tmp_path: Path) -> None:
    layers = model(quantization.Int8WeightOnlyConfig())
    layers.get_parameter("0.weight").scale = torch.ones(24, 1)  # type: ignore[attr-defined]
    with pytest.raises(FormatError, match=r"0.weight: scales of shape \(24, 1\) for 48 rows"):
        saved(tmp_path, layers)["0.weight"].read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("0._weight_scale"), "0._weight_scale is missing"),
        (lambda t, m: m.update({"0.weight": "{"}), "the metadata of 0.weight is not JSON"),
        (lambda t, m: m.update({"0.weight": '{"_type": 3}'}), "metadata of 0.weight: 3 of None"),
        (
            lambda t, m: t.update({"0._weight_qdata": torch.zeros(0, 3, dtype=torch.int8)}),
            "a Int8Tensor of shape",
        ),
    ],
)
def test_broken_parts_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object], message: str
) -> None:
    layers = model(quantization.Int8WeightOnlyConfig())
    state = {name: tensor.detach() for name, tensor in layers.state_dict().items()}
    tensors, metadata = flat.flatten_tensor_state_dict(state)
    change(tensors, metadata)
    with pytest.raises(FormatError, match=message):
        written(tmp_path, tensors, metadata)


@pytest.mark.parametrize(
    ("shape", "message"), [([1 << 40, 1 << 40], "do not make"), ([-8, 64], "of shape")]
)
def test_shapes_that_the_codes_do_not_make(tmp_path: Path, shape: list[int], message: str) -> None:
    parts, _ = int4()
    tensor = quantization.Int4Tensor(*parts.values(), block_size=[1, 32], shape=torch.Size((8, 64)))
    tensors, metadata = flat.flatten_tensor_state_dict({"x.weight": tensor})
    described = json.loads(metadata["x.weight"])
    described["_data"]["shape"] = shape
    with pytest.raises(FormatError, match=message):
        written(tmp_path, tensors, {**metadata, "x.weight": json.dumps(described)})


@pytest.mark.parametrize("part", ["qdata", "scale", "zero_point"])
def test_int4_parts_that_do_not_fit(tmp_path: Path, part: str) -> None:
    parts, _ = int4()
    parts[part] = parts[part][:, :-2].contiguous()
    with pytest.raises(FormatError, match="x.weight: "):
        int4_file(tmp_path, parts)["x.weight"].read()


def test_metadata_of_others_is_not_looked_into(tmp_path: Path) -> None:
    tensors = {"x.weight": torch.ones(2, 2)}
    for names in ("no JSON", "3", '[1, "y"]', '{"a": 1}'):
        assert set(written(tmp_path, tensors, {"tensor_names": names})) == {"x.weight"}


def test_parts_in_another_file_are_left_to_it(tmp_path: Path) -> None:
    layers = model(quantization.Int8WeightOnlyConfig())
    state = {name: tensor.detach() for name, tensor in layers.state_dict().items()}
    tensors, metadata = flat.flatten_tensor_state_dict(state)
    half = {name: tensor for name, tensor in tensors.items() if name.startswith("2.")}
    assert set(written(tmp_path, half, metadata)) == {"2.weight"}
