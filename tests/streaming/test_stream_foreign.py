"""Models of diffusers, and hooks of other libraries that move weights, too."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, apply_group_offloading, apply_layerwise_casting
from diffusers.models import FluxTransformer2DModel
from pipelines import PIPELINES, draw
from streaming.models import Snapshot, inputs, reference, same, streamer_of

import lowbits
from lowbits.errors import PatchError, StreamError
from lowbits.streaming.streamer import LayerStreamer

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = PIPELINES["flux"].build()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def picture(pipe: Any) -> torch.Tensor:
    return draw("flux", pipe)


@pytest.mark.parametrize(("method", "location"), [("queue", "disk"), ("async", "cpu")])
def test_the_transformer_of_a_pipeline(
    pipe: Any, picture: torch.Tensor, method: str, location: str
) -> None:
    transformer = pipe.transformer
    before = Snapshot(transformer)
    with streamer_of(transformer, method=method, location=location) as streamer:
        assert isinstance(transformer, FluxTransformer2DModel)
        assert transformer.device == torch.device("cpu")
        assert transformer.dtype == torch.float32
        assert same(draw("flux", pipe), picture)
        assert transformer.device == torch.device("cpu")
        assert transformer.dtype == torch.float32
        assert streamer.stats().peak_device_bytes <= streamer.stats().budget_bytes
        assert streamer.stats().misses == 0
    before.require()
    assert same(draw("flux", pipe), picture)


def test_every_component_at_once(pipe: Any, picture: torch.Tensor) -> None:
    models = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae]
    streamers = [streamer_of(model, location="disk").attach() for model in models]
    assert same(draw("flux", pipe), picture)
    for streamer in streamers:
        streamer.detach()
    assert same(draw("flux", pipe), picture)


def test_a_packed_transformer(picture: torch.Tensor) -> None:
    pipe: Any = PIPELINES["flux"].build()
    pipe.set_progress_bar_config(disable=True)
    lowbits.quantize(pipe.transformer, "bnb-nf4")
    packed = draw("flux", pipe)
    assert not same(packed, picture)
    with streamer_of(pipe.transformer):
        assert same(draw("flux", pipe), packed)
    lowbits.restore(pipe.transformer)
    assert same(draw("flux", pipe), picture)


def test_saving_and_loading(pipe: Any, tmp_path: Path) -> None:
    transformer = pipe.transformer
    expected = {key: value.clone() for key, value in transformer.state_dict().items()}
    with streamer_of(transformer, location="disk"):
        transformer.save_pretrained(tmp_path)
    loaded: Any = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert all(same(loaded.state_dict()[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_regional_compilation(pipe: Any, picture: torch.Tensor) -> None:
    made: Any = PIPELINES["flux"].build()
    made.set_progress_bar_config(disable=True)
    total = sum(p.nbytes for p in made.transformer.parameters())
    with LayerStreamer(
        made.transformer, device="cpu", budget=total * 8 // 10, method="queue"
    ) as streamer:
        assert "transformer_blocks.0" in {unit.name for unit in streamer.stats().units}
        made.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert same(draw("flux", made), picture)
        assert same(draw("flux", made), picture)


def test_hooks_of_accelerate_are_refused() -> None:
    model, expected = reference(), reference()(inputs())
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(PatchError, match="remove"):
        LayerStreamer(model, device="cpu", budget=10**6).attach()
    remove_hook_from_module(model, recurse=True)
    with streamer_of(model):
        assert same(model(inputs()), expected)


def test_a_hook_on_one_block_is_refused() -> None:
    model = reference()
    add_hook_to_module(model.blocks[1], AlignDevicesHook(io_same_device=True))
    with pytest.raises(PatchError, match=r"blocks\.1"):
        LayerStreamer(model, device="cpu", budget=10**6).attach()


def test_hooks_of_accelerate_that_come_later_are_refused() -> None:
    model, expected = reference(), reference()(inputs())
    with streamer_of(model):
        model(inputs())
        with pytest.raises((PatchError, StreamError)):
            accelerate.cpu_offload(model, torch.device("cpu"))
        remove_hook_from_module(model, recurse=True)
        assert same(model(inputs()), expected)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level", "casting"])
def test_hooks_of_diffusers_are_refused(kind: str) -> None:
    model: Any = PIPELINES["flux"].build().transformer
    if kind == "casting":
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    else:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        cpu = torch.device("cpu")
        apply_group_offloading(
            model, onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks
        )
    with pytest.raises(PatchError, match="remove"):
        LayerStreamer(model, device="cpu", budget=10**9).attach()


def test_hooks_that_came_between_a_copy_and_a_pass_are_refused_by_that_pass() -> None:
    model = reference()
    with torch.no_grad(), streamer_of(model):
        expected = model(inputs())
        copy.deepcopy(model)
        apply_group_offloading(model, CPU, CPU, offload_type="leaf_level")
        for _ in range(2):
            with pytest.raises(PatchError, match="group_offloading.: remove them"):
                model(inputs())
        for module in model.modules():
            HookRegistry.check_if_exists_or_initialize(module).remove_hook("group_offloading")
        assert same(model(inputs()), expected)
    assert same(model(inputs()), expected)
