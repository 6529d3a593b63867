"""The table of GGUF types: what a block holds, and how it is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from lowbits.backends.gguf import codebook, uniform

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@final
@dataclass(frozen=True)
class GgufType:
    """A type of GGUF tensors.

    Attributes:
        name: as in ggml, e.g. ``"Q4_K"``.
        number: of the type in a file.
        code_bits: of one code, without scales; 1.58 where quantizers use three values.
        weights: in a block; it divides the rows of a tensor of this type.
        block_bytes: bytes of a block.
        decode: writes ``(n, block_bytes)`` uint8, contiguous, as ``(n, weights)`` float32 into its
            second argument, contiguous.
        fallback: the type for rows that this one's blocks do not divide.
    """

    name: str
    number: int
    code_bits: float
    weights: int
    block_bytes: int
    decode: Callable[[Tensor, Tensor], None]
    fallback: str | None = None


#: By name. Numbers, sizes: ``ggml_type`` in ggml.h, ``block_*`` in ggml-common.h. Fallbacks of
#: K types are llama.cpp's (``tensor_type_fallback``): no type falls back to one of fewer bits.
TYPES: Final = {
    kind.name: kind
    for kind in (
        GgufType("F16", 1, 16, 1, 2, uniform.f16),
        GgufType("BF16", 30, 16, 1, 2, uniform.bf16),
        GgufType("Q8_0", 8, 8, 32, 34, uniform.q8_0),
        GgufType("Q6_K", 14, 6, 256, 210, uniform.q6_k, "Q8_0"),
        GgufType("Q5_K", 13, 5, 256, 176, uniform.q5_k, "Q5_1"),
        GgufType("Q4_K", 12, 4, 256, 144, uniform.q4_k, "Q5_0"),
        GgufType("Q3_K", 11, 3, 256, 110, uniform.q3_k, "IQ4_NL"),
        GgufType("Q2_K", 10, 2, 256, 84, uniform.q2_k, "IQ4_NL"),
        GgufType("Q5_1", 7, 5, 32, 24, uniform.q5_1),
        GgufType("Q5_0", 6, 5, 32, 22, uniform.q5_0),
        GgufType("Q4_1", 3, 4, 32, 20, uniform.q4_1),
        GgufType("Q4_0", 2, 4, 32, 18, uniform.q4_0),
        GgufType("IQ4_NL", 20, 4, 32, 18, codebook.iq4_nl),
        GgufType("IQ4_XS", 23, 4, 256, 136, codebook.iq4_xs, "IQ4_NL"),
        GgufType("IQ3_S", 21, 3, 256, 110, codebook.iq3_s),
        GgufType("IQ3_XXS", 18, 3, 256, 98, codebook.iq3_xxs),
        GgufType("IQ2_S", 22, 2, 256, 82, codebook.iq2_s),
        GgufType("IQ2_XS", 17, 2, 256, 74, codebook.iq2_xs),
        GgufType("IQ2_XXS", 16, 2, 256, 66, codebook.iq2_xxs),
        GgufType("IQ1_M", 29, 1, 256, 56, codebook.iq1_m),
        GgufType("IQ1_S", 19, 1, 256, 50, codebook.iq1_s),
        GgufType("TQ2_0", 35, 1.58, 256, 66, uniform.tq2_0, "Q4_0"),
        GgufType("TQ1_0", 34, 1.58, 256, 54, uniform.tq1_0, "Q4_0"),
        GgufType("MXFP4", 39, 4, 32, 17, codebook.mxfp4),
        GgufType("NVFP4", 40, 4, 64, 36, codebook.nvfp4, "IQ4_NL"),
        GgufType("Q1_0", 41, 1, 128, 18, uniform.q1_0, "Q4_0"),
        GgufType("Q2_0", 42, 1.58, 64, 18, uniform.q2_0, "Q4_0"),
    )
}
