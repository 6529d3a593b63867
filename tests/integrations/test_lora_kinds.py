"""peft's other kinds of adapters on packed layers: merged from the source, or refused by name."""

from __future__ import annotations

import copy
import gc
import io
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import (
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.module import _global_module_registration_hooks as hooks

import lowbits
from lowbits import errors

if TYPE_CHECKING:
    from pathlib import Path

SCHEME = "torchao-int8"
#: So fine that what is merged is what acts beside, up to a few thousandths.
FINE = "gguf-f16"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, 64)
        self.up = nn.Linear(64, 96)
        self.conv = nn.Conv1d(96, 64, 3, padding=1)
        self.grouped = nn.Conv1d(64, 64, 1, groups=2)
        self.down = nn.Linear(64, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.conv(self.up(self.table(tokens)).transpose(-1, -2))
        z: torch.Tensor = self.down(self.grouped(y).transpose(-1, -2))
        return z


TOKENS = torch.arange(8).view(1, 8)


def packed(scheme: str = FINE, **options: Any) -> tuple[Net, lowbits.Handle]:
    net = Net().eval().requires_grad_(requires_grad=False)
    options = {"keep_source": "memory", "lora": "fp16", **options}
    return net, lowbits.quantize(net, scheme, rules={"*": scheme}, **options)


def adapted(net: nn.Module, config: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(net, config).eval()


def lora(*names: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(names), init_lora_weights=False, **options)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return float(((got - expected).norm() / expected.norm()).detach()) < 3e-3


CONFIGS: dict[str, Any] = {
    "lora": lora("up", "down"),
    "rslora": lora("up", use_rslora=True, lora_alpha=3),
    "embedding": lora("table"),
    "convolution": lora("conv"),
    "dora": lora("up", "down", use_dora=True),
    "dora convolution": lora("conv", use_dora=True),
    "loha": LoHaConfig(r=4, target_modules=["up", "conv"], init_weights=False),
    "lokr": LoKrConfig(r=4, target_modules=["up", "conv"], init_weights=False),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_merged_acts_as_beside(kind: str) -> None:
    net, handle = packed()
    plain = net(TOKENS)
    model = adapted(net, CONFIGS[kind])
    if "dora" in kind:
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data *= 1.2
    beside = model(TOKENS)
    assert not same(beside, plain)
    model.merge_adapter()
    assert same(model(TOKENS), beside)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS), plain)
    assert torch.equal(model(TOKENS), beside)
    lowbits.merge_lora(net)
    model.unmerge_adapter()
    assert torch.equal(model(TOKENS), beside)
    lowbits.merge_lora(net)
    handle.restore()
    assert same(model(TOKENS), beside), "restored, the adapter goes on working"
    model.unload()
    assert torch.equal(net(TOKENS), Net()(TOKENS))


@pytest.mark.filterwarnings("default:LoRA adapter added to ConvNd layer")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora("up", lora_bias=True), "bias of its own"),
        (lora("grouped"), "grouped convolutions"),
        (lora("table", use_dora=True), "variant"),
        (OFTConfig(r=4, oft_block_size=0, target_modules=["up"]), "read only"),
    ],
)
def test_what_cannot_be_merged_says_so_and_works_beside(config: Any, message: str) -> None:
    net, _ = packed()
    model = adapted(net, config)
    beside = model(TOKENS)
    with pytest.raises(errors.PatchError, match=message):
        model.merge_adapter()
    assert torch.equal(model(TOKENS), beside)


