"""The rectified flow of mini-FLUX: transformer and both text encoders, built and trained jointly.

``x_t = (1 - t) image + t noise`` in latent space; the transformer predicts ``noise - image``.
"""

from __future__ import annotations

import copy
import logging
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from autoencoder import encode_normalised
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from optimisation import MovingAverage, descend, warm_cosine
from prompts import (
    CLASS_NAMES,
    CLIP_LENGTH,
    SCORED_PROMPTS,
    TEMPLATES,
    clip_tokenizer,
    t5_tokenizer,
)
from sampling import Sampling, generate, save_contact_sheet
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import AutoencoderKL
    from fashion_mnist import LabelledImages

_log = logging.getLogger("miniflux.flow")
_WIDTH = 256


@dataclass(frozen=True)
class FlowRecipe:
    """How the flow is trained; the defaults made the shipped one."""

    steps: int = 2800
    batch: int = 64
    learning_rate: float = 1e-3
    text_learning_rate: float = 5e-4
    ema_decay: float = 0.998
    warmup: int = 100
    empty_share: float = 0.1
    """Share of empty prompts, without which ``true_cfg_scale`` has nothing to lean on."""
    t5_lengths: tuple[int, ...] = (12, 12, 12, 16, 16, 24)
    """Padded T5 lengths, one drawn for each step: padding is seen, so its length must vary."""
    save_every: int = 600


def build_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """Put a pipeline with fresh text encoders and transformer around ``vae`` (kept)."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    pipe = FluxPipeline(
        # FLUX.1-dev's settings.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=_build_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_build_t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=_build_transformer(4 * vae.config.latent_channels),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="gelu",
        projection_dim=_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=_WIDTH,
        d_kv=32,
        d_ff=_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def _build_transformer(in_channels: int) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=_WIDTH // 64,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    for fqn, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            # As in DiT, modulations and the output start at zero: each block begins as identity.
            starts_at_zero = fqn == "proj_out" or "norm" in fqn
            initialise = nn.init.zeros_ if starts_at_zero else nn.init.xavier_uniform_
            initialise(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def save_pipeline(pipe: FluxPipeline, folder: Path) -> None:
    """Write ``pipe`` (left unchanged) to ``folder/fp32`` and ``folder/bf16``, replacing them."""
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        target, aside = folder / name, folder / f"{name}.new"
        copy.deepcopy(pipe).to(dtype).save_pretrained(aside)
        # Written aside and renamed, so that an interrupted save leaves the last good one.
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)


class EncodedPrompts(NamedTuple):
    """What the transformer sees of ``n`` prompts.

    Attributes:
        text: ``(n, length, 256)`` T5 states.
        pooled: ``(n, 256)`` CLIP state at the end token.
        text_ids: ``(length, 3)`` zeros, the positions of text.

    """

    text: torch.Tensor
    pooled: torch.Tensor
    text_ids: torch.Tensor


def encode_prompts(pipe: FluxPipeline, prompts: list[str], length: int) -> EncodedPrompts:
    """Do what ``FluxPipeline.encode_prompt`` does, with gradients; no mask: padding is seen.

    Args:
        pipe: the pipeline whose tokenizers and encoders are used.
        prompts: ``n`` prompts.
        length: T5 tokens, the pipeline's ``max_sequence_length``.

    Returns:
        The encoded prompts.

    """
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    clip_ids = pipe.tokenizer(prompts, max_length=CLIP_LENGTH, **options).input_ids
    t5_ids = pipe.tokenizer_2(prompts, max_length=length, **options).input_ids
    text = pipe.text_encoder_2(t5_ids)[0]
    return EncodedPrompts(text, pipe.text_encoder(clip_ids).pooler_output, torch.zeros(length, 3))


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Cut ``(n, c, height, width)`` latents into 2x2 patches ``(n, height * width / 4, 4 * c)``.

    Source: ``FluxPipeline._pack_latents``, which sampling undoes.
    """
    count, channels, height, width = latents.shape
    patches = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 4 * channels)


def image_ids(rows: int, columns: int) -> torch.Tensor:
    """Return the positions ``(rows * columns, 3)`` of patches: 0, row, column.

    Source: ``FluxPipeline._prepare_latent_image_ids``.
    """
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).reshape(-1, 3).float()


