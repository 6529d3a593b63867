"""GGUF types whose codes index a table: IQ types, MXFP4, NVFP4.

Functions as in `lowbits.backends.gguf.uniform`. A table's entries are integers of one byte, so that
one look-up gives two to eight weights as one wider integer. The grids of IQ1 to IQ3 are taken from
the ``gguf`` package when such a type is first decoded.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Final

import torch

from lowbits.backends.gguf.blocks import half, place, scale_by, spread_bits, wider
from lowbits.core.tracing import constant
from lowbits.errors import BackendUnavailableError

if TYPE_CHECKING:
    from torch import Tensor

# 16 values of a non-linear 4-bit code; source: ``kvalues_iq4nl``.
IQ4_VALUES: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
#: float4 e2m1, doubled to be whole; source: OCP Microscaling Formats 1.0, ``kvalues_mxfp4``.
E2M1_VALUES: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

#: Types whose grids are in the ``gguf`` package.
GRIDS: Final = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")

#: How much IQ1 shifts its grid up or down, in units of an eighth.
_EIGHTH: Final = 0.125


@constant
def _nibble_tables(values: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the values of the low, and of the high codes of every two bytes: int16, 2 x 128 KB."""
    table = torch.tensor(values, dtype=torch.int8, device="cpu")
    pairs = torch.arange(2**16, device="cpu")
    low = torch.stack([table[pairs & 15], table[pairs >> 8 & 15]], 1)
    high = torch.stack([table[pairs >> 4 & 15], table[pairs >> 12]], 1)
    first, second = (t.view(torch.int16).view(-1).to(device) for t in (low, high))
    return first, second


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Return the entries of a 1-D table at indices of any shape."""
    return table.index_select(0, index.reshape(-1).int()).view(index.shape)


def _nibbles(values: tuple[int, ...], data: Tensor) -> list[Tensor]:
    """Return what the low and what the high codes of bytes stand for: two int8 of data's shape."""
    index = wider(data, torch.int16).int() & 0xFFFF
    tables = _nibble_tables(values, data.device)
    return [_look_up(table, index).view(torch.int8) for table in tables]


