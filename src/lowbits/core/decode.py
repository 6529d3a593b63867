"""Decoding that several backends share: pure functions on plain tensors.

All of them write float32 values into ``out``, a part of a weight that stays in the cache (a fresh
36 MB block costs more in page faults than the arithmetic, docs/design.md), and are plain
expressions to a compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.core.memory import PART_WEIGHTS, temporary
from lowbits.core.tracing import needs_plain_ops
from lowbits.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lowbits.core.backend import Packed, Rows

#: Integers as wide as one, two and four float32: one look-up copies so many values.
_WIDE: Final = {1: torch.float32, 2: torch.int64, 4: torch.complex128}


def decode_rows(
    packed: Packed,
    rows: Rows | None,
    dtype: torch.dtype,
    out: Tensor | None,
    write: Callable[[Packed, Tensor], None],
) -> Tensor:
    """Decode a weight, or some of its rows: on a CPU a part that stays in the cache at a time.

    Args:
        packed: a weight with ``row_sliceable`` tensors.
        rows: as in `QuantBackend.unpack`.
        dtype: of the result; the arithmetic is float32.
        out: as in `QuantBackend.unpack`.
        write: writes the values of a packed weight into ``(rows, row_length)`` float32, contiguous.
    """
    packed = packed.rows(rows)
    count, row_length = packed.shape
    result = packed["qdata"].new_empty(packed.shape, dtype=dtype) if out is None else out
    if needs_plain_ops() or result.device.type != "cpu":
        if count:  # no loop: a compiler would take the count for a constant
            _decode(packed, result, write)
        return result
    step = max(1, PART_WEIGHTS // max(1, row_length))
    for start in range(0, count, step):
        stop = min(start + step, count)
        _decode(packed.rows((start, stop)), result[start:stop], write)
    return result


def _decode(packed: Packed, target: Tensor, write: Callable[[Packed, Tensor], None]) -> None:
    is_wide = target.dtype == torch.float32
    values = target if is_wide else temporary("values", target, torch.float32)
    write(packed, values)
    if values is not target:
        target.copy_(values)


@final
class ByteTable:
    """The values that each byte stands for: one look-up decodes a byte's 1, 2 or 4 codes.

    Costs ``256 * codes * 4`` bytes on the CPU, and as much on each device it is used on.
    """

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        # Made outside of inference mode: the table is used in autograd's backward as well.
        with torch.inference_mode(mode=False):
            self._cpu = torch.tensor(rows, dtype=torch.float32, device="cpu")
        self._wide = self._cpu.view(-1).view(_WIDE[len(rows[0])])
        self._elsewhere: dict[torch.device, Tensor] = {}

    @classmethod
    def of_codes(cls, values: Sequence[float], *, high_first: bool = False) -> ByteTable:
        """Return the table for codes of ``log2(len(values))`` bits, packed low code first."""
        bits = (len(values) - 1).bit_length()
        shifts = range(0, 8, bits)
        order = list(reversed(shifts)) if high_first else list(shifts)
        mask = len(values) - 1
        return cls([[values[byte >> shift & mask] for shift in order] for byte in range(256)])

    def on(self, device: torch.device) -> Tensor:
        """Return the table, ``(256, codes per byte)`` float32, on a device."""
        if device.type == "cpu":
            return self._cpu
        if torch.compiler.is_compiling():
            return self._cpu.to(device)
        if device not in self._elsewhere:
            with torch.inference_mode(mode=False):
                self._elsewhere[device] = self._cpu.to(device)
        return self._elsewhere[device]

    def write(self, codes: Tensor, out: Tensor) -> None:
        """Look bytes up.

        Args:
            codes: ``(rows, n)`` uint8.
            out: ``(rows, n * codes per byte)`` float32, contiguous; written.
        """
        index = temporary("index", codes, torch.int32).copy_(codes).view(-1)
        if codes.device.type == "cpu" and not needs_plain_ops():
            # Single wide elements: four times faster than rows of a table.
            torch.index_select(self._wide, 0, index, out=out.view(-1).view(self._wide.dtype))
        else:
            table = self.on(codes.device)
            out.view(-1, table.shape[1]).copy_(table[index])


def write_float8(codes: Tensor, scale: Tensor | None, out: Tensor, dtype: torch.dtype) -> None:
    """Compute ``codes * scale``.

    Args:
        codes: ``(rows, row_length)`` uint8, the bytes of float8 values.
        scale: ``(rows, 1)`` float32; None: 1.
        out: ``(rows, row_length)`` float32; written.
        dtype: of the codes: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
    """
    if codes.device.type not in ("cpu", "mps"):
        out.copy_(codes.view(dtype))
    elif dtype == torch.float8_e5m2:
        # The upper byte of a float16. torch casts float8 one by one on a CPU; MPS has none.
        bits = temporary("bits", codes, torch.int16).copy_(codes.view(torch.int8))
        out.copy_(bits.bitwise_left_shift_(8).view(torch.float16))
    else:
        # float16 with three more bits of exponent, which is 8 less, hence 256.
        out.copy_(_e4m3_as_float16(codes))
        scale = torch.full((), 256.0, device=out.device) if scale is None else scale * 256
    if scale is not None:
        out.mul_(scale)


def _e4m3_as_float16(codes: Tensor) -> Tensor:
    """Return ``codes / 256`` as float16, exactly, NaN included."""
    # Extended by its sign, and shifted: bit 15 is the sign, bits 13 to 7 are exponent and mantissa,
    # and bit 14, a copy of the sign, has to become 1 for NaN only. Adding 0x80 carries into it for
    # NaN, whose bits below are all ones.
    bits = temporary("bits", codes, torch.int16).copy_(codes.view(torch.int8))
    bits.bitwise_left_shift_(7)
    carry = temporary("carry", codes, torch.int16).copy_(bits)
    return bits.bitwise_xor_(carry.add_(0x80).bitwise_and_(0x4000)).view(torch.float16)


def scale_groups(values: Tensor, scale: Tensor, offset: Tensor | None = None) -> None:
    """Compute ``values * scale + offset`` in place, each scale shared by a group of a row.

    Args:
        values: ``(rows, row_length)`` floating, contiguous; overwritten.
        scale: ``(rows, groups)`` floating.
        offset: as scale.
    """
    rows, groups = scale.shape
    grouped = values.view(rows, groups, -1) if groups else values.view(rows, 1, 0)
    if groups:
        grouped.mul_(scale.to(values.dtype).unsqueeze(-1))
        if offset is not None:
            grouped.add_(offset.to(values.dtype).unsqueeze(-1))


def scale_by_row(scale: Tensor, rows: int) -> Tensor:
    """Return one scale for each row, ``(rows, 1)`` float32, where there is one for all, or each.

    Raises:
        FormatError: there are others, e.g. of blocks.
    """
    if scale.numel() not in (1, rows) or (scale.dim() > 1 and scale.shape[-1] != 1):
        raise FormatError(
            f"scales of shape {tuple(scale.shape)} for {rows} rows: neither one for all nor one "
            "for each"
        )
    return scale.float().reshape(-1, 1).expand(rows, 1).contiguous()


def write_int8(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Compute ``codes * scale``.

    Args:
        codes: ``(rows, row_length)`` int8.
        scale: ``(rows, 1)`` float32.
        out: ``(rows, row_length)`` float32; written.
    """
    # Not torch.mul(codes, scale, out=out): type promotion makes it five times slower.
    out.copy_(codes).mul_(scale)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Put codes of 2 or 4 bits into bytes, the first code in the low bits.

    Args:
        codes: ``(rows, row_length)`` uint8 below ``2 ** bits``.
        bits: 2 or 4; ``row_length`` is a multiple of ``8 / bits``.

    Returns:
        ``(rows, row_length * bits / 8)`` uint8.
    """
    per_byte = 8 // bits
    parts = codes.view(codes.shape[0], -1, per_byte)
    packed = parts[..., 0].clone()
    for i in range(1, per_byte):
        packed |= parts[..., i] << (bits * i)
    return packed
