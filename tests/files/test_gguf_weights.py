"""Tensors of GGUF files as weights: blocks, their byte order, original shapes, bad scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from files.gguf_bytes import PLAIN, Gguf, floats, info, key, opened
from torch import nn

from lowbits.backends.gguf.backend import GgufBackend
from lowbits.backends.gguf.quantize import QUANTIZERS
from lowbits.backends.gguf.types import TYPES
from lowbits.core.backend import Packed
from lowbits.core.packed import storage_form
from lowbits.core.source import NoSource
from lowbits.core.surgery import Journal, packed_parameters
from lowbits.errors import FormatError
from lowbits.files.gguf_types import STORED_TYPES

if TYPE_CHECKING:
    from pathlib import Path

    from lowbits.files.gguf import GgufFile

BACKEND = GgufBackend()


def blocks_file(name: str, rows: int = 2, order: str = "<") -> tuple[Gguf, torch.Tensor]:
    """Return a file with a matrix of some type, and its blocks."""
    kind = TYPES[name]
    length = max(kind.weights, 64)
    if name in QUANTIZERS:
        qdata = BACKEND.encode(torch.randn(rows, length), name)
    else:
        qdata = torch.zeros(rows, length // kind.weights * kind.block_bytes, dtype=torch.uint8)
    data = bytes(qdata.flatten().tolist())
    infos = [info("w", (length, rows), kind.number, 0, order)]
    return Gguf([], infos, data, order=order), qdata


@pytest.mark.parametrize("name", [name for name in TYPES if name not in PLAIN])
def test_block_types_are_weights_of_their_scheme(tmp_path: Path, name: str) -> None:
    file, qdata = blocks_file(name)
    read = opened(tmp_path, file)
    weight = read.weights()["w"]
    packed = weight.read()
    assert isinstance(packed, Packed)
    assert weight.scheme == packed.scheme == f"gguf-{name.lower()}"
    assert (weight.dtype, weight.nbytes) == (None, qdata.numel())
    assert packed.shape == weight.shape
    assert packed.row_sliceable
    assert torch.equal(packed["qdata"], qdata)
    assert torch.equal(read.read("w"), qdata)
    assert torch.equal(read.dequantize("w"), BACKEND.unpack(packed, torch.float32))


#: Float16 fields, which a byte order changes, of what llama.cpp's gguf-convert-endian turns round.
SWAPPED = {"Q4_0": [(0, 2)], "Q8_0": [(0, 2)], "Q4_K": [(0, 2), (2, 2)], "Q6_K": [(208, 2)]}
#: What ggml-quants.c copies into an uint32, or declares as an uint16.
SWAPPED |= {"MXFP4": [], "Q5_0": [(0, 2), (2, 4)], "IQ4_XS": [(0, 2), (2, 2)]}


@pytest.mark.parametrize("name", SWAPPED)
def test_big_endian_blocks(tmp_path: Path, name: str) -> None:
    file, qdata = blocks_file(name, order=">")
    blocks = qdata.view(-1, TYPES[name].block_bytes).clone()
    for offset, width in SWAPPED[name]:
        blocks[:, offset : offset + width] = blocks[:, offset : offset + width].flip(1)
    file.data = bytes(blocks.flatten().tolist())
    assert torch.equal(opened(tmp_path, file).read("w"), qdata)


def test_big_endian_blocks_that_nobody_has_seen_are_refused(tmp_path: Path) -> None:
    file = opened(tmp_path, blocks_file("IQ2_XS", order=">")[0])
    message = "w: it cannot be read: how blocks of IQ2_XS stand in big-endian files is not known"
    with pytest.raises(FormatError, match=message):
        file.dequantize("w")


#: But for integers, and NVFP4, whose scales are finite whatever their bits.
WITH_INFINITY = [name for name in STORED_TYPES if name[0] != "I" and name != "NVFP4"]


@pytest.mark.parametrize("name", WITH_INFINITY)
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, name: str) -> None:
    kind = STORED_TYPES[name]
    if name in PLAIN:
        bad = torch.tensor([1.0, torch.inf], dtype=PLAIN[name]).view(torch.uint8)
        infos = [info("w", (2,), kind.number)]
        file = Gguf([], infos, bytes(bad.tolist()))
    else:
        file, qdata = blocks_file(name)
        blocks = qdata.view(-1, kind.block_bytes).clone()
        # Each scale for itself: Q4_1's minimum counts as well.
        offset, width = (0, 1) if name == "MXFP4" else (*(kind.halves or (0,))[-1:], 2)
        blocks[-1, offset : offset + width] = 0xFF
        file.data = bytes(blocks.flatten().tolist())
    read = opened(tmp_path, file)
    message = r"w: it holds NaN or infinity; allow_nonfinite=True reads .* \(at byte \d+\)"
    with pytest.raises(FormatError, match=message):
        read.dequantize("w")
    with pytest.raises(FormatError, match=message):
        read.weights()["w"].read()
    assert not read.dequantize("w", allow_nonfinite=True).isfinite().all()
    read.weights(allow_nonfinite=True)["w"].read()
    read.read("w")


def test_the_scale_of_iq1_m_is_in_pieces(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file, qdata = blocks_file("IQ1_M")
    blocks = qdata.view(-1, 56).clone()
    blocks[1, 55], blocks[1, 53], blocks[1, 51] = 0x70, 0xC0, 0xF0
    file.data = bytes(blocks.flatten().tolist())
    with pytest.raises(FormatError, match="it holds NaN or infinity"):
        opened(tmp_path, file).dequantize("w")


def convolution(tmp_path: Path, shape: tuple[int, ...], name: str) -> tuple[GgufFile, torch.Tensor]:
    """Return a file with a convolution in ComfyUI's form, and its values."""
    weight = torch.randn(shape)
    weights = TYPES[name].weights
    qdata = BACKEND.encode(weight.view(-1, 256), name)
    keys = [key("comfy.gguf.orig_shape.w", "i32", list(shape))]
    infos = [info("w", (256, weight.numel() // 256), TYPES[name].number)]
    file = opened(tmp_path, Gguf(keys, infos, bytes(qdata.flatten().tolist())))
    values = BACKEND.decode(qdata, name, (weight.numel() // weights, weights)).view(shape)
    return file, values


@pytest.mark.parametrize(
    ("shape", "name", "is_sliceable"),
    [
        ((16, 16, 3, 3), "Q4_K", False),
        ((8, 32, 3, 3), "Q8_0", True),
        ((16, 4, 2, 2), "Q8_0", False),
        ((512,), "Q8_0", True),
    ],
)
def test_original_shapes(
    tmp_path: Path, shape: tuple[int, ...], name: str, *, is_sliceable: bool
) -> None:
    file, values = convolution(tmp_path, shape, name)
    tensor = file.tensors["w"]
    assert (tensor.shape, tensor.stored_shape) == (shape, (values.numel() // 256, 256))
    assert torch.equal(file.dequantize("w"), values)
    weight = file.weights()["w"]
    packed = weight.read()
    assert isinstance(packed, Packed)
    rows = shape[0] if len(shape) > 1 else 1
    assert weight.shape == shape
    assert packed.shape == (rows, values.numel() // rows)
    assert packed.row_sliceable is is_sliceable
    assert packed.rows_at_once(1) == (1 if is_sliceable else rows)
    flat = values.view(packed.shape)
    out = torch.empty(packed.shape)
    assert BACKEND.unpack(packed, torch.float32, out=out) is not None
    assert torch.equal(out, flat)
    assert torch.equal(BACKEND.unpack(packed, torch.float16), flat.half())
    part = torch.empty(rows - rows // 2, packed.shape[1])
    assert torch.equal(
        BACKEND.unpack(packed, torch.float32, out=part, rows=(rows // 2, rows)), flat[rows // 2 :]
    )
    index = torch.tensor([rows - 1, 0])
    assert torch.equal(BACKEND.unpack(packed, torch.bfloat16, rows=index), flat[index].bfloat16())


@pytest.mark.parametrize("order", ["i32", "i64", "u32"])
def test_original_shapes_in_any_integers(tmp_path: Path, order: str) -> None:
    keys = [key("comfy.gguf.orig_shape.w", order, [2, 1, 2])]
    file = opened(tmp_path, Gguf(keys, [info("w", (4,))], floats(*range(4))))
    assert torch.equal(file.dequantize("w"), torch.arange(4.0).view(2, 1, 2))
    assert file.weights()["w"].shape == (2, 1, 2)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("i32", [2, 3]),
        ("i32", [-2, -2]),
        ("i32", []),
        ("f32", [4.0]),
        ("str", ["4"]),
        ("bool", [True, True]),
        ("i32", [1] * 9),
        ("i32", 4),
    ],
)
def test_original_shapes_of_other_values_are_refused(tmp_path: Path, kind: str, shape: Any) -> None:
    keys = [key("comfy.gguf.orig_shape.w", kind, shape)]
    with pytest.raises(FormatError, match=r"w: its original shape.* is none of 4 values"):
        opened(tmp_path, Gguf(keys, [info("w", (4,))], floats(*range(4))))


def install(layer: nn.Conv2d | nn.Linear, packed: Packed) -> None:
    shape = layer.weight.shape
    layout, tensors = storage_form("weight", packed, BACKEND, shape)
    stored = packed_parameters("weight", layout, tensors, torch.float32, NoSource())
    Journal().install(layer, {"weight": stored}, "layer")


def test_blocks_across_rows_in_a_convolution(tmp_path: Path) -> None:
    file, values = convolution(tmp_path, (16, 16, 3, 3), "Q4_K")
    layer, plain = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
    plain.load_state_dict(layer.state_dict() | {"weight": values})
    packed: Any = file.weights()["w"].read()
    install(layer, packed)
    x = torch.randn(2, 16, 6, 6)
    assert torch.allclose(layer(x), plain(x), atol=1e-5)
    assert torch.equal(layer.weight.clone(), values)


def test_blocks_across_rows_in_a_linear_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One row at a time, were they sliceable.
    monkeypatch.setattr("lowbits.core.functional.PART_WEIGHTS", 16)
    file, values = convolution(tmp_path, (32, 24), "Q8_0")
    layer, plain = nn.Linear(24, 32), nn.Linear(24, 32)
    plain.load_state_dict(layer.state_dict() | {"weight": values})
    packed: Any = file.weights()["w"].read()
    assert not packed.row_sliceable
    install(layer, packed)
    x = torch.randn(3, 24, requires_grad=True)
    y = layer(x)
    assert torch.allclose(y, plain(x), atol=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, values.sum(0).expand(3, 24), atol=1e-5)


def test_blocks_across_rows_compile(tmp_path: Path) -> None:
    packed: Any = convolution(tmp_path, (16, 16, 3, 3), "Q4_K")[0].weights()["w"].read()
    unpack: Any = torch.compile(BACKEND.unpack, fullgraph=True, backend="eager")
    assert torch.equal(unpack(packed, torch.float32), BACKEND.unpack(packed, torch.float32))