OTHERS: dict[str, Any] = {
    "oft": OFTConfig(r=4, oft_block_size=0, target_modules=["up"]),
    "vera": VeraConfig(r=4, target_modules=["up"]),
    "ia3": IA3Config(target_modules=["up"], feedforward_modules=[]),
    "hra": HRAConfig(target_modules=["up"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_not_left_out_without_a_word(kind: str) -> None:
    net, handle = packed()
    model = adapted(net, OTHERS[kind])
    beside = model(TOKENS)
    with pytest.raises(errors.PatchError, match="'default' into up: .* Beside the weights"):
        lowbits.merge_lora(net)
    assert torch.equal(model(TOKENS), beside)
    with model.disable_adapter():
        lowbits.merge_lora(net)
    model.unload()
    handle.restore()


def test_other_kinds_are_refused_where_all_is_to_be_merged() -> None:
    net = Net().eval()
    lowbits.apply(net, FINE, lora="merge")
    model = adapted(net, OTHERS["oft"])
    with pytest.raises(errors.PatchError, match="Beside the weights"):
        model(TOKENS)
    model.unload()
    assert net(TOKENS).isfinite().all()


def test_tied_weights_are_not_merged_into() -> None:
    net = Net().eval()
    net.other = nn.Linear(64, 64)
    net.other.weight = net.down.weight
    lowbits.quantize(net, FINE, rules={"*": FINE}, keep_source="memory")
    model = adapted(net, lora("down"))
    with pytest.raises(errors.PatchError, match="tied to another layer"):
        lowbits.merge_lora(net)
    assert model(TOKENS).isfinite().all(), "auto leaves it beside"


def test_strength_follows_what_peft_says() -> None:
    net, _ = packed()
    model = adapted(net, lora("up", "down"))
    layers = (net.up, net.down)

    def outputs(*, merges: bool) -> list[torch.Tensor]:
        results = []
        for strength in (1.0, 0.5, -1.0, 0.0):
            for layer in layers:
                layer.set_scale("default", strength)  # type: ignore[operator]
            results.append(model(TOKENS))
            if merges:
                lowbits.merge_lora(net)
                results[-1] = model(TOKENS)
        return results

    beside = outputs(merges=False)
    merged = outputs(merges=True)
    lowbits.merge_lora(net)
    after = outputs(merges=False)
    for a, b, c in zip(beside, merged, after, strict=True):
        assert same(b, a)
        assert same(c, a)


def test_several_adapters_come_and_go() -> None:
    net, _ = packed()
    model = adapted(net, lora("up", "down"))
    one = model(TOKENS)
    torch.manual_seed(2)
    model.add_adapter("other", lora("up"))
    model.base_model.set_adapter(["default", "other"])
    both = model(TOKENS)
    model.merge_adapter(adapter_names=["other"])
    assert same(model(TOKENS), both)
    lowbits.merge_lora(net)
    assert same(model(TOKENS), both)
    with pytest.raises(ValueError, match="unmerge"):
        model.delete_adapter("other")  # peft's models refuse; diffusers asks the layers
    net.up.delete_adapter("other")  # type: ignore[operator]
    assert same(model(TOKENS), one)
    lowbits.unmerge_lora(net)
    assert torch.equal(model(TOKENS), one)


def test_what_was_merged_and_unloaded_stays_until_it_is_unmerged() -> None:
    net, _ = packed()
    plain = net(TOKENS)
    model = adapted(net, lora("up"))
    first = model(TOKENS) - plain
    model.merge_and_unload()
    merged = net(TOKENS)
    assert same(merged - plain, first)
    model = adapted(net, lora("up"), seed=2)
    second = model(TOKENS)
    assert not same(second, merged)
    lowbits.merge_lora(net)
    assert same(model(TOKENS), second), "the first one is in the sum"
    model.unload()
    lowbits.unmerge_lora(net)
    assert torch.equal(net(TOKENS), plain)


def test_the_difference_of_a_merged_dora_is_refused() -> None:
    net, _ = packed()
    model = adapted(net, lora("up", use_dora=True))
    model.merge_adapter()
    net.up.set_scale("default", 0.5)  # type: ignore[operator]
    with pytest.raises(errors.PatchError, match="merge_lora"):
        model(TOKENS)
    lowbits.merge_lora(net)
    assert model(TOKENS).isfinite().all()


def test_what_was_fused_before_packing_can_be_unfused() -> None:
    net = Net().eval()
    plain = net(TOKENS)
    model = adapted(net, lora("up", "down"))
    beside = model(TOKENS)
    model.merge_adapter()
    handle = lowbits.quantize(net, FINE, rules={"*": FINE}, keep_source="memory")
    assert same(model(TOKENS), beside)
    model.unmerge_adapter()
    assert same(model(TOKENS), beside)
    with model.disable_adapter():
        assert same(model(TOKENS), plain)
    handle.restore()
    assert same(model(TOKENS), beside)
    with model.disable_adapter():
        assert same(model(TOKENS), plain)


def test_adapters_that_come_are_merged_before_the_next_pass() -> None:
    net, _ = packed(lora="merge")
    plain = net(TOKENS)
    model = adapted(net, lora("up", "down"))
    beside = model(TOKENS)
    assert net.up.merged_adapters == [], "gradients are recorded: it may be trained"
    with torch.no_grad():
        assert same(model(TOKENS), beside)
        assert net.up.merged_adapters == ["default"]
        net.up.set_scale("default", 0.5)  # type: ignore[operator]
        model(TOKENS)
        assert lowbits.handle(net) is not None
        model.disable_adapter_layers()
        assert torch.equal(model(TOKENS), plain)
        model.enable_adapter_layers()
        model(TOKENS)
        assert net.up.merged_adapters == ["default"]
        model.unload()
        assert torch.equal(net(TOKENS), plain), "what was merged unasked goes with the adapter"


def test_adapters_that_are_there_are_merged_by_apply() -> None:
    net = Net().eval()
    model = adapted(net, lora("up"))
    beside = model(TOKENS)
    handle = lowbits.apply(
        net, FINE, rules={"*": FINE}, lora="merge", keep_source="none", device="cpu"
    )
    assert net.up.merged_adapters == ["default"]
    with torch.no_grad():
        assert same(model(TOKENS), beside)
        net.up.set_scale("default", 0.5)  # type: ignore[operator]
        with pytest.raises(errors.SourceUnavailableError, match="lora='fp16'"):
            model(TOKENS)
    with pytest.raises(errors.SourceUnavailableError):
        handle.restore()


def test_originals_in_a_file_are_read_again(tmp_path: Path) -> None:
    net = Net().eval()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    lowbits.quantize(net, FINE, keep_source="file", source=tmp_path)
    plain = net(TOKENS)
    model = adapted(net, lora("up", "down"))
    beside = model(TOKENS)
    lowbits.merge_lora(net)
    assert same(model(TOKENS), beside)
    lowbits.unmerge_lora(net)
    assert torch.equal(model(TOKENS), beside)
    (tmp_path / "net.safetensors").unlink()
    with pytest.raises(errors.SourceUnavailableError, match="cannot merge a LoRA into"):
        lowbits.merge_lora(net)
    assert torch.equal(model(TOKENS), beside)
    model.unload()
    assert torch.equal(net(TOKENS), plain)


def test_automatic_merges_into_16_bits_only() -> None:
    for scheme, merged in (("gguf-bf16", ["default"]), ("gguf-q8_0", [])):
        net, _ = packed(scheme, lora="auto")
        model = adapted(net, lora("up"))
        with torch.no_grad():
            model(TOKENS)
        assert net.up.merged_adapters == merged


def test_few_bits_are_warned_about_with_a_figure(caplog: pytest.LogCaptureFixture) -> None:
    net, _ = packed("gguf-q2_0")
    adapted(net, lora("up", "down"))
    with caplog.at_level(logging.WARNING, "lowbits.lora"):
        lowbits.merge_lora(net)
        lowbits.unmerge_lora(net)
        lowbits.merge_lora(net)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "% of the LoRA survives" in warning
    share = float(warning.split()[0])
    assert 50 < share < 120


def test_copies_and_pickles_keep_what_was_merged() -> None:
    net, _ = packed(lora="merge")
    model = adapted(net, lora("up"))
    with torch.no_grad():
        model(TOKENS)
        merged = model(TOKENS)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(twin(TOKENS), merged)
            with pytest.raises(errors.PatchError):
                twin.unmerge_adapter()
        assert torch.equal(model(TOKENS), merged)


def test_switch_takes_adapters_along() -> None:
    net, handle = packed("torchao-int8", lora="merge")
    model = adapted(net, lora("up"))
    with torch.no_grad():
        expected = model(TOKENS)
        handle = handle.switch("gguf-q8_0")
        assert net.up.merged_adapters == ["default"]
        assert float((model(TOKENS) - expected).norm() / expected.norm()) < 0.05
    lowbits.dequantize(net)
    with torch.no_grad():
        assert float((model(TOKENS) - expected).norm() / expected.norm()) < 0.05
    assert type(net.up).__mro__[1].__module__ != "lowbits.integrations.peft"


def test_factors_are_widened_where_16_bits_are_slow() -> None:
    net = Net().eval().bfloat16()
    lowbits.quantize(net, SCHEME, keep_source="memory")
    model = adapted(net, lora("up"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    output = model(TOKENS)
    assert output.dtype == torch.bfloat16
    slow = not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    assert (net.up.lora_A["default"].weight.dtype == torch.float32) == slow  # type: ignore[index, union-attr]


def test_nothing_is_left_behind() -> None:
    gc.collect()
    before = len(hooks)
    net, handle = packed(lora="merge")
    assert len(hooks) == before + 1
    handle.restore()
    assert len(hooks) == before
    assert not net._forward_pre_hooks
    packed()
    gc.collect()
    assert len(hooks) == before, "a target that is let go takes its hook along"


def test_without_a_handle_there_is_nothing_to_merge() -> None:
    with pytest.raises(errors.NotPatchedError):
        lowbits.merge_lora(Net())
    with pytest.raises(errors.NotPatchedError):
        lowbits.unmerge_lora(Net())
