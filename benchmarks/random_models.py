"""Denoisers from configurations, with random weights whose rows and columns differ in size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

#: Spread of the rows' and of the columns' sizes, as in trained weights; a fresh model's uniform
#: spread would flatter quantization.
SPREAD: Final = 0.3


@final
@dataclass(frozen=True)
class Denoiser:
    """A denoiser to build.

    Attributes:
        build: makes it, in float32 on the CPU.
        inputs: of one step: ``(model, image_side, text_tokens, dtype)``.
    """

    build: Callable[[], Any]
    inputs: Callable[[Any, int, int, torch.dtype], dict[str, Any]]


def spread_(model: nn.Module) -> nn.Module:
    """Fill the weights of Linear and convolution layers in place; activations stay of order one."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.data
            weight.normal_(0, weight[0].numel() ** -0.5)
            ones = [1] * (weight.dim() - 1)
            weight.mul_(torch.exp(SPREAD * torch.randn(weight.shape[0], *ones)))
            weight.mul_(torch.exp(SPREAD * torch.randn(weight.shape[1:])))
    return model.eval().requires_grad_(requires_grad=False)


def flux() -> Any:
    """Build one double and one single block of FLUX in their own width; 0.5 billion weights."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


def tiny_flux() -> Any:
    """Build a FLUX of 0.5 million weights, to try a script with."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=4,
        attention_head_dim=32,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=True,
    )


def sdxl() -> Any:
    """Build SDXL's UNet in its own width with fewer layers; 0.4 billion weights."""
    return _unet((320, 640, 1280), (1, 1, 1), cross_attention_dim=2048, pooled=1280)


def tiny_sdxl() -> Any:
    """Build a UNet like SDXL's of 3 million weights, to try a script with."""
    return _unet((64, 128), (1, 1), cross_attention_dim=128, pooled=64)


def _unet(
    channels: tuple[int, ...], depths: tuple[int, ...], *, cross_attention_dim: int, pooled: int
) -> nn.Module:
    from diffusers import UNet2DConditionModel

    deeper, time_ids = len(channels) - 1, 256
    model: nn.Module = UNet2DConditionModel(
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * deeper),
        up_block_types=(*["CrossAttnUpBlock2D"] * deeper, "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        transformer_layers_per_block=depths,
        attention_head_dim=tuple(width // 64 for width in channels),
        cross_attention_dim=cross_attention_dim,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_ids,
        projection_class_embeddings_input_dim=6 * time_ids + pooled,
    )
    return model


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def flux_inputs(model: Any, side: int, text: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return one step's inputs: ``side * side`` image tokens, ``text`` text tokens."""
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None]
    config = model.config
    return {
        "hidden_states": _random(1, side * side, config.in_channels, dtype=dtype),
        "encoder_hidden_states": _random(1, text, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": _random(1, config.pooled_projection_dim, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=dtype),
        "img_ids": ids.reshape(-1, 3).to(dtype),
        "txt_ids": torch.zeros(text, 3, dtype=dtype),
        "return_dict": False,
    }


def sdxl_inputs(model: Any, side: int, text: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return one step's inputs: a picture as large as FLUX's of ``side * side`` tokens, and text.

    FLUX makes a token of 2 x 2 latents.
    """
    config = model.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pixels = 16.0 * side
    time_ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], dtype=dtype)
    return {
        "sample": _random(1, 4, 2 * side, 2 * side, dtype=dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": _random(1, text, config.cross_attention_dim, dtype=dtype),
        "added_cond_kwargs": {
            "text_embeds": _random(1, pooled, dtype=dtype),
            "time_ids": time_ids,
        },
        "return_dict": False,
    }


DENOISERS: Final = {
    "flux": Denoiser(flux, flux_inputs),
    "sdxl": Denoiser(sdxl, sdxl_inputs),
    "tiny-flux": Denoiser(tiny_flux, flux_inputs),
    "tiny-sdxl": Denoiser(tiny_sdxl, sdxl_inputs),
}
