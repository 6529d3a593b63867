"""The names that reference checkpoints give to the tensors of diffusers' models.

Names only: which rows of a model's tensors a reference tensor is made of is not written here, but
read off the converter that goes the other way (`row_tracing`), which also refuses a wrong name.

A line of a table holds a model's name and the reference's; ``#`` is the number of a block, ``[]``
a choice (in brackets one that is repeated, as the second group), and what follows (``.weight``) is
kept. Names in no line are the same in both.

Source: the converters in ``diffusers.loaders.single_file_utils`` (huggingface/diffusers), each
named at its table, read backwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lowbits.errors import ConfigError
from lowbits.integrations.renaming import ldm_namer, renamed, rules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

#: ``convert_flux_transformer_checkpoint_to_diffusers``, for FLUX.1 (with and without guidance).
_FLUX: Final = """
time_text_embed.timestep_embedder.linear_1         time_in.in_layer
time_text_embed.timestep_embedder.linear_2         time_in.out_layer
time_text_embed.text_embedder.linear_1             vector_in.in_layer
time_text_embed.text_embedder.linear_2             vector_in.out_layer
time_text_embed.guidance_embedder.linear_1         guidance_in.in_layer
time_text_embed.guidance_embedder.linear_2         guidance_in.out_layer
context_embedder                                   txt_in
x_embedder                                         img_in
transformer_blocks.#.norm1.linear                  double_blocks.#.img_mod.lin
transformer_blocks.#.norm1_context.linear          double_blocks.#.txt_mod.lin
transformer_blocks.#.attn.to_[qkv]                 double_blocks.#.img_attn.qkv
transformer_blocks.#.attn.add_[qkv]_proj           double_blocks.#.txt_attn.qkv
transformer_blocks.#.attn.norm_q.weight            double_blocks.#.img_attn.norm.query_norm.scale
transformer_blocks.#.attn.norm_k.weight            double_blocks.#.img_attn.norm.key_norm.scale
transformer_blocks.#.attn.norm_added_q.weight      double_blocks.#.txt_attn.norm.query_norm.scale
transformer_blocks.#.attn.norm_added_k.weight      double_blocks.#.txt_attn.norm.key_norm.scale
transformer_blocks.#.attn.to_out.0                 double_blocks.#.img_attn.proj
transformer_blocks.#.attn.to_add_out               double_blocks.#.txt_attn.proj
transformer_blocks.#.ff.net.0.proj                 double_blocks.#.img_mlp.0
transformer_blocks.#.ff.net.2                      double_blocks.#.img_mlp.2
transformer_blocks.#.ff_context.net.0.proj         double_blocks.#.txt_mlp.0
transformer_blocks.#.ff_context.net.2              double_blocks.#.txt_mlp.2
single_transformer_blocks.#.norm.linear            single_blocks.#.modulation.lin
single_transformer_blocks.#.attn.to_[qkv]          single_blocks.#.linear1
single_transformer_blocks.#.proj_mlp               single_blocks.#.linear1
single_transformer_blocks.#.attn.norm_q.weight     single_blocks.#.norm.query_norm.scale
single_transformer_blocks.#.attn.norm_k.weight     single_blocks.#.norm.key_norm.scale
single_transformer_blocks.#.proj_out               single_blocks.#.linear2
norm_out.linear                                    final_layer.adaLN_modulation.1
proj_out                                           final_layer.linear
"""

#: ``convert_chroma_transformer_checkpoint_to_diffusers``; the blocks are those of FLUX.1.
_CHROMA: Final = (
    _FLUX
    + """
