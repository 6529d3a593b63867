"""The part of the contract about compilers: a packed layer is a plain expression to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lowbits.testing.layers import close, packed_model, tokens

if TYPE_CHECKING:
    from torch import Tensor

    from lowbits.core.backend import QuantBackend
    from lowbits.core.scheme import Scheme


def check_compiles_whole_and_only_once(backend: QuantBackend, scheme: Scheme) -> None:
    """`torch.compile` takes a packed model without a graph break, and never again."""
    model, _ = packed_model(scheme.name)
    graphs = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=keep)
    with torch.no_grad():
        expected = model(tokens())
        for _ in range(3):
            assert _is_same(compiled(tokens()), expected, scheme)
    assert len(graphs) == 1


def check_exports(backend: QuantBackend, scheme: Scheme) -> None:
    """`torch.export` takes a packed model; the program computes the same."""
    model, _ = packed_model(scheme.name)
    with torch.no_grad():
        program = torch.export.export(model, (tokens(),))
        got = program.module()(tokens())
        assert _is_same(got, model(tokens()), scheme)


def _is_same(got: Tensor, expected: Tensor, scheme: Scheme) -> bool:
    """Compare what a compiler made; a GPU's other roundings may flip a code of inputs."""
    if got.device.type != "cpu" and "dynamic" in scheme.name:
        return close(got, expected, scheme)
    return torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
