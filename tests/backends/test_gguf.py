"""GGUF: every type decodes to the bits that the gguf package gives; mixes choose by name."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lowbits
from lowbits import errors
from lowbits.backends.gguf import codebook
from lowbits.backends.gguf.backend import GgufBackend, scheme_name
from lowbits.backends.gguf.quantize import QUANTIZERS
from lowbits.backends.gguf.types import TYPES, GgufType
from lowbits.core.backend import Packed

gguf = pytest.importorskip("gguf")

BACKEND = GgufBackend()
#: Byte offsets of float16 fields, which random bytes must not make infinite; others: offset 0.
HALVES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (),
    "NVFP4": (), "IQ1_M": (), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
}  # fmt: skip
#: What the gguf package does not decode.
NEWER = ("Q1_0", "Q2_0")


def random_blocks(kind: GgufType, count: int) -> np.ndarray[Any, Any]:
    """Any codes, and small scales."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (count, kind.block_bytes), dtype=np.uint8)
    for offset in HALVES.get(kind.name, (0,)):
        scales = rng.normal(0, 1e-2, (count, 1)).astype(np.float16)
        data[:, offset : offset + 2] = scales.view(np.uint8)
    if kind.name == "IQ1_M":
        data[:, 55] &= 0x3F  # the float16's exponent is in the fourth word's highest bits
    if kind.name == "BF16":
        data[:, 1] &= 0xBF
    return data