distilled_guidance_layer.layers.#.linear_1         distilled_guidance_layer.layers.#.in_layer
distilled_guidance_layer.layers.#.linear_2         distilled_guidance_layer.layers.#.out_layer
distilled_guidance_layer.norms.#.weight            distilled_guidance_layer.norms.#.scale
"""
)

#: ``convert_flux2_transformer_checkpoint_to_diffusers``.
_FLUX2: Final = """
time_guidance_embed.timestep_embedder.linear_1     time_in.in_layer
time_guidance_embed.timestep_embedder.linear_2     time_in.out_layer
time_guidance_embed.guidance_embedder.linear_1     guidance_in.in_layer
time_guidance_embed.guidance_embedder.linear_2     guidance_in.out_layer
context_embedder                                   txt_in
x_embedder                                         img_in
double_stream_modulation_img.linear                double_stream_modulation_img.lin
double_stream_modulation_txt.linear                double_stream_modulation_txt.lin
single_stream_modulation.linear                    single_stream_modulation.lin
transformer_blocks.#.attn.to_[qkv]                 double_blocks.#.img_attn.qkv
transformer_blocks.#.attn.add_[qkv]_proj           double_blocks.#.txt_attn.qkv
transformer_blocks.#.attn.norm_q.weight            double_blocks.#.img_attn.norm.query_norm.scale
transformer_blocks.#.attn.norm_k.weight            double_blocks.#.img_attn.norm.key_norm.scale
transformer_blocks.#.attn.norm_added_q.weight      double_blocks.#.txt_attn.norm.query_norm.scale
transformer_blocks.#.attn.norm_added_k.weight      double_blocks.#.txt_attn.norm.key_norm.scale
transformer_blocks.#.attn.to_out.0                 double_blocks.#.img_attn.proj
transformer_blocks.#.attn.to_add_out               double_blocks.#.txt_attn.proj
transformer_blocks.#.ff.linear_in                  double_blocks.#.img_mlp.0
transformer_blocks.#.ff.linear_out                 double_blocks.#.img_mlp.2
transformer_blocks.#.ff_context.linear_in          double_blocks.#.txt_mlp.0
transformer_blocks.#.ff_context.linear_out         double_blocks.#.txt_mlp.2
single_transformer_blocks.#.attn.to_qkv_mlp_proj   single_blocks.#.linear1
single_transformer_blocks.#.attn.to_out            single_blocks.#.linear2
single_transformer_blocks.#.attn.norm_q.weight     single_blocks.#.norm.query_norm.scale
single_transformer_blocks.#.attn.norm_k.weight     single_blocks.#.norm.key_norm.scale
norm_out.linear                                    final_layer.adaLN_modulation.1
proj_out                                           final_layer.linear
"""

#: ``convert_sd3_transformer_checkpoint_to_diffusers``.
_SD3: Final = """
pos_embed.pos_embed                                pos_embed
pos_embed.proj                                     x_embedder.proj
time_text_embed.timestep_embedder.linear_1         t_embedder.mlp.0
time_text_embed.timestep_embedder.linear_2         t_embedder.mlp.2
time_text_embed.text_embedder.linear_1             y_embedder.mlp.0
time_text_embed.text_embedder.linear_2             y_embedder.mlp.2
transformer_blocks.#.attn.to_[qkv]                 joint_blocks.#.x_block.attn.qkv
transformer_blocks.#.attn.add_[qkv]_proj           joint_blocks.#.context_block.attn.qkv
transformer_blocks.#.attn.norm_q                   joint_blocks.#.x_block.attn.ln_q
transformer_blocks.#.attn.norm_k                   joint_blocks.#.x_block.attn.ln_k
transformer_blocks.#.attn.norm_added_q             joint_blocks.#.context_block.attn.ln_q
transformer_blocks.#.attn.norm_added_k             joint_blocks.#.context_block.attn.ln_k
transformer_blocks.#.attn.to_out.0                 joint_blocks.#.x_block.attn.proj
transformer_blocks.#.attn.to_add_out               joint_blocks.#.context_block.attn.proj
transformer_blocks.#.attn2.to_[qkv]                joint_blocks.#.x_block.attn2.qkv
transformer_blocks.#.attn2.norm_q                  joint_blocks.#.x_block.attn2.ln_q
transformer_blocks.#.attn2.norm_k                  joint_blocks.#.x_block.attn2.ln_k
transformer_blocks.#.attn2.to_out.0                joint_blocks.#.x_block.attn2.proj
transformer_blocks.#.norm1.linear                  joint_blocks.#.x_block.adaLN_modulation.1
transformer_blocks.#.norm1_context.linear          joint_blocks.#.context_block.adaLN_modulation.1
transformer_blocks.#.ff.net.0.proj                 joint_blocks.#.x_block.mlp.fc1
transformer_blocks.#.ff.net.2                      joint_blocks.#.x_block.mlp.fc2
transformer_blocks.#.ff_context.net.0.proj         joint_blocks.#.context_block.mlp.fc1
transformer_blocks.#.ff_context.net.2              joint_blocks.#.context_block.mlp.fc2
norm_out.linear                                    final_layer.adaLN_modulation.1
proj_out                                           final_layer.linear
"""

#: ``convert_auraflow_transformer_checkpoint_to_diffusers``.
_AURA: Final = """
time_step_proj.linear_1                            t_embedder.mlp.0
time_step_proj.linear_2                            t_embedder.mlp.2
context_embedder                                   cond_seq_linear
pos_embed.pos_embed                                positional_encoding
pos_embed.proj                                     init_x_linear
joint_transformer_blocks.#.attn.to_([qkv])         double_layers.#.attn.w2\\2
joint_transformer_blocks.#.attn.to_out.0           double_layers.#.attn.w2o
joint_transformer_blocks.#.attn.add_([qkv])_proj   double_layers.#.attn.w1\\2
joint_transformer_blocks.#.attn.to_add_out         double_layers.#.attn.w1o
joint_transformer_blocks.#.norm1.linear            double_layers.#.modX.1
joint_transformer_blocks.#.norm1_context.linear    double_layers.#.modC.1
joint_transformer_blocks.#.ff.linear_([12])        double_layers.#.mlpX.c_fc\\2
joint_transformer_blocks.#.ff.out_projection       double_layers.#.mlpX.c_proj
joint_transformer_blocks.#.ff_context.linear_([12])      double_layers.#.mlpC.c_fc\\2
joint_transformer_blocks.#.ff_context.out_projection     double_layers.#.mlpC.c_proj
single_transformer_blocks.#.attn.to_([qkv])        single_layers.#.attn.w1\\2
single_transformer_blocks.#.attn.to_out.0          single_layers.#.attn.w1o
single_transformer_blocks.#.norm1.linear           single_layers.#.modCX.1
single_transformer_blocks.#.ff.linear_([12])       single_layers.#.mlp.c_fc\\2
single_transformer_blocks.#.ff.out_projection      single_layers.#.mlp.c_proj
norm_out.linear                                    modF.1
proj_out                                           final_linear
"""

#: ``convert_wan_transformer_to_diffusers``, for Wan 2.1 and 2.2, text, image and VACE.
_WAN_BLOCK: Final = """
{0}blocks.#.attn1.to_out.0                         {0}blocks.#.self_attn.o
{0}blocks.#.attn1.to_([qkv])                       {0}blocks.#.self_attn.\\2
{0}blocks.#.attn1                                  {0}blocks.#.self_attn
{0}blocks.#.attn2.to_out.0                         {0}blocks.#.cross_attn.o
{0}blocks.#.attn2.to_([qkv])                       {0}blocks.#.cross_attn.\\2
{0}blocks.#.attn2.add_k_proj                       {0}blocks.#.cross_attn.k_img
{0}blocks.#.attn2.add_v_proj                       {0}blocks.#.cross_attn.v_img
{0}blocks.#.attn2.norm_added_k                     {0}blocks.#.cross_attn.norm_k_img
{0}blocks.#.attn2                                  {0}blocks.#.cross_attn
{0}blocks.#.norm2                                  {0}blocks.#.norm3
{0}blocks.#.norm3                                  {0}blocks.#.norm2
{0}blocks.#.ffn.net.0.proj                         {0}blocks.#.ffn.0
{0}blocks.#.ffn.net.2                              {0}blocks.#.ffn.2
{0}blocks.#.scale_shift_table                      {0}blocks.#.modulation
{0}blocks.#.proj_in                                {0}blocks.#.before_proj
{0}blocks.#.proj_out                               {0}blocks.#.after_proj
"""
_WAN: Final = (
    """
