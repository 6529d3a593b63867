"""Which modules are units, whatever the tree: layers in no list, wrappers, shared layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from streaming.models import WIDTH, Block, Wrapper, assert_streams, inputs, smallest_budget
from torch import nn

from lowbits.streaming.cut import lay_out

if TYPE_CHECKING:
    from torch import Tensor


class Flat(nn.Module):
    """Layers that are attributes, and some in a list."""

    def __init__(self, layers: int, listed: int = 0) -> None:
        super().__init__()
        for number in range(layers):
            self.add_module(f"layer{number}", nn.Linear(WIDTH, WIDTH))
        self.last = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(listed)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class Tabled(Wrapper):
    """A wrapper with a small table of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.table = nn.Parameter(torch.randn(8 * WIDTH))

    def forward(self, *args: Any) -> Any:
        return self.inner(*args) + self.table.mean()


def stack() -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(6)))


def nbytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("listed", [0, 1, 2])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_layers_in_no_list(listed: int, share: float) -> None:
    model = Flat(12, listed)
    least = smallest_budget(model)
    assert least <= nbytes(model) / 8
    assert_streams(model, inputs(), budget=max(least, int(share * nbytes(model))))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(Wrapper(stack())),
        lambda: nn.Sequential(Wrapper(Wrapper(stack())), nn.LayerNorm(WIDTH)),
        lambda: nn.Sequential(Wrapper(stack()), Wrapper(stack())),
        lambda: nn.Sequential(Tabled(stack()), nn.Linear(WIDTH, WIDTH)),
    ],
)
def test_a_wrapper_is_cut_as_what_it_wraps(make: Any) -> None:
    model = make()
    assert smallest_budget(model) <= nbytes(model) / 5
    assert_streams(model, inputs())


class Sharing(nn.Module):
    """A block that has a layer of its own, or a weight, and one that others have, too."""

    def __init__(self, shared: nn.Module, *, is_raw: bool) -> None:
        super().__init__()
        self.shared = shared
        if is_raw:
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        else:
            self.own = nn.Linear(WIDTH, WIDTH)
            self.compile(backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shared(x @ self.weight if hasattr(self, "weight") else self.own(x))
        return out


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.3, 0.5])
def test_blocks_that_stay_whole_and_share_a_layer(share: float, *, is_raw: bool) -> None:
    """It lies in the base; were it a unit, it would come back, again and again."""
    shared = nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(*(Sharing(shared, is_raw=is_raw) for _ in range(6)))
    budget = max(smallest_budget(model), int(share * nbytes(model)))
    with torch.no_grad():
        assert_streams(model, inputs(), budget=budget)


def test_compiled_layers_of_a_list_that_is_too_small_to_be_cut_stay_whole() -> None:
    model = nn.Sequential(nn.Linear(40 * WIDTH, 40 * WIDTH), Wrapper(nn.ModuleList()))
    small = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    small.compile(backend="eager")
    root = Wrapper(model)
    root.small = nn.ModuleDict({"compiled": small})
    modules = [unit.module for unit in lay_out(root, budget_bytes=0, depth=1).units]
    assert small in modules
    assert not set(small) & set(modules)


def test_the_base_gives_no_more_than_is_missing() -> None:
    model = Flat(12, 4)
    whole = lay_out(model, budget_bytes=1 << 40, depth=3)
    budget = nbytes(model) - 1
    part = lay_out(model, budget_bytes=budget, depth=3)
    assert len(whole.units) == 4
    assert len(part.units) < 16
    assert part.fixed_bytes + 3 * part.units[0].nbytes <= budget
