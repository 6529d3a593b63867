"""Float8 and int8 weights with scales, as Forge, ComfyUI and others store them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from stored import packed_of, values_of, written

from lowbits.errors import FormatError
from lowbits.files.forms.recognise import recognise
from lowbits.files.safetensors import read_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def codes(dtype: torch.dtype = E4M3, *shape: int) -> Tensor:
    return (torch.randn(shape or (16, 32)) * 20).to(dtype)


def json_tensor(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_plain_casts(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "x.weight": codes(dtype),
        "conv.weight": codes(dtype, 8, 4, 3, 3),
        "norm.weight": codes(dtype, 16),
        "y.bias": torch.zeros(16),
    }
    weights = written(tmp_path, tensors)
    name = f"float8-{str(dtype).removeprefix('torch.float8_')}-raw"
    schemes = {key: weight.scheme for key, weight in weights.items()}
    assert schemes == {
        "x.weight": name, "conv.weight": name, "norm.weight": None, "y.bias": None,
    }  # fmt: skip
    assert torch.equal(values_of(weights["x.weight"]), tensors["x.weight"].float())
    assert packed_of(weights["conv.weight"]).shape == (8, 36)
    assert torch.equal(values_of(weights["conv.weight"]), tensors["conv.weight"].float())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(), (1,), (16,), (16, 1)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_scaled_float8(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...], scale_dtype: torch.dtype
) -> None:
    scale = (torch.rand(shape) + 0.1).to(scale_dtype)
    tensors = {
        "scaled_fp8": torch.zeros(0, dtype=dtype),
        "x.weight": codes(dtype),
        "x.scale_weight": scale,
        "x.scale_input": torch.ones(()),
        "x.bias": torch.zeros(16),
    }
    weights = written(tmp_path, tensors)
    assert set(weights) == {"x.weight", "x.bias"}
    expected = tensors["x.weight"].float() * scale.float().reshape(-1, 1)
    assert torch.equal(values_of(weights["x.weight"]), expected)


def layer(kind: str, weight: Tensor, scale: Tensor, **more: Any) -> dict[str, Tensor]:
    return {
        "x.weight": weight,
        "x.weight_scale": scale,
        "x.input_scale": torch.ones(()),
        "x.comfy_quant": json_tensor({"format": kind, **more}),
    }


def test_comfy_float8(tmp_path: Path) -> None:
    tensors = layer("float8_e4m3fn", codes(), torch.tensor(0.3), full_precision_matrix_mult=True)
    weights = written(tmp_path, tensors)
    assert list(weights) == ["x.weight"]
    assert torch.equal(values_of(weights["x.weight"]), tensors["x.weight"].float() * 0.3)
    bytes_of_it = tensors | {"x.weight": tensors["x.weight"].view(torch.uint8)}
    again = written(tmp_path / "again.safetensors", bytes_of_it)["x.weight"]
    assert torch.equal(values_of(again), values_of(weights["x.weight"]))


@pytest.mark.parametrize("shape", [(), (16,), (16, 1)])
def test_comfy_int8(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    scale = torch.rand(shape)
    found = written(tmp_path, layer("int8_tensorwise", weight, scale))["x.weight"]
    assert found.scheme == "torchao-int8"
    assert torch.equal(values_of(found), weight.float() * scale.reshape(-1, 1))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_descriptions_in_the_metadata(tmp_path: Path, prefix: str) -> None:
    tensors = layer("", codes(), torch.tensor(0.3))
    del tensors["x.comfy_quant"]
    tensors = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    layers = {"x": {"format": "float8_e4m3fn"}, "elsewhere": {"format": "nvfp4"}}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    weights = written(tmp_path, tensors, metadata)
    assert list(weights) == [f"{prefix}x.weight"]
    assert weights[f"{prefix}x.weight"].scheme == "float8-e4m3fn"


def test_scales_in_float8_are_no_weights(tmp_path: Path) -> None:
    tensors = layer("nvfp4", torch.zeros(16, 32, dtype=torch.uint8), torch.ones(()))
    tensors["x.weight_scale"] = torch.ones(16, 4).to(torch.float8_e4m3fn)
    tensors["x.weight_scale_2"] = torch.ones(())
    found = written(tmp_path, tensors)
    assert {name: weight.scheme for name, weight in found.items()} == {"x.weight": "comfy:nvfp4"}


@pytest.mark.parametrize(
    ("kind", "more", "listed"),
    [
        ("nvfp4", {}, "nvfp4"),
        ("mxfp8", {}, "mxfp8"),
        ("convrot_w4a4", {}, "convrot_w4a4"),
        ("int8_tensorwise", {"convrot": True}, "int8_tensorwise (convrot)"),
        ("int8_tensorwise", {"params": {"convrot": True}}, "int8_tensorwise (convrot)"),
        (["a"], {}, "['a']"),
    ],
)
def test_formats_of_no_scheme_are_listed(
    tmp_path: Path, kind: Any, more: dict[str, Any], listed: str
) -> None:
    weight = torch.zeros(16, 16, dtype=torch.int8)
    tensors = layer(kind, weight, torch.zeros(16, 2, dtype=torch.uint8), **more)
    tensors["x.weight_scale_2"] = torch.ones(())
    found = written(tmp_path, tensors)
    assert list(found) == ["x.weight"]
    assert found["x.weight"].scheme == f"comfy:{listed}"
    assert found["x.weight"].nbytes == sum(t.nbytes for t in tensors.values())
    with pytest.raises(FormatError, match="x.weight: ComfyUI's format") as caught:
        found["x.weight"].read()
    assert listed in str(caught.value)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale_2", "pre_quant_scale"])
def test_scales_of_blocks_are_refused(tmp_path: Path, name: str) -> None:
    tensors = {"x.weight": codes(), "x.weight_scale": torch.ones(()), f"x.{name}": torch.ones(1, 1)}
    found = written(tmp_path, tensors)["x.weight"]
    assert found.scheme
    assert found.scheme.startswith("scaled:")
    with pytest.raises(FormatError, match=f"x.weight: weights of .* with x.{name} .* no scheme"):
        found.read()


def test_a_scale_for_each_block_is_refused(tmp_path: Path) -> None:
    tensors = {"x.weight": codes(), "x.weight_scale": torch.ones(4, 4)}
    with pytest.raises(
        FormatError, match=r"x.weight_scale torch.float32 \(4, 4\) are of no scheme"
    ):
        written(tmp_path, tensors)["x.weight"].read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("x.weight"), "x.weight is missing"),
        (lambda t: t.pop("x.weight_scale"), "its scale is missing"),
        (lambda t: t.update({"x.comfy_quant": torch.zeros(3, dtype=torch.uint8)}), "not JSON"),
        (lambda t: t.update({"x.comfy_quant": json_tensor([1])}), "not a JSON object, but list"),
        (lambda t: t.update({"x.comfy_quant": torch.zeros(3)}), "no description"),
        (lambda t: t.update({"x.weight": torch.zeros(0, 3, dtype=torch.int8)}), "shape"),
    ],
)
def test_broken_parts_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = layer("int8_tensorwise", torch.ones(4, 4, dtype=torch.int8), torch.ones(()))
    change(tensors)
    with pytest.raises(FormatError, match=message) as caught:
        written(tmp_path, tensors)
    assert caught.value.tensor.startswith("x.")


def test_scales_without_their_weight(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="x.scale_weight: x.weight is missing, or neither"):
        written(tmp_path, {"x.scale_weight": torch.ones(()), "x.weight": torch.ones(2, 2)})


def test_metadata_that_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="_quantization_metadata is not JSON"):
        written(tmp_path, {"x.weight": torch.ones(2, 2)}, {"_quantization_metadata": "{"})


@pytest.mark.parametrize(
    ("dtype", "bits"), [(E4M3, 0x7F), (E4M3, 0xFF), (E5M2, 0x7C), (E5M2, 0xFE)]
)
def test_values_that_are_not_finite(tmp_path: Path, dtype: torch.dtype, bits: int) -> None:
    weight = codes(dtype)
    weight.view(torch.uint8)[3, 4] = bits
    assert not weight.float().isfinite().all()
    with pytest.raises(FormatError, match="x.weight: 1 of its float8-.*-raw scales or values"):
        written(tmp_path, {"x.weight": weight})["x.weight"].read()
    found = written(tmp_path, {"x.weight": weight}, allow_nonfinite=True)["x.weight"]
    assert not values_of(found).isfinite().all()


def test_a_scale_that_is_not_finite(tmp_path: Path) -> None:
    tensors = {"x.weight": codes(), "x.scale_weight": torch.tensor(torch.inf)}
    with pytest.raises(FormatError, match="16 of its float8-e4m3fn scales"):
        written(tmp_path, tensors)["x.weight"].read()


def test_files_that_end_early(tmp_path: Path) -> None:
    written(tmp_path, {"x.weight": codes()})
    file = tmp_path / "x.safetensors"
    opened = read_safetensors(file)
    stored = opened.tensors["x.weight"]
    unstamped = replace(stored, extent=replace(stored.extent, stamp=None))
    file.write_bytes(file.read_bytes()[:-5])
    for tensor, message in (
        (stored, "x.weight: the file was changed or replaced since it was opened"),
        (unstamped, "x.weight: the file ends after 507 of 512 bytes"),
    ):
        found = recognise({"x.weight": tensor}, opened.metadata, None)["x.weight"]
        with pytest.raises(FormatError, match=message):
            found.read()
