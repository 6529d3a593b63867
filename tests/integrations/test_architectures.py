"""Which architecture a checkpoint is of, and which parts it holds, by its names alone."""

from __future__ import annotations

import pytest
from tiny_models import CONFIGS, tiny

from lowbits.integrations.architectures import architecture_of, parts_of
from lowbits.integrations.keymaps import to_reference
from lowbits.integrations.module_tensors import tensors_of

ARCHITECTURES = {
    "flux": "flux",
    "flux-schnell": "flux",
    "chroma": "flux",
    "flux2": "flux",
    "sd3": "sd3",
    "sd3-medium": "sd3",
    "sdxl": "sdxl",
    "sd15": "sd1",
    "aura": "aura",
    "wan": "wan",
    "wan-image": "wan",
    "wan-vace": "wan",
    "qwen-image": "qwen_image",
    "z-image": "lumina2",
    "lumina2": "lumina2",
    "ltx": "ltxv",
    "hunyuan": "hyvid",
}


@pytest.fixture(scope="module")
def names() -> dict[str, tuple[list[str], list[str]]]:
    """Return each model's names, and its reference's."""
    return {
        name: (list(tensors_of(model).shapes), list(to_reference(model)))
        for name, model in ((name, tiny(name)) for name in CONFIGS)
    }


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "model.", "net.", "transformer."]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_denoisers(name: str, prefix: str, names: dict[str, tuple[list[str], list[str]]]) -> None:
    own, reference = ([prefix + key for key in group] for group in names[name])
    same = set(own) == set(reference)
    for group, naming in ((own, "library"), (reference, "library" if same else "reference")):
        for metadata in (None, "pig", "llama"):
            found = architecture_of(group, metadata)
            assert found is not None
            assert (found.name, found.part, found.naming) == (
                ARCHITECTURES[name],
                "denoiser",
                naming,
            )


@pytest.mark.parametrize(
    ("signs", "name", "naming"),
    [
        (["enc.blk.0.attn_q.weight"], "t5", "llama.cpp"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "t5", "library"),
        (["text_model.encoder.layers.0.self_attn.q_proj.weight"], "clip_l", "library"),
        (["transformer.resblocks.0.attn.in_proj_weight"], "clip_g", "open_clip"),
        (["blk.0.attn_q.weight"], "llama", "llama.cpp"),
        (["blk.0.attn_q.weight", "blk.0.attn_q.bias"], "qwen2vl", "llama.cpp"),
        (["blk.0.attn_q.weight", "blk.0.attn_q_norm.weight"], "qwen3", "llama.cpp"),
        (["decoder.middle.0.residual.0.gamma"], "wan_vae", "reference"),
        (["decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight"], "vae", "reference"),
        (
            [
                "caption_projection.0.linear.weight",
                "double_stream_blocks.0.block.ff_i.shared_experts.w3.weight",
            ],
            "hidream",
            "library",
        ),
        (
            ["net.blocks.0.mlp.layer1.weight", "net.blocks.0.adaln_modulation_cross_attn.1.weight"],
            "cosmos",
            "reference",
        ),
    ],
)
def test_others(signs: list[str], name: str, naming: str) -> None:
    found = architecture_of(signs)
    assert found is not None
    assert (found.name, found.naming) == (name, naming)


def test_metadata_tells_language_models_apart() -> None:
    signs = ["blk.0.attn_q.weight", "blk.0.attn_q.bias"]
    found = architecture_of(signs, "qwen2")
    assert found is not None
    assert found.name == "qwen2"


def test_nothing_known() -> None:
    assert architecture_of([]) is None
    assert architecture_of(["a", "b"], "flux") is None
    assert parts_of(["a", "b"]) == {}


def test_parts_of_checkpoints_of_pipelines() -> None:
    sd3 = [
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "first_stage_model.decoder.conv_in.weight",
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight",
        "text_encoders.clip_g.transformer.text_model.embeddings.token_embedding.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
    ]
    assert parts_of(sd3) == {
        "denoiser": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "clip_g": "text_encoders.clip_g.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
    }
    found = architecture_of(sd3)
    assert found is not None
    assert found.name == "sd3"
    sdxl = [
        "model.diffusion_model.input_blocks.0.0.weight",
        "vae.decoder.conv_in.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        "conditioner.embedders.1.model.token_embedding.weight",
    ]
    assert parts_of(sdxl) == {
        "denoiser": "model.diffusion_model.",
        "vae": "vae.",
        "clip_l": "conditioner.embedders.0.transformer.",
        "clip_g": "conditioner.embedders.1.model.",
    }


def test_a_checkpoint_of_one_model_is_its_own_part() -> None:
    assert parts_of(["double_blocks.0.img_attn.proj.weight"]) == {"denoiser": ""}
    assert parts_of(["enc.blk.0.attn_q.weight"]) == {"t5": ""}