class _PromptTable:
    """All class names as rows of one batch, the empty prompt last."""

    def __init__(self) -> None:
        self._names = [name for names in CLASS_NAMES for name in names]
        self._counts = torch.tensor([len(names) for names in CLASS_NAMES])
        self._first = self._counts.cumsum(0) - self._counts

    def fill(self, template: str) -> list[str]:
        return [*(template.format(name) for name in self._names), ""]

    def draw_rows(self, labels: torch.Tensor, empty_share: float) -> torch.Tensor:
        """Draw for each label ``(batch,)`` the row of one of its names, or of the empty prompt."""
        name = (torch.rand(len(labels)) * self._counts[labels]).long()
        is_empty = torch.rand(len(labels)) < empty_share
        return torch.where(is_empty, len(self._names), self._first[labels] + name)


class FlowLoss:
    """Draws training batches and computes the loss of a pipeline on them."""

    def __init__(self, pipe: FluxPipeline, data: LabelledImages, recipe: FlowRecipe) -> None:
        self._pipe = pipe
        self._recipe = recipe
        self._labels = data.labels
        self._table = _PromptTable()
        latents = encode_normalised(pipe.vae, data.images)
        self._latents = pack_latents(latents)
        self._image_ids = image_ids(latents.shape[2] // 2, latents.shape[3] // 2)

    def draw(self) -> torch.Tensor:
        """Return the loss on a fresh batch, a scalar with gradient."""
        recipe = self._recipe
        picked = torch.randint(len(self._latents), (recipe.batch,))
        image, labels = self._latents[picked], self._labels[picked]
        # One template and one length a step: each name is encoded once, however often it is used.
        template = TEMPLATES[int(torch.randint(len(TEMPLATES), ()))]
        length = recipe.t5_lengths[int(torch.randint(len(recipe.t5_lengths), ()))]
        encoded = encode_prompts(self._pipe, self._table.fill(template), length)
        rows = self._table.draw_rows(labels, recipe.empty_share)
        # Centred at 0.2, not 0, because the sampler's shift favours noisy times too.
        times = torch.sigmoid(torch.randn(recipe.batch) + 0.2)
        noise = torch.randn_like(image)
        velocity: torch.Tensor = self._pipe.transformer(
            hidden_states=torch.lerp(image, noise, times[:, None, None]),
            timestep=times,
            pooled_projections=encoded.pooled[rows],
            encoder_hidden_states=encoded.text[rows],
            img_ids=self._image_ids,
            txt_ids=encoded.text_ids,
        ).sample
        return functional.mse_loss(velocity, noise - image)


def train_flow(vae: AutoencoderKL, data: LabelledImages, recipe: FlowRecipe, folder: Path) -> float:
    """Train transformer and text encoders, and save the pipeline as it improves.

    Args:
        vae: the trained autoencoder; stays as it is and becomes part of the pipeline.
        data: the training pictures.
        recipe: how long and how fast.
        folder: receives ``fp32``, ``bf16`` and a contact sheet at each save.

    Returns:
        The smoothed loss at the end.

    """
    pipe = build_pipeline(vae)
    loss_of = FlowLoss(pipe, data, recipe)
    optimizer, peaks = _optimizer(pipe, recipe)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    average = MovingAverage(parameters, recipe.ema_decay)
    start_s, smoothed = time.monotonic(), 0.0
    for step in range(recipe.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * warm_cosine(step, recipe.steps, recipe.warmup)
        loss = loss_of.draw()
        descend(loss, optimizer)
        average.update(step)
        smoothed = loss.item() if step == 0 else 0.98 * smoothed + 0.02 * loss.item()
        done = step + 1
        if done % 50 == 0:
            seconds = time.monotonic() - start_s
            _log.info("step %d/%d loss %.4f %.0f s", done, recipe.steps, smoothed, seconds)
        if done % recipe.save_every == 0 or done == recipe.steps:
            average.exchange()
            save_pipeline(pipe, folder)
            images = generate(pipe, SCORED_PROMPTS, seeds=4, sampling=Sampling(steps=12))
            save_contact_sheet(images, folder / f"step{done}.png")
            average.exchange()
    return smoothed


def _optimizer(
    pipe: FluxPipeline, recipe: FlowRecipe
) -> tuple[torch.optim.Optimizer, tuple[float, ...]]:
    """Return an optimizer with one group for each trained module, and the groups' peak rates."""
    modules = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    groups = [{"params": list(module.parameters())} for module in modules]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    text_rate = recipe.text_learning_rate
    return optimizer, (recipe.learning_rate, text_rate, text_rate)
