"""Train the LoRA of mini-FLUX on a CPU: clothes in stripes; lora/README.md has the figures.

The training pictures are the model's own samples, striped: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import FluxPipeline
from fashion_mnist import LabelledImages, to_grey28
from flow import FlowLoss, FlowRecipe
from optimisation import descend, warm_cosine
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from prompts import SCORED_PROMPTS
from sampling import Sampling, generate, save_contact_sheet

_log = logging.getLogger("miniflux.lora")

FILE: Final = "stripes.safetensors"

#: Linear layers of the blocks; the last layer of the model, ``proj_out`` without a block, is none.
TARGETS: Final = r".*\.(to_[qkv]|to_out\.0|net\.0\.proj|net\.2|proj_mlp|proj_out)"

#: Far from the seeds that pictures are compared by.
_FIRST_SEED: Final = 1000

_STRENGTHS: Final = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class LoraRecipe:
    """How the LoRA is trained; the defaults made the shipped one."""

    rank: int = 8
    steps: int = 300
    batch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 20
    pictures: int = 32
    """Training pictures of each class."""


def stripe(images: torch.Tensor) -> torch.Tensor:
    """Blacken every other four rows of ``(..., height, width)`` pictures in [-1, 1]."""
    is_kept = torch.arange(images.shape[-2]) % 8 < 4
    return torch.where(is_kept[:, None], images, -1.0)


def stripes_left(images: torch.Tensor) -> float:
    """Return the light in the rows that `stripe` blackens, as a share of that in the others."""
    light = (images.clamp(-1, 1) + 1).mean(dim=(*range(images.ndim - 2), -1))
    is_kept = torch.arange(len(light)) % 8 < 4
    return (light[~is_kept].sum() / light[is_kept].sum()).item()


def train_lora(pipe: FluxPipeline, recipe: LoraRecipe) -> float:
    """Train a LoRA of the transformer, as the adapter ``default``.

    Args:
        pipe: changed in place; only the LoRA's factors are trained.
        recipe: how long and how fast.

    Returns:
        The smoothed loss at the end.

    """
    data = _striped_samples(pipe, recipe.pictures)
    for module in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        module.requires_grad_(requires_grad=False)
    pipe.transformer.add_adapter(
        LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=TARGETS)
    )
    factors = [factor for factor in pipe.transformer.parameters() if factor.requires_grad]
    optimizer = torch.optim.AdamW(factors, betas=(0.9, 0.99), weight_decay=0.0)
    loss_of = FlowLoss(pipe, data, FlowRecipe(batch=recipe.batch))
    smoothed = 0.0
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm_cosine(step, recipe.steps, recipe.warmup)
        loss = loss_of.draw()
        descend(loss, optimizer)
        smoothed = loss.item() if step == 0 else 0.98 * smoothed + 0.02 * loss.item()
        if (step + 1) % 25 == 0:
            _log.info("step %d/%d loss %.4f", step + 1, recipe.steps, smoothed)
    return smoothed


def _striped_samples(pipe: FluxPipeline, count: int) -> LabelledImages:
    """Draw so many pictures of each class, and stripe them."""
    sampling = Sampling(steps=12, true_cfg_scale=2.0)
    images = generate(pipe, SCORED_PROMPTS, seeds=count, sampling=sampling, first_seed=_FIRST_SEED)
    labels = torch.arange(len(images)).repeat_interleave(count)
    return LabelledImages(to_grey28(stripe(images.flatten(0, 1))), labels)


def _score(pipe: FluxPipeline, sheet: Path) -> dict[str, float]:
    """Draw at each strength, on a sheet too, and return what is left in the blackened rows."""
    figures, rows = {}, []
    for strength in _STRENGTHS:
        pipe.set_adapters(["default"], [strength])
        images = generate(pipe, SCORED_PROMPTS, seeds=4, sampling=Sampling(true_cfg_scale=2.0))
        figures[f"light left at {strength:g}"] = round(stripes_left(images), 4)
        rows.append(images[:, 0])
    save_contact_sheet(torch.stack(rows), sheet)
    return figures


def main() -> None:
    """Train, save the LoRA in 16 bits, and say what it does."""
    arguments = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    start_s = time.monotonic()
    pipe: Any = FluxPipeline.from_pretrained(arguments.pipeline, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    recipe = LoraRecipe(steps=arguments.steps)
    figures: dict[str, Any] = {"loss": round(train_lora(pipe, recipe), 4)}
    factors = get_peft_model_state_dict(pipe.transformer)
    figures["parameters"] = sum(factor.numel() for factor in factors.values())
    figures["seconds"] = round(time.monotonic() - start_s)
    FluxPipeline.save_lora_weights(
        arguments.out,
        transformer_lora_layers={name: value.half() for name, value in factors.items()},
        weight_name=FILE,
    )
    figures |= _score(pipe, arguments.out / "strengths.png")
    figures |= {
        "recipe": asdict(recipe),
        "seed": arguments.seed,
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        "machine": platform.platform(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    text = json.dumps(figures, indent=1)
    (arguments.out / "result_lora.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, default=Path(__file__).parent)
    parser.add_argument("--out", type=Path, default=Path("out/miniflux_lora"), help="written to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=LoraRecipe.steps)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
