"""What is a unit, what is base, and that any model streams: odd trees, odd tensors."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from streaming.models import (
    WIDTH,
    Block,
    Stack,
    Wrapper,
    assert_streams,
    inputs,
    same,
    streamer_of,
)
from torch import nn
from torch.nn import functional

import lowbits
from lowbits.errors import InsufficientMemoryError
from lowbits.streaming.cut import lay_out
from lowbits.streaming.layout import ALIGNMENT, ModelLayout, held_tensors, kept_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

MODES = (torch.no_grad, torch.inference_mode, torch.enable_grad)
LOCATIONS = ("cpu", "disk")


def layout_of(
    model: nn.Module, budget_bytes: int = 1 << 40, depth: int | None = None
) -> ModelLayout:
    return lay_out(model, budget_bytes=budget_bytes, depth=depth)


def names(layout: ModelLayout) -> list[str]:
    return [unit.name for unit in layout.units]


def base_names(layout: ModelLayout) -> set[str]:
    return {holder.name for holder, _ in layout.base.holders()}


def test_blocks_of_a_list_are_units_and_the_rest_is_base() -> None:
    layout = layout_of(Stack(3))
    assert names(layout) == ["blocks.0", "blocks.1", "blocks.2"]
    modules = {id(holder.module) for holder, _ in layout.base.holders()}
    assert len(layout.base.places) == 4
    assert len(modules) == 2


@pytest.mark.parametrize("container", [nn.Sequential, lambda *m: nn.ModuleList(m)])
def test_units_hold_parameters_and_buffers(container: Callable[..., nn.Module]) -> None:
    layout = layout_of(Wrapper(container(Block(), Block())))
    assert names(layout) == ["inner.0", "inner.1"]
    held = {holder.name for unit in layout.units for holder, _ in unit.holders()}
    assert held == {"weight", "bias", "gain"}
    assert not layout.base.places


def test_every_tensor_has_one_place_that_overlaps_no_other() -> None:
    model = Stack(3)
    layout = layout_of(model)
    places = [place for unit in (*layout.units, layout.base) for place in unit.places]
    assert sorted(id(p.original) for p in places) == sorted(id(t) for _, t in held_tensors(model))
    for unit in layout.units:
        end = 0
        for place in unit.places:
            assert place.offset % ALIGNMENT == 0
            assert place.offset >= end
            end = place.offset + place.nbytes
        assert end <= unit.nbytes


def test_the_layout_does_not_change_the_model() -> None:
    model = Stack(2)
    before = [(id(t), t.data_ptr()) for _, t in held_tensors(model)]
    layout_of(model, budget_bytes=1)
    assert before == [(id(t), t.data_ptr()) for _, t in held_tensors(model)]


def test_an_oversized_block_is_split_into_its_layers() -> None:
    model = Stack(4)
    model.blocks[2] = Block(WIDTH, 64 * WIDTH)
    whole = layout_of(model)
    split = layout_of(model, whole.fixed_bytes + model.blocks[2].up.weight.nbytes * 3 // 2)
    assert {"blocks.2.up", "blocks.2.down"} <= set(names(split))
    assert {"blocks.0", "blocks.1"} <= set(names(split))
    assert split.nbytes == whole.nbytes
    assert "gain" in base_names(split)
    assert_streams(model, inputs())


LARGE = 32 * WIDTH
LARGE_BLOCK = partial(Block, WIDTH, LARGE)


class Table(Block):
    """A large block with a table of its own, of a thirtieth of its bytes."""

    def __init__(self) -> None:
        super().__init__(WIDTH, LARGE)
        self.table = nn.Parameter(torch.randn(2, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.table[0] @ self.table[1])


@pytest.mark.parametrize(
    ("block", "beside", "depth", "parts"),
    [
        (LARGE_BLOCK, 5.5, None, ["norm", "up", "down"]),
        (LARGE_BLOCK, 5.5, 3, []),
        (LARGE_BLOCK, 6.5, None, []),
        (Block, 5.5, None, []),
        (Table, 5.5, None, []),
    ],
)
def test_blocks_larger_than_most_are_cut_where_few_fit(
    block: Callable[[], Block], beside: float, depth: int | None, parts: list[str]
) -> None:
    """What a block owns itself would stay on the device: where that is much, it stays whole."""
    model = Stack(18)
    for number in range(8):
        model.blocks[number] = block()
    whole = layout_of(model)
    budget = whole.fixed_bytes + int(beside * whole.units[0].nbytes)
    found = names(layout_of(model, budget, depth))
    of_large = [f"blocks.{number}.{part}" for number in range(8) for part in parts]
    assert found == (of_large or names(whole)[:8]) + names(whole)[8:]
    assert_streams(model, inputs(), budget=budget)


class Owner(nn.Module):
    """A block of a layer, and of a table of a hundredth of its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(160, 160, bias=False)
        self.table = nn.Parameter(torch.randn(256))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + self.table.mean()
        return out


