"""Weights of bitsandbytes in files, against its own decoder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from oracles import bitsandbytes_values
from safetensors.torch import save_file
from stored import packed_of, recognised, values_of, written
from torch import nn

import lowbits
from lowbits.core.registry import DEFAULT
from lowbits.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")

State = dict[str, "Tensor"]


def quantized(
    shape: tuple[int, ...] = (32, 128), kind: str = "nf4", *, nested: bool = False, **kwargs: Any
) -> tuple[State, Tensor]:
    """Return a weight as bitsandbytes saves it, and its values."""
    weight = torch.randn(shape, dtype=kwargs.pop("dtype", torch.float32))
    codes, state = bnb.quantize_4bit(
        weight, quant_type=kind, compress_statistics=nested, **{"blocksize": 64, **kwargs}
    )
    saved = {f"x.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"x.weight": codes, **saved, "x.bias": torch.zeros(shape[0])}, bitsandbytes_values(
        codes, state
    )


def described(tensors: State, **changes: Any) -> State:
    """Return the same tensors with another description."""
    name = next(name for name in tensors if "quant_state" in name)
    state = json.loads(bytes(tensors[name].tolist())) | changes
    text = json.dumps(state).encode()
    return {**tensors, name: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


@pytest.mark.parametrize("block", [64, 128, 4096])
@pytest.mark.parametrize("shape", [(32, 128), (5, 33), (3, 7), (48, 64)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_values_are_those_of_bitsandbytes(
    tmp_path: Path, kind: str, shape: tuple[int, int], block: int, *, nested: bool
) -> None:
    tensors, values = quantized(shape, kind, nested=nested, blocksize=block)
    weights = written(tmp_path, tensors)
    assert list(weights) == ["x.bias", "x.weight"]
    weight = weights["x.weight"]
    assert weight.shape == shape
    assert weight.dtype == torch.float32
    assert weight.nbytes == sum(t.nbytes for n, t in tensors.items() if n != "x.bias")
    assert torch.equal(values_of(weight), values)
    assert weights["x.bias"].scheme is None


@pytest.mark.parametrize("row_length", [7, 100, 224, 256])
def test_one_row_that_ends_within_a_block(tmp_path: Path, row_length: int) -> None:
    tensors, values = quantized((1, row_length))
    packed = packed_of(written(tmp_path, tensors)["x.weight"])
    assert packed.row_sliceable == (row_length % 64 == 0)
    layer = nn.Linear(row_length, 1, bias=False)
    tensors.pop("x.bias")
    save_file(
        {name.removeprefix("x."): t for name, t in tensors.items()}, tmp_path / "y.safetensors"
    )
    lowbits.load(tmp_path / "y.safetensors", into=layer)
    x = torch.randn(3, row_length)
    torch.testing.assert_close(layer(x), x @ values.T)


@pytest.mark.parametrize("nested", [False, True])
def test_some_rows_of_wide_blocks(tmp_path: Path, *, nested: bool) -> None:
    tensors, values = quantized((16, 256), nested=nested, blocksize=128)
    packed = packed_of(written(tmp_path, tensors)["x.weight"])
    backend, _ = DEFAULT.find(packed.scheme)
    assert backend is not None
    part = backend.unpack(packed, torch.float32, rows=(3, 9))
    assert torch.equal(part, values[3:9])
    rows = torch.tensor([7, 0, 7])
    assert torch.equal(backend.unpack(packed, torch.float32, rows=rows), values[rows])


def test_blocks_of_32(tmp_path: Path) -> None:
    tensors, values = quantized((8, 96), blocksize=32)
    assert torch.equal(values_of(written(tmp_path, tensors)["x.weight"]), values)


def test_bytes_kept_in_another_dtype(tmp_path: Path) -> None:
    tensors, values = quantized(quant_storage=torch.bfloat16, dtype=torch.bfloat16)
    weight = written(tmp_path, tensors)["x.weight"]
    assert weight.dtype == torch.bfloat16
    assert torch.equal(values_of(weight).bfloat16().float(), values)


def test_transformers_model(tmp_path: Path) -> None:
    """What transformers saves of a T5 in NF4: names, and values of each layer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=32, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4
    )
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "plain")
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.T5EncoderModel.from_pretrained(
        tmp_path / "plain", quantization_config=options, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "nf4")
    weights = recognised(tmp_path / "nf4" / "model.safetensors")
    layers = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if type(layer).__name__ == "Linear4bit"
    }
    packed = {name for name, weight in weights.items() if weight.scheme}
    assert packed == set(layers)
    assert len(packed) > 4
    for name, layer in layers.items():
        values = bitsandbytes_values(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(values_of(weights[name]), values.float()), name


def int8(name: str = "x.SCB") -> tuple[State, Tensor]:
    codes, scale, _ = bnb.int8_vectorwise_quant(torch.randn(16, 48, dtype=torch.float16))
    values: Tensor = bnb.int8_vectorwise_dequant(codes, scale)
    order = torch.tensor(0, dtype=torch.uint8)
    return {"x.weight": codes, name: scale, "x.weight_format": order}, values


@pytest.mark.parametrize("name", ["x.SCB", "x.weight.SCB"])
def test_int8(tmp_path: Path, name: str) -> None:
    tensors, values = int8(name)
    weights = written(tmp_path, tensors)
    assert list(weights) == ["x.weight"]
    assert weights["x.weight"].scheme == "bnb-int8"
    # bitsandbytes multiplies by the absolute maximum, then by 1 / 127; here by their quotient.
    torch.testing.assert_close(values_of(weights["x.weight"]), values, rtol=2e-7, atol=0)


def test_int8_in_an_order_of_a_gpu(tmp_path: Path) -> None:
    tensors = int8()[0] | {"x.weight_format": torch.tensor(2, dtype=torch.uint8)}
    weight = written(tmp_path, tensors)["x.weight"]
    with pytest.raises(FormatError, match="x.weight: weight_format 2: its codes are not in rows"):
        weight.read()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda t: t.pop("x.weight"), "x.weight is missing"),
        (lambda t: t.pop("x.weight.absmax"), "x.weight.absmax is missing"),
        (lambda t: t.pop("x.weight.quant_map"), "x.weight.quant_map is missing"),
        (lambda t: t.pop("x.weight.nested_absmax"), "nested_absmax is missing"),
        (lambda t: t.update(described(t, shape=[1 << 40, 1 << 40])), "take"),
        (lambda t: t.update(described(t, shape=[-32, -128])), "shape"),
        (lambda t: t.update(described(t, shape=[4096])), "shape"),
        (lambda t: t.update(described(t, shape=None)), "shape"),
        (lambda t: t.update(described(t, blocksize=0)), "block size 0"),
        (lambda t: t.update(described(t, blocksize=48)), "block size 48"),
        (lambda t: t.update(described(t, blocksize="64")), "blocksize '64'"),
        (lambda t: t.update(described(t, dtype="cdll")), "dtype 'cdll'"),
        (lambda t: t.update(described(t, quant_type="fp4")), "quant_type 'fp4'"),
        (lambda t: t.update(described(t, nested_blocksize=128)), "nested_blocksize 128"),
        (lambda t: t.update(described(t, nested_offset="0")), "nested_offset '0'"),
        (lambda t: t.update(described(t, nested_offset=10**400)), "nested_offset"),
        (lambda t: t.update({"x.weight": t["x.weight"][:-1]}), "take 2048 bytes"),
        (lambda t: t.update({"x.weight.absmax": t["x.weight.absmax"][1:]}), "64 scales"),
        (lambda t: t.update({"x.weight.absmax": torch.zeros(64)}), "nested ones are True"),
        (
            lambda t: t.update(
                {"x.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}
            ),
            "it is not JSON",
        ),
        (
            lambda t: t.update(
                {
                    "x.weight.quant_state.bitsandbytes__nf4": torch.full(
                        (60000,), ord("["), dtype=torch.uint8
                    )
                }
            ),
            "it is not JSON",
        ),
        (
            lambda t: t.update(
                {"x.weight.quant_state.bitsandbytes__nf4": torch.zeros(1 << 17, dtype=torch.uint8)}
            ),
            "no description",
        ),
    ],
)
def test_broken_parts_are_refused_by_name(
    tmp_path: Path, break_it: Callable[[State], object], message: str
) -> None:
    tensors, _ = quantized(nested=True)
    break_it(tensors)
    with pytest.raises(FormatError, match=message) as caught:
        written(tmp_path, tensors)
    assert caught.value.tensor.startswith("x.weight")
    assert caught.value.path.endswith(".safetensors")


