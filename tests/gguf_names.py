"""Tensors of reference models and diffusers' ones, a block of each, by name and shape."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]

FLUX: Shapes = {
    "img_in.weight": (3072, 64),
    "img_in.bias": (3072,),
    "time_in.in_layer.weight": (3072, 256),
    "vector_in.in_layer.weight": (3072, 768),
    "guidance_in.out_layer.weight": (3072, 3072),
    "txt_in.weight": (3072, 4096),
    "double_blocks.0.img_mod.lin.weight": (18432, 3072),
    "double_blocks.0.img_attn.norm.query_norm.scale": (128,),
    "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
    "double_blocks.0.img_attn.proj.weight": (3072, 3072),
    "double_blocks.0.txt_attn.qkv.weight": (9216, 3072),
    "double_blocks.0.img_mlp.0.weight": (12288, 3072),
    "double_blocks.0.img_mlp.2.weight": (3072, 12288),
    "double_blocks.0.txt_mlp.2.weight": (3072, 12288),
    "single_blocks.0.linear1.weight": (21504, 3072),
    "single_blocks.0.linear2.weight": (3072, 15360),
    "final_layer.linear.weight": (64, 3072),
    "final_layer.adaLN_modulation.1.weight": (6144, 3072),
}
FLUX_DIFFUSERS: Shapes = {
    "x_embedder.weight": (3072, 64),
    "context_embedder.weight": (3072, 4096),
    "time_text_embed.timestep_embedder.linear_1.weight": (3072, 256),
    "transformer_blocks.0.norm1.linear.weight": (18432, 3072),
    "transformer_blocks.0.attn.to_q.weight": (3072, 3072),
    "transformer_blocks.0.attn.to_v.weight": (3072, 3072),
    "transformer_blocks.0.attn.add_v_proj.weight": (3072, 3072),
    "transformer_blocks.0.ff.net.0.proj.weight": (12288, 3072),
    "transformer_blocks.0.ff.net.2.weight": (3072, 12288),
    "transformer_blocks.0.ff_context.net.2.weight": (3072, 12288),
    "single_transformer_blocks.0.proj_mlp.weight": (12288, 3072),
    "single_transformer_blocks.0.proj_out.weight": (3072, 15360),
    "norm_out.linear.weight": (6144, 3072),
    "proj_out.weight": (64, 3072),
}
SD3: Shapes = {
    "pos_embed": (1, 36864, 1536),
    "x_embedder.proj.weight": (1536, 16, 2, 2),
    "y_embedder.mlp.0.weight": (1536, 2048),
    "t_embedder.mlp.2.weight": (1536, 1536),
    "context_embedder.weight": (1536, 4096),
    "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536),
    "joint_blocks.0.context_block.attn.proj.weight": (1536, 1536),
    "joint_blocks.0.x_block.mlp.fc2.weight": (1536, 6144),
    "final_layer.linear.weight": (64, 1536),
}
SDXL: Shapes = {
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "time_embed.0.weight": (1280, 320),
    "label_emb.0.0.weight": (1280, 2816),
    "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
    "input_blocks.1.0.emb_layers.1.weight": (320, 1280),
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (640, 640),
    "input_blocks.7.1.transformer_blocks.0.attn1.to_v.weight": (1280, 1280),
    "input_blocks.4.1.proj_in.weight": (640, 640),
    "input_blocks.9.0.odd.weight": (10, 17, 3, 3),
    "out.2.weight": (4, 320, 3, 3),
    "out.2.bias": (4,),
}
WAN: Shapes = {
    "patch_embedding.weight": (5120, 16, 1, 2, 2),
    "text_embedding.0.weight": (5120, 4096),
    "time_embedding.0.weight": (5120, 256),
    "time_projection.1.weight": (30720, 5120),
    "img_emb.proj.1.weight": (1280, 1280),
    "blocks.0.modulation": (1, 6, 5120),
    "blocks.0.self_attn.q.weight": (5120, 5120),
    "blocks.0.self_attn.v.weight": (5120, 5120),
    "blocks.0.cross_attn.v_img.weight": (5120, 5120),
    "blocks.0.ffn.2.weight": (5120, 13824),
    "head.modulation": (1, 2, 5120),
    "head.head.weight": (64, 5120),
}
LTX: Shapes = {
    "adaln_single.emb.timestep_embedder.linear_1.weight": (2048, 256),
    "adaln_single.linear.weight": (12288, 2048),
    "caption_projection.linear_1.weight": (2048, 4096),
    "patchify_proj.weight": (2048, 128),
    "proj_out.weight": (128, 2048),
    "scale_shift_table": (2, 2048),
    "transformer_blocks.0.scale_shift_table": (6, 2048),
    "transformer_blocks.0.attn1.to_v.weight": (2048, 2048),
    "transformer_blocks.0.ff.net.2.weight": (2048, 8192),
}
LUMINA2: Shapes = {
    "x_embedder.weight": (2304, 64),
    "t_embedder.mlp.0.weight": (1024, 256),
    "cap_embedder.1.weight": (2304, 2304),
    "context_refiner.0.attention.qkv.weight": (3840, 2304),
    "noise_refiner.0.feed_forward.w2.weight": (2304, 9216),
    "layers.0.attention.qkv.weight": (3840, 2304),
    "layers.0.feed_forward.w2.weight": (2304, 9216),
    "final_layer.linear.weight": (64, 2304),
}
