"""The field's known bugs, by their number where they have one: none of them is ours."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pipelines import PIPELINES
from safetensors.torch import load_file, save_model
from schemes import LAYOUTS
from torch import nn

import lowbits
from lowbits import errors
from lowbits.core.packed import PackedLayer, dequantized, stored_bytes
from lowbits.core.registry import DEFAULT
from lowbits.testing.layers import model_for, packed_model, same_codes, stored, tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def schemes_of(backend: str) -> list[str]:
    return [s.name for s in lowbits.backend(backend).schemes() if s.can_quantize]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds, however deep; modules below it aside."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from tensors_in(vars(value))


@pytest.mark.parametrize("scheme", LAYOUTS)
def test_bitsandbytes_1527_a_move_leaves_no_tensor_behind(scheme: str) -> None:
    """``quant_state.code`` stayed on the old device after ``.to()``."""
    model, _ = packed_model(scheme)
    model.to("meta")
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    for layer in layers:
        layouts = vars(layer).copy()
        layouts["lowbits_layouts"] = {
            name: vars(layout) | {"backend": None} for name, layout in layer.lowbits_layouts.items()
        }
        assert all(tensor.is_meta for tensor in tensors_in(layouts))
        assert all(dequantized(layer, name).is_meta for name in layer.lowbits_layouts)


@pytest.mark.parametrize("scheme", LAYOUTS)
def test_bitsandbytes_937_and_1664_a_move_does_not_quantize_again(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moves between CPU and GPU quantized what was quantized; tests/gpu does the real move."""
    model, _ = packed_model(scheme)
    codes, expected = stored(model), model(tokens())
    backend, _ = DEFAULT.require(scheme)
    monkeypatch.delattr(type(backend), "pack")
    state = copy.deepcopy(model.state_dict())
    model.to("cpu").cpu().to("cpu", torch.float32)
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    assert same_codes(model, codes)
    assert torch.equal(model(tokens()), expected)


@pytest.mark.parametrize("scheme", LAYOUTS)
def test_bitsandbytes_1946_strict_loads_load_and_others_are_never_silently_wrong(
    scheme: str,
) -> None:
    """``Linear4bit`` has no ``_load_from_state_dict``: strict raised, non-strict loaded nothing."""
    model, _ = packed_model(scheme)
    twin, _ = packed_model(scheme, seed=1)
    before = stored(twin)
    with pytest.raises(RuntimeError, match="full-precision weight"):
        twin.load_state_dict(model_for(scheme).state_dict(), strict=False)
    other, _ = packed_model("bnb-fp4" if scheme != "bnb-fp4" else "bnb-nf4")
    with pytest.raises(RuntimeError, match="the state dict holds"):
        twin.load_state_dict(other.state_dict(), strict=False)
    assert same_codes(twin, before)
    assert twin.load_state_dict(model.state_dict()) == ([], [])
    assert same_codes(twin, stored(model))
    with pytest.raises(RuntimeError, match="Missing key.*blocks.0.weight"):
        model_for(scheme).load_state_dict(model.state_dict())


@pytest.mark.parametrize("scheme", schemes_of("quanto"))
def test_quanto_358_deepcopy(scheme: str) -> None:
    """``copy.deepcopy`` of a quanto model raises."""
    model, _ = packed_model(scheme)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()), model(tokens()))
    assert twin.blocks[0].weight_qdata is not model.blocks[0].weight_qdata


@pytest.mark.parametrize("scheme", ["quanto-int8", "bnb-nf4", "torchao-int8", "gguf-q8_0"])
@pytest.mark.parametrize("is_safe", [True, False], ids=["safe", "in place"])
def test_quanto_a_fused_lora_is_not_lost(scheme: str, is_safe: bool) -> None:  # noqa: FBT001
    """diffusers' ``fuse_lora`` merges into a dequantized copy of quanto's weights."""
    layers = PIPELINES["flux"].build().transformer
    lowbits.quantize(layers, scheme)
    layers.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    codes = stored(layers)
    layers.fuse_lora(safe_fusing=is_safe)
    assert not same_codes(layers, codes)
    layers.unfuse_lora()
    assert same_codes(layers, codes)


