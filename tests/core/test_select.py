"""What is packed, what is left alone, and the reason that is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from pipelines import PIPELINES
from torch import nn

import lowbits
from lowbits import errors

if TYPE_CHECKING:
    from lowbits import LayerReport


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(16, 256)
        self.context_embedder = nn.Linear(128, 256)
        self.blocks = nn.ModuleList(
            [
                nn.ModuleDict({"norm": nn.LayerNorm(256), "fc": nn.Linear(256, 256)})
                for _ in range(3)
            ]
        )
        self.experts = nn.Parameter(torch.randn(4, 64, 64))
        self.gate = nn.Linear(8, 8)
        self.up = nn.ConvTranspose2d(64, 64, 3)
        self.proj_out = nn.Linear(256, 16)


def rows(handle: lowbits.Handle) -> dict[str, LayerReport]:
    return {row.fqn: row for row in handle.report().layers}


def quantized(**options: object) -> dict[str, LayerReport]:
    return rows(lowbits.quantize(Denoiser(), "float8-e4m3fn", **options))


def test_defaults_leave_alone_by_reason() -> None:
    layers = quantized()
    assert layers["x_embedder"].reason.startswith("first or last projection: 16 channels")
    assert layers["proj_out"].reason.startswith("first or last projection")
    assert layers["gate"].reason == "tiny: 64 weights"
    assert layers["blocks.0.norm"].reason == "norm"
    assert layers["blocks.0.fc.bias"].reason == "bias"
    assert layers["experts"].reason == "raw parameter: name it in rules to pack it"
    assert layers["up"].reason == "no scheme holds ConvTranspose2d layers"
    assert layers["context_embedder"].scheme == "float8-e4m3fn"
    assert all(layers[f"blocks.{i}.fc"].scheme == "float8-e4m3fn" for i in range(3))


def test_a_rule_overrides_defaults_and_the_last_match_counts() -> None:
    layers = quantized(rules={"*": "bnb-nf4", "blocks.*.fc": "gguf-q8_0", "blocks.1": "native"})
    assert layers["x_embedder"].scheme == "bnb-nf4"
    assert layers["blocks.0.fc"].scheme == "gguf-q8_0"
    assert layers["blocks.1.fc"].scheme == "native"
    assert layers["experts"].scheme == "native", "a wildcard does not name a raw parameter"


def test_a_raw_parameter_is_packed_where_it_is_named() -> None:
    model = Denoiser()
    expected = model.experts.detach().clone()
    layers = rows(lowbits.quantize(model, "gguf-q8_0", rules={"experts": "gguf-q8_0"}))
    assert layers["experts"].scheme == "gguf-q8_0"
    product = torch.bmm(torch.ones(4, 1, 64), model.experts)
    assert torch.allclose(product, expected.sum(1, keepdim=True), atol=0.3)
    assert model.experts[1].shape == (64, 64)


def test_skip_is_stronger_than_a_rule() -> None:
    layers = quantized(rules={"*": "bnb-nf4"}, skip=("blocks.2",))
    assert layers["blocks.2.fc"].reason == "skipped by 'blocks.2'"
    assert layers["blocks.1.fc"].scheme == "bnb-nf4"


@pytest.mark.parametrize(
    "option", [{"skip": ("blocks.*.f",)}, {"rules": {"blocks.*.f": "bnb-nf4"}}]
)
def test_a_pattern_that_matches_nothing_is_an_error_with_a_suggestion(
    option: dict[str, object],
) -> None:
    model = Denoiser()
    with pytest.raises(errors.ConfigError, match=r"'blocks.\*.f' matches no layer.*'blocks.\*.fc'"):
        lowbits.quantize(model, "bnb-nf4", **option)
    assert lowbits.handle(model) is None


def test_unknown_scheme_names_the_closest() -> None:
    with pytest.raises(errors.UnknownSchemeError, match="did you mean 'bnb-nf4'"):
        lowbits.quantize(Denoiser(), "bnb-nf5")


def test_nothing_to_pack_is_an_error_with_reasons() -> None:
    with pytest.raises(errors.NoCapableBackendError, match="tiny: 64 weights") as caught:
        lowbits.quantize(nn.ModuleList([nn.Linear(8, 8)]), "bnb-nf4")
    assert caught.value.failures == {"0": "tiny: 64 weights"}


def test_a_target_that_is_one_layer_is_packed_whatever_its_size() -> None:
    layer = nn.Linear(8, 8)
    with lowbits.quantize(layer, "bnb-nf4") as handle:
        assert [row.scheme for row in handle.report().packed] == ["bnb-nf4"]


def test_native_packs_nothing() -> None:
    model = Denoiser()
    handle = lowbits.apply(model, "native", device="cpu")
    assert handle.report().packed == ()
    assert handle.report().bytes_after == handle.report().bytes_before
    handle.restore()


def test_a_row_length_that_does_not_fit_falls_back_and_says_so() -> None:
    model = nn.ModuleList([nn.Linear(300, 64), nn.Linear(128, 64)])
    layers = rows(lowbits.quantize(model, "quanto-int4"))
    assert layers["0"].scheme == "quanto-int8"
    assert layers["0"].reason == "instead of quanto-int4: row length 300 is not a multiple of 32"
    assert layers["1"].scheme == "quanto-int4"


@pytest.mark.parametrize("scheme", ["torchao-int8", "float8-e4m3fn"])
def test_tied_weights_share_what_holds_both(scheme: str) -> None:
    model = nn.Sequential(nn.Embedding(128, 64), nn.Linear(64, 128, bias=False))
    model[1].weight = model[0].weight
    layers = rows(lowbits.quantize(model, f"{scheme}-dynamic", rules={"*": f"{scheme}-dynamic"}))
    assert {layer.scheme for layer in layers.values()} == {scheme}
    assert layers["1"].reason == f"tied; instead of {scheme}-dynamic: 0 has the same weight"
    assert model[0].weight_qdata is model[1].weight_qdata


@pytest.mark.parametrize("pattern", ["*", "experts.*"])
def test_raw_parameters_have_to_be_named(pattern: str) -> None:
    model = nn.ModuleDict({"experts": nn.ParameterList([torch.randn(64, 64)])})
    with pytest.raises(
        errors.ConfigError, match=r"raw Parameters alone.* named itself, as 'experts\.0'"
    ):
        lowbits.quantize(model, "bnb-nf4", rules={pattern: "bnb-nf4"})
    assert rows(lowbits.quantize(model, "bnb-nf4", rules={"experts.0": "bnb-nf4"}))


def test_tied_weights_share_their_fate() -> None:
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(128, 64),
            "head": nn.Linear(64, 128, bias=False),
            "other": nn.Linear(128, 128),
        }
    )
    table, head = model["table"], model["head"]
    assert isinstance(table, nn.Embedding)
    assert isinstance(head, nn.Linear)
    head.weight = table.weight
    layers = rows(lowbits.quantize(model, "bnb-nf4", skip=("head",)))
    assert layers["table"].reason == "tied to head: skipped by 'head'"
    lowbits.restore(model)
    layers = rows(lowbits.quantize(model, "bnb-nf4", rules={"table": "bnb-int8"}))
    assert layers["table"].reason == "tied to head: stored as bnb-nf4"
    lowbits.restore(model)
    handle = lowbits.quantize(model, "bnb-nf4")
    assert table._parameters["weight_qdata"] is head._parameters["weight_qdata"]
    assert sum(row.bytes_before for row in handle.report().packed) == (128 * 64 + 128 * 128) * 4
    handle.restore()
    assert head.weight is table.weight


def test_adapter_factors_are_never_packed() -> None:
    class Adapted(nn.Module):
        adapter_layer_names = ("lora_A",)

        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(128, 128)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(128, 64)})

    model = nn.ModuleList([Adapted()])
    layers = rows(lowbits.quantize(model, "bnb-nf4", rules={"*": "bnb-nf4"}))
    assert layers["0.lora_A.default"].reason == "adapter factor"
    assert layers["0.base_layer"].scheme == "bnb-nf4"


def test_what_another_library_stores_is_left_alone() -> None:
    model = nn.ModuleList([nn.Linear(128, 128), nn.Linear(128, 128)])
    model[0].weight = nn.Parameter(torch.zeros(128, 128, dtype=torch.int8), requires_grad=False)
    layers = rows(lowbits.quantize(model, "bnb-nf4"))
    assert layers["0"].reason == "its dtype int8 is not a full precision"


def test_meta_weights_are_refused_before_anything_changes() -> None:
    model = nn.ModuleList([nn.Linear(128, 128), nn.Linear(128, 128, device="meta")])
    with pytest.raises(errors.PatchError, match=r"^1 has no data \(meta device\)"):
        lowbits.quantize(model, "bnb-nf4")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_by_name(value: float) -> None:
    model = nn.ModuleList([nn.Linear(128, 128), nn.Linear(128, 128)])
    with torch.no_grad():
        model[1].get_parameter("weight")[3, 5] = value
    with pytest.raises(
        errors.NonFiniteWeightError, match="1 cannot be packed as bnb-nf4: 1 of its"
    ):
        lowbits.quantize(model, "bnb-nf4")
    assert type(model[0]) is nn.Linear


def test_scales_that_overflow_are_refused() -> None:
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.fill_(1e9)
    with pytest.raises(errors.NonFiniteWeightError, match="would decode to NaN or infinity"):
        lowbits.quantize(layer, "gguf-q8_0")
    assert type(layer) is nn.Linear


def test_layers_whose_weight_is_more_than_a_tensor_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Embedding(64, 64, max_norm=1.0),
        nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
        nn.Linear(64, 64),
    )
    layers = rows(lowbits.quantize(model, "bnb-nf4", rules={"*": "bnb-nf4"}))
    assert layers["0"].reason == "its max_norm rewrites the weight at each call"
    reasons = {row.reason for fqn, row in layers.items() if fqn.startswith("1.parametrizations")}
    assert "parametrized weight" in reasons
    assert [fqn for fqn, row in layers.items() if row.scheme == "bnb-nf4"] == ["2"]


def test_what_is_packed_already_and_should_not_be_is_told() -> None:
    model = Denoiser()
    handle = lowbits.quantize(model, "float8-e4m3fn")
    assert lowbits.quantize(model, "float8-e4m3fn") is handle
    for options in ({"skip": ["blocks.1.*"]}, {"rules": {"blocks.1.*": "native"}}):
        with pytest.raises(errors.AlreadyPatchedError, match="packed already"):
            lowbits.quantize(model, "float8-e4m3fn", **options)


def test_of_two_names_of_a_module_the_one_that_is_asked_for_counts() -> None:
    pipe: Any = PIPELINES["flux"].build()
    pipe.register_modules(text_encoder=pipe.text_encoder_2)
    report = lowbits.quantize(pipe, "gguf-q8_0", components=["text_encoder_2"]).report()
    assert {layer.component for layer in report.packed} == {"text_encoder_2"}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Q4_K_M", "gguf-q4_k_m"),
        ("BNB-NF4", "bnb-nf4"),
        ("nf4", "bnb-nf4"),
        ("fp8", "float8-e4m3fn"),
    ],
)
def test_schemes_as_others_write_them(written: str, meant: str) -> None:
    with pytest.raises(errors.UnknownSchemeError, match=f"did you mean .*{meant}"):
        lowbits.quantize(nn.Linear(64, 64), written)


def test_parts_of_what_is_no_pipeline() -> None:
    with pytest.raises(errors.ConfigError, match="a Linear is no pipeline, and has no 'unet'"):
        lowbits.quantize(nn.Linear(64, 64), "bnb-nf4", components=["unet"])
    folder: Any = "some/folder"
    with pytest.raises(errors.ConfigError, match="got str, expected .*; load it first"):
        lowbits.apply(folder, "bnb-nf4")


def test_prompts_that_are_tuned_are_never_packed() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    prompts = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=80, encoder_hidden_size=64
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), prompts)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    handle = lowbits.quantize(model, "float8-e4m3fn")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    reasons = {r.fqn: r.reason for r in handle.report().layers if "prompt_encoder" in r.fqn}
    assert "adapter factor" in reasons.values()
    assert handle.report().packed


def test_what_is_skipped_says_so_though_it_is_tied() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(128, 64), "head": nn.Linear(64, 128, bias=False)})
    model["other"] = nn.Linear(128, 128)
    model["head"].weight = model["table"].weight
    layers = rows(lowbits.quantize(model, "bnb-nf4", skip=("head",)))
    assert layers["head"].reason.endswith("skipped by 'head'")
    assert not layers["head"].reason.startswith("tied to table")


def test_what_holds_both_keeps_its_reason() -> None:
    model = nn.Sequential(nn.Embedding(128, 64), nn.Linear(64, 128, bias=False))
    model[1].weight = model[0].weight
    scheme = "torchao-int8-dynamic"
    layers = rows(lowbits.quantize(model, scheme, rules={"*": scheme}))
    assert layers["0"].scheme == "torchao-int8"
    assert "has the same weight" not in layers["0"].reason
