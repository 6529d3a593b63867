"""torch.compile beyond the contract: 16 bits computed in 32, and code from Inductor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import lowbits
from lowbits.testing.layers import model_for, packed_model, tokens

if TYPE_CHECKING:
    from pathlib import Path


def test_compiles_where_16_bits_are_computed_in_32() -> None:
    """As it is on most CPUs, and is asked for here: on others torch convolves some to NaN."""
    model = model_for("torchao-int8")
    rules = {"*": "torchao-int8"}
    lowbits.quantize(model, "torchao-int8", rules=rules, compute_dtype=torch.float32)
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


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))


@pytest.mark.parametrize(
    "scheme", ["bnb-nf4", "torchao-int8", "quanto-int8", "gguf-q4_k", "float8-e4m3fn"]
)
def test_an_embedding_is_compiled_for_any_number_of_tokens(scheme: str) -> None:
    table = nn.Sequential(nn.Embedding(64, 256))
    lowbits.quantize(table, scheme, rules={"*": scheme})
    graphs = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled: Any = torch.compile(table, fullgraph=True, dynamic=True, backend=keep)
    with torch.no_grad():
        for count in (5, 7, 11, 0):
            tokens = torch.arange(count)
            assert torch.equal(compiled(tokens), table(tokens))
        assert len(graphs) == 2  # nothing, and any number but one
        shapes = [{0: torch.export.Dim("count", min=2)}]
        program = torch.export.export(table, (tokens.new_zeros(4),), dynamic_shapes=shapes)
        assert torch.equal(program.module()(torch.arange(9)), table(torch.arange(9)))


@pytest.mark.parametrize(
    ("scheme", "lora"), [("gguf-bf16", "auto"), ("bnb-nf4", "merge"), ("bnb-nf4", "auto")]
)
def test_a_model_without_adapters_is_one_graph(scheme: str, lora: str) -> None:
    model: Any = two_layers()
    lowbits.quantize(model, scheme, lora=lora)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(2, 256)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


@torch.no_grad()
def test_an_adapter_that_comes_after_compiling_acts() -> None:
    """Where adapters are merged before a pass, which a graph of before has nothing of."""
    model: Any = two_layers()
    lowbits.quantize(model, "gguf-bf16")
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager")
    x = torch.randn(2, 256)
    plain = compiled(x)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), model)
    for strength in (1.0, 0.5):
        model[0].set_scale("default", strength)
        got = compiled(x)
        assert not torch.allclose(got, plain, atol=1e-2)
        assert torch.equal(got, model(x))


@torch.no_grad()
def test_a_wrapper_of_torch_compile_is_what_is_inside(tmp_path: Path) -> None:
    model, x = two_layers(), torch.randn(2, 256)
    compiled: Any = torch.compile(model, backend="eager")
    expected, options = model(x), {"rules": {"0": "bnb-nf4"}}
    owned = lowbits.quantize(compiled, "gguf-q8_0", **options)
    assert lowbits.handle(compiled) is owned is lowbits.handle(model)
    assert lowbits.quantize(compiled, "gguf-q8_0", **options) is owned
    packed = model(x)
    assert torch.equal(compiled(x), packed)
    file = tmp_path / "model.safetensors"
    lowbits.save(compiled, file)
    lowbits.save_gguf(compiled, tmp_path / "model.gguf", "Q8_0", arch="flux", names="diffusers")
    other = two_layers()
    lowbits.load(file, into=torch.compile(other, backend="eager"))
    assert torch.equal(other(x), packed)
    lowbits.restore(compiled)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(model(x), expected)
