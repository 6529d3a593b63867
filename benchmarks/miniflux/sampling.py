"""Sampling pictures by the pipeline's own call, and contact sheets of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import FluxPipeline

_SHEET_ZOOM = 3


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled.

    Attributes:
        steps: denoising steps.
        true_cfg_scale: classifier-free guidance against the empty prompt; 1 is without.

    """

    steps: int = 12
    true_cfg_scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Sampling:
        """Read ``steps:true_cfg_scale``, such as ``12:2``.

        Raises:
            ValueError: if ``text`` is not two numbers with a colon between them.

        """
        steps, true_cfg_scale = text.split(":")
        return cls(int(steps), float(true_cfg_scale))

    def call_options(self, batch: int) -> dict[str, Any]:
        """Return the keywords of the pipeline's call for ``batch`` prompts."""
        options: dict[str, Any] = {
            "height": 32,
            "width": 32,
            "max_sequence_length": 16,
            "num_inference_steps": self.steps,
        }
        if self.true_cfg_scale > 1:
            options |= {"negative_prompt": [""] * batch, "true_cfg_scale": self.true_cfg_scale}
        return options


@torch.no_grad()
def generate(
    pipe: FluxPipeline,
    prompts: Sequence[str],
    *,
    seeds: int,
    sampling: Sampling,
    first_seed: int = 0,
) -> torch.Tensor:
    """Sample every prompt from the same noises.

    Args:
        pipe: the pipeline.
        prompts: ``n`` prompts.
        seeds: pictures of each prompt.
        sampling: steps and guidance.
        first_seed: the seeds are this one and those that follow.

    Returns:
        ``(n, seeds, 3, 32, 32)`` in [-1, 1].

    """
    rows = []
    numbers = range(first_seed, first_seed + seeds)
    for prompt in prompts:
        generators = [torch.Generator().manual_seed(seed) for seed in numbers]
        options = sampling.call_options(seeds)
        output = pipe([prompt] * seeds, generator=generators, output_type="pt", **options)
        rows.append(output.images)
    return torch.stack(rows) * 2 - 1


def save_contact_sheet(images: torch.Tensor, path: Path) -> None:
    """Write ``(rows, columns, 3, 32, 32)`` pictures in [-1, 1] as one enlarged picture."""
    rows, columns = images.shape[:2]
    levels = (images.clamp(-1, 1) + 1) * 127.5
    tiles = functional.pad(levels, (1, 1, 1, 1), value=90).byte()
    sheet = tiles.permute(0, 3, 1, 4, 2).reshape(rows * 34, columns * 34, 3)
    size = (columns * 34 * _SHEET_ZOOM, rows * 34 * _SHEET_ZOOM)
    Image.fromarray(sheet.numpy()).resize(size, Image.Resampling.NEAREST).save(path)
