"""Complete tiny diffusers pipelines with random weights; nothing comes from a hub.

Each entry of ``PIPELINES`` has every component of the real pipeline (tokenizers, text encoders,
denoiser, VAE, scheduler) at a width that runs in well under two seconds on one core. Linear layers
of the denoisers mostly have 64 input features, so that group sizes 32 and 64 divide them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HEADS = 2
HEAD_DIM = 32
HIDDEN = HEADS * HEAD_DIM
PROMPT = "a cat"


@dataclass(frozen=True)
class TinyPipeline:
    """How to make one tiny pipeline and how to call it.

    Attributes:
        build: ``build(dtype=torch.float32, seed=0)``; the same weights for the same seed. Mixed
            precision follows ``from_pretrained(dtype=dtype)``.
        call: keyword arguments of a quick call with decoded NumPy output; no generator.
        denoiser: component name of the denoiser.
    """

    build: Callable[..., DiffusionPipeline]
    call: Mapping[str, Any]
    denoiser: str


def draw(name: str, pipe: Any, seed: int = 0) -> torch.Tensor:
    """Run ``PIPELINES[name].call`` on ``pipe`` with a fresh CPU generator.

    Returns:
        float32 in 0..1: images ``(1, height, width, 3)``, videos ``(1, frames, height, width, 3)``.
    """
    generator = torch.Generator().manual_seed(seed)
    decoded = pipe(**PIPELINES[name].call, generator=generator, return_dict=False)[0]
    return torch.from_numpy(decoded)


def _clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE without merges: every byte is its own token."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # GPT-2's table moves the other 68 bytes to code points from 256 on.
    chars = [chr(code) for code in [*kept, *range(256, 256 + 256 - len(kept))]]
    tokens = [*chars, *(char + "</w>" for char in chars), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    """Unigram over printable ASCII; T5 wants pad, end and unknown at 0, 1 and 2."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -4.0) for code in range(0x21, 0x7F)]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in range(99, -1, -1)]
    return T5Tokenizer(vocab=pieces, model_max_length=512)


