"""Round trips over random shapes and values: each weight is off by at most its format's step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbits.core.decode import ByteTable, pack_codes
from lowbits.core.registry import DEFAULT
from lowbits.core.scheme import LINEAR

#: Largest error of one weight, as a part of the largest weight that shares its scale: half of the
#: widest gap between neighbouring codes, and the rounding of the scales. One for each kind of code.
HALF_STEP = {
    "bnb-nf4": 0.16, "bnb-nf4-dq": 0.17, "bnb-int8": 0.0045, "torchao-int4": 0.075,
    "torchao-int8": 0.0045, "quanto-int4": 0.07, "quanto-int2": 0.34, "quanto-float8": 0.04,
    "float8-e4m3fn": 0.04, "float8-e5m2-raw": 0.13, "gguf-q8_0": 0.0045, "gguf-q4_0": 0.13,
    "gguf-q4_1": 0.07, "gguf-q5_0": 0.065, "gguf-q5_1": 0.034,
}  # fmt: skip


@pytest.mark.property
@pytest.mark.parametrize("name", HALF_STEP)
@settings(suppress_health_check=[HealthCheck.differing_executors])
@given(data=st.data())
def test_every_weight_is_within_a_step(name: str, data: st.DataObject) -> None:
    backend, scheme = DEFAULT.require(name)
    assert backend is not None
    rows = data.draw(st.integers(1, 20), "rows")
    row_length = data.draw(st.integers(1, 12), "blocks") * scheme.row_multiple
    if scheme.refusal(LINEAR, row_length):
        return
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    magnitude = 10.0 ** data.draw(st.integers(-2, 2), "magnitude")
    weight = torch.randn(rows, row_length, generator=generator) * magnitude
    shift = data.draw(st.sampled_from([0.0, 0.0, 3.0]), "shift")
    weight += shift * magnitude
    packed = backend.pack(weight, scheme)
    values = backend.unpack(packed, torch.float32)
    stored = sum(tensor.nbytes for tensor in packed.tensors.values())
    assert stored == backend.packed_bytes(scheme, rows, row_length)
    largest = weight.abs().max() if not packed.row_sliceable else weight.abs().amax(1, keepdim=True)
    # Affine codes span from the lowest to the highest weight of a group: at most twice the largest.
    assert ((values - weight).abs() <= HALF_STEP[name] * largest + 1e-7).all()
    start = data.draw(st.integers(0, rows - 1), "start")
    stop = data.draw(st.integers(start + 1, rows), "stop")
    part = backend.unpack(packed, torch.float32, rows=(start, stop))
    assert torch.equal(part, values[start:stop])


@pytest.mark.property
@given(
    bits=st.sampled_from([2, 4]),
    rows=st.integers(1, 8),
    bytes_=st.integers(1, 16),
    seed=st.integers(0, 999),
)
def test_packed_codes_come_back(bits: int, rows: int, bytes_: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, bytes_ * 8 // bits), generator=generator)
    packed = pack_codes(codes.to(torch.uint8), bits)
    assert packed.shape == (rows, bytes_)
    table = ByteTable.of_codes([float(code) for code in range(2**bits)])
    values = torch.empty(codes.shape)
    table.write(packed, values)
    assert torch.equal(values, codes.float())
