"""diffusers' LoRA calls on packed pipelines, resident and streamed: beside weights, and merged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline, FluxTransformer2DModel, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from pipelines import PIPELINES, draw
from streamed import ASYNC_DISK, MODES, Anatomy, mode_name, smallest_budget

import lowbits
from lowbits.core import packing

if TYPE_CHECKING:
    from pathlib import Path

PLACES: tuple[dict[str, Any], ...] = ({}, *MODES)


def place_name(place: dict[str, Any]) -> str:
    return mode_name(place) or "resident"


@pytest.fixture(params=PLACES, ids=place_name)
def place(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def applied(pipe: Any, scheme: str, place: dict[str, Any], **options: Any) -> lowbits.Handle:
    options = {"keep_source": "memory", **options}
    if place:
        sources = {"keep_source": options["keep_source"]}
        place = {"gpu_weights": 4 * smallest_budget(pipe, scheme, **sources), **place}
    return lowbits.apply(pipe, scheme, device="cpu", **place, **options)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", ["bnb-nf4", "gguf-q8_0"])
def test_fusing_is_merging_and_unfusing_gives_the_codes_back(
    scheme: str, place: dict[str, Any], lora: Path
) -> None:
    pipe: Any = PIPELINES["flux"].build()
    plain = draw("flux", pipe)
    handle = applied(pipe, scheme, place)
    packed = draw("flux", pipe)
    pipe.load_lora_weights(lora, adapter_name="one")
    pipe.set_adapters(["one"], [0.8])
    beside = draw("flux", pipe)
    effect = distance(beside, packed)
    pipe.fuse_lora(lora_scale=0.5)
    assert pipe.num_fused_loras == 1
    fused = draw("flux", pipe)
    assert distance(fused, packed) > 0.3 * effect
    pipe.unfuse_lora()
    pipe.set_adapters(["one"], [0.4])
    weaker = draw("flux", pipe)
    assert distance(fused, weaker) < (0.5 if scheme == "bnb-nf4" else 0.1) * effect
    pipe.fuse_lora()
    assert torch.equal(draw("flux", pipe), fused)
    pipe.disable_lora()
    assert torch.equal(draw("flux", pipe), packed)
    pipe.enable_lora()
    assert torch.equal(draw("flux", pipe), weaker)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(draw("flux", pipe), fused), "it is in the weights"
    lowbits.unmerge_lora(pipe)
    assert torch.equal(draw("flux", pipe), packed)
    handle.restore()
    assert torch.equal(draw("flux", pipe), plain)


@pytest.mark.parametrize("scheme", ["bnb-nf4", "gguf-q8_0"])
def test_an_adapter_that_was_fused_and_deleted_is_part_of_the_weights(
    scheme: str, lora: Path
) -> None:
    pictures = []
    for ends in ("delete_adapters", "unload_lora_weights"):
        pipe: Any = PIPELINES["flux"].build()
        pipe.load_lora_weights(lora, adapter_name="one")
        pipe.fuse_lora()
        getattr(pipe, ends)(*(["one"] if ends == "delete_adapters" else []))
        before = draw("flux", pipe)
        with lowbits.apply(pipe, scheme, device="cpu", keep_source="memory"):
            pictures.append(draw("flux", pipe))
        assert torch.equal(draw("flux", pipe), before)
    assert torch.equal(*pictures)


def test_a_lora_merged_in_parts_is_the_one_merged_at_once(
    place: dict[str, Any], lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, states = [], []
    for part_weights in (10**6, 500):
        monkeypatch.setattr(packing, "part_weights", lambda _, limit=part_weights: limit)
        pipe: Any = PIPELINES["flux"].build()
        applied(pipe, "gguf-q8_0", place)
        pipe.load_lora_weights(lora, adapter_name="one")
        packed = {key: held.clone() for key, held in pipe.transformer.state_dict().items()}
        pipe.fuse_lora()
        states.append(pipe.transformer.state_dict())
        assert any(not torch.equal(packed[key], fused) for key, fused in states[-1].items())
        pictures.append(draw("flux", pipe))
    assert all(torch.equal(whole, states[1][key]) for key, whole in states[0].items())
    assert torch.equal(*pictures)


@pytest.mark.filterwarnings("default:Already found a `peft_config`:UserWarning")
@pytest.mark.filterwarnings("default:Adapter cannot be set when the model is merged:UserWarning")
@pytest.mark.parametrize("order", ["lora first", "packed first"])
def test_adapters_are_merged_as_they_come_and_go(
    order: str, place: dict[str, Any], lora: Path
) -> None:
    def states(pipe: Any, option: str) -> list[torch.Tensor]:
        if order == "lora first":
            pipe.load_lora_weights(lora, adapter_name="one")
        handle = applied(pipe, "gguf-q8_0", place, lora=option)
        if order == "packed first":
            pipe.load_lora_weights(lora, adapter_name="one")
        pictures = [draw("flux", pipe)]
        pipe.set_adapters(["one"], [0.5])
        pictures.append(draw("flux", pipe))
        pipe.disable_lora()
        pictures.append(draw("flux", pipe))
        pipe.enable_lora()
        pipe.load_lora_weights(lora, adapter_name="two")
        pipe.set_adapters(["one", "two"], [0.5, -0.5])
        pictures.append(draw("flux", pipe))
        pipe.delete_adapters("two")
        pictures.append(draw("flux", pipe))
        handle.restore()
        pictures.append(draw("flux", pipe))
        pipe.unload_lora_weights()
        return [*pictures, draw("flux", pipe)]

    beside = states(PIPELINES["flux"].build(), "fp16")
    merged = states(PIPELINES["flux"].build(), "merge")
    off = beside[2]
    for number, (got, expected) in enumerate(zip(merged, beside, strict=True)):
        if number in {2, 5, 6}:  # switched off, restored, unloaded: nothing is in the codes
            assert torch.equal(got, expected), number
        else:
            assert distance(got, expected) < 0.1 * distance(beside[0], off), number
    assert torch.equal(beside[6], draw("flux", PIPELINES["flux"].build()))


def test_unloading_takes_out_what_was_merged_unasked(place: dict[str, Any], lora: Path) -> None:
    pipe: Any = PIPELINES["flux"].build()
    handle = applied(pipe, "gguf-q8_0", place, lora="merge")
    packed = draw("flux", pipe)
    pipe.load_lora_weights(lora)
    merged = draw("flux", pipe)
    assert distance(merged, packed) > 0.05
    pipe.unload_lora_weights()
    assert torch.equal(draw("flux", pipe), packed)
    handle.reconfigure(gpu_weights="all")
    pipe.load_lora_weights(lora)
    assert torch.equal(draw("flux", pipe), merged)
    handle.restore()


def test_a_strength_for_one_call_acts_on_a_merged_lora(lora: Path) -> None:
    pictures = []
    for option in ("fp16", "merge"):
        pipe: Any = PIPELINES["flux"].build()
        applied(pipe, "gguf-q8_0", {}, lora=option)
        packed = draw("flux", pipe)
        pipe.load_lora_weights(lora)
        draw("flux", pipe)
        generator = torch.Generator().manual_seed(0)
        call = {**PIPELINES["flux"].call, "joint_attention_kwargs": {"scale": 0.3}}
        pictures.append(torch.from_numpy(pipe(**call, generator=generator, return_dict=False)[0]))
    effect = distance(pictures[0], packed)
    assert distance(pictures[1], pictures[0]) < 0.2 * effect


@pytest.mark.parametrize("place", [{}, ASYNC_DISK], ids=place_name)
@pytest.mark.parametrize("option", ["fp16", "merge"])
def test_a_text_encoder_has_a_lora_too(place: dict[str, Any], option: str, tmp_path: Path) -> None:
    parts = ["unet", "text_encoder"]
    source: Any = PIPELINES["sd15"].build()
    config = LoraConfig(r=4, target_modules=["to_q", "to_k"])
    source.unet.add_adapter(config)
    source.text_encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "fc1"]))
    generator = torch.Generator().manual_seed(0)
    factors = [
        {
            name: torch.randn(value.shape, generator=generator) * 0.1
            for name, value in get_peft_model_state_dict(part).items()
        }
        for part in (source.unet, source.text_encoder)
    ]
    StableDiffusionPipeline.save_lora_weights(tmp_path, *factors)
    pipe: Any = PIPELINES["sd15"].build()
    plain = draw("sd15", pipe)
    if place:
        budget = 4 * smallest_budget(pipe, "gguf-q8_0", components=parts, keep_source="memory")
        place = {"gpu_weights": budget, **place}
    handle = lowbits.apply(
        pipe, "gguf-q8_0", components=parts, lora=option, keep_source="memory", device="cpu",
        **place,
    )  # fmt: skip
    packed = draw("sd15", pipe)
    pipe.load_lora_weights(tmp_path)
    beside = draw("sd15", pipe)
    effect = distance(beside, packed)
    assert effect > 0.02
    pipe.fuse_lora()
    assert distance(draw("sd15", pipe), beside) < 0.2 * effect
    pipe.unfuse_lora()
    assert distance(draw("sd15", pipe), beside) < (1e-6 if option == "fp16" else 0.2 * effect)
    pipe.disable_lora()
    assert torch.equal(draw("sd15", pipe), packed)
    handle.restore()
    pipe.unload_lora_weights()
    assert torch.equal(draw("sd15", pipe), plain)


@pytest.mark.parametrize("place", [{}, ASYNC_DISK], ids=place_name)
def test_a_lora_that_replaces_a_layer_is_reported_and_outlives_restore(
    place: dict[str, Any], tmp_path: Path
) -> None:
    pipe = control_pipeline()
    model = pipe.transformer
    save_control_lora(model, tmp_path)
    reference = control_pipeline()
    reference.load_lora_weights(tmp_path)
    expected = draw_controlled(reference)
    budget = {"gpu_weights": 4 * smallest_budget(pipe, "gguf-q8_0", keep_source="memory")}
    rules = {"x_embedder": "gguf-q8_0"}
    place = {**budget, **place} if place else {}
    handle = lowbits.apply(
        pipe, "gguf-q8_0", rules=rules, keep_source="memory", device="cpu", **place
    )
    assert not handle.report().warnings
    pipe.load_lora_weights(tmp_path)
    assert "transformer.x_embedder was replaced" in handle.report().warnings[-1]
    assert distance(draw_controlled(pipe), expected) < 0.02
    handle.restore()
    assert distance(draw_controlled(pipe), expected) < 0.01
    assert model.x_embedder.base_layer.in_features == 2 * 64


def control_pipeline() -> Any:
    parts = PIPELINES["flux"].build().components
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    kept = {name: parts[name] for name in names}
    return FluxControlPipeline(transformer=parts["transformer"], **kept)


def save_control_lora(model: Any, folder: Path) -> None:
    """Write a LoRA whose first layer takes twice the channels, as FLUX Control's."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    wide: Any = FluxTransformer2DModel(**{**config, "in_channels": 2 * config["in_channels"]})
    wide.add_adapter(LoraConfig(r=4, target_modules=["x_embedder", "to_q"]))
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: torch.randn(value.shape, generator=generator) * 0.2
        for name, value in get_peft_model_state_dict(wide).items()
    }
    FluxControlPipeline.save_lora_weights(folder, transformer_lora_layers=factors)


