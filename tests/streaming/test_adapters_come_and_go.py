"""Adapters that come, are merged and go while their model is streamed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from streaming.models import WIDE, WIDTH, frozen, inputs, same, stage_of, streamer_of
from torch import nn

CONFIGS = [
    LoraConfig(target_modules=["linear"], init_lora_weights=False),
    LoHaConfig(target_modules=["linear"], init_weights=False),
]


@pytest.mark.parametrize("budget", [10**5, 10**6])
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_merged_adapters_that_came_while_streamed_are_switched_off(
    config: Any, budget: int
) -> None:
    blocks = (nn.Sequential(OrderedDict(linear=nn.Linear(WIDTH, WIDTH))) for _ in range(5))
    twin = nn.Sequential(*blocks).eval()
    model = copy.deepcopy(twin)
    with streamer_of(model, budget=budget):
        assert same(model(inputs()), twin(inputs()))
        layers: list[Any] = []
        for each in (twin, model):
            torch.manual_seed(5)
            inject_adapter_in_model(config, each).eval()
            layers += [m for m in each.modules() if hasattr(m, "merge")]
        assert same(model(inputs()), twin(inputs()))
        for layer in layers:
            layer.merge()
        assert same(model(inputs()), twin(inputs()))
        for layer in layers:
            layer.enable_adapters(enabled=False)
        for _ in range(3):
            assert same(model(inputs()), twin(inputs()))
    assert same(list(model.state_dict().values()), list(twin.state_dict().values()))


def test_factors_from_before_do_not_count_any_more_when_they_are_unloaded() -> None:
    model = frozen()
    config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    peft: Any = get_peft_model(model, config)
    with streamer_of(model, budget=10**6) as streamer:
        model(inputs(WIDE))
        component = streamer._engine.component  # type: ignore[union-attr]
        assert component.loose_bytes
        peft.unload()
        model(inputs(WIDE))
        assert component.loose_bytes == 0
        assert stage_of(streamer).plan.fixed_bytes == component.base.unit.nbytes  # type: ignore[union-attr]


def test_factors_from_before_are_let_go_when_they_are_unloaded() -> None:
    model = frozen()
    config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    peft: Any = get_peft_model(model, config)
    gone = [weakref.ref(p) for name, p in model.named_parameters() if "lora_" in name]
    with streamer_of(model, budget=10**6):
        model(inputs(WIDE))
        peft.unload()
        del peft
        model(inputs(WIDE))
        gc.collect()
        assert not [reference for reference in gone if reference() is not None]
