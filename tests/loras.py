"""A small LoRA of tiny FLUX, as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipelines import PIPELINES

if TYPE_CHECKING:
    from pathlib import Path


def save_lora(folder: Path) -> None:
    """Write a LoRA with factors that are not zero, as diffusers does."""
    pipe: Any = PIPELINES["flux"].build()
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_out.0", "proj_mlp"]))
    factors = get_peft_model_state_dict(pipe.transformer)
    generator = torch.Generator().manual_seed(0)
    random = {k: torch.randn(v.shape, generator=generator) * 0.2 for k, v in factors.items()}
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=random)