@pytest.mark.parametrize("scheme", schemes_of("torchao"))
def test_torchao_pickle_and_save(scheme: str, tmp_path: Path) -> None:
    """Pickle fails on a ``functools.partial``, safetensors on "invalid python storage"."""
    model, _ = packed_model(scheme)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(tokens()), model(tokens()))
    save_model(model, str(tmp_path / "model.safetensors"))
    saved = load_file(tmp_path / "model.safetensors")
    codes = model.blocks[0].get_parameter("weight_qdata")
    assert torch.equal(saved["blocks.0.weight_qdata"], codes)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert same_codes(twin, stored(model))
    twin.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))


@pytest.mark.parametrize("scheme", [*schemes_of("float8"), "torchao-float8", "quanto-float8"])
def test_diffusers_layerwise_casting_a_cast_does_not_inflate_float8(scheme: str) -> None:
    """``.to(dtype)`` makes float32 of plain float8 weights: four times the bytes, silently."""
    model, _ = packed_model(scheme)
    layer: Any = model.blocks[0]
    size, codes = stored_bytes(layer), stored(model)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model.to(dtype)
        assert stored_bytes(layer) == size
    assert same_codes(model, codes)


@pytest.mark.parametrize("name", ["transformer", "text_encoder_2"])
def test_saved_in_place_and_reloaded_as_noise(name: str, tmp_path: Path) -> None:
    """Models that bitsandbytes or quanto changed in place save, and reload as NaN without error."""
    pipe: Any = PIPELINES["flux"].build()
    model = getattr(pipe, name)
    handle = lowbits.quantize(pipe, "bnb-nf4")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(errors.PatchError, match="reads as random weights.*lowbits.save"):
            copied.save_pretrained(tmp_path / "copied")
    pipe.save_pretrained(tmp_path / "pipe")
    for folder in (tmp_path / "pipe" / name, tmp_path / "packed"):
        model.save_pretrained(folder)
        with pytest.raises(OSError, match="no file named"):
            type(model).from_pretrained(folder)
        twin = copy.deepcopy(model)
        lowbits.dequantize(twin)
        decoded = twin.state_dict()
        lowbits.load(folder, into=twin)
        assert same_codes(twin, stored(model))
        lowbits.dequantize(twin)
        assert all(torch.equal(twin.state_dict()[key], value) for key, value in decoded.items())
    handle.restore()
    for ordinary in (twin, model):
        ordinary.save_pretrained(tmp_path / "ordinary")
        again = type(model).from_pretrained(tmp_path / "ordinary")
        for key, value in ordinary.state_dict().items():
            assert torch.equal(again.state_dict()[key], value)


def test_a_model_that_its_handle_let_go_is_not_saved_as_noise_either(tmp_path: Path) -> None:
    model = PIPELINES["flux"].build().transformer
    lowbits.quantize(model, "bnb-nf4").release()
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(OSError, match="no file named"):
        type(model).from_pretrained(tmp_path / "packed")
    codes = stored(model)
    lowbits.dequantize(model)
    model.save_pretrained(tmp_path)
    lowbits.load(tmp_path / "packed", into=model)
    assert same_codes(model, codes)


def test_a_model_inside_of_another_module_is_not_saved_as_noise_either(tmp_path: Path) -> None:
    wrapper = nn.ModuleDict({"inner": PIPELINES["flux"].build().transformer})
    handle = lowbits.quantize(wrapper, "bnb-nf4")
    inner: Any = wrapper["inner"]
    inner.save_pretrained(tmp_path / "packed")
    with pytest.raises(OSError, match="no file named"):
        type(inner).from_pretrained(tmp_path / "packed")
    codes = stored(inner)
    handle.restore()
    inner.save_pretrained(tmp_path)
    again = type(inner).from_pretrained(tmp_path)
    lowbits.load(tmp_path / "packed", into=again)
    assert same_codes(again, codes)


def test_adapters_of_a_packed_model_are_saved(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"]))
    lowbits.quantize(model, "torchao-int8")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
