"""Tiny denoisers of diffusers with random weights, for tests of names and rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

_UNET: Mapping[str, Any] = {
    "sample_size": 8,
    "norm_num_groups": 8,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
}
_FLUX: Mapping[str, Any] = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 5,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (4, 6, 6),
}
_WAN: Mapping[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 8,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}

#: By name: the class, and the config.
CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "flux": ("FluxTransformer2DModel", {**_FLUX, "guidance_embeds": True}),
    "flux-schnell": ("FluxTransformer2DModel", _FLUX),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 5,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 20,
            "approximator_layers": 2,
        },
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 8,
            "axes_dims_rope": (4, 4, 4, 4),
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "pos_embed_max_size": 8,
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "caption_projection_dim": 32,
            "joint_attention_dim": 20,
            "pooled_projection_dim": 12,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
    ),
    "sd3-medium": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "pos_embed_max_size": 8,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "caption_projection_dim": 32,
            "joint_attention_dim": 20,
            "pooled_projection_dim": 12,
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            **_UNET,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
        },
    ),
    "sd15": (
        "UNet2DConditionModel",
        {
            **_UNET,
            "block_out_channels": (16, 16, 32, 32),
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        },
    ),
    "aura": (
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 20,
            "caption_projection_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
    ),
    "wan": ("WanTransformer3DModel", {**_WAN, "cross_attn_norm": True}),
    "wan-image": (
        "WanTransformer3DModel",
        {**_WAN, "image_dim": 20, "added_kv_proj_dim": 24, "cross_attn_norm": True},
    ),
    "wan-vace": (
        "WanVACETransformer3DModel",
        {**_WAN, "cross_attn_norm": True, "vace_layers": [0, 1], "vace_in_channels": 6},
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        {
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 20,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 24,
            "axes_dims": [8, 12, 12],
            "axes_lens": [16, 16, 16],
        },
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 96,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "num_attention_heads": 6,
            "num_kv_heads": 3,
            "multiple_of": 8,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": 20,
        },
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 20,
        },
    ),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_refiner_layers": 2,
            "text_embed_dim": 20,
            "pooled_projection_dim": 12,
            "rope_axes_dim": (4, 6, 6),
        },
    ),
}


def tiny(name: str, **changes: Any) -> Any:
    """Return a model, with other random values in each of its tensors."""
    class_name, config = CONFIGS[name]
    model = getattr(diffusers, class_name).from_config({**config, **changes})
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    return model.eval()
