"""What image and text models keep in high precision when they are written as GGUF, as data."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Final, final

from lowbits.errors import ConfigError

#: What UIs put in front of a model's names in checkpoints that hold more than one model.
_PREFIX: Final = r"(?:(?:model\.)?diffusion_model\.)?"
#: How alike a name is to a known one that it was meant to be.
_TYPO: Final = 0.85


@final
@dataclass(frozen=True)
class Architecture:
    """An architecture that GGUF readers know by name.

    The patterns are regular expressions for one or more whole parts of a dotted name; one that
    begins with ``^`` matches at the beginning of the name only.

    Attributes:
        name: the value of ``general.architecture``.
        kept: of weights that are never quantized, in reference and in diffusers names.
        float32: of tensors that readers hold as bare Parameters, which they do not take in 16 bits.
        is_reshaped: whether ComfyUI-GGUF takes tensors whose rows are no multiple of 256 as rows of
            256, with their shape in the metadata.
    """

    name: str
    kept: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    is_reshaped: bool = False

    def keeps(self, name: str) -> str | None:
        """Return the part of a tensor's name for which its weights are never quantized."""
        return _first_match(self.kept, name)

    def needs_float32(self, name: str) -> str | None:
        """Return the part of a tensor's name for which it is stored in float32."""
        return _first_match(self.float32, name)


def _named(name: str, kept: str, float32: str = "") -> Architecture:
    is_reshaped = name in ("sd1", "sdxl")
    return Architecture(name, tuple(kept.split()), tuple(float32.split()), is_reshaped)


#: diffusers' names for the layers around the blocks of a diffusion transformer.
_DIFFUSERS: Final = (
    " ^x_embedder ^context_embedder ^time_text_embed ^time_guidance_embed ^norm_out ^proj_out"
)
_FLUX: Final = (
    "txt_in img_in time_in vector_in guidance_in final_layer ^distilled_guidance_layer" + _DIFFUSERS
)
_UNET: Final = (
    r"time_embed label_emb class_embedding time_embedding add_embedding conv_in conv_out"
    r" ^input_blocks\.0\.0 ^out\.2"
)
_T5: Final = "attn_rel_b relative_attention_bias"

#: By name. Reference names: ComfyUI-GGUF's convert.py and lcpp.patch, commit 795e451; of models
#: that those do not know, the layers in the same places.
ARCHITECTURES: Final = {
    entry.name: entry
    for entry in (
        _named("flux", _FLUX),
        _named("hyvid", _FLUX),
        _named("qwen_image", _FLUX),
        _named("sd3", "final_layer t_embedder y_embedder x_embedder ^pos_embed" + _DIFFUSERS),
        _named(
            "aura",
            r"t_embedder init_x_linear ^modF\.1 ^cond_seq_linear ^final_linear"
            r" ^positional_encoding ^register_tokens ^time_step_proj ^pos_embed" + _DIFFUSERS,
        ),
        _named(
            "hidream",
            "p_embedder t_embedder x_embedder final_layer caption_projection",
            float32=r"ff_i\.gate img_emb\.emb_pos",
        ),
        _named(
            "cosmos",
            r"p_embedder t_embedder t_embedding_norm x_embedder final_layer"
            r" ^patch_embed ^time_embed ^norm_out ^proj_out",
            float32=r"\w*pos_embedder ^learnable_pos_embed",
        ),
        _named(
            "ltxv",
            r"\w*adaln_single (\w+_)?caption_projection (\w+_)?patchify_proj"
            r" ^(\w+_)?time_embed ^(\w+_)?proj_in ^(\w+_)?proj_out",
            float32=r"\w*scale_shift_table",
        ),
        _named(
            "wan",
            r"\w*patch_embedding ^text_embedding ^time_projection ^time_embedding ^img_emb ^head"
            r" ^condition_embedder ^proj_out",
            float32=r"modulation scale_shift_table",
        ),
        _named(
            "lumina2",
            r"t_embedder (all_)?x_embedder (all_)?final_layer cap_embedder context_refiner"
            r" noise_refiner ^time_caption_embed ^norm_out",
        ),
        _named("sd1", _UNET),
        _named("sdxl", _UNET),
        _named("t5", _T5),
        _named("t5encoder", _T5),
        _named("llama", ""),
        _named("qwen2vl", ""),
        _named("qwen3", ""),
        _named("qwen3vl", ""),
    )
}


def architecture(name: str) -> Architecture:
    """Return what is known of an architecture; of a name that nothing resembles, an empty entry.

    Raises:
        ConfigError: empty, or a known name misspelt. A name that differs in its number is another
            version, not a mistake.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    meant = next((known for known in ARCHITECTURES if _is_misspelt(name, known)), None)
    if not name.strip() or name == "auto" or meant:
        hint = f"; did you mean {meant!r}?" if meant else ""
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"arch: unknown architecture {name!r}{hint}; known: {known}")
    return Architecture(name)


def _first_match(patterns: tuple[str, ...], name: str) -> str | None:
    for pattern in patterns:
        is_root, part = pattern.startswith("^"), pattern.removeprefix("^")
        start = rf"^{_PREFIX}" if is_root else r"(?:^|\.)"
        match = re.search(rf"{start}({part})(?:\.|$)", name)
        if match:
            return match[1]
    return None


def _is_misspelt(name: str, known: str) -> bool:
    plain = re.sub(r"[\W_]", "", name).lower()
    expected = known.replace("_", "")
    if re.sub(r"\D", "", plain) != re.sub(r"\D", "", expected):
        return False
    return difflib.SequenceMatcher(None, plain, expected).ratio() >= _TYPO