@pytest.mark.parametrize("budget", [1, 200_000, 400_000, 600_000])
def test_what_is_said_to_be_needed_is_enough(budget: int) -> None:
    """A cut that leaves more on the device for good may be worth it in the larger budget only."""
    large = [nn.Linear(160, 960, bias=False), nn.Linear(960, 160, bias=False)]
    small = (nn.LayerNorm(160) for _ in range(20))
    model = nn.Sequential(*large, *(Owner() for _ in range(5)), *small)
    with pytest.raises(InsufficientMemoryError) as caught:
        streamer_of(model, budget=budget).attach()
    assert_streams(model, torch.randn(2, 160), budget=caught.value.needed_bytes)


class Wide(nn.Module):
    """A block of layers with so many outputs."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, width, bias=False) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        return sum((layer(x).mean() for layer in self.layers), x)


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [
        (3, [(8, 64, 512), (128, 16), (128, 16), (512,), (512,), (8, 64, 512)]),
        (4, [(4, 64), (4, 64), (16, 128, 512), (16, 128, 512), (16, 128, 512)]),
    ],
)
def test_what_so_many_slots_are_said_to_need_is_enough(
    depth: int, blocks: list[tuple[int, ...]]
) -> None:
    """How few bytes so many slots take depends on whose turn each is: on the cut, as well."""
    model = nn.Sequential(*(Wide(*widths) for widths in blocks))
    assert_streams(model, torch.randn(2, 64), depth=depth)


@torch.no_grad()
def test_a_block_that_torch_compile_made_stays_whole() -> None:
    model = Stack(18)
    for number in range(8):
        block: Any = torch.compile(LARGE_BLOCK(), backend="eager", fullgraph=True)
        model.blocks[number] = block
    whole = layout_of(model)
    budget = whole.fixed_bytes + int(5.5 * whole.units[0].nbytes)
    assert names(layout_of(model, budget)) == names(whole)
    expected = model(inputs())
    with streamer_of(model, budget=budget):
        assert all(same(model(inputs()), expected) for _ in range(3))


def test_tied_weights_of_one_unit_lie_there_once() -> None:
    block = Block(WIDTH, WIDTH)
    block.down.weight = block.up.weight
    model = Wrapper(nn.Sequential(block, Block()))
    layout = layout_of(model)
    shared = [p for p in layout.units[0].places if p.original is block.up.weight]
    assert [len(place.holders) for place in shared] == [2]
    assert_streams(model, inputs())


@pytest.mark.parametrize("location", LOCATIONS)
def test_tied_weights_of_two_units_are_base(location: str) -> None:
    model = Stack(3, hidden=WIDTH)
    model.blocks[2].up.weight = model.blocks[0].up.weight
    model.blocks[1]._buffers["gain"] = model.blocks[0].gain
    model.head.weight = model.stem.weight
    layout = layout_of(model)
    assert len([p for p in layout.base.places if len(p.holders) == 2]) == 3
    assert_streams(model, inputs(), location=location)
    assert model.blocks[2].up.weight is model.blocks[0].up.weight
    assert model.blocks[1].gain is model.blocks[0].gain


class Prompt(nn.Module):
    """Nothing but a Parameter, which is its result."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self) -> Tensor:
        return self.tokens


class Prompted(nn.Module):
    """Uses what parameter-only modules return after others have run."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.ModuleList(Prompt() for _ in range(3))
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        prompts = [prompt() for prompt in self.prompts]
        for block in self.blocks:
            x = block(x)
        return torch.cat([x, *prompts])


@pytest.mark.parametrize("method", ["queue", "async"])
def test_a_unit_may_return_its_own_parameter(method: str) -> None:
    assert_streams(Prompted(), inputs(), method=method)


class Embedded(nn.Module):
    """A unit that returns a view of its own buffer."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(8, WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.proj(x), {"rows": self.table[: len(x)]}


class Collecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Embedded() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for block in self.blocks:
            x, extra = block(x)
            rows.append(extra["rows"])
        return x + torch.stack(rows).sum(0)


def test_a_unit_may_return_a_view_of_its_own_buffer() -> None:
    assert_streams(Collecting(), inputs())