condition_embedder.time_embedder.linear_1          time_embedding.0
condition_embedder.time_embedder.linear_2          time_embedding.2
condition_embedder.text_embedder.linear_1          text_embedding.0
condition_embedder.text_embedder.linear_2          text_embedding.2
condition_embedder.time_proj                       time_projection.1
condition_embedder.image_embedder.norm1            img_emb.proj.0
condition_embedder.image_embedder.ff.net.0.proj    img_emb.proj.1
condition_embedder.image_embedder.ff.net.2         img_emb.proj.3
condition_embedder.image_embedder.norm2            img_emb.proj.4
scale_shift_table                                  head.modulation
proj_out                                           head.head
"""
    + _WAN_BLOCK.format("")
    + _WAN_BLOCK.format("vace_")
)

_LUMINA_BLOCK: Final = """
{0}.#.attn.to_[qkv]                                {0}.#.attention.qkv
{0}.#.attn.to_out.0                                {0}.#.attention.out
{0}.#.attn.norm_q                                  {0}.#.attention.q_norm
{0}.#.attn.norm_k                                  {0}.#.attention.k_norm
{0}.#.feed_forward.linear_1                        {0}.#.feed_forward.w1
{0}.#.feed_forward.linear_2                        {0}.#.feed_forward.w2
{0}.#.feed_forward.linear_3                        {0}.#.feed_forward.w3
{0}.#.norm1.linear                                 {0}.#.adaLN_modulation.1
{0}.#.norm1.norm                                   {0}.#.attention_norm1
{0}.#.norm1                                        {0}.#.attention_norm1
{0}.#.norm2                                        {0}.#.attention_norm2
"""
#: ``convert_lumina2_to_diffusers``.
_LUMINA2: Final = (
    """
