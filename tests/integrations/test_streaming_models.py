"""Every tiny pipeline, streamed in the smallest budget, and given back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import PIPELINES, draw
from streamed import ASYNC_DISK, QUEUE_CPU, Anatomy, smallest_budget

import lowbits


def resident(name: str, pipe: Any, scheme: str) -> torch.Tensor:
    with lowbits.apply(pipe, scheme, device="cpu", keep_source="memory"):
        return draw(name, pipe)


@pytest.mark.parametrize("scheme", ["native", "torchao-int8"])
@pytest.mark.parametrize("name", PIPELINES)
def test_streamed_and_restored_and_streamed_again(name: str, scheme: str) -> None:
    pipe = PIPELINES[name].build()
    draw(name, pipe)  # some models keep things from their first call on
    anatomy = Anatomy(pipe)
    expected = resident(name, pipe, scheme)
    smallest = smallest_budget(pipe, scheme, keep_source="memory")
    anatomy.check()
    for budget, mode in ((smallest, ASYNC_DISK), (2 * smallest, QUEUE_CPU)):
        options: dict[str, Any] = {"keep_source": "memory", "gpu_weights": budget, **mode}
        handle = lowbits.apply(pipe, scheme, device="cpu", **options)
        assert torch.equal(draw(name, pipe), expected)
        stats = handle.stats()
        assert 0 < stats.peak_device_bytes <= budget
        assert stats.passes >= len(handle.components)
        handle.restore()
        anatomy.check()


@pytest.mark.parametrize("name", PIPELINES)
def test_every_model_of_a_pipeline_takes_its_turn(name: str) -> None:
    pipe = PIPELINES[name].build()
    handle = lowbits.apply(pipe, device="cpu", gpu_weights=smallest_budget(pipe), **ASYNC_DISK)
    draw(name, pipe)
    draw(name, pipe)
    stats = handle.stats()
    copied = {unit.name.partition(".")[0] for unit in stats.units if unit.copies}
    assert copied == set(handle.components)
    assert stats.misses == 0


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_vae_encode_and_decode_are_bit_equal(name: str) -> None:
    pipe = PIPELINES[name].build()
    image = torch.rand(1, 3, 32, 32)

    def round_trip() -> torch.Tensor:
        with torch.no_grad():
            latents = pipe.vae.encode(image).latent_dist.mode()
            decoded: torch.Tensor = pipe.vae.decode(latents).sample
        return decoded

    expected = round_trip()
    with lowbits.apply(pipe, device="cpu", gpu_weights=smallest_budget(pipe), **ASYNC_DISK):
        assert torch.equal(round_trip(), expected)
        assert torch.equal(round_trip(), expected)
    pipe.vae.enable_tiling()
    expected = round_trip()
    with lowbits.apply(pipe, device="cpu", gpu_weights=smallest_budget(pipe), **QUEUE_CPU):
        assert torch.equal(round_trip(), expected)
