"""torch.compile and torch.export: one scheme for each way of storing a weight; all in CI."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lowbits
from lowbits.testing.layers import packed_model, tokens

LAYOUTS = (
    "bnb-nf4",
    "bnb-nf4-dq",
    "torchao-int8-dynamic",
    "quanto-int2",
    "float8-e4m3fn",
    "gguf-q5_1",
)
SCHEMES = [
    pytest.param(info.name, marks=() if info.name in LAYOUTS else pytest.mark.slow)
    for info in lowbits.schemes()
    if info.backend not in ("-", "toy")
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiles_whole_and_only_once(scheme: str) -> None:
    model, _ = packed_model(scheme)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        expected = model(tokens())
        for _ in range(3):
            assert torch.allclose(compiled(tokens()), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


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


@pytest.mark.parametrize("scheme", SCHEMES)
def test_exports(scheme: str) -> None:
    model, _ = packed_model(scheme)
    program = torch.export.export(model, (tokens(),))
    with torch.no_grad():
        got = program.module()(tokens())
        assert torch.allclose(got, model(tokens()), rtol=1e-4, atol=1e-5)
