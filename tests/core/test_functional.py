"""Linear layers by parts, under transforms and tracers, and what is kept between calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from schemes import LAYOUTS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import lowbits
from lowbits.backends.gguf import codebook
from lowbits.core import memory
from lowbits.core.decode import ByteTable
from lowbits.errors import PatchError

DYNAMIC = "torchao-int8-dynamic"


def packed(scheme: str, rows: int = 96, row_length: int = 256) -> nn.Linear:
    layer = nn.Linear(row_length, rows)
    lowbits.quantize(layer, scheme, rules={"*": scheme}, keep_source="none")
    return layer


def twin_of(layer: nn.Linear) -> nn.Linear:
    twin = nn.Linear(layer.in_features, layer.out_features)
    twin.load_state_dict({"weight": layer.weight.clone(), "bias": layer.bias})
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", [*LAYOUTS, "gguf-q4_k"])
def test_parts_make_the_whole(
    scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbits.core.functional.PART_WEIGHTS", 5000)
    # A CPU with int8 products takes a dynamic scheme's weight as it is.
    monkeypatch.setattr("lowbits.backends.torchao.int8_rows", lambda *_: None)
    layer = packed(scheme).to(dtype)
    x = torch.randn(3, 5, 256).to(dtype)
    expected = twin_of(layer).double()(x.double()).detach()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    with torch.no_grad():
        got = layer(x)
    assert got.dtype == dtype
    assert float((got - expected).norm() / expected.norm()) <= tolerance


@pytest.fixture
def _product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose int8 products are fast."""
    monkeypatch.setattr("lowbits.backends.torchao.int8_rows", lambda *_: 1)


@pytest.mark.usefixtures("_product")
def test_transforms_differentiate_the_dequantized_weight() -> None:
    layer = packed(DYNAMIC).requires_grad_(requires_grad=False)
    weight, x, tangent = layer.weight.clone(), torch.randn(4, 256), torch.randn(4, 256)
    with torch.no_grad():
        assert not torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias))
    pushed: Any = torch.func.jvp(layer, (x,), (tangent,))
    assert torch.allclose(pushed[1], tangent @ weight.t(), atol=1e-4)
    expected = torch.ones(4, 96) @ weight
    leaf = x.clone().requires_grad_()
    y: torch.Tensor = torch.func.vmap(layer)(leaf)
    torch.autograd.backward(y.sum())
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, expected, atol=1e-4)
    nested = torch.func.grad(lambda y: torch.func.vmap(layer)(y).sum())(x)
    assert torch.allclose(nested, expected, atol=1e-4)


@pytest.mark.parametrize("scheme", ["bnb-nf4", "float8-e4m3fn", "gguf-q4_k"])
def test_gradients_can_be_differentiated_again(scheme: str) -> None:
    layer = packed(scheme)
    x = torch.randn(4, 256, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    torch.autograd.backward(gradient.square().sum())
    weight = layer.weight.clone()
    second = 8 * ((x @ weight.t() + layer.bias) @ weight) @ weight.t() @ weight
    assert x.grad is not None
    assert torch.allclose(x.grad, second, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("scheme", ["float8-e4m3fn", "gguf-q4_k", "bnb-nf4"])
def test_vmap_of_an_embedding_decodes_its_rows(scheme: str) -> None:
    table = nn.Embedding(32, 256)
    lowbits.quantize(table, scheme, rules={"*": scheme})
    indices = torch.arange(6).view(3, 2)
    assert torch.equal(torch.vmap(table)(indices), table(indices))


@pytest.mark.parametrize("scheme", ["bnb-nf4", "float8-e4m3fn", "gguf-q4_k"])
def test_a_traced_layer_keeps_no_scratch(scheme: str) -> None:
    layer = packed(scheme)
    x = torch.randn(2, 256)
    with torch.no_grad():
        traced: Any = make_fx(layer)(x)
        expected = layer(x)
        assert torch.allclose(traced(x), expected, rtol=1e-4, atol=1e-5)
        memory.scratch("weight", (96, 256), torch.float32).fill_(torch.nan)
        assert torch.allclose(traced(x), expected, rtol=1e-4, atol=1e-5)


def test_what_is_kept_lies_on_the_cpu_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        room = memory.scratch("a test's", (2, 3), torch.float32)
        table = ByteTable.of_codes([0.0, 1.0, 2.0, 3.0])
        tables = codebook._nibble_tables(tuple(range(16, 32)), torch.device("cpu"))
    assert room.device.type == table.on(torch.device("cpu")).device.type == "cpu"
    assert {t.device.type for t in tables} == {"cpu"}


def test_constants_are_ordinary_tensors_wherever_the_first_call_is() -> None:
    with FakeTensorMode():
        tables = codebook._nibble_tables(tuple(range(32, 48)), torch.device("cpu"))
    assert not any(isinstance(table, FakeTensor) for table in tables)
    with torch.inference_mode():
        tables = codebook._nibble_tables(tuple(range(48, 64)), torch.device("cpu"))
    assert not any(table.is_inference() for table in tables)


def test_autocast_leaves_float64_alone() -> None:
    layer = packed("torchao-int8").double()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(torch.randn(2, 256).double()).dtype == torch.float64


class Reading(nn.Module):
    """Reads a part of a layer's weight, and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.inner.weight[:32].T


@pytest.mark.parametrize(
    "transform",
    [
        lambda model, x: torch.vmap(model)(x),
        lambda model, x: torch.func.jvp(model, (x,), (x,))[1],
        lambda model, x: torch.func.jacfwd(model)(x[0]),
        lambda model, x: torch.func.grad(lambda given: model(given).sum())(x),
    ],
    ids=["vmap", "jvp", "jacfwd", "grad"],
)
def test_transforms_of_what_reads_a_weight(transform: Any) -> None:
    model = Reading()
    lowbits.quantize(model, "gguf-q8_0", rules={"*": "gguf-q8_0"})
    twin = Reading()
    twin.inner = twin_of(model.inner)
    x = torch.randn(5, 64)
    torch.testing.assert_close(transform(model, x), transform(twin, x))


def test_a_packed_weight_is_not_trained() -> None:
    layer = packed("gguf-q8_0")
    with pytest.raises(PatchError, match="'requires_grad_' to a weight stored as gguf-q8_0"):
        layer.weight.requires_grad_()
    assert not layer.weight.requires_grad_(False).requires_grad


@pytest.mark.parametrize("scheme", ["bnb-nf4", "gguf-q4_k", "torchao-int8-dynamic"])
@pytest.mark.parametrize("shape", [(4, 128), (2, 512), (256, 2), (1, 2, 128)])
def test_inputs_of_another_width_are_told_as_torch_tells_them(
    scheme: str, shape: tuple[int, ...]
) -> None:
    layer, x = nn.Linear(256, 64), torch.randn(shape)
    with pytest.raises(RuntimeError) as expected:
        layer(x)
    lowbits.quantize(layer, scheme)
    with pytest.raises(RuntimeError) as found:
        layer(x)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("scheme", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 256), (2, 3, 256), (0, 256)])
def test_a_result_is_no_view(scheme: str, shape: tuple[int, ...]) -> None:
    """Compilers make another graph for views, and one more when their length changes."""
    layer = packed(scheme)
    with torch.no_grad():
        result = layer(torch.randn(shape))
    assert result.shape == (*shape[:-1], 96)
    assert result._base is None
