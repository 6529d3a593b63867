"""torch.compile beyond the contract: 16 bits computed in 32, and code from Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbits.testing.layers import packed_model, tokens


def test_compiles_where_16_bits_are_computed_in_32() -> None:
    model, _ = packed_model("torchao-int8")
    model.bfloat16()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(tokens()), model(tokens()))


@pytest.mark.parametrize("scheme", ["bnb-nf4", "torchao-int8"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_gives_the_same(scheme: str) -> None:
    model, _ = packed_model(scheme)
    layer: Any = model.blocks[0]
    compiled: Any = torch.compile(layer, fullgraph=True)
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.allclose(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
