"""What is in the codes beside what peft says: at a copy, a save, an interrupt, a new factor."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from tiny_models import tiny
from torch import nn

import lowbits
from lowbits.core import surgery
from lowbits.core.packed import PackedLayer
from lowbits.errors import PatchError, SourceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: So fine that a LoRA that is there, or is not, is told apart at once.
SCHEME = "gguf-q8_0"
CLOSE = 0.03


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).eval()


def adapted(net: nn.Module) -> Any:
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    return get_peft_model(net, config).eval()


def packed(lora: str) -> tuple[Any, Any]:
    """Return a packed net, and peft's model around it."""
    net = plain()
    lowbits.quantize(net, SCHEME, lora=lora, rules={"*": SCHEME})
    return net, adapted(net)


@torch.no_grad()
def out(net: nn.Module) -> torch.Tensor:
    result: torch.Tensor = net(torch.randn(4, 256, generator=torch.Generator().manual_seed(1)))
    return result


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    return out(plain())


@pytest.fixture(scope="module")
def with_lora() -> torch.Tensor:
    net = plain()
    adapted(net)
    return out(net)


def saved(net: nn.Module, folder: Path) -> nn.Module:
    lowbits.save(net, folder / "net.safetensors")
    read = plain()
    lowbits.load(folder / "net.safetensors", into=read)
    return read


def dequantized(net: nn.Module, _: Path) -> nn.Module:
    lowbits.dequantize(net)
    return net


def copied(net: nn.Module, _: Path) -> nn.Module:
    return copy.deepcopy(net)


HOW = pytest.mark.parametrize("how", [copied, saved, dequantized])


@HOW
def test_what_was_merged_unasked_goes_as_it_is_unloaded(
    how: Callable[..., nn.Module], base: torch.Tensor, tmp_path: Path
) -> None:
    net, wrapped = packed("merge")
    out(net)
    net = wrapped.unload()
    assert error(out(how(net, tmp_path)), base) < CLOSE
    assert error(out(net), base) < CLOSE


def test_a_save_has_no_adapter_that_nobody_has_asked_to_merge(
    base: torch.Tensor, with_lora: torch.Tensor, tmp_path: Path
) -> None:
    net, _ = packed("merge")
    for number in range(2):  # before a pass, and after one
        (tmp_path / str(number)).mkdir()
        assert error(out(saved(net, tmp_path / str(number))), base) < CLOSE
        assert error(out(net), with_lora) < CLOSE
    lowbits.merge_lora(net)
    (tmp_path / "asked").mkdir()
    assert error(out(saved(net, tmp_path / "asked")), with_lora) < CLOSE


@pytest.mark.parametrize("how", [copied, dequantized])
def test_a_strength_that_has_changed_since_goes_along(
    how: Callable[..., nn.Module], tmp_path: Path
) -> None:
    net, _ = packed("fp16")
    lowbits.merge_lora(net)
    for layer in net:
        layer.set_scale("default", -2.0)
    expected = out(net)
    assert error(out(how(net, tmp_path)), expected) < CLOSE


@pytest.mark.parametrize("lora", ["merge", "fp16"])
def test_factors_that_were_written_are_merged_anew(lora: str) -> None:
    net, wrapped = packed(lora)
    twin = plain()
    twins = adapted(twin)
    out(net)
    lowbits.merge_lora(net) if lora == "fp16" else None
    factors = {
        name: value * -3 if "lora_B" in name else value
        for name, value in get_peft_model_state_dict(twins).items()
    }
    for model in (wrapped, twins):
        set_peft_model_state_dict(model, factors)
    lowbits.merge_lora(net) if lora == "fp16" else None
    assert error(out(net), out(twin)) < CLOSE


@pytest.mark.parametrize("lora", ["merge", "fp16"])
def test_an_error_while_codes_are_written_is_made_good(
    lora: str, with_lora: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = packed(lora)
    written, rewrite = [], surgery.rewrite

    def interrupted(*args: Any) -> None:
        written.append(args)
        if len(written) == 2:
            raise KeyboardInterrupt
        rewrite(*args)

    monkeypatch.setattr("lowbits.integrations.adapters.rewrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        out(net) if lora == "merge" else lowbits.merge_lora(net)
    for _ in range(2):
        assert error(out(net), with_lora) < CLOSE
    lowbits.merge_lora(net)
    assert error(out(net), with_lora) < CLOSE
    lowbits.unmerge_lora(net)
    assert error(out(net), with_lora) < CLOSE


def test_merging_into_what_nobody_has_the_originals_of_raises(tmp_path: Path) -> None:
    """It would be gone, without a word, as the adapter is unloaded."""
    net = plain()
    lowbits.quantize(net, SCHEME, rules={"*": SCHEME})
    lowbits.save(net, tmp_path / "x.safetensors")
    loaded = plain()
    lowbits.load(tmp_path / "x.safetensors", into=loaded)
    lowbits.apply(loaded, device="cpu")
    before = out(loaded)
    model = adapted(loaded)
    expected = out(model)
    assert not torch.equal(expected, before)
    for _ in range(2):
        with pytest.raises(SourceUnavailableError, match=r"it was loaded.*lowbits\.dequantize"):
            lowbits.merge_lora(loaded)
    assert torch.equal(out(model), expected)
    model.disable_adapter_layers()
    lowbits.merge_lora(loaded)  # there is nothing to merge
    assert torch.equal(out(model), before)


def flux_adapted(model: Any) -> Any:
    """Return a copy of tiny FLUX with a LoRA."""
    found = copy.deepcopy(model)
    found.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    return found


@pytest.mark.parametrize("names", ["reference", "diffusers"])
def test_files_are_written_from_and_loaded_into_models_that_have_a_lora(
    tmp_path: Path, names: str
) -> None:
    bare = tiny("flux", num_attention_heads=2, attention_head_dim=32, axes_dims_rope=(8, 12, 12))
    model = flux_adapted(bare)
    lowbits.save_gguf(bare, tmp_path / "plain.gguf", "Q8_0", names=names)
    lowbits.save_gguf(model, tmp_path / "x.gguf", "Q8_0", names=names)
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    lowbits.load(tmp_path / "x.gguf", into=bare)
    twin = flux_adapted(bare)
    twin.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "lora_" in name},
        strict=False,
    )
    report = lowbits.load(tmp_path / "x.gguf", into=model)
    assert len(report.packed) == len([m for m in bare.modules() if isinstance(m, PackedLayer)])
    found, expected = model.state_dict(), twin.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_merged_lora_is_not_loaded_over(tmp_path: Path) -> None:
    model = flux_adapted(tiny("flux"))
    lowbits.save(model, tmp_path / "x.safetensors")
    model.fuse_lora()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PatchError, match="'default' is merged into what would be replaced"):
        lowbits.load(tmp_path / "x.safetensors", into=model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    model.unfuse_lora()
    lowbits.load(tmp_path / "x.safetensors", into=model)
