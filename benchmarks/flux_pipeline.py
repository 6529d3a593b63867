"""FLUX.1-dev from its configurations, with random weights, packed block by block as it is built.

No weight file and no tokenizer is needed: shapes are what memory and speed depend on. A block's
weights are made on the device, packed there and let go before the next block's, as a loader that
quantizes while it reads does: what a device holds at most is the packed model and one block.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Text tokens of a prompt for T5 and for CLIP, and the pictures' guidance.
T5_TOKENS: Final = 512
CLIP_TOKENS: Final = 77
GUIDANCE: Final = 3.5

Config = dict[str, Any]

#: huggingface.co/black-forest-labs/FLUX.1-dev, the config.json of each component.
FULL: Final[dict[str, Config]] = {
    "transformer": {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": (16, 56, 56),
    },
    "text_encoder_2": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
}

TINY: Final[dict[str, Config]] = {
    "transformer": {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 8,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 64,
        "axes_dims_rope": (8, 12, 12),
    },
    "text_encoder_2": {
        "vocab_size": 512,
        "d_model": 256,
        "d_kv": 64,
        "d_ff": 512,
        "num_layers": 2,
        "num_heads": 4,
    },
    "text_encoder": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "vae": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 8},
}


def transformer(config: Config) -> Any:
    """Build FLUX's transformer."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(patch_size=1, guidance_embeds=True, **config)


def t5(config: Config) -> Any:
    """Build T5's encoder."""
    from transformers import T5Config, T5EncoderModel

    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": True}
    return T5EncoderModel(T5Config(is_encoder_decoder=False, use_cache=False, **gated, **config))


def clip(config: Config) -> Any:
    """Build CLIP's text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    last = config["vocab_size"] - 1
    tokens = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    return CLIPTextModel(
        CLIPTextConfig(
            max_position_embeddings=CLIP_TOKENS, hidden_act="quick_gelu", **tokens, **config
        )
    )


def vae(config: Config) -> Any:
    """Build the decoder of pictures."""
    from diffusers import AutoencoderKL

    levels = len(config["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        **config,
    )


BUILDERS: Final[dict[str, Callable[[Config], Any]]] = {
    "transformer": transformer,
    "text_encoder_2": t5,
    "text_encoder": clip,
    "vae": vae,
}


def loaded(
    name: str, config: Config, device: torch.device, pack: Callable[[nn.Module], object] | None
) -> Any:
    """Build a component in bfloat16 on a device; ``pack`` gets each of its blocks as it is made."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: Any = BUILDERS[name](config)
    if name == "text_encoder_2":
        model.tie_weights()  # made one by one under init_empty_weights, they are not tied
    model.eval().requires_grad_(requires_grad=False)
    owners = Counter(map(id, (p for _, p in model.named_parameters(remove_duplicate=False))))
    # Held until the end, so that no new weight takes the identity of one that it replaced; the new
    # ones are not, but for tied ones: packing lets them go.
    empty = list(model.parameters())
    tied: dict[int, nn.Parameter | None] = {id(p): None for p in empty if owners[id(p)] > 1}
    for block in _blocks(model):
        _materialize(block, device, tied)
        if pack is not None:
            pack(block)
    _materialize(model, device, tied)
    return cast("nn.Module", model)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the entries of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _materialize(
    module: nn.Module, device: torch.device, tied: dict[int, nn.Parameter | None]
) -> None:
    """Give weights that have no data random ones; those in ``tied`` the same one each time."""
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None and parameter.is_meta:
                new = tied.get(id(parameter))
                if new is None:
                    new = _random(parameter, name, device)
                if id(parameter) in tied:
                    tied[id(parameter)] = new
                layer._parameters[name] = new
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                layer._buffers[name] = buffer.to(device)


def _random(parameter: Tensor, name: str, device: torch.device) -> nn.Parameter:
    values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
    if parameter.dim() > 1:
        values.normal_(0, parameter[0].numel() ** -0.5)
    else:
        values.fill_(1.0 if name == "weight" else 0.0)
    return nn.Parameter(values, requires_grad=False)


def pipeline(components: dict[str, nn.Module]) -> Any:
    """Put a pipeline together; it has no tokenizers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    shifting = {"base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096}
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **shifting),
        tokenizer=None,
        tokenizer_2=None,
        **components,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, *, size: int, steps: int, device: torch.device) -> Tensor:
    """Encode a prompt of random tokens, make a picture of it; ``(1, 3, size, size)``."""
    generator = torch.Generator().manual_seed(0)
    embeds = []
    for encoder, length in ((pipe.text_encoder_2, T5_TOKENS), (pipe.text_encoder, CLIP_TOKENS)):
        vocabulary = encoder.config.vocab_size
        tokens = torch.randint(vocabulary - 2, (1, length), generator=generator)
        tokens[:, -1] = vocabulary - 1
        embeds.append(encoder(tokens.to(device)))
    images: Tensor = pipe(
        prompt_embeds=embeds[0][0],
        pooled_prompt_embeds=embeds[1].pooler_output,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        max_sequence_length=T5_TOKENS,
        generator=generator,
        output_type="pt",
    ).images
    return images
