"""Devices by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lowbits
from lowbits.core.device import named_device, usable_device
from lowbits.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

#: No build of torch computes on all of them.
FOREIGN = ("cuda", "mps", "xpu", "xla", "hpu")


@pytest.mark.parametrize("value", ["cpu", "cpu:0", torch.device("cpu")])
def test_devices_that_are_there(value: Any) -> None:
    assert usable_device(value).type == named_device(value).type == "cpu"


@pytest.mark.parametrize("value", ["gpu", "cuda:x", "", None, torch.float16])
def test_names_that_are_none(value: Any) -> None:
    for take in (named_device, usable_device):
        with pytest.raises(ConfigError, match="device: got .*, expected one such as cpu or cuda:0"):
            take(value)


def _foreign() -> str:
    here = torch.accelerator.current_accelerator(check_available=True)
    return next(kind for kind in FOREIGN if here is None or here.type != kind)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, device: lowbits.apply(model, device=device),
        lambda model, device: lowbits.LayerStreamer(model, device=device, budget="1MB").attach(),
        lambda _, device: lowbits.device_budget(device, "1MB"),
    ],
    ids=["apply", "streamer", "budget"],
)
def test_devices_that_are_not_here(use: Callable[[nn.Module, str], object]) -> None:
    model = nn.Linear(4, 4)
    before = model.weight
    for device in (_foreign(), "meta"):
        with pytest.raises(ConfigError, match=rf"cannot compute on '{device}' here .* on: cpu"):
            use(model, device)
    assert model.weight is before
    assert lowbits.handle(model) is None