def _gemma_tokenizer() -> GemmaTokenizer:
    """BPE without merges over printable ASCII."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581"]
    tokens += [chr(code) for code in range(0x21, 0x7F)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocab, merges=[], model_max_length=512)


def _clip_config(tokenizer: CLIPTokenizer, hidden: int, *, act: str = "quick_gelu") -> Any:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=hidden,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        # CLIP takes its pooled output at this token; the default id is the real vocabulary's.
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_sizes(tokenizer: T5Tokenizer, hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "d_model": hidden,
        "d_kv": hidden // 4,
        "d_ff": 2 * hidden,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def _vae(latent_channels: int, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=latent_channels,
        **config,
    )


def _flow_vae(**config: Any) -> AutoencoderKL:
    """The 16-channel VAE of FLUX and SD3."""
    return _vae(16, use_quant_conv=False, use_post_quant_conv=False, force_upcast=True, **config)


def _flux() -> Any:
    tokenizer, tokenizer_2 = _clip_tokenizer(), _t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_flow_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(_clip_config(tokenizer, HIDDEN)),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(**_t5_sizes(tokenizer_2, HIDDEN))),
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,  # 2 x 2 patches of 16 latent channels
            num_layers=2,
            num_single_layers=2,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            axes_dims_rope=(8, 12, 12),  # adds up to the head dimension
            joint_attention_dim=HIDDEN,
            pooled_projection_dim=HIDDEN,
            guidance_embeds=True,
        ),
    )


def _sd3() -> Any:
    """SD3.5: with query/key norms and one dual-attention block."""
    tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    joint = 2 * HIDDEN  # both CLIP states side by side, padded to the width of T5
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer, HIDDEN)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer, HIDDEN, act="gelu")),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=T5EncoderModel(T5Config(**_t5_sizes(t5_tokenizer, joint))),
        tokenizer_3=t5_tokenizer,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            pos_embed_max_size=8,
            num_layers=3,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            caption_projection_dim=HIDDEN,
            joint_attention_dim=joint,
            pooled_projection_dim=2 * HIDDEN,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
    )


def _sdxl() -> Any:
    tokenizer, pooled, time_ids = _clip_tokenizer(), 32, 8
    return StableDiffusionXLPipeline(
        scheduler=EulerDiscreteScheduler(**_sd_schedule(), timestep_spacing="leading"),
        vae=_vae(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(_clip_config(tokenizer, pooled)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer, pooled, act="gelu")),
        tokenizer_2=_clip_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=8,
            norm_num_groups=8,
            block_out_channels=(32, HIDDEN),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(1, HEADS),
            cross_attention_dim=2 * pooled,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_ids,
            projection_class_embeddings_input_dim=6 * time_ids + pooled,
        ),
        add_watermarker=False,
    )


def _sd15() -> Any:
    tokenizer = _clip_tokenizer()
    return StableDiffusionPipeline(
        scheduler=DDIMScheduler(**_sd_schedule(), clip_sample=False, set_alpha_to_one=False),
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip_config(tokenizer, HIDDEN)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            norm_num_groups=8,
            block_out_channels=(HIDDEN, HIDDEN),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=HEADS,  # the number of heads, by a misnomer diffusers kept
            cross_attention_dim=HIDDEN,
            time_embedding_dim=2 * HIDDEN,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd_schedule() -> dict[str, Any]:
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }


def _pixart() -> Any:
    tokenizer = _t5_tokenizer()
    return PixArtSigmaPipeline(
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
        vae=_vae(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=T5EncoderModel(T5Config(**_t5_sizes(tokenizer, HIDDEN))),
        tokenizer=tokenizer,
        transformer=PixArtTransformer2DModel(
            sample_size=8,
            num_layers=3,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            cross_attention_dim=HIDDEN,
            caption_channels=HIDDEN,
            use_additional_conditions=False,
        ),
    )


def _sana() -> Any:
    tokenizer = _gemma_tokenizer()
    return SanaPipeline(
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=_deep_compression_vae(),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=HIDDEN,
                intermediate_size=2 * HIDDEN,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                query_pre_attn_scalar=16,
                max_position_embeddings=512,
            )
        ),
        tokenizer=tokenizer,
        transformer=SanaTransformer2DModel(
            sample_size=8,
            num_layers=3,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_cross_attention_heads=HEADS,
            cross_attention_head_dim=HEAD_DIM,
            cross_attention_dim=HIDDEN,
            caption_channels=HIDDEN,
        ),
    )


def _deep_compression_vae() -> AutoencoderDC:
    """Eight-fold where the real one is 32-fold; attention in the two deepest stages."""
    stages: dict[str, Any] = {
        "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": (1, 1, 1, 1),
        "qkv_multiscales": ((), (), (5,), (5,)),
    }
    return AutoencoderDC(
        attention_head_dim=16,
        scaling_factor=0.41407,
        **{
            f"{side}_{key}": value
            for side in ("encoder", "decoder")
            for key, value in stages.items()
        },
    )


def _auraflow() -> Any:
    tokenizer = _t5_tokenizer()
    return AuraFlowPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=_vae(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=UMT5EncoderModel(UMT5Config(**_t5_sizes(tokenizer, HIDDEN))),
        tokenizer=tokenizer,
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            pos_embed_max_size=64,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            joint_attention_dim=HIDDEN,
            caption_projection_dim=HIDDEN,
        ),
    )


def _wan() -> Any:
    tokenizer = _t5_tokenizer()
    return WanPipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1),
        text_encoder=UMT5EncoderModel(UMT5Config(**_t5_sizes(tokenizer, HIDDEN))),
        tokenizer=tokenizer,
        transformer=WanTransformer3DModel(
            num_layers=3,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            text_dim=HIDDEN,
            freq_dim=HIDDEN,
            ffn_dim=2 * HIDDEN,
            rope_max_seq_len=32,
        ),
    )


def _spread(model: torch.nn.Module) -> None:
    """Give every ``Linear`` channels of differing size, as trained weights have.

    The uniform spread of a fresh model would flatter quantisation. Activations stay of order one.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            rows, columns = module.weight.shape
            weight = torch.randn(rows, columns) / columns**0.5
            weight *= torch.exp(0.3 * torch.randn(rows, 1)) * torch.exp(0.3 * torch.randn(columns))
            module.weight.data.copy_(weight)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Cast ``model`` as its ``from_pretrained(dtype=dtype)`` would, and put it in eval mode.

    ``DiffusionPipeline.to`` would cast the modules a model keeps in float32 too, and warn.
    transformers keeps them for float16 only, diffusers always. Buffers outside the state dict stay
    as built.
    """
    keeps = isinstance(model, ModelMixin) or dtype == torch.float16
    kept = set(model._keep_in_fp32_modules or ()) if keeps else set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    model.eval()


def _tiny(assemble: Callable[[], Any], denoiser: str, **call: Any) -> TinyPipeline:
    def build(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        # torch.manual_seed would reseed accelerators as well, which fork_rng does not restore here.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            pipe = assemble()
            _spread(getattr(pipe, denoiser))
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                _cast(component, dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    quick = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    return TinyPipeline(build, MappingProxyType({"prompt": PROMPT, **quick, **call}), denoiser)


PIPELINES: Mapping[str, TinyPipeline] = MappingProxyType(
    {
        "flux": _tiny(_flux, "transformer", max_sequence_length=16),
        "sdxl": _tiny(_sdxl, "unet"),
        "sd3": _tiny(_sd3, "transformer", max_sequence_length=16),
        "sd15": _tiny(_sd15, "unet"),
        # Resolution binning knows only the real sizes.
        "pixart": _tiny(
            _pixart,
            "transformer",
            max_sequence_length=16,
            use_resolution_binning=False,
            clean_caption=False,  # would want Beautiful Soup
        ),
        "sana": _tiny(
            _sana,
            "transformer",
            max_sequence_length=16,
            use_resolution_binning=False,
            complex_human_instruction=None,
        ),
        "auraflow": _tiny(_auraflow, "transformer", max_sequence_length=16),
        # Five frames are the fewest that make two latent frames.
        "wan": _tiny(
            _wan, "transformer", height=32, width=32, num_frames=5, max_sequence_length=16
        ),
    }
)
