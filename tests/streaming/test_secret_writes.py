"""Functions of torch that write into what they read, outside of a pass: into the masters."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from streaming.models import WIDTH, inputs, reference, same, streamer_of
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable


ROWS = torch.arange(4)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: functional.embedding(ROWS, w, max_norm=0.1),
        lambda w: functional.embedding_bag(ROWS[None], w, max_norm=0.1),
    ],
)
@pytest.mark.parametrize("part", ["stem", "blocks.1.up"])
@torch.no_grad()
def test_rows_that_are_scaled_outside_of_a_pass(write: Callable[[Any], object], part: str) -> None:
    twin = reference()
    model = copy.deepcopy(twin)
    with streamer_of(model):
        for each in (twin, model):
            write(each.get_submodule(part).weight)
        assert same(model(inputs()), twin(inputs()))
    assert same(list(model.state_dict().values()), list(twin.state_dict().values()))


@pytest.mark.parametrize(
    "write",
    [
        lambda m: functional.batch_norm(torch.ones(3, WIDTH), m, torch.ones(WIDTH), training=True),
        lambda m: torch.batch_norm(
            torch.ones(3, WIDTH), None, None, m, torch.ones(WIDTH), True, 0.1, 1e-5, False
        ),
        lambda m: torch.native_batch_norm(
            torch.ones(3, WIDTH), None, None, m, torch.ones(WIDTH), True, 0.1, 1e-5
        ),
        lambda m: torch.ops.aten.native_batch_norm.default(
            torch.ones(3, WIDTH), None, None, m, torch.ones(WIDTH), True, 0.1, 1e-5
        ),
        lambda m: torch._native_batch_norm_legit(
            torch.ones(3, WIDTH), None, None, m, torch.ones(WIDTH), True, 0.1, 1e-5
        ),
        lambda m: functional.instance_norm(torch.ones(2, WIDTH, 5), m, torch.ones(WIDTH)),
        lambda m: torch.instance_norm(
            torch.ones(2, WIDTH, 5), None, None, m, torch.ones(WIDTH), True, 0.1, 1e-5, False
        ),
    ],
)
@torch.no_grad()
def test_statistics_that_are_written_outside_of_a_pass(write: Callable[[Any], object]) -> None:
    twin = reference()
    model = copy.deepcopy(twin)
    with streamer_of(model):
        for each in (twin, model):
            write(each.blocks[1].gain)
        assert same(model(inputs()), twin(inputs()))
    assert same(list(model.state_dict().values()), list(twin.state_dict().values()))
