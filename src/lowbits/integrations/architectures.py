"""What a checkpoint is of, by the names of its tensors, and which parts of a pipeline it holds.

Names of architectures are those of ``general.architecture`` in GGUF files of image models
(city96/ComfyUI-GGUF ``loader.py``), so several models share one: FLUX.1, Chroma and FLUX.2 are
``flux``; Lumina 2 and Z-Image are ``lumina2``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

#: ``reference`` is what the model's authors call its tensors; ``library`` diffusers, transformers.
Naming = Literal["reference", "library", "llama.cpp", "open_clip"]


@final
@dataclass(frozen=True)
class Architecture:
    """What tensors are of.

    Attributes:
        name: ``flux``, ``sdxl``, ``t5``, ...
        part: of a pipeline: ``denoiser``, ``text_encoder`` or ``vae``.
        naming: whose names they have.
    """

    name: str
    part: str
    naming: Naming


#: Names that only tensors of an architecture have together; the first line that is there counts.
#: After ``keys_detect`` of city96/ComfyUI-GGUF ``tools/convert.py``; of the first block, and first
#: what would be taken for another.
_SIGNS: Final[tuple[tuple[str, str, Naming, tuple[str, ...]], ...]] = (
    (
        "qwen_image",
        "denoiser",
        "library",
        (
            "transformer_blocks.0.attn.add_q_proj.weight",
            "transformer_blocks.0.img_mlp.net.0.proj.weight",
        ),
    ),
    ("hyvid", "denoiser", "reference", ("double_blocks.0.img_attn_proj.weight",)),
    (
        "hyvid",
        "denoiser",
        "library",
        ("context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight",),
    ),
    ("flux", "denoiser", "reference", ("double_blocks.0.img_attn.proj.weight",)),
    (
        "flux",
        "denoiser",
        "library",
        (
            "transformer_blocks.0.attn.add_q_proj.weight",
            "single_transformer_blocks.0.attn.norm_q.weight",
        ),
    ),
    ("sd3", "denoiser", "reference", ("joint_blocks.0.x_block.attn.qkv.weight",)),
    (
        "sd3",
        "denoiser",
        "library",
        ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"),
    ),
    ("aura", "denoiser", "reference", ("double_layers.0.modX.1.weight",)),
    (
        "aura",
        "denoiser",
        "library",
        ("joint_transformer_blocks.0.ff_context.out_projection.weight",),
    ),
    (
        "hidream",
        "denoiser",
        "library",
        ("double_stream_blocks.0.block.ff_i.shared_experts.w3.weight",),
    ),
    (
        "cosmos",
        "denoiser",
        "reference",
        ("blocks.0.mlp.layer1.weight", "blocks.0.adaln_modulation_cross_attn.1.weight"),
    ),
    (
        "cosmos",
        "denoiser",
        "library",
        ("transformer_blocks.0.norm1.linear_1.weight", "patch_embed.proj.weight"),
    ),
    (
        "ltxv",
        "denoiser",
        "reference",
        ("adaln_single.emb.timestep_embedder.linear_2.weight", "patchify_proj.weight"),
    ),
    (
        "ltxv",
        "denoiser",
        "library",
        ("time_embed.emb.timestep_embedder.linear_2.weight", "proj_in.weight"),
    ),
    ("wan", "denoiser", "reference", ("blocks.0.self_attn.norm_q.weight", "head.modulation")),
    ("wan", "denoiser", "library", ("condition_embedder.time_proj.weight", "scale_shift_table")),
    (
        "lumina2",
        "denoiser",
        "reference",
        ("cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight"),
    ),
    ("lumina2", "denoiser", "library", ("time_caption_embed.caption_embedder.1.weight",)),
    (
        "lumina2",
        "denoiser",
        "library",
        ("cap_embedder.1.weight", "context_refiner.0.attention.to_q.weight"),
    ),
    ("sdxl", "denoiser", "reference", ("input_blocks.0.0.weight", "label_emb.0.0.weight")),
    ("sdxl", "denoiser", "library", ("conv_in.weight", "add_embedding.linear_1.weight")),
    (
        "sd1",
        "denoiser",
        "reference",
        ("input_blocks.0.0.weight", "middle_block.0.in_layers.0.bias"),
    ),
    ("sd1", "denoiser", "library", ("conv_in.weight", "mid_block.resnets.0.conv1.weight")),
    ("vae", "vae", "reference", ("decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight")),
    (
        "vae",
        "vae",
        "library",
        ("decoder.conv_in.weight", "decoder.mid_block.resnets.0.conv1.weight"),
    ),
    ("wan_vae", "vae", "reference", ("decoder.middle.0.residual.0.gamma",)),
    ("t5", "text_encoder", "llama.cpp", ("enc.blk.0.attn_q.weight",)),
    ("t5", "text_encoder", "library", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
    (
        "clip_l",
        "text_encoder",
        "library",
        ("text_model.encoder.layers.0.self_attn.q_proj.weight",),
    ),
    ("clip_l", "text_encoder", "library", ("encoder.layers.0.self_attn.q_proj.weight",)),
    ("clip_g", "text_encoder", "open_clip", ("transformer.resblocks.0.attn.in_proj_weight",)),
    ("qwen3", "text_encoder", "llama.cpp", ("blk.0.attn_q.weight", "blk.0.attn_q_norm.weight")),
    ("qwen2vl", "text_encoder", "llama.cpp", ("blk.0.attn_q.weight", "blk.0.attn_q.bias")),
    ("llama", "text_encoder", "llama.cpp", ("blk.0.attn_q.weight",)),
    ("llama", "text_encoder", "library", ("model.layers.0.self_attn.q_proj.weight",)),
)

#: Architectures of language models: their tensors' names are the same, so the file's word counts.
LANGUAGE_MODELS: Final = ("llama", "qwen2", "qwen2vl", "qwen3", "qwen3vl")

#: Prefixes of a pipeline's parts in checkpoints that hold several, and in those saved from them.
_PARTS: Final[Mapping[str, str]] = {
    "model.diffusion_model.": "denoiser",
    "diffusion_model.": "denoiser",
    "first_stage_model.": "vae",
    "vae.": "vae",
    "cond_stage_model.transformer.": "clip_l",
    "cond_stage_model.model.": "clip_h",
    "conditioner.embedders.0.transformer.": "clip_l",
    "conditioner.embedders.0.model.": "clip_g",
    "conditioner.embedders.1.model.": "clip_g",
    "text_encoders.clip_l.transformer.": "clip_l",
    "text_encoders.clip_g.transformer.": "clip_g",
    "text_encoders.t5xxl.transformer.": "t5",
    "text_encoders.umt5xxl.transformer.": "t5",
    "text_encoders.llama.transformer.": "llama",
    "text_encoders.llava_llama3.transformer.": "llama",
    "text_encoders.gemma2_2b.transformer.": "gemma2",
    "text_encoders.qwen25_7b.transformer.": "qwen2vl",
    "text_encoders.qwen3_4b.transformer.": "qwen3",
}

#: Prefixes that tools leave in front of a model's names.
_WRAPPERS: Final = ("model.", "net.", "transformer.", "module.", "_orig_mod.")

#: Those of denoisers.
_DENOISERS: Final = ("model.diffusion_model.", "diffusion_model.")


def parts_of(names: Iterable[str]) -> dict[str, str]:
    """Return the prefix of each part of a pipeline that a checkpoint holds.

    Parts are ``denoiser``, ``vae``, and text encoders by what they are (``clip_l``, ``clip_g``,
    ``t5``, ...). A checkpoint of one model whose names have no prefix is its part under ``""``;
    one that is of nothing known has no parts.

    Example:
        >>> parts_of(["model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias"])
        {'denoiser': 'model.diffusion_model.', 'vae': 'first_stage_model.'}
    """
    names = list(names)
    parts: dict[str, str] = {}
    for prefix, part in _PARTS.items():
        if part not in parts and any(name.startswith(prefix) for name in names):
            parts[part] = prefix
    found = None if parts else architecture_of(names)
    if found is None:
        return parts
    return {found.name if found.part == "text_encoder" else found.part: ""}


def prefixes_of(names: Collection[str]) -> list[str]:
    """Return the prefixes that names of a model may have to lose, none first.

    Newer versions of transformers have CLIP without its ``text_model.``: that one comes last.
    """
    bases = ["", *_PARTS, *_WRAPPERS]
    return [
        prefix
        for prefix in (*bases, *(f"{base}text_model." for base in bases))
        if not prefix or any(name.startswith(prefix) for name in names)
    ]


def architecture_of(names: Iterable[str], metadata_arch: str | None = None) -> Architecture | None:
    """Say what a checkpoint is of.

    Of one that holds several models, the denoiser is looked at.

    Args:
        names: of its tensors.
        metadata_arch: ``general.architecture`` of a GGUF file; it tells language models apart.
            Of others the names are believed: files are often marked ``pig``, ``cow``, or wrongly.

    Returns:
        The architecture, or None where the names are of none that is known.
    """
    names = set(names)
    for prefix in sorted(prefixes_of(names), key=lambda prefix: prefix not in _DENOISERS):
        bare = {name[len(prefix) :] for name in names if name.startswith(prefix)}
        found = recognized(bare, metadata_arch)
        if found is not None:
            return found
    return None


def recognized(names: Iterable[str], metadata_arch: str | None = None) -> Architecture | None:
    """Say what names without a prefix are of; else as `architecture_of`."""
    names = set(names)
    for arch, part, naming, signs in _SIGNS:
        if names.issuperset(signs):
            told = arch in LANGUAGE_MODELS and naming == "llama.cpp" and metadata_arch
            return Architecture(str(metadata_arch) if told else arch, part, naming)
    return None