def decoded_by_gguf(kind: GgufType, data: np.ndarray[Any, Any]) -> torch.Tensor:
    if kind.name == "F16":
        return torch.from_numpy(data.view(np.float16).astype(np.float32))
    qtype = gguf.GGMLQuantizationType[kind.name]
    with np.errstate(over="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(data, qtype))


@pytest.mark.parametrize("name", [name for name in TYPES if name not in NEWER])
def test_decoding_is_bit_equal_to_the_gguf_package(name: str) -> None:
    kind = TYPES[name]
    data = random_blocks(kind, max(1, 2**15 // kind.weights))
    expected = decoded_by_gguf(kind, data)
    got = BACKEND.decode(torch.from_numpy(data), name, tuple(expected.shape))
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name", [name for name in TYPES if name not in (*NEWER, "F16")])
def test_sizes_are_those_of_the_gguf_package(name: str) -> None:
    qtype = gguf.GGMLQuantizationType[name]
    kind = TYPES[name]
    assert gguf.GGML_QUANT_SIZES[qtype] == (kind.weights, kind.block_bytes)
    assert kind.number == qtype.value


def test_types_newer_than_the_package_follow_their_definition() -> None:
    scale = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)
    bits = torch.arange(16, dtype=torch.uint8) * 17
    got = BACKEND.decode(torch.cat([scale, bits]), "Q1_0", (128,))
    signs = [1 if int(byte) >> i & 1 else -1 for byte in bits for i in range(8)]
    assert torch.equal(got, 0.5 * torch.tensor(signs))
    got = BACKEND.decode(torch.cat([scale, bits]), "Q2_0", (64,))
    codes = [(int(byte) >> i & 3) - 1 for byte in bits for i in range(0, 8, 2)]
    assert torch.equal(got, 0.5 * torch.tensor(codes))


@pytest.mark.parametrize("name", TYPES)
def test_rows_parts_and_dtypes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = TYPES[name]
    blocks = max(1, 512 // kind.weights)
    data = torch.from_numpy(random_blocks(kind, 12 * blocks)).view(12, -1)
    shape = (12, blocks * kind.weights)
    packed = Packed(scheme_name(name), shape, {"qdata": data})
    whole = BACKEND.unpack(packed, torch.float32)
    monkeypatch.setattr("lowbits.core.decode.PART_WEIGHTS", 1024)
    assert torch.equal(BACKEND.unpack(packed, torch.float32), whole)
    out = torch.full((4, shape[1]), torch.nan)
    assert BACKEND.unpack(packed, torch.float32, out=out, rows=(3, 7)) is out
    assert torch.equal(out, whole[3:7])
    index = torch.tensor([5, 0, 5])
    half = BACKEND.unpack(packed, torch.bfloat16, rows=index)
    assert torch.equal(half, whole[index].bfloat16())


def test_blocks_across_rows() -> None:
    kind = TYPES["Q8_0"]
    data = torch.from_numpy(random_blocks(kind, 9))
    shape = (12, 24)
    values = BACKEND.decode(data, "Q8_0", (9, 32)).view(shape)
    packed = Packed("gguf-q8_0", shape, {"qdata": data}, row_sliceable=False)
    assert packed.rows_at_once(1) == 12
    assert torch.equal(BACKEND.unpack(packed, torch.float32), values)
    out = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    assert BACKEND.unpack(packed, torch.bfloat16, out=out) is out
    assert torch.equal(out, values.bfloat16())
    part = torch.full((4, 24), torch.nan)
    assert BACKEND.unpack(packed, torch.float32, out=part, rows=(3, 7)) is part
    assert torch.equal(part, values[3:7])
    index = torch.tensor([5, 0, 5])
    assert torch.equal(BACKEND.unpack(packed, torch.float32, rows=index), values[index])


@pytest.mark.parametrize("name", TYPES)
def test_compiles_whole(name: str) -> None:
    kind = TYPES[name]
    data = torch.from_numpy(random_blocks(kind, 4)).view(2, -1)
    packed = Packed(scheme_name(name), (2, 2 * kind.weights), {"qdata": data})
    unpack: Any = torch.compile(BACKEND.unpack, fullgraph=True, backend="eager")
    assert torch.equal(unpack(packed, torch.float32), BACKEND.unpack(packed, torch.float32))


def test_grids_need_the_gguf_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(errors.BackendUnavailableError, match=r"type IQ3_S .*lowbits\[gguf\]"):
        codebook._codec("IQ3_S")
    assert BACKEND.decode(torch.zeros(1, 144, dtype=torch.uint8), "Q4_K", (256,)).sum() == 0


def test_bytes_that_make_no_such_tensor_are_refused() -> None:
    with pytest.raises(errors.FormatError, match="unknown GGUF type 'Q4K'; did you mean 'Q4_K'"):
        BACKEND.decode(torch.zeros(144, dtype=torch.uint8), "Q4K", (256,))
    with pytest.raises(
        errors.FormatError, match="takes 144 bytes .uint8. in rows of .*256; got 143 of"
    ):
        BACKEND.decode(torch.zeros(143, dtype=torch.uint8), "Q4_K", (256,))
    with pytest.raises(errors.ConfigError, match="cannot quantize to GGUF type 'IQ3_S'; can: "):
        BACKEND.encode(torch.zeros(1, 256), "IQ3_S")
    with pytest.raises(
        errors.FormatError, match=r"whole blocks of 256; got torch.float32 \(1, 64\)"
    ):
        BACKEND.encode(torch.zeros(1, 64), "Q4_K")
    with pytest.raises(errors.FormatError, match="made of float32 .* got torch.float64"):
        BACKEND.encode(torch.zeros(1, 256, dtype=torch.float64), "BF16")
    with pytest.raises(errors.NonFiniteWeightError, match="NaN or infinite"):
        BACKEND.encode(torch.full((1, 64), torch.nan), "NVFP4")
    with pytest.raises(errors.FormatError, match="got 144 of torch.int8"):
        BACKEND.decode(torch.zeros(144, dtype=torch.int8), "Q4_K", (256,))
    for shape in ((), (0, 256)):
        with pytest.raises(errors.FormatError, match="of shape"):
            BACKEND.decode(torch.zeros(0, dtype=torch.uint8), "Q4_K", shape)


def test_decode_only_schemes_are_listed_and_refused() -> None:
    infos = {info.name: info for info in lowbits.schemes()}
    for name in TYPES:
        assert infos[scheme_name(name)].can_quantize is (name in QUANTIZERS)
    layer = nn.Linear(256, 256)
    with pytest.raises(errors.ConfigError, match="'gguf-iq2_xs' can only be decoded"):
        lowbits.quantize(layer, "gguf-iq2_xs")
    handle = lowbits.quantize(layer, "gguf-q4_k")
    with pytest.raises(errors.ConfigError, match="'gguf-iq2_xs' can only be decoded"):
        handle.switch("gguf-iq2_xs")
    assert handle.is_active, "what cannot be had is not worth a restore"


def test_types_that_need_a_package_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbits.backends.gguf.backend.has_package", lambda: False)
    infos = {info.name: info for info in lowbits.schemes()}
    assert not infos["gguf-iq1_s"].available
    assert "lowbits[gguf]" in str(infos["gguf-iq1_s"].reason)
    assert infos["gguf-q4_k"].available


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(width, width), nn.Linear(width, width)
        self.ff = nn.ModuleDict()
        self.ff["net"] = nn.ModuleList(
            [nn.Linear(width, width), nn.Identity(), nn.Linear(width, width)]
        )


def chosen(scheme: str, width: int = 256, blocks: int = 3) -> dict[str, tuple[str, str]]:
    model = nn.ModuleList(Block(width) for _ in range(blocks))
    report = lowbits.quantize(model, scheme).report()
    return {row.fqn: (row.scheme, row.reason) for row in report.layers if row.kind == "Linear"}


def test_a_mix_gives_more_bits_where_they_matter() -> None:
    rows = chosen("gguf-q4_k_m")
    assert rows["0.to_q"] == ("gguf-q4_k", "gguf-q4_k_m")
    assert rows["0.to_v"] == ("gguf-q6_k", "gguf-q4_k_m")
    assert rows["1.ff.net.2"] == ("gguf-q6_k", "gguf-q4_k_m")
    assert rows["1.ff.net.0"] == ("gguf-q4_k", "gguf-q4_k_m")


def test_a_mix_may_mean_the_first_layers_only() -> None:
    rows = chosen("gguf-q3_k_m")
    values = [rows[f"{i}.to_v"][0] for i in range(3)]
    assert values == ["gguf-q5_k", "gguf-q5_k", "gguf-q4_k"]


def test_tied_layers_of_a_mix_count_once_and_stay_tied() -> None:
    model = nn.ModuleList(Block(256) for _ in range(3))
    blocks: list[Any] = list(model)
    blocks[1].to_q.weight = blocks[0].to_v.weight
    report = lowbits.quantize(model, "gguf-q3_k_m").report()
    rows = {row.fqn: row.scheme for row in report.layers if row.kind == "Linear"}
    assert rows["0.to_v"] == rows["1.to_q"] == "gguf-q5_k"
    assert blocks[1].to_q.weight_qdata is blocks[0].to_v.weight_qdata
    assert (rows["1.to_v"], rows["2.to_v"]) == ("gguf-q5_k", "gguf-q4_k")


def test_rows_of_broken_blocks_fall_back_and_say_so() -> None:
    rows = chosen("gguf-q4_k_m", width=96)
    assert rows["0.to_q"][0] == "gguf-q5_0"
    assert rows["0.to_v"][0] == "gguf-q8_0"
    assert "gguf-q4_k_m; instead of gguf-q6_k: row length 96" in rows["0.to_v"][1]
