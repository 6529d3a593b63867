"""GGUF's block types as the benchmark needs them: random valid blocks, and llama.cpp's errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Blocks:
    """Where the scales stand in a block; every other byte may hold anything.

    Attributes:
        weights: in a block.
        size_bytes: of a block.
        halves: offsets of float16 scales.
        bounded: ``(offset, lowest, highest)`` of bytes that must not take any value.
    """

    weights: int
    size_bytes: int
    halves: tuple[int, ...] = ()
    bounded: tuple[tuple[int, int, int], ...] = ()

    def random(self, weights: int, generator: torch.Generator) -> Tensor:
        """Return valid blocks of so many weights, ``(blocks, size_bytes)`` uint8."""
        count = weights // self.weights
        blocks = torch.randint(256, (count, self.size_bytes), generator=generator).to(torch.uint8)
        for offset in self.halves:
            scales = 0.001 + 0.009 * torch.rand(count, 1, generator=generator)
            blocks[:, offset : offset + 2] = scales.half().view(torch.uint8)
        for offset, low, high in self.bounded:
            blocks[:, offset] = torch.randint(low, high + 1, (count,), generator=generator)
        return blocks


#: Sizes and offsets: ggml-common.h, and the ``gguf`` package's ``quants.py``.
TYPES: Final = {
    # The upper byte of a bfloat16: values from 3e-5 to 2.
    "BF16": Blocks(1, 2, bounded=((1, 0x38, 0x3F),)),
    "Q8_0": Blocks(32, 34, (0,)),
    "Q5_1": Blocks(32, 24, (0, 2)),
    "Q5_0": Blocks(32, 22, (0,)),
    "Q4_1": Blocks(32, 20, (0, 2)),
    "Q4_0": Blocks(32, 18, (0,)),
    "Q6_K": Blocks(256, 210, (208,)),
    "Q5_K": Blocks(256, 176, (0, 2)),
    "Q4_K": Blocks(256, 144, (0, 2)),
    "Q3_K": Blocks(256, 110, (108,)),
    "Q2_K": Blocks(256, 84, (80, 82)),
    "IQ4_NL": Blocks(32, 18, (0,)),
    "IQ4_XS": Blocks(256, 136, (0,)),
    "IQ3_S": Blocks(256, 110, (0,)),
    "IQ3_XXS": Blocks(256, 98, (0,)),
    "IQ2_S": Blocks(256, 82, (0,)),
    "IQ2_XS": Blocks(256, 74, (0,)),
    "IQ2_XXS": Blocks(256, 66, (0,)),
    # The scale's bits are the upper four of four 16-bit numbers; these are its exponent's.
    "IQ1_M": Blocks(256, 56, bounded=((55, 0x20, 0x2F),)),
    "IQ1_S": Blocks(256, 50, (0,)),
    "TQ1_0": Blocks(256, 54, (52,)),
    "TQ2_0": Blocks(256, 66, (64,)),
    # Powers of two around one; unsigned float8 scales that are no NaN.
    "MXFP4": Blocks(32, 17, bounded=((0, 118, 126),)),
    "NVFP4": Blocks(64, 36, bounded=tuple((offset, 0x20, 0x40) for offset in range(4))),
    "Q1_0": Blocks(128, 18, (0,)),
    "Q2_0": Blocks(64, 18, (0,)),
}

#: Root mean square errors of llama.cpp (libggml-base 0.25.3, no importance matrix), relative to
#: the weights' standard deviation: Gaussian, Student-t with 4 degrees of freedom.
LLAMA_CPP: Final = {
    "BF16": (0.0017, 0.0017),
    "Q8_0": (0.0054, 0.0073),
    "Q5_1": (0.0378, 0.0453),
    "Q5_0": (0.0427, 0.0581),
    "Q4_1": (0.0782, 0.0937),
    "Q4_0": (0.0859, 0.1157),
    "Q6_K": (0.0178, 0.0228),
    "Q5_K": (0.0361, 0.0439),
    "Q4_K": (0.0713, 0.0867),
    "Q3_K": (0.1510, 0.1839),
    "Q2_K": (0.2966, 0.3437),
    "IQ4_NL": (0.0761, 0.0934),
    "IQ4_XS": (0.0767, 0.0943),
    "IQ3_S": (0.1661, 0.1975),
    "IQ3_XXS": (0.2138, 0.2550),
    "IQ2_S": (0.2657, 0.3400),
    "IQ2_XS": (0.3006, 0.3473),
    "IQ2_XXS": (0.3445, 0.4181),
    "IQ1_M": (0.5833, 0.5992),
    "IQ1_S": (0.4867, 0.5805),
    "TQ1_0": (0.807, 0.844),
    "TQ2_0": (0.807, 0.844),
    "MXFP4": (0.1141, 0.1314),
    "NVFP4": (0.1031, 0.0959),
    "Q1_0": (0.60, 0.70),
    "Q2_0": (0.718, 0.731),
}


def gaussian(rows: int, columns: int) -> Tensor:
    """Return standard normal weights, always the same."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def student_t(rows: int, columns: int) -> Tensor:
    """Return weights of Student's t with 4 degrees of freedom, always the same."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(rows, columns, generator=generator)
    chi_squared = torch.zeros(rows, columns)
    for _ in range(4):
        chi_squared += torch.randn(rows, columns, generator=generator).square()
    return normal / (chi_squared / 4).sqrt()