time_caption_embed.caption_embedder                cap_embedder
time_caption_embed.timestep_embedder.linear_1      t_embedder.mlp.0
time_caption_embed.timestep_embedder.linear_2      t_embedder.mlp.2
norm_out.linear_1                                  final_layer.adaLN_modulation.1
norm_out.linear_2                                  final_layer.linear
"""
    + _LUMINA_BLOCK.format("layers")
    + _LUMINA_BLOCK.format("noise_refiner")
    + _LUMINA_BLOCK.format("context_refiner")
)

_Z_IMAGE_BLOCK: Final = """
{0}.#.attention.to_[qkv]                           {0}.#.attention.qkv
{0}.#.attention.to_out.0                           {0}.#.attention.out
{0}.#.attention.norm_q                             {0}.#.attention.q_norm
{0}.#.attention.norm_k                             {0}.#.attention.k_norm
"""
#: ``convert_z_image_transformer_checkpoint_to_diffusers``.
_Z_IMAGE: Final = (
    """
all_final_layer.2-1                                final_layer
all_x_embedder.2-1                                 x_embedder
"""
    + _Z_IMAGE_BLOCK.format("layers")
    + _Z_IMAGE_BLOCK.format("noise_refiner")
    + _Z_IMAGE_BLOCK.format("context_refiner")
)

#: ``convert_ltx_transformer_checkpoint_to_diffusers``.
_LTX: Final = """
proj_in                                            patchify_proj
time_embed                                         adaln_single
transformer_blocks.#.attn1.norm_q                  transformer_blocks.#.attn1.q_norm
transformer_blocks.#.attn1.norm_k                  transformer_blocks.#.attn1.k_norm
transformer_blocks.#.attn2.norm_q                  transformer_blocks.#.attn2.q_norm
transformer_blocks.#.attn2.norm_k                  transformer_blocks.#.attn2.k_norm
"""

#: ``convert_hunyuan_video_transformer_to_diffusers``.
_HUNYUAN: Final = """
x_embedder                                         img_in
time_text_embed.timestep_embedder.linear_1         time_in.mlp.0
time_text_embed.timestep_embedder.linear_2         time_in.mlp.2
time_text_embed.guidance_embedder.linear_1         guidance_in.mlp.0
time_text_embed.guidance_embedder.linear_2         guidance_in.mlp.2
time_text_embed.text_embedder.linear_1             vector_in.in_layer
time_text_embed.text_embedder.linear_2             vector_in.out_layer
context_embedder.proj_in                           txt_in.input_embedder
context_embedder.time_text_embed.timestep_embedder.linear_1   txt_in.t_embedder.mlp.0
context_embedder.time_text_embed.timestep_embedder.linear_2   txt_in.t_embedder.mlp.2
context_embedder.time_text_embed.text_embedder     txt_in.c_embedder
{refiner}.attn.to_[qkv]                            {blocks}.self_attn_qkv
{refiner}.attn.to_out.0                            {blocks}.self_attn_proj
{refiner}.norm_out.linear                          {blocks}.adaLN_modulation.1
{refiner}.ff.net.0.proj                            {blocks}.mlp.fc1
{refiner}.ff.net.2                                 {blocks}.mlp.fc2
{refiner}                                          {blocks}
transformer_blocks.#.attn.to_[qkv]                 double_blocks.#.img_attn_qkv
transformer_blocks.#.attn.norm_q                   double_blocks.#.img_attn_q_norm
transformer_blocks.#.attn.norm_k                   double_blocks.#.img_attn_k_norm
transformer_blocks.#.attn.to_out.0                 double_blocks.#.img_attn_proj
transformer_blocks.#.attn.add_[qkv]_proj           double_blocks.#.txt_attn_qkv
transformer_blocks.#.attn.norm_added_q             double_blocks.#.txt_attn_q_norm
transformer_blocks.#.attn.norm_added_k             double_blocks.#.txt_attn_k_norm
transformer_blocks.#.attn.to_add_out               double_blocks.#.txt_attn_proj
transformer_blocks.#.norm1.linear                  double_blocks.#.img_mod.linear
transformer_blocks.#.norm1_context.linear          double_blocks.#.txt_mod.linear
transformer_blocks.#.ff.net.0.proj                 double_blocks.#.img_mlp.fc1
transformer_blocks.#.ff.net.2                      double_blocks.#.img_mlp.fc2
transformer_blocks.#.ff_context.net.0.proj         double_blocks.#.txt_mlp.fc1
transformer_blocks.#.ff_context.net.2              double_blocks.#.txt_mlp.fc2
single_transformer_blocks.#.attn.to_[qkv]          single_blocks.#.linear1
single_transformer_blocks.#.proj_mlp               single_blocks.#.linear1
single_transformer_blocks.#.attn.norm_q            single_blocks.#.q_norm
single_transformer_blocks.#.attn.norm_k            single_blocks.#.k_norm
single_transformer_blocks.#.norm.linear            single_blocks.#.modulation.linear
single_transformer_blocks.#.proj_out               single_blocks.#.linear2
norm_out.linear                                    final_layer.adaLN_modulation.1
proj_out                                           final_layer.linear
""".format(
    refiner="context_embedder.token_refiner.refiner_blocks.#",
    blocks="txt_in.individual_token_refiner.blocks.#",
)

_TABLES: Final[Mapping[str, str]] = {
    "FluxTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _CHROMA,
    "Flux2Transformer2DModel": _FLUX2,
    "SD3Transformer2DModel": _SD3,
    "AuraFlowTransformer2DModel": _AURA,
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "Lumina2Transformer2DModel": _LUMINA2,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "LTXVideoTransformer3DModel": _LTX,
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    # Their reference checkpoints have diffusers' names.
    "QwenImageTransformer2DModel": "",
    "HiDreamImageTransformer2DModel": "",
}


def reference_namer(class_name: str, names: Iterable[str], config: Any) -> Callable[[str], str]:
    """Return what gives the reference's name of the tensor that holds a model's tensor.

    Several tensors of a model may be of one name: parts of a fused weight.

    Args:
        class_name: of the diffusers model, or of its base class.
        names: of all of the model's tensors.
        config: the model's.

    Raises:
        ConfigError: no reference names are known for this class.
    """
    if class_name == "UNet2DConditionModel":
        return ldm_namer(set(names), config["layers_per_block"])
    if class_name not in _TABLES:
        raise ConfigError(
            f"no reference names are known for a {class_name}; known: "
            f"{', '.join(['UNet2DConditionModel', *_TABLES])}. Save it with diffusers' names"
        )
    rules = rules_of(_TABLES[class_name])
    return lambda name: renamed(name, rules)
