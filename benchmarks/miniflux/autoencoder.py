"""The VAE of mini-FLUX: 32x32 RGB pictures to 8x8 latents with 4 channels."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from fashion_mnist import to_rgb32
from optimisation import MovingAverage, descend, warm_cosine
from torch.nn import functional

_log = logging.getLogger("miniflux.autoencoder")


@dataclass(frozen=True)
class AutoencoderRecipe:
    """How the VAE is trained; the defaults made the shipped one."""

    steps: int = 1000
    batch: int = 32
    learning_rate: float = 2e-3
    kl_weight: float = 1e-3
    ema_decay: float = 0.99
    warmup: int = 30


def build_autoencoder() -> AutoencoderKL:
    """Build FLUX.1's autoencoder class at 0.54 M parameters, with fresh weights."""
    return AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(24, 48, 48),
        layers_per_block=1,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def train_autoencoder(images: torch.Tensor, recipe: AutoencoderRecipe) -> AutoencoderKL:
    """Train a VAE on pictures.

    Args:
        images: ``(n, 1, 28, 28)`` in [-1, 1].
        recipe: how long and how fast.

    Returns:
        The VAE with averaged weights and the latents' measured mean and scale in its config.

    """
    # channels_last is what the CPU convolutions want; the result goes back to the usual order.
    vae = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    average = MovingAverage(vae.parameters(), recipe.ema_decay)
    start_s = time.monotonic()
    for step in range(recipe.steps):
        factor = warm_cosine(step, recipe.steps, recipe.warmup)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * factor
        batch = to_rgb32(images[torch.randint(len(images), (recipe.batch,))])
        loss = _loss(vae, batch.contiguous(memory_format=torch.channels_last), recipe.kl_weight)
        descend(loss, optimizer)
        average.update(step)
        if step % 50 == 49:
            seconds = time.monotonic() - start_s
            _log.info("step %d/%d loss %.4f %.0f s", step + 1, recipe.steps, loss, seconds)
    average.exchange()
    _measure_latents(vae, images)
    return vae.to(memory_format=torch.contiguous_format)


def _loss(vae: AutoencoderKL, batch: torch.Tensor, kl_weight: float) -> torch.Tensor:
    posterior = vae.encode(batch).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    kl: torch.Tensor = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    distance = functional.l1_loss(decoded, batch) + functional.mse_loss(decoded, batch)
    return distance + kl_weight * kl


@torch.no_grad()
def _measure_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Set the config values by which pipelines bring latents to mean 0 and deviation 1."""
    latents = vae.encode(to_rgb32(images[:4096])).latent_dist.sample()
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4),
        scaling_factor=round(1 / latents.std().item(), 4),
    )


@torch.no_grad()
def encode_normalised(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return the normalised latents ``(n, 4, 8, 8)`` of ``(n, 1, 28, 28)`` pictures."""
    parts = [vae.encode(to_rgb32(part)).latent_dist.mean for part in torch.split(images, 500)]
    shift: float = vae.config.shift_factor
    scale: float = vae.config.scaling_factor
    return (torch.cat(parts) - shift) * scale