def draw_controlled(pipe: Any) -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    call = {
        name: value
        for name, value in PIPELINES["flux"].call.items()
        if name not in {"true_cfg_scale", "negative_prompt"}
    }
    generator = torch.Generator().manual_seed(0)
    image = Image.fromarray(pixels)
    drawn = pipe(**call, control_image=image, generator=generator, return_dict=False)[0]
    return torch.from_numpy(drawn)


def test_streamed_states_are_those_of_resident_ones(lora: Path) -> None:
    pictures = []
    for place in ({}, ASYNC_DISK):
        pipe: Any = PIPELINES["flux"].build()
        anatomy = Anatomy(pipe)
        handle = applied(pipe, "bnb-nf4", dict(place), lora="merge")
        pipe.load_lora_weights(lora)
        pictures.append(draw("flux", pipe))
        handle.restore()
        pipe.unload_lora_weights()
        assert torch.equal(draw("flux", pipe), draw("flux", PIPELINES["flux"].build()))
        assert {name for _, name in anatomy.tensors}
    assert torch.equal(*pictures)


def codes(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of the codes of all layers, by the names that they have without adapters."""
    held = {key: value for key, value in model.state_dict().items() if "qdata" in key}
    return {key.replace(".base_layer", ""): value.clone() for key, value in held.items()}


@pytest.mark.filterwarnings("default:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("lets_go", ["a pass", "a switch"])
def test_what_was_fused_on_request_stays_in_all_of_its_layers(lets_go: str) -> None:
    """Another one that has some of these layers, and not all, was switched off before."""
    pipe: Any = PIPELINES["flux"].build()
    handle = applied(pipe, "gguf-q8_0", {}, lora="merge")
    model = pipe.transformer
    for name, targets in {"one": ["to_q", "to_k"], "two": ["to_q", "to_v"]}.items():
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model.add_adapter(config, adapter_name=name)
    packed = codes(model)
    model.set_adapters(["one", "two"])
    model.fuse_lora()
    model.set_adapters(["one"])
    draw("flux", pipe)
    model.unload_lora()
    if lets_go == "a pass":
        draw("flux", pipe)
    else:
        handle.switch("gguf-q8_0")
    now = codes(model)
    changed = {key for key, held in packed.items() if not torch.equal(held, now[key])}
    assert changed == {key for key in packed if ".to_q." in key or ".to_k." in key}
