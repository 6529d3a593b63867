"""What packed models of diffusers and transformers say about themselves after casts and moves."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pipelines import PIPELINES
from schemes import every_scheme

import lowbits

if TYPE_CHECKING:
    from collections.abc import Callable

CASTS: dict[str, tuple[torch.dtype, Callable[[Any], Any]]] = {
    "half": (torch.float16, lambda model: model.half()),
    "bfloat16": (torch.bfloat16, lambda model: model.bfloat16()),
    "double": (torch.float64, lambda model: model.double()),
    "to": (torch.float16, lambda model: model.to(torch.float16)),
    "to device and dtype": (torch.bfloat16, lambda model: model.to("cpu", torch.bfloat16)),
    "float": (torch.float32, lambda model: model.float()),
}


@pytest.fixture(scope="module")
def flux() -> Any:
    return PIPELINES["flux"].build()


@pytest.mark.parametrize("scheme", every_scheme())
@pytest.mark.parametrize("name", ["transformer", "text_encoder_2"])
@pytest.mark.filterwarnings("ignore:Casting a .* model:UserWarning")
def test_dtype_and_device_right_after_every_cast(flux: Any, name: str, scheme: str) -> None:
    model = copy.deepcopy(getattr(flux, name))
    weights = sum(p.numel() for p in model.parameters())
    handle = lowbits.quantize(model, scheme, rules={"*": scheme}, keep_source="none")
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    for dtype, cast in CASTS.values():
        cast(model)
        assert (model.dtype, model.device) == (dtype, torch.device("cpu"))
    assert model.to("meta").device == torch.device("meta")
    assert model.dtype == torch.float32
    # The model counts what is stored, two 4-bit codes as one; the report counts weights.
    stored = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == stored
    assert handle.report().parameters == weights
