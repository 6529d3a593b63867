"""mini-FLUX, and the picture of it that tests compare."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from keymaps import joined
from schemes import every_scheme
from torch import nn

import lowbits
from lowbits.cli.drawing import draw
from lowbits.cli.loading import load_pipeline, quiet, read_recipe
from lowbits.core.packed import PackedLayer, stored_names
from lowbits.integrations.keymaps import to_reference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _pytest.mark import ParameterSet
    from torch import Tensor

MODEL = Path(__file__).parents[1] / "benchmarks" / "miniflux"
#: What is packed by default.
PACKED = ("transformer", "text_encoder_2")
#: That the fixture `saved` is in.
SCHEME = "bnb-nf4"

#: Types and mixes that can be written; those that are not here are slow.
QUICK_TYPES = ("Q8_0", "Q5_1")
TYPES = [
    pytest.param(name, marks=() if name in QUICK_TYPES else pytest.mark.slow)
    for scheme in lowbits.backend("gguf").schemes()
    if scheme.can_quantize and not scheme.name.endswith("-best")
    for name in [scheme.name.removeprefix("gguf-").upper()]
    if name not in ("Q1_0", "Q2_0")  # no program of the targets reads them
]


def schemes(*quick: str) -> list[ParameterSet]:
    """Return every scheme; those that are not named are slow."""
    names = [item.values[0] for item in every_scheme()]
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


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


def packed_layers(module: nn.Module) -> dict[str, str]:
    """Return the scheme of each packed weight."""
    return {
        f"{fqn}.{name}": layout.scheme
        for fqn, part in module.named_modules()
        if isinstance(part, PackedLayer)
        for name, layout in part.lowbits_layouts.items()
    }


def values(module: nn.Module) -> dict[str, Tensor]:
    """Return all weights, decoded, under the names that they have in full precision."""
    found: dict[str, Tensor] = dict(module.named_parameters())
    for fqn, part in module.named_modules():
        for name in part.lowbits_layouts if isinstance(part, PackedLayer) else ():
            found[f"{fqn}.{name}"] = getattr(part, name) + 0
            for stored in stored_names(part, name):
                del found[f"{fqn}.{stored}"]
    return {name: tensor.detach() for name, tensor in found.items()}


def referenced(model: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Return a model's tensors by the names of the reference; and which are Linear weights."""
    tensors = dict(model.state_dict())
    linear = {f"{n}.weight" for n, part in model.named_modules() if isinstance(part, nn.Linear)}
    key_map = to_reference(model)
    made = {name: tensor.contiguous() for name, tensor in joined(key_map, tensors).items()}
    return made, {name for name, segments in key_map.items() if segments[0].source in linear}


def assert_untouched(module: nn.Module, before: dict[str, Tensor]) -> None:
    """See that a module is what it was before something that failed."""
    now = module.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert not packed_layers(module)
    assert lowbits.handle(module) is None


def save_drawn(pipe: Any, folder: Path, scheme: str) -> None:
    """Write a pipeline as packed in a scheme, and its picture beside it; it stays as it was."""
    with lowbits.apply(pipe, scheme, device="cpu"):
        torch.save(picture(pipe), folder / "picture.pt")
        pipe.save_pretrained(folder)


def drawn(folder: Path) -> Tensor:
    """Return the picture that a folder's pipeline drew before it was saved."""
    found: Tensor = torch.load(folder / "picture.pt")
    return found
