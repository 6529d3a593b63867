"""mini-FLUX, and the picture of it that tests compare."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbits.cli.drawing import draw
from lowbits.cli.loading import load_pipeline, quiet, read_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = Path(__file__).parents[1] / "benchmarks" / "miniflux"
#: What is packed by default.
PACKED = ("transformer", "text_encoder_2")


def build() -> Any:
    """Return the pipeline in float32."""
    torch.set_num_threads(1)
    return load_pipeline(MODEL, torch.device("cpu"))


def picture(pipe: Any) -> torch.Tensor:
    """Draw one picture in two steps."""
    recipe = read_recipe(MODEL)
    call = {**recipe.call, "num_inference_steps": 2, "true_cfg_scale": 1.0}
    pipe.set_progress_bar_config(disable=True)
    return draw(pipe, recipe.prompts[-2], [0], call, lambda _: None)


def empty(model: Any) -> Any:
    """Return a model as one is on the meta device, without a weight."""
    from accelerate import init_empty_weights

    with init_empty_weights(), quiet():
        if hasattr(model, "from_config"):
            made = type(model).from_config(model.config)
        else:
            made = type(model)(copy.deepcopy(model.config))
    if not hasattr(model, "from_config"):
        made.tie_weights()
    return made.eval()


def blank(model: Any) -> Any:
    """Return a model whose weights are all ones."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.fill_(1)
    return made


@contextmanager
def exchanged(pipe: Any, **parts: Any) -> Iterator[Any]:
    """Give a pipeline other models for a while."""
    before = {name: getattr(pipe, name) for name in parts}
    pipe.register_modules(**parts)
    try:
        yield pipe
    finally:
        pipe.register_modules(**before)
