"""Which schemes a test runs for: by default one for each way of storing a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lowbits.core.registry import DEFAULT

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

#: One scheme for each way of storing a weight: what layers do with it depends on nothing else.
LAYOUTS = (
    "bnb-nf4",  # two codes in a byte, the first in the high bits; a scale per block
    "bnb-nf4-dq",  # scales that run across rows
    "torchao-int8",  # a code in a byte, a scale per row
    "torchao-int8-dynamic",  # a product of its own
    "torchao-int4",  # scale and zero point per group
    "quanto-int2",  # four codes in a byte
    "float8-e4m3fn",  # float8 codes
    "float8-e5m2-raw",  # no scale
    "gguf-q5_1",  # blocks with scales inside
)


def every_scheme() -> list[ParameterSet]:
    """Return the built-in schemes that store weights; those not among `LAYOUTS` are slow."""
    return [
        pytest.param(scheme.name, marks=() if scheme.name in LAYOUTS else pytest.mark.slow)
        for name, backend in DEFAULT.all().items()
        if name != "toy"
        for scheme in backend.schemes()
        if scheme.can_quantize and not scheme.mix
    ]
