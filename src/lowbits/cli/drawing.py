"""Drawing pictures by a pipeline's own call."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from lowbits.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor


def draw(
    pipe: Any,
    prompt: str,
    seeds: Sequence[int],
    call: Mapping[str, Any],
    on_step: Callable[[float], None],
) -> Tensor:
    """Draw one prompt from the noise of each seed, in one call of the pipeline.

    Args:
        pipe: a diffusers pipeline that draws pictures.
        prompt: what to draw.
        seeds: of the CPU generators, one for each picture.
        call: further keywords of the call.
        on_step: is told after each step which share of the call is done, 0 to 1.

    Returns:
        ``(len(seeds), 3, height, width)`` float32 in 0 to 1, on the CPU.

    Raises:
        ConfigError: the pipeline does not accept these keywords, or draws no pictures.
    """
    count = len(seeds)
    options = {
        "prompt": [prompt] * count,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "pt",
        **{key: _repeated(key, value, count) for key, value in call.items()},
    }
    accepted = inspect.signature(type(pipe).__call__).parameters
    unknown = [key for key in options if key not in accepted]
    if unknown:
        raise ConfigError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    if "callback_on_step_end" in accepted:
        options["callback_on_step_end"] = _reporting(on_step)
    output = pipe(**options)
    if not isinstance(getattr(output, "images", None), torch.Tensor):
        raise ConfigError(f"{type(pipe).__name__} draws no pictures: its output has no images")
    pictures: Tensor = output.images
    return pictures.float().cpu()


def to_image(picture: Tensor) -> Image.Image:
    """Turn a ``(3, height, width)`` picture in 0 to 1 into one of Pillow's, 8 bits a channel."""
    levels = (picture.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def _repeated(key: str, value: Any, count: int) -> Any:
    """Give each picture its negative prompt: pipelines want as many as there are prompts."""
    is_prompt = key.startswith("negative_prompt") and isinstance(value, str)
    return [value] * count if is_prompt else value


def _reporting(on_step: Callable[[float], None]) -> Callable[..., dict[str, Any]]:
    def report(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step((step + 1) / max(getattr(pipe, "num_timesteps", 0), step + 1))
        return tensors

    return report
