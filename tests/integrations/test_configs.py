"""Configs of diffusers and transformers, and Forge's strings, wherever a scheme is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from pipelines import PIPELINES
from torch import nn
from torchao import quantization

import lowbits
from lowbits import errors
from lowbits.integrations.configs import Request, component_requests, request_of

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("library", [diffusers, transformers])
@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        (NF4, "bnb-nf4"),
        (NF4 | {"bnb_4bit_use_double_quant": True}, "bnb-nf4-dq"),
        ({"load_in_4bit": True}, "bnb-fp4"),
        ({"load_in_8bit": True}, "bnb-int8"),
    ],
)
def test_bitsandbytes(library: Any, options: dict[str, Any], scheme: str) -> None:
    assert request_of(library.BitsAndBytesConfig(**options)).scheme == scheme


def test_bitsandbytes_names_what_to_skip_and_the_dtype_to_compute_in() -> None:
    config = transformers.BitsAndBytesConfig(
        **NF4, llm_int8_skip_modules=["lm_head", "0"], bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    report = lowbits.quantize(model, config).report()
    assert [row.fqn for row in report.packed] == ["1"]
    layouts: Any = model[1]
    assert layouts.lowbits_layouts["weight"].compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (quantization.Int8WeightOnlyConfig(), "torchao-int8"),
        (quantization.Int4WeightOnlyConfig(), "torchao-int4"),
        (quantization.Float8WeightOnlyConfig(), "torchao-float8"),
        (quantization.Int8DynamicActivationInt8WeightConfig(), "torchao-int8-dynamic"),
        (quantization.Float8DynamicActivationFloat8WeightConfig(), "torchao-float8-dynamic"),
    ],
)
def test_torchao(config: Any, scheme: str) -> None:
    assert request_of(diffusers.TorchAoConfig(config)) == Request(scheme)


def test_torchao_by_row_is_what_schemes_do_where_its_own_default_is_coarser() -> None:
    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow()
    )
    assert request_of(diffusers.TorchAoConfig(config)).scheme == "torchao-float8-dynamic"


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("Float8WeightOnlyConfig", "weight_dtype", torch.float8_e5m2),
        ("Int8WeightOnlyConfig", "granularity", quantization.PerGroup(32)),
        ("Int8WeightOnlyConfig", "granularity", quantization.PerRow(dim=0)),
        (
            "Int8DynamicActivationInt8WeightConfig",
            "act_mapping_type",
            quantization.MappingType.ASYMMETRIC,
        ),
        ("Int4WeightOnlyConfig", "int4_choose_qparams_algorithm", "hqq"),
    ],
)
def test_torchaos_options_that_no_scheme_has_are_refused(
    kind: str, option: str, value: object
) -> None:
    config = getattr(quantization, kind)(**{option: value})
    with pytest.raises(errors.ConfigError, match=rf"{kind}\({option}=.* is not offered, .* is"):
        request_of(diffusers.TorchAoConfig(config))


def test_what_no_scheme_does_is_refused() -> None:
    with pytest.raises(errors.ConfigError, match=r"group_size=32.* is not offered, 128 is"):
        request_of(diffusers.TorchAoConfig(quantization.Int4WeightOnlyConfig(group_size=32)))
    with pytest.raises(errors.ConfigError, match="no scheme does IntxWeightOnlyConfig"):
        request_of(diffusers.TorchAoConfig(quantization.IntxWeightOnlyConfig()))
    with pytest.raises(errors.ConfigError, match="names no type, its file does"):
        request_of(diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32))
    with pytest.raises(errors.ConfigError, match="expected a scheme's name"):
        request_of(4)


@pytest.mark.filterwarnings("ignore:.*Quanto.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "float8"])
def test_quanto(kind: str) -> None:
    assert request_of(transformers.QuantoConfig(weights=kind)).scheme == f"quanto-{kind}"


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("Automatic", "native"),
        ("Automatic (fp16 LoRA)", "native"),
        ("bnb-nf4", "bnb-nf4"),
        ("bnb-nf4 (fp16 LoRA)", "bnb-nf4"),
        ("float8-e4m3fn", "float8-e4m3fn"),
        ("float8-e4m3fn (fp16 LoRA)", "float8-e4m3fn"),
        ("bnb-fp4", "bnb-fp4"),
        ("bnb-fp4 (fp16 LoRA)", "bnb-fp4"),
        ("float8-e5m2", "float8-e5m2"),
        ("float8-e5m2 (fp16 LoRA)", "float8-e5m2"),
    ],
)
def test_forges_menu(text: str, scheme: str) -> None:
    assert request_of(text).scheme == scheme
    assert scheme in {info.name for info in lowbits.schemes() if info.forge_name}


def test_a_pipeline_config_names_components() -> None:
    pipe = PIPELINES["flux"].build()
    config = diffusers.PipelineQuantizationConfig(
        quant_mapping={
            "transformer": diffusers.BitsAndBytesConfig(**NF4),
            "text_encoder_2": transformers.BitsAndBytesConfig(load_in_8bit=True),
        }
    )
    schemes = {row.component: row.scheme for row in lowbits.apply(pipe, config).report().packed}
    assert schemes == {"transformer": "bnb-nf4", "text_encoder_2": "bnb-int8"}
    lowbits.restore(pipe)
    config = diffusers.PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs=NF4,
        components_to_quantize=["transformer"],
    )
    schemes = {row.component: row.scheme for row in lowbits.apply(pipe, config).report().packed}
    assert schemes == {"transformer": "bnb-nf4"}


@pytest.mark.parametrize(
    ("backend", "options", "scheme"),
    [
        ("bitsandbytes_8bit", {"load_in_8bit": True}, "bnb-int8"),
        ("bitsandbytes_4bit", {**NF4, "bnb_4bit_use_double_quant": True}, "bnb-nf4-dq"),
        ("bitsandbytes_4bit", {"load_in_4bit": True}, "bnb-fp4"),
    ],
)
def test_a_pipeline_config_of_one_backend(
    backend: str, options: dict[str, Any], scheme: str
) -> None:
    config = diffusers.PipelineQuantizationConfig(
        quant_backend=backend, quant_kwargs=options, components_to_quantize=["transformer"]
    )
    assert component_requests(config) == {"transformer": Request(scheme)}


def test_a_pipeline_config_says_what_to_skip_and_the_dtype_to_compute_in() -> None:
    options = {**NF4, "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["proj_out"]}
    config = diffusers.PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs=options,
        components_to_quantize="transformer",
    )
    wanted = Request("bnb-nf4", ("proj_out", "*.proj_out"), torch.bfloat16)
    assert component_requests(config) == {"transformer": wanted}


@pytest.mark.parametrize(
    ("backend", "options", "scheme"),
    [
        ("torchao", {"quant_type": quantization.Int8WeightOnlyConfig()}, "torchao-int8"),
        ("quanto", {"weights_dtype": "int4"}, "quanto-int4"),
    ],
)
def test_a_pipeline_config_where_transformers_has_the_same_options(
    backend: str, options: dict[str, Any], scheme: str
) -> None:
    """diffusers makes none of these where both are installed, and their signatures differ."""
    config = SimpleNamespace(
        quant_backend=backend,
        quant_kwargs=options,
        components_to_quantize=["transformer"],
        quant_mapping=None,
    )
    assert component_requests(config) == {"transformer": Request(scheme)}


def test_a_pipeline_config_that_names_no_component_is_refused() -> None:
    kwargs = {"load_in_8bit": True}
    config = diffusers.PipelineQuantizationConfig("bitsandbytes_8bit", kwargs)
    with pytest.raises(errors.ConfigError, match="give quant_mapping, or components_to_quantize"):
        component_requests(config)


def test_bitsandbytes_without_a_scheme_is_refused() -> None:
    with pytest.raises(errors.ConfigError, match="neither load_in_4bit nor load_in_8bit"):
        request_of(transformers.BitsAndBytesConfig())
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    with pytest.raises(errors.ConfigError, match="double quantization is offered for nf4 only"):
        request_of(config)


def test_options_are_checked() -> None:
    with pytest.raises(errors.ConfigError, match="scheme: got None"):
        lowbits.LowbitsConfig(None)
    with pytest.raises(errors.ConfigError, match="keep_source: got 'ram', expected one of auto"):
        lowbits.LowbitsConfig(keep_source="ram")
    swaps: Any = ["queue"]
    with pytest.raises(errors.ConfigError, match=r"swap: got \['queue'\], expected one of auto"):
        lowbits.LowbitsConfig(swap=swaps)
    with pytest.raises(errors.ConfigError, match="never_oom: got 'unet', expected one of denoiser"):
        lowbits.LowbitsConfig(never_oom=("vae", "unet"))
    with pytest.raises(errors.ConfigError, match="skip: got the string"):
        lowbits.LowbitsConfig(skip="proj_out")
    with pytest.raises(errors.ConfigError, match="compute_dtype: got torch.int8"):
        lowbits.LowbitsConfig(compute_dtype=torch.int8)
    names: Any = "bfloat16"
    with pytest.raises(errors.ConfigError, match="compute_dtype: got 'bfloat16', expected one as"):
        lowbits.LowbitsConfig(compute_dtype=names)
    with pytest.raises(errors.ConfigError, match="components: got the string 'transformer'"):
        lowbits.LowbitsConfig(components="transformer")
    pairs: Any = [("*", "bnb-nf4")]
    with pytest.raises(errors.ConfigError, match=r"rules: got \[.*expected a scheme by glob"):
        lowbits.LowbitsConfig(rules=pairs)
    with pytest.raises(
        errors.ConfigError, match="device: quantize moves nothing; use lowbits.apply"
    ):
        lowbits.quantize(nn.Linear(64, 64), "bnb-nf4", device="cpu")


def test_a_config_stands_for_all_options() -> None:
    model = nn.Linear(64, 64)
    config = lowbits.LowbitsConfig("gguf-q8_0", device="cpu", keep_source="none")
    report = lowbits.apply(model, config).report()
    assert [(row.scheme, row.source) for row in report.packed] == [("gguf-q8_0", "none")]


@pytest.mark.parametrize("there", ["native", "gguf-q8_0"])
@pytest.mark.parametrize("how", ["rules", "config"])
def test_a_switch_leaves_alone_what_was_left_alone(how: str, there: str) -> None:
    def packed(handle: lowbits.Handle) -> set[str]:
        return {row.fqn for row in handle.report().packed}

    model = nn.ModuleDict({name: nn.Linear(256, 256) for name in ("a", "b", "head")})
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["head"]
    )
    if how == "rules":
        handle = lowbits.quantize(model, "bnb-nf4", rules={"head": "native", "b": "bnb-nf4"})
    else:
        handle = lowbits.quantize(model, config)
    assert packed(handle) == {"a", "b"}
    handle = handle.switch(there)
    assert packed(handle) == (set() if there == "native" else {"a", "b"})
    handle = handle.switch("bnb-nf4")
    assert packed(handle) == {"a", "b"}
    handle.restore()


def test_a_switch_leaves_alone_components_that_were_to_stay_native() -> None:
    pipe = PIPELINES["flux"].build()
    components = {"transformer": "bnb-nf4", "text_encoder_2": "native"}
    handle = lowbits.apply(pipe, components=components, device="cpu")
    for scheme in ("gguf-q8_0", "native", "bnb-nf4"):
        handle = handle.switch(scheme)
        packed = {row.component for row in handle.report().packed}
        assert packed == (set() if scheme == "native" else {"transformer"})


def test_options_beside_a_config_are_refused() -> None:
    model = nn.Linear(256, 256)
    with pytest.raises(errors.ConfigError, match="gpu_weights: a LowbitsConfig stands for all"):
        lowbits.apply(model, lowbits.LowbitsConfig("bnb-nf4"), gpu_weights="1KB")
    assert lowbits.handle(model) is None
    with lowbits.apply(model, lowbits.LowbitsConfig("bnb-nf4"), device=None) as handle:
        handle.switch("bnb-int8")
        with pytest.raises(errors.NotPatchedError, match=r"spent .* lowbits.handle\(target\)"):
            handle.switch("bnb-nf4")
    assert lowbits.handle(model) is None
