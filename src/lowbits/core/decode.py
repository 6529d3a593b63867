"""Decoding that several backends share: pure functions on plain tensors.

All of them write into ``out`` where one is given (a scratch that is used again: a fresh 36 MB block
costs more in page faults than the arithmetic, docs/design.md), and are plain expressions to a
compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@final
class ByteTable:
    """The values that each byte stands for: one look-up decodes a byte's 1, 2 or 4 codes.

    Costs ``256 * codes * 4`` bytes on the CPU, and as much on each device it is used on.
    """

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        # Made outside of inference mode: the table is used in autograd's backward as well.
        with torch.inference_mode(mode=False):
            self._cpu = torch.tensor(rows, dtype=torch.float32)
        self._elsewhere: dict[torch.device, Tensor] = {}

    @classmethod
    def of_codes(cls, values: Sequence[float], *, high_first: bool = False) -> ByteTable:
        """Return the table for codes of ``log2(len(values))`` bits, packed low code first."""
        bits = (len(values) - 1).bit_length()
        shifts = range(0, 8, bits)
        order = list(reversed(shifts)) if high_first else list(shifts)
        mask = len(values) - 1
        return cls([[values[byte >> shift & mask] for shift in order] for byte in range(256)])

    @classmethod
    def of_float8(cls, dtype: torch.dtype) -> ByteTable:
        """Return the table of a float8 format."""
        values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        return cls([[value] for value in values.tolist()])

    def _on(self, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return self._cpu
        if torch.compiler.is_compiling():
            return self._cpu.to(device)
        if device not in self._elsewhere:
            with torch.inference_mode(mode=False):
                self._elsewhere[device] = self._cpu.to(device)
        return self._elsewhere[device]

    def decode(self, codes: Tensor, out: Tensor | None = None) -> Tensor:
        """Look bytes up.

        Args:
            codes: ``(rows, n)`` uint8.
            out: ``(rows, n * codes per byte)`` float32, contiguous.

        Returns:
            ``(rows, n * codes per byte)`` float32.
        """
        table = self._on(codes.device)
        index = codes.reshape(-1).int()
        flat = out.view(-1, table.shape[1]) if out is not None else None
        values = torch.index_select(table, 0, index, out=flat) if flat is not None else table[index]
        return values.view(codes.shape[0], -1)


def scale_groups(values: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Compute ``values * scale + offset`` in place, each scale shared by a group of a row.

    Args:
        values: ``(rows, row_length)`` floating, contiguous; overwritten and returned.
        scale: ``(rows, groups)`` floating.
        offset: as scale.
    """
    rows, groups = scale.shape
    grouped = values.view(rows, groups, -1) if groups else values.view(rows, 1, 0)
    if groups:
        grouped.mul_(scale.to(values.dtype).unsqueeze(-1))
        if offset is not None:
            grouped.add_(offset.to(values.dtype).unsqueeze(-1))
    return values


def decode_int8_rows(
    codes: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Compute ``codes * scale``.

    Args:
        codes: ``(rows, row_length)`` int8.
        scale: ``(rows, 1)`` float32.
        dtype: of the result; the arithmetic runs in float32, and in ``out``'s dtype where given.
        out: ``(rows, row_length)``.
    """
    if out is not None and out.dtype == torch.float32:
        return out.copy_(codes).mul_(scale)
    return deliver(codes.float().mul_(scale), dtype, out)


def work_buffer(out: Tensor | None) -> Tensor | None:
    """Return ``out`` where float32 arithmetic can run in it, else None."""
    return out if out is not None and out.dtype == torch.float32 else None


def deliver(values: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Return float32 values as the caller wants them: in ``out``, or in ``dtype``."""
    if out is None:
        return values.to(dtype)
    return out if values.data_ptr() == out.data_ptr() else out.copy_(values)


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
