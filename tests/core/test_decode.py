"""Decoding by tables and bits gives what torch's own casts give."""

from __future__ import annotations

import pytest
import torch

from lowbits.core.decode import ByteTable, scale_groups, write_float8, write_int8


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float8_code_decodes_as_torch_casts_it(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    expected = codes.view(dtype).float()
    out = torch.empty(2, 128)
    write_float8(codes, None, out, dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    scale = torch.tensor([[0.1], [3e-7]])
    write_float8(codes, scale, out, dtype)
    assert torch.equal(out.nan_to_num(), (expected * scale).nan_to_num())


def test_int8_rows() -> None:
    codes = torch.arange(-128, 128).to(torch.int8).view(2, 128)
    scale, out = torch.tensor([[0.1], [2.0]]), torch.empty(2, 128)
    write_int8(codes, scale, out)
    assert torch.equal(out, codes.float() * scale)


@pytest.mark.parametrize("count", [2, 4, 16])
def test_tables_hold_one_two_or_four_codes_a_byte(count: int) -> None:
    values = [0.5 * code - 1 for code in range(count)]
    if count == 2:  # a byte is one code
        table = ByteTable([[float(byte)] for byte in range(256)])
    else:
        table = ByteTable.of_codes(values)
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    width = table.on(torch.device("cpu")).shape[1]
    out = torch.empty(2, 128 * width)
    table.write(codes, out)
    expected = table.on(torch.device("cpu"))[codes.long()].view(2, -1)
    assert torch.equal(out, expected)


def test_groups_without_weights() -> None:
    values = torch.empty(3, 0)
    scale_groups(values, torch.empty(3, 0))
    assert values.shape == (3, 0)
