"""What a scheme is: a named way to store a weight, and exactly what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch

LINEAR: Final = "Linear"
EMBEDDING: Final = "Embedding"
PARAMETER: Final = "Parameter"
CONVOLUTIONS: Final = ("Conv1d", "Conv2d", "Conv3d")
ALL_KINDS: Final = (LINEAR, *CONVOLUTIONS, EMBEDDING, PARAMETER)

#: The scheme that leaves every weight as it is (Forge: "Automatic").
NATIVE: Final = "native"

#: Shape at which `SchemeInfo.bits_per_weight` is stated: a projection of FLUX.
REFERENCE_SHAPE: Final = (3072, 3072)


@final
@dataclass(frozen=True)
class Override:
    """Another scheme for some layers of a mix.

    Attributes:
        pattern: regular expression searched for in the layer's dotted name.
        scheme: its name.
        first: only so many layers of a component, in its order; None: all.
    """

    pattern: str
    scheme: str
    first: int | None = None


@final
@dataclass(frozen=True)
class Scheme:
    """A way to store a weight of ``(rows, row_length)`` values.

    Attributes:
        name: the scheme's own name, unique over all backends, e.g. ``"bnb-nf4"``.
        summary: one line for tables and help texts.
        code_bits: bits of one weight's code; 1.58 where weights have three values.
        group_bits: bits of the scale (and zero point) that a group of weights shares.
        group_sizes: weights in a group; the first size that divides the row is taken. Empty:
            one group is one row.
        kinds: layer kinds that it can hold, out of `ALL_KINDS`.
        row_multiple: rows whose length this does not divide are refused.
        fallbacks: schemes tried, in order, for a row length that this one refuses.
        can_quantize: False where weights of this scheme can be decoded only.
        mix: where a scheme is a choice among others by the layer's name: tried in order, the last
            one matches every name. Layers are reported as stored in the scheme chosen.
        forge_name: the entry of Forge's "Diffusion in Low Bits" menu that means this scheme.
    """

    name: str
    summary: str
    code_bits: float
    group_bits: int
    group_sizes: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ALL_KINDS
    row_multiple: int = 1
    fallbacks: tuple[str, ...] = ()
    can_quantize: bool = True
    mix: tuple[Override, ...] = ()
    forge_name: str | None = None

    def group_size(self, row_length: int) -> int:
        """Return the number of weights that share a scale in rows of this length."""
        return next((size for size in self.group_sizes if row_length % size == 0), row_length)

    def refusal(self, kind: str, row_length: int) -> str | None:
        """Say why a layer cannot be stored in this scheme, or None where it can."""
        if kind not in self.kinds:
            return f"{self.name} does not hold {kind} layers"
        if row_length % self.row_multiple:
            return f"row length {row_length} is not a multiple of {self.row_multiple}"
        return None


@final
@dataclass(frozen=True)
class SchemeInfo:
    """A row of `lowbits.schemes()`.

    Attributes:
        bits_per_weight: stored bits per weight of a 3072 x 3072 layer, scales included.
        layer_kinds: what it can hold, e.g. ``("Linear", "Conv2d")``.
        devices: device types that run it, or ``("any",)``.
        available: whether it can be used here; `reason` says why not.
    """

    name: str
    backend: str
    summary: str
    bits_per_weight: float
    layer_kinds: tuple[str, ...]
    devices: tuple[str, ...]
    row_multiple: int
    can_quantize: bool
    available: bool
    reason: str | None
    forge_name: str | None


@final
@dataclass(frozen=True)
class BackendInfo:
    """A row of `lowbits.backends()`.

    Attributes:
        version: of the package that the backend stands on; None where it needs none or lacks it.
        reason: why it cannot be used here.
        install: the pip command that helps.
    """

    name: str
    version: str | None
    available: bool
    reason: str | None
    install: str | None


def rows_of(shape: torch.Size | tuple[int, ...], kind: str) -> tuple[int, int]:
    """Return a weight's ``(rows, row_length)``: what one scale's row is depends on the kind.

    A convolution's row is everything that makes one output channel; a raw Parameter (a stack of
    expert matrices, say) has a row per vector of its last dimension.
    """
    if kind == PARAMETER:
        return torch.Size(shape[:-1]).numel(), shape[-1]
    return shape[0], torch.Size(shape[1:]).numel()
