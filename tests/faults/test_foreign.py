"""accelerate, diffusers and peft on packed modules, and several handles in one pipeline."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import lowbits
from lowbits.core.packed import PackedLayer

SCHEME = "float8-e4m3fn"
CPU = torch.device("cpu")


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))


def pack(target: Any, **options: Any) -> lowbits.Handle:
    return lowbits.quantize(target, SCHEME, **{"keep_source": "memory", **options})


def is_packed(module: nn.Module) -> bool:
    return any(isinstance(part, PackedLayer) for part in module.modules())


@pytest.fixture(scope="module")
def _flux() -> Any:
    pipelines: Any = importlib.import_module("pipelines")
    return pipelines.PIPELINES["flux"].build()


@pytest.fixture
def flux(_flux: Any) -> Any:
    yield _flux
    for part in _flux.components.values():
        if isinstance(part, nn.Module):
            while is_packed(part):
                lowbits.restore(part)


def flux_inputs() -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(1, 16, 64),
        "encoder_hidden_states": torch.randn(1, 8, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


CAPTURED = (
    "a hook that wraps module.forward (accelerate, diffusers) while packed keeps PackedLinear's "
    "bound method; after restore() it is called on an nn.Linear, which has no lowbits_layouts"
)


def test_a_forward_wrapped_while_packed_works_after_restore() -> None:
    target = model()
    x = torch.ones(1, 64)
    expected = target(x)
    handle = pack(target)
    target[0].forward = functools.partial(target[0].forward)
    handle.restore()
    assert torch.equal(target(x), expected)


def test_an_accelerate_hook_added_while_packed_works_after_restore() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    target = model()
    x = torch.ones(1, 64)
    expected = target(x)
    handle = pack(target)
    hooks.add_hook_to_module(target[0], hooks.ModelHook())
    handle.restore()
    assert torch.equal(target(x), expected)


def test_group_offloading_enabled_while_packed_works_after_restore(flux: Any) -> None:
    transformer = copy.deepcopy(flux.transformer)
    inputs = flux_inputs()
    with torch.no_grad():
        expected = transformer(**inputs)[0]
        handle = pack(transformer)
        transformer.enable_group_offload(
            onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
        )
        transformer(**inputs)
        handle.restore()
        assert torch.equal(transformer(**inputs)[0], expected)


@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerate_hooks_do_not_change_a_packed_result(order: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    target = model()
    x = torch.ones(1, 64)
    if order == "before":
        hooks.add_hook_to_module(target[0], hooks.ModelHook())
    handle = pack(target)
    if order == "after":
        hooks.add_hook_to_module(target[0], hooks.ModelHook())
    twin = copy.deepcopy(target)
    lowbits.dequantize(twin)
    if order == "after":
        hooks.remove_hook_from_module(target[0])
    else:
        assert torch.allclose(target(x), twin(x), atol=1e-5)
        handle.restore()
        assert target(x).shape == (1, 64)


def test_projections_fused_while_packed_are_not_used_after_restore(flux: Any) -> None:
    transformer = copy.deepcopy(flux.transformer)
    inputs = flux_inputs()
    with torch.no_grad():
        expected = transformer(**inputs)[0]
        handle = pack(transformer)
        try:
            transformer.fuse_qkv_projections()
            handle.restore()
        except lowbits.errors.LowbitsError:
            return
        assert torch.allclose(transformer(**inputs)[0], expected, atol=1e-4)


def test_projections_are_fused_before_packing_or_after_restore_and_not_between(flux: Any) -> None:
    transformer = copy.deepcopy(flux.transformer)
    inputs = flux_inputs()
    with torch.no_grad():
        expected = transformer(**inputs)[0]
        handle = pack(transformer)
        packed = transformer(**inputs)[0]
        attention = transformer.transformer_blocks[0].attn
        for module, name in [
            (transformer, "fuse_qkv_projections"),
            (attention, "fuse_projections"),
            (copy.deepcopy(transformer), "fuse_qkv_projections"),
        ]:
            with pytest.raises(lowbits.errors.PatchError, match="Fuse before lowbits.apply"):
                getattr(module, name)()
        assert torch.equal(transformer(**inputs)[0], packed)
        assert not attention.fused_projections
        handle.restore()
        assert torch.equal(transformer(**inputs)[0], expected)
        assert "fuse_projections" not in vars(attention)
        transformer.fuse_qkv_projections()
        fused = transformer(**inputs)[0]
        handle = pack(transformer)
        assert isinstance(attention.to_qkv, PackedLayer)
        assert not torch.equal(transformer(**inputs)[0], fused)
        handle.restore()
        assert torch.equal(transformer(**inputs)[0], fused)


def two_handles(pipe: Any) -> dict[str, lowbits.Handle]:
    names = ("transformer", "text_encoder_2")
    return {name: pack(pipe, components=[name]) for name in names}


def test_each_of_two_handles_switches_its_own_component(flux: Any) -> None:
    handles = two_handles(flux)
    for name, handle in handles.items():
        (other,) = handles.keys() - {name}
        new = handle.switch("gguf-q8_0")
        assert list(new.components) == [name]
        assert handles[other].is_active
        new.restore()
        handles[name] = pack(flux, components=[name])


def test_restore_of_a_pipeline_restores_all_of_it(flux: Any) -> None:
    two_handles(flux)
    lowbits.restore(flux)
    assert not is_packed(flux.transformer)
    assert not is_packed(flux.text_encoder_2)


def test_a_component_that_a_rule_reaches_has_the_handle(flux: Any) -> None:
    handle = pack(flux, components=["transformer"], rules={"vae.*": SCHEME})
    try:
        assert is_packed(flux.vae)
        assert lowbits.handle(flux.vae) is handle
    finally:
        handle.restore()


def test_switch_keeps_the_components_of_a_pipeline_config(flux: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    config = diffusers.PipelineQuantizationConfig(
        quant_mapping={
            "text_encoder_2": transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4"
            )
        }
    )
    handle = lowbits.quantize(flux, config, keep_source="memory")
    new = handle.switch(SCHEME)
    assert list(new.components) == ["text_encoder_2"]


def test_a_component_that_is_dropped_from_the_pipeline_is_freed() -> None:
    pipelines: Any = importlib.import_module("pipelines")
    pipe = pipelines.PIPELINES["flux"].build()
    pack(pipe)
    encoder = weakref.ref(pipe.text_encoder_2)
    pipe.text_encoder_2 = None
    gc.collect()
    assert encoder() is None


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 64)
        self.up = nn.Linear(64, 96)
        self.conv = nn.Conv1d(96, 64, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(self.up(self.table(tokens)).transpose(-1, -2))
        return y


def lora(target: nn.Module, names: tuple[str, ...] = ("table", "up"), **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=list(names), init_lora_weights=False, **options)
    return peft.get_peft_model(target, config)


def factors(target: nn.Module) -> list[str]:
    return [name for name, _ in target.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_lora_acts_and_is_never_packed(order: str, options: dict[str, Any]) -> None:
    target: Any = Small()
    tokens = torch.arange(4).view(1, 4)
    if order == "before":
        target = lora(target, **options)
    handle = pack(target, rules={"*": SCHEME})
    if order == "after":
        target = lora(target, **options)
    assert len(factors(target)) >= 4
    for name, module in target.named_modules():
        assert not ("lora_" in name and isinstance(module, PackedLayer))
    twin = copy.deepcopy(target)
    lowbits.dequantize(twin)
    with torch.no_grad():
        got, base = target(tokens), None
        assert torch.allclose(got, twin(tokens), atol=1e-4)
        with target.disable_adapter():
            base = target(tokens)
        assert not torch.allclose(got, base, atol=1e-3)
    handle.restore()
    assert not is_packed(target)
    assert target(tokens).shape == got.shape


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_lora_on_a_convolution(order: str) -> None:
    target: Any = Small()
    if order == "before":
        target = lora(target, ("conv",))
    pack(target, rules={"*": SCHEME})
    if order == "after":
        target = lora(target, ("conv",))
    assert not any(
        "lora_" in name and isinstance(module, PackedLayer)
        for name, module in target.named_modules()
    )
    tokens = torch.arange(4).view(1, 4)
    with torch.no_grad(), target.disable_adapter():
        base = target(tokens)
    assert not torch.allclose(target(tokens), base, atol=1e-3)


def test_a_lora_on_packed_layers_gets_the_gradients_of_dequantized_ones() -> None:
    target: Any = Small()
    pack(target, rules={"*": SCHEME})
    target = lora(target)
    twin = copy.deepcopy(target)
    lowbits.dequantize(twin)
    tokens = torch.arange(4).view(1, 4)
    for each in (target, twin):
        each(tokens).square().sum().backward()
    for name, parameter in target.named_parameters():
        if "lora_" in name:
            other = twin.get_parameter(name)
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_safe", [True, False])
def test_merging_a_lora_into_weights_without_a_source_is_refused(is_safe: bool) -> None:  # noqa: FBT001
    target: Any = Small()
    pack(target, rules={"*": SCHEME}, keep_source="none")
    target = lora(target)
    tokens = torch.arange(4).view(1, 4)
    expected = target(tokens)
    with pytest.raises(lowbits.errors.SourceUnavailableError, match="lora='fp16'"):
        target.merge_adapter(safe_merge=is_safe)
    assert torch.equal(target(tokens), expected)
