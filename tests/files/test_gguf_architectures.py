"""Architectures: what each keeps in high precision, under reference names and diffusers' names."""

from __future__ import annotations

import re

import pytest
from gguf_names import FLUX, FLUX_DIFFUSERS, LTX, LUMINA2, SD3, WAN, Shapes

from lowbits.errors import ConfigError
from lowbits.files.gguf_architectures import ARCHITECTURES, architecture
from lowbits.files.gguf_rules import TARGETS, metadata_for, plan_types


def types(shapes: Shapes, kind: str, arch: str | None, target: str = "comfy") -> dict[str, str]:
    return {p.name: p.type_name or "high" for p in plan_types(shapes, kind, arch, target)}


def quantized(shapes: Shapes, arch: str, target: str = "comfy") -> set[str]:
    kept = ("F32", "high")
    return {name for name, kind in types(shapes, "Q8_0", arch, target).items() if kind not in kept}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("arch", "shapes", "inside"),
    [
        ("flux", FLUX, r"_blocks\..*weight"),
        ("flux", FLUX_DIFFUSERS, r"transformer_blocks\..*weight"),
        ("sd3", SD3, r"joint_blocks\..*weight"),
        ("wan", WAN, r"^blocks\..*weight"),
        ("ltxv", LTX, r"transformer_blocks\..*weight"),
        ("lumina2", LUMINA2, r"^layers\..*weight"),
    ],
)
def test_blocks_are_quantized_and_what_is_around_them_is_not(
    arch: str, shapes: Shapes, inside: str, target: str
) -> None:
    assert quantized(shapes, arch, target) == {n for n in shapes if re.search(inside, n)}


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        (
            "hyvid",
            "txt_in.t_embedder.mlp.0 img_in.x final_layer.linear context_embedder.x proj_out",
        ),
        ("qwen_image", "img_in txt_in time_text_embed.timestep_embedder.linear_1 proj_out"),
        ("aura", "init_x_linear modF.1 cond_seq_linear final_linear t_embedder.mlp.0"),
        (
            "aura",
            "time_step_proj.linear_1 context_embedder pos_embed.proj norm_out.linear proj_out",
        ),
        ("hidream", "p_embedder.x t_embedder.x caption_projection.0.linear final_layer.linear"),
        ("cosmos", "x_embedder.proj.1 t_embedder.1.linear_1 final_layer.linear patch_embed.proj"),
        ("wan", "condition_embedder.time_proj proj_out vace_patch_embedding"),
        (
            "ltxv",
            "time_embed.linear proj_in proj_out audio_patchify_proj av_ca_adaln_single.linear",
        ),
        ("lumina2", "time_caption_embed.caption_embedder.1 norm_out.linear_1 all_x_embedder.2-1"),
        ("sd3", "time_text_embed.x context_embedder norm_out.linear proj_out pos_embed.proj"),
        ("sd1", "time_embedding.linear_1 class_embedding.linear_1 conv_in conv_out"),
        ("sdxl", "add_embedding.linear_1 label_emb.0.0 time_embed.0"),
        (
            "t5",
            "enc.blk.0.attn_rel_b encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        ),
        ("flux", "model.diffusion_model.img_in model.diffusion_model.proj_out"),
        ("flux", "distilled_guidance_layer.in_proj time_guidance_embed.linear_1"),
    ],
)
def test_first_and_last_layers_are_kept(arch: str, names: str) -> None:
    shapes: Shapes = {f"{name}.weight": (512, 512) for name in names.split()}
    plans = plan_types(shapes, "Q8_0", arch, "comfy")
    assert all(p.type_name is None and f"{arch} keeps " in p.reason for p in plans)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("flux", "single_transformer_blocks.0.proj_out.weight"),
        ("wan", "vace_blocks.0.proj_out.weight"),
        ("flux", "double_blocks.0.not_img_in.weight"),
        ("sd1", "input_blocks.0.01.weight"),
    ],
)
def test_names_that_only_look_like_kept_ones_are_quantized(arch: str, name: str) -> None:
    assert types({name: (512, 512)}, "Q8_0", arch) == {name: "Q8_0"}


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("wan", "blocks.0.modulation"),
        ("wan", "blocks.0.scale_shift_table"),
        ("ltxv", "transformer_blocks.0.scale_shift_table"),
        ("hidream", "double_stream_blocks.0.block.ff_i.gate.weight"),
        ("hidream", "img_emb.emb_pos"),
        ("cosmos", "extra_pos_embedder.pos_emb_h"),
        ("cosmos", "learnable_pos_embed.pos_emb_h"),
    ],
)
def test_bare_parameters_that_readers_do_not_take_in_16_bits_are_float32(
    arch: str, name: str
) -> None:
    (plan,) = plan_types({name: (64, 512)}, "Q8_0", arch, "comfy")
    assert (plan.type_name, "in float32" in plan.reason) == ("F32", True)


@pytest.mark.parametrize(
    "arch", ["Flux", "fluxx", "qwen-image", "ltx", "lumina_2", "", " ", "auto"]
)
def test_misspelt_architectures_are_refused(arch: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown architecture .*; known: flux"):
        architecture(arch)
    with pytest.raises(ConfigError, match="did you mean 'flux'"):
        metadata_for("flx", "Q8_0")


@pytest.mark.parametrize(
    "arch", ["krea2", "ideogram", "flux2", "sd2", "chroma", "wan22", "qwen2", "clip_l", "wan_vae"]
)
def test_other_architectures_are_written_but_keep_nothing_and_say_so(arch: str) -> None:
    (plan,) = plan_types({"img_in.weight": (512, 512)}, "Q8_0", arch, "comfy")
    assert plan.type_name == "Q8_0"
    assert plan.reason == (
        f"unknown architecture {arch}: nothing is kept in high precision for its name"
    )
    assert metadata_for(arch, "Q8_0")[0][2] == arch


def test_comfyuis_architectures_are_known() -> None:
    images = "flux sd1 sdxl sd3 aura hidream cosmos ltxv hyvid wan lumina2 qwen_image"
    texts = "t5 t5encoder llama qwen2vl qwen3 qwen3vl"
    assert set(ARCHITECTURES) == {*images.split(), *texts.split()}
    assert all(architecture(name).name == name for name in ARCHITECTURES)
