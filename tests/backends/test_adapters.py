"""peft's wrappers around packed layers of each kind that it knows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from schemes import every_scheme

import lowbits
from lowbits.core.packed import PackedLayer
from lowbits.core.registry import DEFAULT
from lowbits.testing.layers import Model, close, packed_model, same_codes, stored, tokens

#: Layers of `Model` by kind.
NAMES = {"Linear": "blocks.0", "Conv2d": "conv2", "Embedding": "table"}


@pytest.mark.parametrize("scheme_name", every_scheme())
@pytest.mark.parametrize("kind", NAMES)
def test_a_lora_wraps_a_packed_layer_and_trains(kind: str, scheme_name: str) -> None:
    _, scheme = DEFAULT.require(scheme_name)
    packed, _ = packed_model(scheme_name)
    codes = stored(packed)
    config = LoraConfig(r=4, target_modules=[NAMES[kind]], init_lora_weights=False)
    model: Any = get_peft_model(packed, config)
    twin = copy.deepcopy(model)
    lowbits.dequantize(twin)
    for each in (model, twin):
        each(tokens()).square().mean().backward()
    factors = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(factors) == 2
    for name in factors:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert close(gradient, twin.get_parameter(name).grad, scheme), name
    with torch.no_grad():
        assert close(model(tokens()), twin(tokens()), scheme)
        with model.disable_adapter():
            assert torch.equal(model(tokens()), packed_model(scheme_name)[0](tokens()))
    base = model.get_submodule(f"base_model.model.{NAMES[kind]}.base_layer")
    assert isinstance(base, PackedLayer) or kind not in scheme.kinds or kind == "Conv2d"
    assert codes.keys() != stored(model).keys(), "peft renames the layer that it wraps"
    model.unload()
    assert same_codes(packed, codes)
    assert type(packed) is Model
