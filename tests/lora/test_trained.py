"""The LoRA that mini-FLUX ships with: pictures come nearer to its style as its strength grows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import pytest
import torch
from schemes import every_scheme

import lowbits
from lowbits.cli.drawing import draw
from lowbits.cli.loading import load_loras, load_pipeline, read_recipe

if TYPE_CHECKING:
    from torch import Tensor

MODEL: Final = Path(__file__).parents[2] / "benchmarks" / "miniflux"
LORA: Final = MODEL / "lora" / "stripes.safetensors"
PROMPTS: Final = ("a photo of a bag", "a photo of a pullover")
#: One bit is too few to draw anything with.
DRAWING: Final = [item for item in every_scheme() if item.values != ("gguf-q1_0",)]


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load_pipeline(MODEL, torch.device("cpu"))
    load_loras(pipe, {LORA: 1.0})
    return pipe


def pictures(pipe: Any, strength: float) -> Tensor:
    """Draw two pictures of each prompt, in few steps."""
    pipe.set_adapters(["lora_0"], [strength])
    call = {**read_recipe(MODEL).call, "num_inference_steps": 4}
    return torch.cat([draw(pipe, prompt, [0, 1], call, lambda _: None) for prompt in PROMPTS])


def striped(drawn: Tensor) -> Tensor:
    """Blacken the rows that the LoRA was trained to blacken."""
    is_kept = torch.arange(drawn.shape[-2]) % 8 < 4
    return torch.where(is_kept[:, None], drawn, 0.0)


def from_style(drawn: Tensor) -> float:
    """Return the mean squared distance of pictures to their own striped versions."""
    return float((drawn - striped(drawn)).square().mean())


@pytest.mark.parametrize("lora", ["fp16", "merge"])
def test_pictures_come_nearer_to_the_style(pipe: Any, lora: Literal["fp16", "merge"]) -> None:
    with lowbits.apply(pipe, "bnb-nf4", components=["transformer"], lora=lora):
        none, half, all_of_it = (pictures(pipe, strength) for strength in (0.0, 0.5, 1.0))
        again = pictures(pipe, 0.0)
    far, nearer, near = (from_style(x) for x in (none, half, all_of_it))
    assert near < 0.1 * far
    assert near < 0.8 * nearer < 0.4 * far
    # Black pictures would be as near: what the style keeps has to be there.
    assert 0.5 < float(striped(all_of_it).mean() / striped(none).mean()) < 2
    assert torch.equal(again, none)


@pytest.mark.parametrize("scheme", DRAWING)
def test_every_scheme_shows_it(pipe: Any, scheme: str) -> None:
    call = {**read_recipe(MODEL).call, "true_cfg_scale": 1.0, "num_inference_steps": 3}
    with lowbits.apply(pipe, scheme, components=["transformer"], lora="auto"):
        distances = []
        for strength in (0.0, 0.5, 1.0):
            pipe.set_adapters(["lora_0"], [strength])
            distances.append(from_style(draw(pipe, PROMPTS[0], [0], call, lambda _: None)))
    assert distances[2] < 0.8 * distances[1] < 0.6 * distances[0]


def test_merged_or_beside_it_draws_the_same(pipe: Any) -> None:
    """What nf4 does to pictures is small beside what the LoRA does, wherever it acts."""
    exact = {strength: pictures(pipe, strength) for strength in (0.0, 1.0)}
    errors = {}
    for lora in ("fp16", "merge"):
        with lowbits.apply(pipe, "bnb-nf4", components=["transformer"], lora=lora):
            for strength, reference in exact.items():
                drawn = pictures(pipe, strength)
                errors[lora, strength] = float((drawn - reference).square().mean().sqrt())
    effect = float((exact[1.0] - exact[0.0]).square().mean().sqrt())
    assert all(error < effect / 3 for error in errors.values())
    assert errors["merge", 0.0] == errors["fp16", 0.0]
