"""What the caller did between packing and restoring."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbits
from lowbits import errors
from lowbits.core.packed import PackedLayer

if TYPE_CHECKING:
    from pathlib import Path

SCHEME = "float8-e4m3fn"


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))


def pack(target: nn.Module, **options: Any) -> lowbits.Handle:
    return lowbits.quantize(target, SCHEME, **{"keep_source": "memory", **options})


def test_restore_after_dequantizing_one_layer_gives_the_original_or_raises() -> None:
    target = model()
    original = target[0].weight.detach().clone()
    handle = pack(target)
    lowbits.dequantize(target[0])
    try:
        handle.restore()
    except errors.LowbitsError:
        return
    assert torch.equal(target[0].weight, original)


def test_dequantize_releases_the_handles_of_submodules() -> None:
    target = model()
    handle = pack(target[0])
    lowbits.dequantize(target)
    assert not handle.is_active


def test_restore_after_loading_another_state_dict_does_not_mix_checkpoints() -> None:
    target, other = model(0), model(1)
    handle = pack(target)
    pack(other)
    target.load_state_dict(other.state_dict())
    bias = target[0].bias.clone()
    lowbits.restore(other)
    try:
        handle.restore()
    except errors.LowbitsError:
        return
    is_new_bias = torch.equal(target[0].bias, bias)
    is_new_weight = torch.equal(target[0].weight, other[0].weight)
    assert is_new_bias == is_new_weight


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_restore_of_a_layer_that_was_parametrized_meanwhile_is_refused() -> None:
    layer = nn.Linear(64, 96)
    weight = layer.weight
    handle = pack(layer)
    nn.utils.parametrize.register_parametrization(layer, "bias", Double())
    with pytest.raises(errors.PatchError, match=r"became a .*; undo that first|became a "):
        handle.restore()
    assert layer(torch.zeros(1, 64)).abs().max() > 0
    nn.utils.parametrize.remove_parametrizations(layer, "bias")
    handle.restore()
    assert layer.weight is weight


def test_a_bias_that_was_parametrized_before_stays_so() -> None:
    layer = nn.Linear(64, 96)
    nn.utils.parametrize.register_parametrization(layer, "bias", Double())
    expected, cls = layer(torch.ones(1, 64)), type(layer)
    handle = pack(layer)
    packed = layer(torch.zeros(1, 64))
    handle.restore()
    assert type(layer) is cls
    assert torch.equal(layer(torch.ones(1, 64)), expected)
    assert torch.allclose(packed[0], layer.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_restore_follows_a_cast_and_keeps_ties(dtype: torch.dtype) -> None:
    target: Any = nn.ModuleDict(
        {"table": nn.Embedding(8, 64), "head": nn.Linear(64, 8, bias=False)}
    )
    target["head"].weight = target["table"].weight
    parameter = target["table"].weight
    expected = parameter.detach().to(dtype)
    handle = pack(target, rules={"*": SCHEME})
    target.to(dtype)
    handle.restore()
    assert target["head"].weight is parameter
    assert target["table"].weight is parameter
    assert torch.equal(parameter, expected)


def test_a_cast_there_and_back_loses_no_bit() -> None:
    target = model()
    expected = target[0].weight.detach().clone()
    handle = pack(target)
    target.half().float()
    handle.restore()
    assert torch.equal(target[0].weight, expected)


def test_parameters_cast_one_by_one_are_refused_and_can_be_restored() -> None:
    target = model()
    expected = target[0].weight.detach().clone()
    handle = pack(target)
    for parameter in target.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(errors.FormatError, match="cast to"):
        target(torch.ones(1, 64))
    target.float()
    handle.restore()
    assert torch.equal(target[0].weight, expected.bfloat16().float()) or torch.equal(
        target[0].weight, expected
    )


def test_a_cast_of_floating_parameters_only_is_harmless() -> None:
    target = model()
    pack(target)
    expected = target[0].weight.float().clone()
    for parameter in target.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float16)
    assert target[0].weight.dtype == torch.float16
    assert torch.allclose(target[0].weight.float(), expected, rtol=1e-3)


def test_none_changes_nothing_where_it_cannot_restore() -> None:
    target = model()
    handle = pack(target, keep_source="none")
    expected = target(torch.ones(1, 64))
    with pytest.raises(errors.SourceUnavailableError, match="keep_source='none'"):
        handle.restore()
    with pytest.raises(errors.SourceUnavailableError):
        handle.switch("gguf-q8_0")
    assert torch.equal(target(torch.ones(1, 64)), expected)
    assert handle.is_active


def test_none_lets_the_originals_go_at_once() -> None:
    target = model()
    original = weakref.ref(target[0].weight)
    pack(target, keep_source="none")
    assert original() is None


def test_originals_die_with_the_model() -> None:
    target = model()
    original = weakref.ref(target[0].weight)
    pack(target)
    del target
    gc.collect()
    assert original() is None


def test_packed_weights_die_with_the_restore_though_the_handle_lives() -> None:
    target = model()
    handle = pack(target)
    codes = weakref.ref(target[0].get_parameter("weight_qdata"))
    handle.restore()
    gc.collect()
    assert codes() is None


def test_deepcopy_lives_on_when_the_original_is_restored() -> None:
    target = model()
    x = torch.ones(1, 64)
    handle = pack(target)
    expected = target(x)
    twin = copy.deepcopy(target)
    handle.restore()
    assert torch.equal(twin(x), expected)
    with pytest.raises(errors.NotPatchedError, match="copy"):
        lowbits.restore(twin)
    lowbits.dequantize(twin)
    assert torch.allclose(twin(x), expected, atol=1e-5)
    assert type(twin[0]) is nn.Linear


def test_a_pickle_runs_in_another_process(tmp_path: Path) -> None:
    target = model()
    pack(target)
    x = torch.linspace(-1, 1, 64).view(1, 64)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((target, x)))
    script = (
        "import pickle, sys, torch; torch.set_num_threads(1)\n"
        "model, x = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(model(x).double().sum().item().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pickle")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == target(x).double().sum().item().hex()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_of_a_state_dict_keep_the_versions_of_modules(copier: Any) -> None:
    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state: Any, prefix: str, meta: Any, *args: Any) -> None:
            if meta.get("version") != 2:
                state[prefix + "bias"] = state[prefix + "bias"] * 10
            super()._load_from_state_dict(state, prefix, meta, *args)

    target: Any = nn.Sequential(Versioned(64, 96))
    bias = target[0].bias.detach().clone()
    pack(target)
    target.load_state_dict(copier(target.state_dict()))
    assert torch.equal(target[0].bias, bias)


def test_a_layer_with_extra_state_of_its_own_is_left_alone() -> None:
    class Tempered(nn.Linear):
        temperature = 1.0

        def get_extra_state(self) -> torch.Tensor:
            return torch.tensor(self.temperature)

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.temperature = float(state)

    layer = Tempered(64, 96)
    with pytest.raises(errors.NoCapableBackendError, match="has extra state of its own"):
        pack(layer)
    assert type(layer) is Tempered


def test_another_schemes_state_dict_is_refused() -> None:
    target, other = model(), model(1)
    lowbits.quantize(target, "bnb-nf4")
    lowbits.quantize(other, "bnb-fp4")
    expected = target[0].weight.clone()
    with pytest.raises(RuntimeError, match="bnb-fp4"):
        target.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(target[0].weight, expected)


def test_a_state_dict_of_converted_codes_is_refused() -> None:
    target = model()
    lowbits.quantize(target, "bnb-nf4")
    state = target.state_dict()
    broken = {k: v.half() if "scale" in k else v for k, v in state.items()}
    with pytest.raises(RuntimeError, match="never converted"):
        target.load_state_dict(broken)


def test_a_state_dict_goes_through_safetensors(tmp_path: Path) -> None:
    target, other = model(), model(1)
    pack(target)
    pack(other)
    save_file(target.state_dict(), tmp_path / "packed.safetensors")
    other.load_state_dict(load_file(tmp_path / "packed.safetensors"))
    assert torch.equal(other(torch.ones(1, 64)), target(torch.ones(1, 64)))


@pytest.mark.parametrize("assign", [True, False])
def test_a_meta_skeleton_takes_a_packed_state_dict(assign: bool) -> None:  # noqa: FBT001
    target, other = model(), model(1)
    pack(target)
    pack(other)
    if assign:
        other.to("meta")
    other.load_state_dict(target.state_dict(), assign=assign)
    assert torch.equal(other(torch.ones(1, 64)), target(torch.ones(1, 64)))


def test_a_parent_may_take_and_load_the_state_dict() -> None:
    parent: Any = nn.ModuleDict({"part": model()})
    parent.register_state_dict_post_hook(lambda *_: None)
    pack(parent["part"])
    state = parent.state_dict()
    assert "part.0.weight" not in state
    parent.load_state_dict(state)


def test_restore_leaves_the_order_of_the_state_dict() -> None:
    target = model()
    keys = list(target.state_dict())
    handle = pack(target)
    target[0].register_parameter("extra", nn.Parameter(torch.zeros(1)))
    handle.restore()
    assert [key for key in target.state_dict() if key != "0.extra"] == keys
    assert "0.extra" in target.state_dict()


def test_a_context_manager_restores_and_can_be_used_once() -> None:
    target = model()
    with pack(target) as handle:
        assert issubclass(type(target[0]), PackedLayer)
    assert not issubclass(type(target[0]), PackedLayer)
    with pytest.raises(errors.NotPatchedError):
        handle.restore()
    with pytest.raises(errors.NotPatchedError):
        handle.switch(SCHEME)


def test_requires_grad_and_gradients_come_back() -> None:
    target = model()
    target(torch.ones(1, 64)).sum().backward()
    target[2].weight.requires_grad_(False)
    gradient = target[0].weight.grad
    pack(target).restore()
    assert target[0].weight.grad is gradient
    assert [p.requires_grad for p in target.parameters()] == [True, True, False, True]


def test_restore_while_offloaded_to_meta_is_a_typed_error() -> None:
    target = model()
    handle = pack(target)
    target.to("meta")
    with pytest.raises(errors.LowbitsError):
        handle.restore()


def test_restore_while_on_meta_loses_no_original() -> None:
    target = model()
    original = target[0].weight
    expected = original.detach().clone()
    handle = pack(target)
    target.to("meta")
    with pytest.raises(RuntimeError):
        handle.restore()
    assert torch.equal(original, expected)


def test_restore_under_inference_mode_gives_trainable_weights() -> None:
    target = model()
    with torch.inference_mode():
        handle = pack(target)
    target(torch.ones(1, 64, requires_grad=True)).sum().backward()
    with torch.inference_mode():
        handle.restore()
    target(torch.ones(1, 64)).sum().backward()
    assert target[0].weight.grad is not None


def test_restore_from_a_file_under_inference_mode_gives_trainable_weights(tmp_path: Path) -> None:
    target = model()
    save_file(target.state_dict(), tmp_path / "model.safetensors")
    handle = pack(target, keep_source="file", source=tmp_path)
    with torch.inference_mode():
        handle.restore()
    target(torch.ones(1, 64, requires_grad=True)).sum().backward()
    assert target[0].weight.grad is not None


def test_dequantized_weights_can_be_trained_through_under_inference_mode() -> None:
    target = model()
    pack(target)
    with torch.inference_mode():
        lowbits.dequantize(target)
    x = torch.ones(1, 64, requires_grad=True)
    target(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("change", ["truncate", "delete", "rewrite", "folder"])
def test_a_file_that_changed_is_refused_and_nothing_changes(change: str, tmp_path: Path) -> None:
    target = model()
    path = tmp_path / "model.safetensors"
    save_file(target.state_dict(), path)
    handle = pack(target, keep_source="file", source=path)
    expected = target(torch.ones(1, 64))
    data = path.read_bytes()
    path.unlink()
    if change == "truncate":
        path.write_bytes(data[:-1])
    elif change == "rewrite":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif change == "folder":
        path.mkdir()
    with pytest.raises(errors.SourceUnavailableError):
        handle.restore()
    assert torch.equal(target(torch.ones(1, 64)), expected)
    assert handle.is_active
    if change == "folder":
        path.rmdir()
    path.write_bytes(data)
    handle.restore()
    assert all(
        torch.equal(load_file(path)[name], value) for name, value in target.state_dict().items()
    )


def test_a_fused_lora_is_not_undone_by_a_file(tmp_path: Path) -> None:
    target = model()
    save_file(target.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        target[0].weight[5, 5] += 1
    expected = target[0].weight.detach().clone()
    with pytest.raises(errors.SourceUnavailableError, match=r"1 weights .* 0 "):
        pack(target, keep_source="file", source=tmp_path)
    assert type(target[0]) is nn.Linear
    handle = pack(target, keep_source="auto", source=tmp_path)
    assert {row.fqn: row.source for row in handle.report().packed} == {"0": "memory", "2": "file"}
    handle.restore()
    assert torch.equal(target[0].weight, expected)


def test_negative_zero_and_nan_payloads_do_not_pass_for_equal(tmp_path: Path) -> None:
    layer = nn.Linear(64, 96, bias=False)
    with torch.no_grad():
        layer.weight[0, 0] = 0.0
    state = layer.state_dict()
    save_file({"weight": state["weight"].clone()}, tmp_path / "m.safetensors")
    with torch.no_grad():
        layer.weight[0, 0] = -0.0
    with pytest.raises(errors.SourceUnavailableError):
        pack(layer, keep_source="file", source=tmp_path)


def test_a_tie_that_the_file_holds_under_its_second_name_is_proven(tmp_path: Path) -> None:
    target: Any = nn.ModuleDict(
        {"table": nn.Embedding(8, 64), "head": nn.Linear(64, 8, bias=False)}
    )
    target["head"].weight = target["table"].weight
    save_file({"head.weight": target["table"].weight.detach()}, tmp_path / "m.safetensors")
    handle = pack(target, rules={"*": SCHEME}, keep_source="file", source=tmp_path)
    handle.restore()
    assert target["head"].weight is target["table"].weight


def test_a_layer_that_was_dequantized_alone_is_restored_too() -> None:
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    before = [layer.weight for layer in model]
    values = [weight.detach().clone() for weight in before]
    handle = lowbits.quantize(model, "bnb-nf4", rules={"*": "bnb-nf4"})
    lowbits.dequantize(model[0])
    handle.restore()
    for layer, weight, value in zip(model, before, values, strict=True):
        assert type(layer) is nn.Linear
        assert layer.weight is weight
        assert torch.equal(layer.weight, value)