def test_a_list_of_parameters_is_base() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList(nn.Parameter(torch.randn(WIDTH)) for _ in range(3))
            self.stack = Stack(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.stack(x * self.scales[0]) + self.scales[1] * self.scales[2]
            return out

    assert_streams(Listed(), inputs())


class Repeating(nn.Module):
    """Calls a block twice in a row, one again later, and has one block in two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.shared = nn.ModuleList([self.blocks[0], Block(), self.blocks[2]])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, self.blocks[1], self.blocks[1], *self.shared):
            x = block(x)
        return x


@pytest.mark.parametrize("method", ["queue", "async"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_repeated_and_shared_blocks(method: str, location: str) -> None:
    model = Repeating()
    assert len(layout_of(model).units) == 5
    assert_streams(model, inputs(), method=method, location=location)


class Reaching(nn.Module):
    """Computes with its child's weight, without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = functional.linear(x, block.weight, block.bias) + block.weight.T[0]
        out: Tensor = x.to(self.blocks[0].weight.dtype) * self.blocks[0].weight.shape[0]
        return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("location", LOCATIONS)
def test_a_parent_may_read_the_weight_of_a_unit(mode: Any, location: str) -> None:
    with mode():
        assert_streams(Reaching(), inputs(), location=location)


@pytest.mark.parametrize("in_block", [True, False])
@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(*, in_block: bool, location: str, training: bool) -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            mixed, _ = self.attention(x, x, x, need_weights=False)
            out: Tensor = x + self.out(mixed)
            return out

    model = nn.Sequential(*(Attend() for _ in range(3))) if in_block else Attend()
    with torch.no_grad():
        assert_streams(model.train(training), inputs()[None], location=location)


@pytest.mark.parametrize(
    ("mode", "training"),
    [
        (torch.no_grad, True),
        (torch.no_grad, False),
        (torch.enable_grad, True),
        # Weights in use are frozen, so that torch fuses the layer, and rounds differently.
    ],
)
def test_a_transformer_encoder(mode: Any, *, training: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    with mode():
        assert_streams(model.train(training), inputs()[None])


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: Any, location: str) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(WIDTH, WIDTH, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.rnn(x)[0]
            return out

    model = nn.Sequential(*(Steps() for _ in range(3)))
    with torch.no_grad():
        assert_streams(model, inputs()[None], location=location)


class Nested(nn.Module):
    """Lists of lists, as a UNet has: down, middle, up with skip connections."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def conv() -> nn.Sequential:
            return nn.Sequential(
                nn.GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
            )

        self.entry = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(
            nn.ModuleDict({"convs": nn.ModuleList([conv(), conv()]), "pool": nn.AvgPool2d(2)})
            for _ in range(2)
        )
        self.middle = conv()
        self.up = nn.ModuleList(nn.ModuleList([conv(), conv()]) for _ in range(2))
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.entry(x), []
        for stage in self.down:
            assert isinstance(stage, nn.ModuleDict)
            convs: Any = stage["convs"]
            for conv in convs:
                x = x + conv(x)
            skips.append(x)
            x = stage["pool"](x)
        x = self.middle(x)
        lists: Any = self.up
        for convs in lists:
            x = functional.interpolate(x, scale_factor=2.0) + skips.pop()
            for conv in convs:
                x = x + conv(x)
        out: Tensor = self.norm(x)
        return out


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_unet_of_nested_lists(*, location: str, channels_last: bool) -> None:
    model, x = Nested().eval(), torch.randn(1, 3, 8, 8)
    assert {"down.0.convs.1", "up.1.0"} <= set(names(layout_of(model)))
    if channels_last:
        move: Any = model.to
        model, x = move(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_streams(model, x, location=location)
    assert model.entry.weight.is_contiguous(memory_format=torch.channels_last) is channels_last


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Block(), id="no list"),  # noqa: PLW0108 - the class is no factory
        pytest.param(lambda: Wrapper(Wrapper(Block())), id="wrapped"),
        pytest.param(lambda: nn.Linear(WIDTH, WIDTH), id="leaf"),
        pytest.param(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)), id="sequential of one"),
        pytest.param(lambda: nn.Sequential(*(Block() for _ in range(5))), id="sequential"),
        pytest.param(lambda: nn.Sequential(nn.Sequential(Block(), Block()), Block()), id="nested"),
        pytest.param(lambda: nn.Sequential(nn.ReLU(), nn.Identity()), id="no tensors"),
    ],
)
def test_roots(make: Callable[[], nn.Module], location: str) -> None:
    model = make()
    if next(model.parameters(), None) is None:
        assert_streams(model, inputs(), location=location, budget=1)
    else:
        assert_streams(model, inputs(), location=location)


def test_a_root_that_is_a_list_is_called_by_its_blocks() -> None:
    blocks = nn.ModuleList(Block() for _ in range(4))

    def run() -> Tensor:
        x = inputs()
        for block in blocks:
            x = block(x)
        return x

    expected = run()
    with streamer_of(blocks) as streamer:
        for _ in range(3):
            assert torch.equal(run(), expected)
        assert streamer.stats().peak_device_bytes <= streamer.stats().budget_bytes
    assert torch.equal(run(), expected)


def test_adapters_of_a_packed_model_are_compared_with_its_codes() -> None:
    """What is left of it in floating point may be less than they are."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
    lowbits.quantize(model, "float8-e4m3fn")
    config = LoraConfig(r=16, target_modules=["1"])
    model = inject_adapter_in_model(config, model)
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert kept_bytes(model) >= sum(p.nbytes for p in adapters) == 2 * 16 * 256 * 4
