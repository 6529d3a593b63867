"""GGUF rules: which type each tensor of a model gets, in the names of its file and its readers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from gguf_names import FLUX, SDXL, WAN, Shapes

from lowbits.backends.gguf.mixes import MIXES
from lowbits.backends.gguf.quantize import QUANTIZERS
from lowbits.backends.gguf.types import TYPES
from lowbits.errors import ConfigError
from lowbits.files.gguf_rules import (
    FILE_TYPES,
    TARGETS,
    TensorPlan,
    check_metadata,
    high_precision_type,
    metadata_for,
    plan_types,
    settled,
    shapes_metadata,
)


def types(shapes: Shapes, kind: str, arch: str | None, target: str = "comfy") -> dict[str, str]:
    return {p.name: p.type_name or "high" for p in plan_types(shapes, kind, arch, target)}


def of(shape: tuple[int, ...], kind: str = "Q4_K", target: str = "comfy") -> TensorPlan:
    return plan_types({"blocks.0.to_q.weight": shape}, kind, "flux", target)[0]


@pytest.mark.parametrize(
    ("shape", "type_name", "reason"),
    [
        ((), "F32", "vector"),
        ((4096,), "F32", "vector"),
        ((1, 4096), "Q4_K", ""),
        ((4, 256), "F32", "tiny: 1024 weights"),
        ((5, 256), "Q4_K", ""),
        ((8, 16, 256), None, "not a matrix: 3 dimensions"),
        ((8, 8, 3, 256), None, "not a matrix: 4 dimensions"),
        ((8, 8, 1, 3, 256), "F32", "5 dimensions"),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_vectors_and_small_tensors_are_float32_and_only_matrices_quantized(
    shape: tuple[int, ...], type_name: str | None, reason: str, target: str
) -> None:
    plan = of(shape, target=target)
    assert (plan.type_name, plan.reason) == (type_name, reason)
    assert plan.stored_shape == (shape or (1,))


def test_parameters_of_no_layer_are_not_quantized() -> None:
    (plan,) = plan_types({"blocks.0.table": (64, 512)}, "Q8_0", "flux", "comfy")
    assert (plan.type_name, plan.reason) == (None, "not the weight of a layer")


@pytest.mark.parametrize(
    ("kind", "row", "type_name", "reason"),
    [
        ("Q2_K", 96, "IQ4_NL", "rows of 96 are not whole blocks of 256 (Q2_K)"),
        ("Q3_K", 96, "IQ4_NL", "rows of 96 are not whole blocks of 256 (Q3_K)"),
        ("Q4_K", 96, "Q5_0", "rows of 96 are not whole blocks of 256 (Q4_K)"),
        ("Q5_K", 96, "Q5_1", "rows of 96 are not whole blocks of 256 (Q5_K)"),
        ("Q6_K", 96, "Q8_0", "rows of 96 are not whole blocks of 256 (Q6_K)"),
        ("NVFP4", 96, "IQ4_NL", "rows of 96 are not whole blocks of 64 (NVFP4)"),
        ("TQ1_0", 96, "Q4_0", "rows of 96 are not whole blocks of 256 (TQ1_0)"),
        ("Q4_K", 100, None, "rows of 100 are not whole blocks of 256 (Q4_K) or 32 (Q5_0)"),
        ("Q8_0", 100, None, "rows of 100 are not whole blocks of 32 (Q8_0)"),
        ("F16", 100, "F16", ""),
        ("BF16", 100, "BF16", ""),
        ("F32", 100, "F32", ""),
    ],
)
def test_rows_of_broken_blocks_fall_back_and_say_so(
    kind: str, row: int, type_name: str | None, reason: str
) -> None:
    plan = of((512, row), kind)
    assert (plan.type_name, plan.reason) == (type_name, reason)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("row", [96, 100, 192, 256, 320, 3072])
def test_planned_types_divide_the_rows(name: str, row: int) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    plan = of((64, row), name, "sdcpp")
    if plan.type_name and plan.type_name != "Q2_0":  # newer than gguf 0.19.0
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[plan.type_name]]
        assert row % block == 0
    else:
        assert row % TYPES[name].weights or name == "Q2_0"


VALUE, FUSED, DOWN = "Q6_K", "Q5_K", "Q6_K"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (VALUE, "blk.0.attn_v blocks.0.self_attn.v blocks.0.cross_attn.v_img x.attn.to_v"),
        (VALUE, "x.attn.add_v_proj double_layers.0.attn.w1v x.attn.w2v blocks.0.cross_attn.v_proj"),
        (FUSED, "double_blocks.0.img_attn.qkv joint_blocks.0.x_block.attn.qkv x.attention.qkv"),
        (FUSED, "double_blocks.0.img_attn_qkv blk.0.attn_qkv attn.to_qkv attn.to_added_qkv"),
        (DOWN, "blk.0.ffn_down blocks.0.ffn.2 blocks.0.ffn.net.2 x.ff.net.2 x.ff_context.net.2"),
        (DOWN, "double_blocks.0.img_mlp.2 double_blocks.0.txt_mlp.2 x.img_mlp.net.2 x.mlp.fc2"),
        (DOWN, "blocks.0.mlp.layer2 blocks.0.adaln_modulation_mlp.2 x.mlpX.c_proj x.mlp.c_proj"),
        (DOWN, "layers.0.feed_forward.w2 layers.0.feed_forward.linear_2 x.ff.linear_out"),
        (DOWN, "b.ff_i.experts.3.w2 b.ff_i.shared_experts.w2 b.ff_t.w2 x.ff.out_projection"),
        (DOWN, "block.0.layer.1.DenseReluDense.wo layers.0.mlp.down_proj"),
        ("Q4_K", "single_blocks.0.linear1 x.attn.to_q x.img_attn.proj x.mlp.0 x.feed_forward.w1"),
        ("Q4_K", "x.attn.w1q x.ff.net.0.proj x.mlp.c_fc1 x.attn.c_proj x.mod.lin x.dev"),
    ],
)
def test_mixes_know_the_layers_of_reference_and_diffusers_names(kind: str, names: str) -> None:
    shapes: Shapes = {f"{name}.weight": (512, 512) for name in names.split()}
    plans = plan_types(shapes, "Q4_K_M", None, "sdcpp")
    assert {plan.name: plan.type_name for plan in plans} == dict.fromkeys(shapes, kind)
    assert all(plan.reason.startswith(f"Q4_K_M: {kind}") == (kind != "Q4_K") for plan in plans)


def test_first_layers_of_a_mix_are_counted_in_the_order_of_the_file() -> None:
    names = [f"context_refiner.{i}.attn.to_v.weight" for i in range(3)]
    names += [f"layers.{i}.attn.to_v.weight" for i in (2, 0, 1)]
    plan = types(dict.fromkeys(names, (512, 512)), "q3_k_m", "lumina2")
    assert list(plan.values()) == ["high"] * 3 + ["Q5_K", "Q5_K", "Q4_K"]


def test_layers_of_a_mix_fall_back_from_the_type_that_it_chose() -> None:
    (plan,) = plan_types({"x.to_v.weight": (512, 96)}, "Q4_K_M", "flux", "comfy")
    assert plan.type_name == "Q8_0"
    assert plan.reason == "Q4_K_M: Q6_K; rows of 96 are not whole blocks of 256 (Q6_K)"


def test_unets_are_reshaped_for_comfyui_only() -> None:
    plans = {plan.name: plan for plan in plan_types(SDXL, "Q4_K", "sdxl", "comfy")}
    conv = plans["input_blocks.1.0.in_layers.2.weight"]
    assert (conv.stored_shape, conv.type_name) == ((3600, 256), "Q4_K")
    to_q = plans["input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"]
    assert (to_q.stored_shape, to_q.type_name) == ((1600, 256), "Q4_K")
    assert plans["input_blocks.0.0.weight"].stored_shape == (45, 256)
    assert plans["input_blocks.0.0.weight"].type_name is None
    odd = plans["input_blocks.9.0.odd.weight"]
    assert (odd.stored_shape, odd.type_name) == ((10, 17, 3, 3), None)
    value = plans["input_blocks.7.1.transformer_blocks.0.attn1.to_v.weight"]
    assert (value.stored_shape, value.type_name) == ((1280, 1280), "Q4_K")
    assert plans["out.2.bias"].stored_shape == (4,)
    for target in ("sdcpp", "diffusers"):
        others = plan_types(SDXL, "Q4_K", "sdxl", target)
        assert all(plan.stored_shape == plan.shape for plan in others)
        assert shapes_metadata(others) == []


@pytest.mark.parametrize(
    ("shape", "stored"),
    [((2, 255), (2, 255)), ((8, 64), (2, 256)), ((512,), (512,)), ((4, 130), (4, 130))],
)
def test_reshaped_tensors_have_at_least_512_weights_in_whole_rows(
    shape: tuple[int, ...], stored: tuple[int, ...]
) -> None:
    assert plan_types({"x.weight": shape}, "Q8_0", "sd1", "comfy")[0].stored_shape == stored


def test_the_metadata_gives_reshaped_tensors_their_shapes_back() -> None:
    entries = shapes_metadata(plan_types(SDXL, "Q4_K", "sdxl", "comfy"))
    key = "comfy.gguf.orig_shape.input_blocks.1.0.in_layers.2.weight"
    assert (key, "i32", (320, 320, 3, 3)) in entries
    assert shapes_metadata(plan_types(FLUX, "Q4_K", "flux", "comfy")) == []
    assert shapes_metadata(plan_types({"x": ()}, "Q4_K", "sd1", "comfy")) == []


@pytest.mark.parametrize(
    "name",
    ["token_embd", "shared", "encoder.embed_tokens", "text_model.embeddings.token_embedding"],
)
def test_embeddings_are_quantized_for_comfyui_only(name: str) -> None:
    shapes: Shapes = {f"{name}.weight": (32128, 4096)}
    assert [types(shapes, "Q8_0", "t5", t)[f"{name}.weight"] for t in TARGETS] == [
        "Q8_0",
        "high",
        "high",
    ]


def test_layers_that_are_known_not_to_be_linear_are_not_quantized() -> None:
    shapes: Shapes = {"a.weight": (512, 512), "b.weight": (512, 512)}
    plans = plan_types(shapes, "Q8_0", "flux", "diffusers", linear={"a.weight"})
    assert [plan.type_name for plan in plans] == ["Q8_0", None]
    assert plans[1].reason == "not the weight of a Linear layer"
    named: Shapes = {"class_embedding.weight": (512, 512)}
    (plan,) = plan_types(named, "Q8_0", "flux", "diffusers", linear=named)
    assert plan.type_name == "Q8_0"
    conv: Shapes = {"x.weight": (256, 64, 3, 3)}
    (plan,) = plan_types(conv, "Q8_0", "sd1", "comfy", linear=())
    assert plan.type_name == "Q8_0"


@pytest.mark.parametrize(
    ("dtype", "ndim", "target", "expected"),
    [
        (torch.bfloat16, 1, "comfy", "F32"),
        (torch.float16, 1, "sdcpp", "F32"),
        (torch.float16, 0, "comfy", "F32"),
        (torch.bfloat16, 2, "comfy", "BF16"),
        (torch.bfloat16, 2, "sdcpp", "BF16"),
        (torch.bfloat16, 2, "diffusers", "F16"),
        (torch.bfloat16, 4, "comfy", "F16"),
        (torch.float32, 2, "comfy", "F16"),
        (torch.float8_e5m2, 4, "diffusers", "F16"),
        (torch.bfloat16, 5, "comfy", "F32"),
    ],
)
def test_high_precision_depends_on_the_source_and_on_who_reads(
    dtype: torch.dtype, ndim: int, target: str, expected: str
) -> None:
    assert high_precision_type(dtype, 1.0, ndim, target) == expected


def test_bare_parameters_are_never_bfloat16() -> None:
    plan = TensorPlan("register_tokens", (64, 512), (64, 512), None, is_weight=False)
    assert settled(plan, torch.bfloat16, 1.0, "comfy").type_name == "F16"


@pytest.mark.parametrize("max_abs", [65505.0, 1e30, float("inf"), float("nan")])
def test_values_beyond_float16_are_not_stored_in_it(max_abs: float) -> None:
    assert high_precision_type(torch.float32, 65504.0, 2, "comfy") == "F16"
    assert high_precision_type(torch.float32, max_abs, 2, "comfy") == "F32"
    assert high_precision_type(torch.bfloat16, max_abs, 2, "diffusers") == "F32"
    assert high_precision_type(torch.bfloat16, max_abs, 2, "comfy") == "BF16"
    assert high_precision_type(torch.bfloat16, max_abs, 4, "comfy") == "F32"


def test_quantized_weights_whose_scales_may_overflow_are_kept() -> None:
    plan = of((512, 96))
    assert settled(plan, torch.float32, 65504.0, "comfy") is plan
    kept = settled(plan, torch.float32, 1e6, "comfy")
    assert kept.type_name == "F32"
    assert (
        kept.reason == f"{plan.reason}; instead of Q5_0: values up to 1e+06 do not fit in float16"
    )
    assert settled(of((512, 512), "F16"), torch.bfloat16, 1e6, "comfy").type_name == "BF16"
    for name in ("F32", "BF16"):
        assert settled(of((512, 512), name), torch.float32, 1e6, "comfy").type_name == name


@pytest.mark.parametrize("name", sorted({*QUANTIZERS, *MIXES, "F32"} - {"F16", "BF16", "Q2_0"}))
def test_file_types_are_llama_cpps(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    known = {kind.name.removeprefix("MOSTLY_"): kind.value for kind in gguf.LlamaFileType}
    aliases = {"F32": "ALL_F32", "MXFP4": "MXFP4_MOE", "Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S"}
    aliases |= {"Q5_K": "Q5_K_S"}
    assert FILE_TYPES[name] == known[aliases.get(name, name)]
    assert (FILE_TYPES["F16"], FILE_TYPES["BF16"]) == (known["F16"], known["BF16"])


def test_metadata_of_types_and_mixes() -> None:
    assert metadata_for("flux", "q4_k_m") == [
        ("general.architecture", "str", "flux"),
        ("general.quantization_version", "u32", 2),
        ("general.file_type", "u32", 15),
    ]
    assert metadata_for(None, "Q2_0") == [("general.quantization_version", "u32", 2)]


def test_no_arrays_beside_five_dimensions_for_stable_diffusion_cpp() -> None:
    entries = [*metadata_for("wan", "Q8_0"), ("tokens", "i32", (1, 2))]
    plans = plan_types(WAN, "Q8_0", "wan", "sdcpp")
    with pytest.raises(ConfigError, match=r"array \(tokens\) and a .*\(patch_embedding.weight\)"):
        check_metadata(entries, plans, "sdcpp")
    check_metadata(entries, plans, "comfy")
    check_metadata(entries[:-1], plans, "sdcpp")
    check_metadata(entries, plan_types(FLUX, "Q8_0", "flux", "sdcpp"), "sdcpp")


def test_comfyui_needs_an_architecture() -> None:
    with pytest.raises(ConfigError, match=r"ComfyUI-GGUF needs an architecture; known: flux"):
        plan_types(FLUX, "Q8_0", None, "comfy")
    (plan,) = plan_types({"img_in.weight": (512, 512)}, "Q8_0", None, "sdcpp")
    assert plan.reason.startswith("no architecture: nothing is kept")


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("q4_km", "comfy", r"'q4_km' is unknown; did you mean 'Q4_K_M'\?; lowbits makes F32"),
        ("IQ2_XXS", "comfy", "'IQ2_XXS' can be decoded only; lowbits makes"),
        ("NVFP4", "diffusers", "diffusers does not read NVFP4; it reads F32"),
        ("MXFP4", "diffusers", "diffusers does not read MXFP4"),
        ("Q1_0", "comfy", "comfy does not read Q1_0"),
        ("Q8_0", "comfi", "target: expected one of comfy, sdcpp, diffusers, got 'comfi'; did you"),
    ],
)
def test_types_that_nobody_makes_or_reads_are_refused(kind: str, target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_types(FLUX, kind, "flux", target)


def test_what_is_read_includes_what_is_fallen_back_to() -> None:
    for target in TARGETS:
        for kind in (*MIXES, *QUANTIZERS):
            try:
                plans = plan_types({"x.weight": (512, 96)}, kind, "flux", target)
            except ConfigError:
                continue
            fallback = plans[0].type_name or "F16"
            plan_types({"x.weight": (512, 96)}, fallback, "flux", target)


def test_fallbacks_have_smaller_blocks() -> None:
    for kind in TYPES.values():
        chain = [kind]
        while chain[-1].fallback:
            chain.append(TYPES[chain[-1].fallback])
        assert all(after.weights < before.weights for before, after in pairwise(chain))


def test_diffusers_reads_what_it_is_given() -> None:
    utils = pytest.importorskip(
        "diffusers.quantizers.gguf.utils", reason="diffusers or gguf is not installed"
    )
    readable = {kind.name for kind in utils.SUPPORTED_GGUF_QUANT_TYPES} | {"F32", "F16"}
    for kind in ("F32", *QUANTIZERS):
        if kind in readable:
            plan_types(FLUX, kind, "flux", "diffusers")
        else:
            with pytest.raises(ConfigError, match="diffusers does not read"):
                plan_types(FLUX, kind, "flux", "diffusers")


@pytest.mark.parametrize("name", ["", "x" * 128, "ä" * 64])
def test_names_that_readers_do_not_take_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="GGUF readers take 1 to 127"):
        plan_types({name: (4,)}, "Q8_0", None, "diffusers")
    plan_types({"x" * 127: (4,), "ä" * 63: (4,)}, "Q8_0", None, "diffusers")
