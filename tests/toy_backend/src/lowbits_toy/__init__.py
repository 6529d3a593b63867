"""A complete backend: 8-bit integers with one float32 scale per row.

Installing the package is all: its entry point in the group ``lowbits.backends`` makes
``lowbits.apply(pipe, "toy-int8")`` work, in every place where a scheme is named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from lowbits import Packed, QuantBackend, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from lowbits.core.backend import Rows


class ToyBackend(QuantBackend):
    """Symmetric int8 per row."""

    name: ClassVar[str] = "toy"

    def schemes(self) -> tuple[Scheme, ...]:
        """Offer one scheme: 8 bits a weight, and 32 bits for each row's scale."""
        return (Scheme("toy-int8", "int8, one scale per row", code_bits=8, group_bits=32),)

    def probe(self) -> str | None:
        """Nothing is needed but torch."""
        return None

    def pack(self, weight: Tensor, scheme: Scheme) -> Packed:
        """Round each row to 255 steps; a row of zeros gets the scale 1."""
        scale = weight.abs().amax(1, keepdim=True) / 127
        scale = torch.where(scale == 0, 1.0, scale)
        codes = (weight / scale).round().to(torch.int8)
        shape = (weight.shape[0], weight.shape[1])
        return Packed(scheme.name, shape, {"qdata": codes, "scale": scale})

    def unpack(
        self,
        packed: Packed,
        dtype: torch.dtype,
        out: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Multiply the codes by their scales."""
        packed = packed.rows(rows)
        values = (packed["qdata"].float() * packed["scale"]).to(dtype)
        return values if out is None else out.copy_(values)