@pytest.mark.parametrize("name", ["quant_map", "nested_quant_map"])
def test_another_code_book_is_refused(tmp_path: Path, name: str) -> None:
    tensors, _ = quantized(nested=True)
    tensors[f"x.weight.{name}"] = tensors[f"x.weight.{name}"] * 2
    weight = written(tmp_path, tensors)["x.weight"]
    with pytest.raises(FormatError, match="x.weight: its code book is not that of bitsandbytes'"):
        weight.read()


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    tensors, _ = quantized()
    tensors["x.weight.absmax"][3] = torch.nan
    weight = written(tmp_path, tensors)["x.weight"]
    with pytest.raises(FormatError, match="x.weight: 1 of its bnb-nf4 scales or values are NaN"):
        weight.read()
    again = written(tmp_path / "again.safetensors", tensors, allow_nonfinite=True)["x.weight"]
    assert packed_of(again)["scale"].isnan().sum() == 1


def test_int8_parts_that_do_not_fit(tmp_path: Path) -> None:
    tensors, _ = int8()
    with pytest.raises(FormatError, match="x.SCB: .* for 16 rows"):
        written(tmp_path, {**tensors, "x.SCB": torch.zeros(15)})
    with pytest.raises(FormatError, match="x.weight: LLM.int8.. weight of torch.uint8"):
        written(tmp_path, {**tensors, "x.weight": tensors["x.weight"].view(torch.uint8)})
    with pytest.raises(FormatError, match="x.SCB: x.weight is missing"):
        written(tmp_path, {"x.SCB": tensors["x.SCB"]})


def test_int8_tensors_of_nobody_are_ordinary(tmp_path: Path) -> None:
    weights = written(tmp_path, {"x.weight": torch.ones(4, 4, dtype=torch.int8)})
    assert weights["x.weight"].scheme is None