def iq4_nl(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_iq4_nl``: scale, 16 bytes of nibbles."""
    place(_nibbles(IQ4_VALUES, blocks[:, 2:]), out, 1)
    scale_by(out, half(blocks, 0))


def iq4_xs(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_iq4_xs``: scale, 8 scales of 6 bits (high bits, low nibbles), nibbles."""
    place(_nibbles(IQ4_VALUES, blocks[:, 8:].reshape(-1, 8, 16)), out, 8)
    shift = torch.arange(0, 16, 2, device=blocks.device, dtype=torch.int32)
    high = wider(blocks[:, 2:4], torch.int16).int() >> shift & 3
    low = _low_then_high(blocks[:, 4:8])
    scale_by(out, half(blocks, 0) * (low | high << 4).sub_(32))


def _low_then_high(data: Tensor) -> Tensor:
    """Return ``(n, bytes)`` as ``(n, 2 * bytes)`` nibbles in order; int32."""
    return torch.stack([data & 15, data >> 4], 2).view(data.shape[0], -1).int()


def mxfp4(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_mxfp4``: a power of two, 16 bytes of e2m1 codes.

    Values are doubled, so the scale is halved: ``2 ** (e - 128)``, subnormal for e of 0 and 1.
    """
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), exponent - 1 << 23)
    place(_nibbles(E2M1_VALUES, blocks[:, 1:]), out, 1)
    scale_by(out, bits.view(torch.float32))


def nvfp4(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_nvfp4``: four unsigned e4m3 scales, 32 bytes of e2m1 codes.

    Values are doubled, so scales are halved; codes 0 and 127 are zero.
    """
    code = blocks[:, :4].int()
    exponent, mantissa = code >> 3 & 15, (code & 7).float()
    subnormal = mantissa * 2.0**-10
    normal = (mantissa / 8 + 1) * ((exponent + 119) << 23).view(torch.float32)
    scale = torch.where(exponent == 0, subnormal, normal)
    place(_nibbles(E2M1_VALUES, blocks[:, 4:].reshape(-1, 4, 8)), out, 4)
    scale_by(out, torch.where((code == 0) | (code == 127), 0.0, scale))


@constant
def _grid_table(type_name: str, device: torch.device) -> Tensor:
    """Return the grid of an IQ type: 4 or 8 signed bytes an entry, as int32 or int64."""
    codec = _codec(type_name)
    if codec.grid is None:
        codec.init_grid()
    entries = torch.from_numpy(codec.grid[0, 0]).to(torch.int8).contiguous()
    wide = torch.int64 if entries.shape[1] == 8 else torch.int32
    return entries.view(wide).view(-1).to(device)


@constant
def _sign_table(device: torch.device) -> Tensor:
    """Return eight signs for each of the 128 codes: an even number of them is negative."""
    bits = torch.tensor(list(_codec("IQ2_XXS").ksigns), dtype=torch.uint8, device="cpu")
    return _signs_of(bits).to(device)


def _grid(type_name: str, index: Tensor) -> Tensor:
    return _look_up(_grid_table(type_name, index.device), index)


def _signs(code: Tensor) -> Tensor:
    return _look_up(_sign_table(code.device), code)


def has_package() -> bool:
    """Say whether the ``gguf`` package is here; does not import it."""
    return importlib.util.find_spec("gguf") is not None


def _codec(type_name: str) -> Any:
    try:
        from gguf import quants
    except ImportError as error:
        raise BackendUnavailableError(
            f"decoding GGUF type {type_name} needs the tables of the gguf package; "
            "pip install 'lowbits[gguf]'"
        ) from error
    return getattr(quants, type_name)


def _signs_of(bits: Tensor) -> Tensor:
    """Return eight signed bytes, 1 or -1 where the bit is set, as int64."""
    return spread_bits(bits).view(torch.int8).mul_(-2).add_(1).view(torch.int64)


def _write(out: Tensor, grid: Tensor, signs: Tensor) -> None:
    """Write a grid's values with their signs: words of 8 signed bytes, in order."""
    values = grid.contiguous().view(torch.int8).view(out.shape[0], -1)
    out.copy_(values * signs.contiguous().view(torch.int8).view(out.shape[0], -1))


def _packed_signs(field: Tensor) -> Tensor:
    """Return the signs of four groups of eight, in 28 bits of an int32: ``(n, 8, 4)`` int64."""
    shift = torch.arange(0, 28, 7, device=field.device, dtype=torch.int32)
    return _signs(field.unsqueeze(-1) >> shift & 127)


def _top_scale(field: Tensor) -> Tensor:
    """Return ``0.5 + s`` for the scale in the highest 4 bits of an int32; float32."""
    return (field >> 28 & 15).float() + 0.5


def iq2_xxs(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_iq2_xxs``: scale; per 32 weights four grid indices, signs and a scale."""
    fields = wider(blocks[:, 2:], torch.int32).view(-1, 8, 2)
    index = fields[..., :1].contiguous().view(torch.uint8)
    _write(out, _grid("IQ2_XXS", index), _packed_signs(fields[..., 1]))
    scale_by(out, half(blocks, 0) * _top_scale(fields[..., 1]) * 0.25)


def iq2_xs(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_iq2_xs``: scale; 32 words (9-bit index, sign code); 16 nibble scales."""
    fields = wider(blocks[:, 2:66], torch.int16).int()
    _write(out, _grid("IQ2_XS", fields & 511), _signs(fields >> 9 & 127))
    scale_by(out, half(blocks, 0) * (_low_then_high(blocks[:, 66:]) + 0.5) * 0.25)


def iq2_s(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_iq2_s``: scale; 32 index bytes; 32 sign bytes; high bits; nibble scales."""
    shift = torch.arange(0, 8, 2, device=blocks.device, dtype=torch.uint8)
    high = (blocks[:, 66:74].unsqueeze(-1) >> shift & 3).view(-1, 32).int()
    index = blocks[:, 2:34].int() | high << 8
    _write(out, _grid("IQ2_S", index), _signs_of(blocks[:, 34:66]))
    scale_by(out, half(blocks, 0) * (_low_then_high(blocks[:, 74:]) + 0.5) * 0.25)


def iq3_xxs(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_iq3_xxs``: scale; 64 indices of 4 weights; per 32 signs and a scale."""
    fields = wider(blocks[:, 66:], torch.int32)
    _write(out, _grid("IQ3_XXS", blocks[:, 2:66]), _packed_signs(fields))
    scale_by(out, half(blocks, 0) * _top_scale(fields) * 0.5)


def iq3_s(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_iq3_s``: scale; 64 indices of 4 weights; ninth bits; signs; nibble scales."""
    ninth = spread_bits(blocks[:, 66:74]).view(torch.uint8).int()
    index = blocks[:, 2:66].int() | ninth << 8
    _write(out, _grid("IQ3_S", index), _signs_of(blocks[:, 74:106]))
    scale_by(out, half(blocks, 0) * (_low_then_high(blocks[:, 106:]) * 2 + 1))


def _write_shifted(out: Tensor, grid: Tensor, is_down: Tensor) -> None:
    """Write ``grid + 1/8``, or ``grid - 1/8`` where ``is_down``, times 8: whole numbers.

    Args:
        out: ``(n, 256)``.
        grid: ``(n, 32)`` int64, eight signed bytes each.
        is_down: ``(n, 32)`` bool.
    """
    shift = (1 - 2 * is_down.to(torch.int8)).unsqueeze(-1)
    out.copy_(grid.view(torch.int8).mul_(8).view(-1, 32, 8).add_(shift).view(out.shape[0], -1))


def iq1_s(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_iq1_s``: scale; 32 index bytes; per 32 weights high bits, scale and shift."""
    fields = wider(blocks[:, 34:], torch.int16).int()
    shift = torch.arange(0, 12, 3, device=blocks.device, dtype=torch.int32)
    high = (fields.unsqueeze(-1) >> shift & 7).view(-1, 32)
    index = blocks[:, 2:34].int() | high << 8
    is_down = (fields & 0x8000 != 0).repeat_interleave(4, 1)
    _write_shifted(out, _grid("IQ1_S", index), is_down)
    scale_by(out, half(blocks, 0) * ((fields >> 12 & 7) * 2 + 1) * _EIGHTH)


def iq1_m(blocks: Tensor, out: Tensor) -> None:
    """Decode ``block_iq1_m``: 32 index bytes; high bits and shifts; 16 scales of 3 bits.

    The scale of the block is in the highest 4 bits of each of the four words of scales.
    """
    nibbles = _low_then_high(blocks[:, 32:48])
    index = blocks[:, :32].int() | (nibbles & 7) << 8
    _write_shifted(out, _grid("IQ1_M", index), nibbles & 8 != 0)
    fields = wider(blocks[:, 48:], torch.int16).int()
    places = torch.arange(0, 16, 4, device=blocks.device, dtype=torch.int32)
    bits = ((fields >> 12 & 15) << places).sum(1, keepdim=True, dtype=torch.int32)
    scale = bits.to(torch.int16).view(torch.float16).float()
    shift = torch.arange(0, 12, 3, device=blocks.device, dtype=torch.int32)
    three_bits = (fields.unsqueeze(-1) >> shift & 7).view(-1, 16)
    scale_by(out, scale * (three_bits * 2 + 1) * _EIGHTH)
