"""Forge's menu: its strings, and what each does."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, draw
from streamed import Anatomy
from torch import nn

from lowbits import errors, forge

LOW_BITS = [
    "Automatic",
    "Automatic (fp16 LoRA)",
    "bnb-nf4",
    "bnb-nf4 (fp16 LoRA)",
    "float8-e4m3fn",
    "float8-e4m3fn (fp16 LoRA)",
    "bnb-fp4",
    "bnb-fp4 (fp16 LoRA)",
    "float8-e5m2",
    "float8-e5m2 (fp16 LoRA)",
]


def option(keyword: str) -> forge.ForgeOption:
    return next(option for option in forge.options() if option.keyword == keyword)


def test_the_strings_are_those_of_its_interface() -> None:
    assert [option.label for option in forge.options()][:4] == [
        "Diffusion in Low Bits", "Swap Method", "Swap Location", "GPU Weights (MB)",
    ]  # fmt: skip
    assert list(option("diffusion_in_low_bits").choices) == LOW_BITS
    assert option("swap_method").choices == ("Queue", "Async")
    assert option("swap_location").choices == ("CPU", "Shared")


def test_apply_takes_what_the_options_hold() -> None:
    parameters = inspect.signature(forge.apply).parameters
    named = {name: p.default for name, p in parameters.items() if name not in ("pipe", "others")}
    assert named == {option.keyword: option.default for option in forge.options()}


@pytest.mark.parametrize("entry", LOW_BITS)
def test_every_entry_packs_the_denoiser_and_nothing_else(entry: str) -> None:
    pipe = PIPELINES["flux"].build()
    expected = draw("flux", pipe)
    anatomy = Anatomy(pipe)
    handle = forge.apply(pipe, diffusion_in_low_bits=entry, device="cpu", keep_source="memory")
    scheme = entry.removesuffix(" (fp16 LoRA)")
    packed = {(row.component, row.scheme) for row in handle.report().packed}
    assert packed == (set() if scheme == "Automatic" else {("transformer", scheme)})
    assert torch.equal(draw("flux", pipe), expected) == (scheme == "Automatic")
    handle.restore()
    anatomy.check()


@pytest.mark.parametrize("method", ["Queue", "Async", "ASYNC", "queue"])
def test_swapping_is_within_a_cap_in_its_megabytes(method: str) -> None:
    pipe = PIPELINES["flux"].build()
    expected = draw("flux", pipe)
    handle = forge.apply(
        pipe, swap_method=method, swap_location="CPU", gpu_weights_mb=1, device="cpu"
    )
    assert torch.equal(draw("flux", pipe), expected)
    stats = handle.stats()
    assert stats.peak_device_bytes <= stats.budget_bytes == 2**20
    assert (stats.method, stats.location) == (method.lower(), "cpu")


def test_a_small_cap_is_refused_with_what_would_do() -> None:
    pipe = PIPELINES["flux"].build()
    with pytest.raises(errors.InsufficientMemoryError) as caught:
        forge.apply(pipe, swap_location="Shared", gpu_weights_mb=0, device="cpu")
    assert caught.value.needed_bytes > 0


def test_automatic_keeps_what_is_quantized_already() -> None:
    model: Any = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 64))
    model[1].weight = nn.Parameter(model[1].weight.to(torch.float8_e4m3fn), requires_grad=False)
    handle = forge.apply(model, device="cpu")
    assert not handle.report().packed
    assert not handle.report().warnings
    assert model[1].weight.dtype == torch.float8_e4m3fn


def test_other_options_go_to_apply() -> None:
    pipe = PIPELINES["flux"].build()
    handle = forge.apply(
        pipe, diffusion_in_low_bits="bnb-nf4", device="cpu", components=["text_encoder_2"]
    )
    assert {row.component for row in handle.report().packed} == {"text_encoder_2"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"diffusion_in_low_bits": "bnb-nf8"}, "got 'bnb-nf8', expected one of Automatic, .*mean"),
        ({"swap_method": "Stream"}, "swap_method: got 'Stream', expected one of Queue, Async"),
        ({"swap_location": "Disk"}, "swap_location: got 'Disk', expected one of CPU, Shared"),
        ({"gpu_weights_mb": -1}, "gpu_weights_mb: got"),
        ({"gpu_weights_mb": "6GB"}, "gpu_weights_mb: got '6GB', expected megabytes as 6144"),
        ({"gpu_weights_mb": 0.5}, "gpu_weights_mb: got 0.5"),
        ({"gpu_weights_mb": float("nan")}, "gpu_weights_mb: got nan"),
        ({"gpu_weights_mb": float("inf")}, "gpu_weights_mb: got inf"),
        ({"gpu_weights": "6GB"}, "gpu_weights: it is called gpu_weights_mb here"),
        ({"swap": "async"}, "swap: it is called swap_method here"),
        ({"location": "cpu"}, "location: it is called swap_location here"),
        ({"scheme": "bnb-nf4"}, "scheme: it is called diffusion_in_low_bits here"),
        ({"never_oom": {"vae"}}, "never_oom: it is called never_oom_unet, never_oom_vae here"),
    ],
)
def test_what_forge_does_not_offer_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        forge.apply(nn.Linear(4, 4), device="cpu", **given)
