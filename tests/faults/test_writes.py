"""A write into a packed weight raises: lost without a word, it would be a wrong result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lowbits
from lowbits import errors

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEME = "float8-e4m3fn"
SWAP: Any = torch.utils.swap_tensors

DIRECT: dict[str, Callable[[Any], Any]] = {
    "zero_": lambda m: m.weight.zero_(),
    "data.zero_": lambda m: m.weight.data.zero_(),
    "detach().zero_": lambda m: m.weight.detach().zero_(),
    "+=": lambda m: m.weight.__iadd__(1),
    "out=": lambda m: torch.mul(torch.ones(96, 64), 2, out=m.weight),
    "setitem": lambda m: m.weight.__setitem__((0, slice(None)), 0.0),
    "data.setitem": lambda m: m.weight.data.__setitem__(0, 0.0),
    "set data": lambda m: setattr(m.weight, "data", torch.zeros(96, 64)),
    "set attribute": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(96, 64))),
    "set None": lambda m: setattr(m, "weight", None),
    "delete": lambda m: delattr(m, "weight"),
    "register": lambda m: m.register_parameter("weight", nn.Parameter(torch.zeros(96, 64))),
    "requires_grad": lambda m: setattr(m.weight, "requires_grad", True),
    "init.zeros_": lambda m: nn.init.zeros_(m.weight),
    "init.xavier": lambda m: nn.init.xavier_uniform_(m.weight),
    "functional_call": lambda m: torch.func.functional_call(
        m, {"weight": torch.zeros(96, 64)}, torch.ones(1, 64)
    ),
    "parametrize": nn.utils.parametrizations.weight_norm,
    "spectral": nn.utils.parametrizations.spectral_norm,
}

LOST: dict[str, Callable[[Any], Any]] = {
    "init.normal_": lambda m: nn.init.normal_(m.weight),
    "init.uniform_": lambda m: nn.init.uniform_(m.weight),
    "init.constant_": lambda m: nn.init.constant_(m.weight, 3.0),
    "init.kaiming": lambda m: nn.init.kaiming_uniform_(m.weight),
    "reset_parameters": lambda m: m.reset_parameters(),
    "swap": lambda m: SWAP(m.weight, torch.zeros(96, 64)),
    "foreach": lambda m: torch._foreach_mul_([m.weight], 2.0),
    "view.mul_": lambda m: m.weight.view(-1).mul_(2),
    "row.zero_": lambda m: m.weight[0].zero_(),
    "data.row.copy_": lambda m: m.weight.data[3:5].copy_(torch.ones(2, 64)),
    "transpose.add_": lambda m: m.weight.t().add_(1),
    "chunk.zero_": lambda m: m.weight.chunk(2)[0].zero_(),
}


def packed_layer() -> Any:
    layer = nn.Linear(64, 96)
    lowbits.quantize(layer, SCHEME)
    return layer


def check(write: Callable[[Any], Any]) -> None:
    layer = packed_layer()
    weight, bias = layer.weight.clone(), layer.bias.detach().clone()
    with (
        torch.no_grad(),
        pytest.raises((errors.PatchError, KeyError, AttributeError, ValueError, RuntimeError)),
    ):
        write(layer)
    assert torch.equal(layer.weight.clone(), weight)
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("name", DIRECT)
def test_a_direct_write_raises(name: str) -> None:
    check(DIRECT[name])


@pytest.mark.parametrize("name", LOST)
def test_a_write_through_a_function_or_a_view_raises(name: str) -> None:
    check(LOST[name])


def test_reads_give_the_values() -> None:
    layer = packed_layer()
    dense = layer.weight.clone()
    assert type(dense) is torch.Tensor
    assert torch.equal(torch.cat([layer.weight, layer.weight]), torch.cat([dense, dense]))
    assert torch.equal(layer.weight[3:5], dense[3:5])
    assert torch.equal(torch.zeros(96, 64).copy_(layer.weight), dense)
    assert torch.equal(layer.weight.T @ torch.ones(96), dense.T @ torch.ones(96))
    assert torch.equal(torch.ones(96, 64) + layer.weight, dense + 1)
    assert layer.weight.to(torch.float64).dtype == torch.float64
    assert layer.weight.type(torch.float16).dtype == torch.float16
    assert isinstance(layer.weight, nn.Parameter)


def test_a_proxy_survives_the_layer() -> None:
    layer = packed_layer()
    proxy, dense = layer.weight, layer.weight.clone()
    lowbits.dequantize(layer)
    assert torch.equal(proxy.clone(), dense)
