"""peft's wrappers around packed layers of each kind that it knows."""

from __future__ import annotations

import copy
from statistics import fmean
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from schemes import every_scheme

import lowbits
from lowbits.core.packed import PackedLayer
from lowbits.core.registry import DEFAULT
from lowbits.testing.layers import (
    Model,
    close,
    model_for,
    packed_model,
    same_codes,
    stored,
    tokens,
)

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


@pytest.mark.parametrize("scheme_name", every_scheme())
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_a_lora_is_merged_and_taken_out(kind: str, scheme_name: str) -> None:
    packed, handle = packed_model(scheme_name)
    codes = stored(packed)
    target = NAMES[kind]
    touched = packed.get_submodule(target)
    if not isinstance(touched, PackedLayer):
        pytest.skip(f"{scheme_name} holds no {kind} of this size")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    model: Any = get_peft_model(packed, config)
    wrapper: Any = packed.get_submodule(target)
    with torch.no_grad():
        beside, plain = model(tokens()), packed_model(scheme_name)[0](tokens())
        lowbits.merge_lora(packed)
        assert changed(packed, codes, target) == {target}
        assert wrapper.merged_adapters == ["default"]
        merged = model(tokens())
        strength = share_of(merged - plain, beside - plain)
        # What one sign per weight keeps of one small LoRA varies by a sixth: take eight.
        is_sign = DEFAULT.require(scheme_name)[1].code_bits == 1
        more = [merged_strength(scheme_name, target, seed) for seed in range(2, 9) if is_sign]
        assert 0.6 < fmean([strength, *more]) < 1.4
        wrapper.set_scale("default", 0.5)
        between = model(tokens())
        lowbits.merge_lora(packed)
        assert not torch.equal(model(tokens()), merged)
        assert close_to(model(tokens()), between, (merged - beside).norm())
        lowbits.unmerge_lora(packed)
        assert changed(packed, codes, target) == set()
        wrapper.set_scale("default", 1.0)
        assert torch.equal(model(tokens()), beside)
        model.merge_and_unload()
        assert torch.equal(packed(tokens()), merged)
        assert same_classes(packed, touched, target)
    handle.restore()
    assert torch.equal(packed(tokens()), model_for(scheme_name)(tokens()))


def share_of(found: torch.Tensor, meant: torch.Tensor) -> float:
    return float((found * meant).sum() / meant.square().sum())


def merged_strength(scheme_name: str, target: str, seed: int) -> float:
    packed, _ = packed_model(scheme_name)
    plain = packed(tokens())
    torch.manual_seed(seed)
    get_peft_model(packed, LoraConfig(r=4, target_modules=[target], init_lora_weights=False))
    beside = packed(tokens())
    lowbits.merge_lora(packed)
    return share_of(packed(tokens()) - plain, beside - plain)


def changed(model: Model, codes: dict[str, torch.Tensor], wrapped: str) -> set[str]:
    """Return the layers that store other bits than they did, by their own names."""
    now = {name.replace(f"{wrapped}.base_layer", wrapped): p for name, p in stored(model).items()}
    assert now.keys() == codes.keys()
    return {name.rpartition(".")[0] for name, p in now.items() if not torch.equal(p, codes[name])}


def close_to(got: torch.Tensor, expected: torch.Tensor, distance: torch.Tensor) -> bool:
    """Say whether outputs differ by no more than merging makes them differ."""
    return float((got - expected).norm()) <= 2 * float(distance) + 1e-4 * float(expected.norm())


def same_classes(model: Model, layer: torch.nn.Module, name: str) -> bool:
    return model.get_submodule(name) is layer and isinstance(layer, PackedLayer)
