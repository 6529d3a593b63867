"""Modules that are given another class while they are streamed, as those who merge tokens do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from streaming.models import Block, Snapshot, Stack, inputs, same, streamer_of

ROOMY: dict[str, Any] = {"budget": 10**6}


def patch(model: Stack) -> None:
    """Give each block a class of others, in front of the one that it has."""
    for block in model.blocks:
        cls = type(block)

        def forward(self: Any, x: torch.Tensor, cls: Any = cls) -> Any:
            return cls.forward(self, x) + 1

        block.__class__ = type("Patched", (cls,), {"forward": forward, "own": cls})


def unpatch(model: Stack) -> None:
    for block in model.blocks:
        block.__class__ = type(block).own


def results() -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the model computes, and what with the other class."""
    model = make()
    plain = model(inputs())
    patch(model)
    return plain, model(inputs())


def make() -> Stack:
    torch.manual_seed(0)
    return Stack(4).eval()


@torch.no_grad()
def test_a_class_that_is_taken_away_again() -> None:
    (plain, patched), model = results(), make()
    before = Snapshot(model)
    with streamer_of(model, **ROOMY):
        patch(model)
        assert same(model(inputs()), patched)
        unpatch(model)
        assert same(model(inputs()), plain)
    before.require()


@torch.no_grad()
def test_a_class_that_stays_when_streaming_ends() -> None:
    (plain, patched), model = results(), make()
    with streamer_of(model, **ROOMY):
        patch(model)
        assert same(model(inputs()), patched)
    for _ in range(2):
        assert same(model(inputs()), patched)
        assert same(copy.deepcopy(model)(inputs()), patched)
        with streamer_of(model, **ROOMY) as streamer:
            assert same(model(inputs()), patched)
            assert streamer.stats().copied_bytes
    unpatch(model)
    assert same(model(inputs()), plain)
    assert isinstance(model.blocks[0], Block)
    assert same(pickle.loads(pickle.dumps(model))(inputs()), plain)
    with streamer_of(model, **ROOMY):
        assert same(model(inputs()), plain)
    assert type(model.blocks[0]) is Block
    assert same(model(inputs()), plain)


@torch.no_grad()
def test_a_class_from_before_that_is_taken_away_while_streaming() -> None:
    (plain, patched), model = results(), make()
    before = Snapshot(model)
    patch(model)
    with streamer_of(model, **ROOMY):
        assert same(model(inputs()), patched)
        unpatch(model)
        assert same(model(inputs()), plain)
    before.require()
    assert same(model(inputs()), plain)
