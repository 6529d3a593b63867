"""torch.compile: block by block, before and after; the whole, as far as that goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from streaming.models import (
    WIDE,
    Block,
    Snapshot,
    Stack,
    Wrapper,
    frozen,
    inputs,
    reference,
    same,
    streamer_of,
)
from torch import nn
from torch._dynamo.utils import counters

import lowbits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

METHODS = ("queue", "async")
ROOM = 8_000

# torch's own warning while it traces in grad mode, streamed or not.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compile_blocks(model: Any) -> None:
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(("first", "location"), [("compile", "cpu"), ("attach", "disk")])
def test_blocks_are_compiled_whole(first: str, location: str, mode: Any) -> None:
    model, expected = reference(), reference()(inputs())
    streamer = streamer_of(model, budget=ROOM, method="queue", location=location)
    with mode():
        if first == "compile":
            compile_blocks(model)
        with streamer:
            assert "blocks.1" in {unit.name for unit in streamer.stats().units}
            if first == "attach":
                compile_blocks(model)
            assert same(model(inputs()), expected)
            made = graphs()
            assert made > 0
            assert not counters["graph_break"]
            with torch.compiler.set_stance("fail_on_recompile"):
                for _ in range(3):
                    assert same(model(inputs()), expected)
            assert graphs() == made
        assert same(model(inputs()), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", [1, 3])
def test_slots_and_plans_do_not_recompile(method: str, depth: int) -> None:
    model, expected = reference(), reference()(inputs())
    compile_blocks(model)
    with torch.no_grad(), streamer_of(model, depth=depth, method=method, budget=20_000):
        model(inputs())
        made = graphs()
        with torch.compiler.set_stance("fail_on_recompile"):
            for number in range(4):
                assert same(model(inputs()), expected), number
        assert graphs() == made


def test_all_blocks_share_one_graph_as_without_streaming() -> None:
    def count(*, streamed: bool) -> int:
        torch.compiler.reset()
        counters.clear()
        model = reference()
        compile_blocks(model)
        streamer = streamer_of(model, budget=10**6)
        with torch.no_grad():
            if streamed:
                streamer.attach()
            model(inputs())
        return graphs()

    assert count(streamed=True) <= count(streamed=False)


def test_packed_blocks_are_compiled_whole() -> None:
    torch.manual_seed(0)
    model = Stack(3, 256, hidden=256).eval()
    lowbits.quantize(model, "torchao-int8")
    with torch.no_grad():
        compile_blocks(model)
        expected = model(inputs(256))
        with streamer_of(model, budget=300_000, method="queue"):
            for _ in range(3):
                assert same(model(inputs(256)), expected)
        assert not counters["graph_break"]


@pytest.mark.parametrize("first", ["compile", "attach"])
def test_the_whole_model_without_fullgraph(first: str) -> None:
    model, expected = reference(), reference()(inputs())
    before = Snapshot(model)
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend="eager") if first == "compile" else None
        with streamer_of(model):
            if first == "attach":
                compiled = torch.compile(model, backend="eager")
            for _ in range(3):
                assert same(compiled(inputs()), expected)
        assert same(compiled(inputs()), expected)
        before.require()


def test_the_whole_model_in_place() -> None:
    model, expected = reference(), reference()(inputs())
    with torch.no_grad(), streamer_of(model):
        model.compile(backend="eager")
        for _ in range(3):
            assert same(model(inputs()), expected)


@pytest.mark.parametrize("how", ["function", "method"])
def test_fullgraph_of_the_whole_names_the_way_out(how: str) -> None:
    model: nn.Module = reference()
    with torch.no_grad(), streamer_of(model):
        if how == "function":
            compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        else:
            model.compile(backend="eager", fullgraph=True)
            compiled = model
        with pytest.raises(Exception, match="compile_repeated_blocks"):
            compiled(inputs())


def compile_children(model: nn.Module) -> None:
    for child in model.children():
        child.compile(backend="eager", fullgraph=True)


def replace_by_compiled(model: nn.Module) -> None:
    for name, child in list(model.named_children()):
        model.add_module(name, torch.compile(child, backend="eager", fullgraph=True))  # type: ignore[arg-type] # torch types it as a function


class Attributes(nn.Module):
    """What is compiled is in no list, and made of smaller modules, in lists too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Wrapper(nn.Sequential(Block(), Block()))
        self.mid = nn.Sequential(Block(), Block())
        self.last = Block()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.mid(self.first(x)))
        return out


@pytest.mark.parametrize("compiled", [compile_children, replace_by_compiled])
def test_what_is_compiled_is_never_cut(compiled: Callable[[nn.Module], None]) -> None:
    model = Attributes()
    with torch.no_grad():
        expected = model(inputs())
        compiled(model)
        with streamer_of(model) as streamer:
            names = [unit.name for unit in streamer.stats().units if not unit.is_base]
            assert names == ["first", "mid", "last"]
            for _ in range(3):
                assert same(model(inputs()), expected)


def test_a_compiled_block_that_had_to_be_split_says_so() -> None:
    model, expected = reference(), reference()(inputs())
    compile_blocks(model)
    with torch.no_grad(), streamer_of(model):
        try:
            assert same(model(inputs()), expected)
        except torch._dynamo.exc.Unsupported as error:
            message = str(error)
        else:
            return
    assert "budget" in message


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_compiled_function_may_go_backward() -> None:
    """The weights that the backward pass reads again are read out of graphs."""

    def guide(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    model = frozen()
    expected = guide(inputs(WIDE))
    for location in ("cpu", "disk"):
        with streamer_of(model, budget=70_000, location=location):
            compiled = torch.compile(guide, backend="eager")
            for _ in range(2):
                assert same(compiled(inputs(WIDE)), expected)


@pytest.mark.parametrize("scheme", ["native", "bnb-nf4"])
def test_a_compiled_function_may_look_at_a_weight(scheme: str) -> None:
    def sample(x: torch.Tensor) -> torch.Tensor:
        weight: Any = model.blocks[0].up.weight
        doubled: torch.Tensor = model(x.to(weight.dtype)) * 2
        return doubled

    model = frozen(scheme)
    with torch.no_grad():
        expected = sample(inputs(WIDE))
        with streamer_of(model):
            assert same(torch.compile(sample, backend="eager")(inputs(WIDE)), expected)
