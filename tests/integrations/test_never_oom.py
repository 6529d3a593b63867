"""Never OOM: the denoiser in a ring, VAEs in tiles, always or where memory runs out."""

from __future__ import annotations

import copy
import logging
import pickle
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from loras import save_lora
from pipelines import PIPELINES, draw
from schemes import every_scheme
from streamed import MODES, Anatomy, mode_name, smallest_budget
from torch import nn

import lowbits
from lowbits import errors, forge
from lowbits.integrations.vae import can_be_tiled

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RESIDENT: dict[str, Any] = {"gpu_weights": "all"}
STREAMED: dict[str, Any] = {"gpu_weights": "1MB", "location": "cpu"}


def build() -> Any:
    pipe = PIPELINES["flux"].build()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 2, 16
    return pipe


def run_out_of_memory(part: nn.Module, too_large: Callable[[torch.Tensor], bool]) -> list[Any]:
    """Let a part of a VAE fail for some inputs; returns what failed calls held, weakly."""
    forward = part.forward
    held: list[weakref.ref[torch.Tensor]] = []

    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert all(reference() is None for reference in held), "a failed call's frame is alive"
        if too_large(x):
            activation = torch.zeros(8)
            held.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("out of memory")
        return forward(x, *args, **kwargs)

    part.forward = run
    return held


def in_tiles(pipe: Any) -> torch.Tensor:
    pipe.vae.enable_tiling()
    picture = draw("flux", pipe)
    pipe.vae.disable_tiling()
    return picture


@pytest.mark.parametrize("mode", MODES, ids=mode_name)
@pytest.mark.parametrize("size", ["auto", "all", "1GB"])
def test_no_block_of_the_denoiser_stays_and_the_others_do(size: str, mode: dict[str, Any]) -> None:
    pipe = build()
    expected = draw("flux", pipe)
    anatomy = Anatomy(pipe)
    handle = lowbits.apply(pipe, never_oom={"denoiser"}, device="cpu", gpu_weights=size, **mode)
    for _ in range(3):
        assert torch.equal(draw("flux", pipe), expected)
    stats = handle.stats()
    denoiser = [u for u in stats.units if u.name.startswith("transformer.") and not u.is_base]
    others = [u for u in stats.units if not u.name.startswith("transformer") and not u.is_base]
    assert denoiser
    assert others
    assert not any(unit.is_resident for unit in denoiser)
    assert min(unit.copies for unit in denoiser) >= 6
    assert max(unit.copies for unit in others) <= 1
    alone = smallest_budget(PIPELINES["flux"].build().transformer)
    rest = sum(u.nbytes for u in stats.units if not u.name.startswith("transformer"))
    assert stats.peak_device_bytes <= alone + rest
    handle.restore()
    anatomy.check()


def test_a_module_is_a_denoiser_itself_and_reconfigure_keeps_it_so() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    x = torch.randn(2, 64)
    expected = model(x)
    least = smallest_budget(model)
    handle = lowbits.apply(model, never_oom=["denoiser"], device="cpu", location="cpu")
    assert torch.equal(model(x), expected)
    assert handle.stats().peak_device_bytes == least
    handle.reconfigure(gpu_weights="1GB", swap="queue")
    assert torch.equal(model(x), expected)
    assert handle.stats().peak_device_bytes == least
    with pytest.raises(errors.InsufficientMemoryError):
        handle.reconfigure(gpu_weights=least - 1)


def test_an_adapter_that_arrives_is_beside_the_ring(tmp_path: Path) -> None:
    save_lora(tmp_path)
    pipe = build()
    handle = lowbits.apply(pipe, never_oom={"denoiser"}, device="cpu", location="cpu")
    draw("flux", pipe)
    plain = draw("flux", pipe)
    pipe.load_lora_weights(tmp_path)
    assert not torch.equal(draw("flux", pipe), plain)
    denoiser = [u for u in handle.stats().units if u.name.startswith("transformer.")]
    assert not any(unit.is_resident for unit in denoiser if not unit.is_base)


@pytest.mark.parametrize("options", [RESIDENT, STREAMED], ids=["resident", "streamed"])
def test_a_vae_works_in_tiles_always_and_is_given_back(options: dict[str, Any]) -> None:
    pipe = build()
    expected = in_tiles(pipe)
    assert not torch.equal(draw("flux", pipe), expected)
    anatomy = Anatomy(pipe)
    handle = lowbits.apply(pipe, never_oom={"vae"}, device="cpu", **options)
    assert pipe.vae.use_tiling
    assert pipe.vae.use_slicing
    assert torch.equal(draw("flux", pipe), expected)
    assert handle.stats().recoveries == 0
    handle.reconfigure(gpu_weights="1MB")
    assert pipe.vae.use_tiling
    handle.restore()
    assert not pipe.vae.use_tiling
    assert not pipe.vae.use_slicing
    anatomy.check()


def test_switches_that_the_caller_has_set_are_his() -> None:
    pipe = build()
    pipe.vae.enable_tiling()
    handle = lowbits.apply(pipe, never_oom={"vae"}, device="cpu")
    pipe.vae.disable_slicing()
    handle.restore()
    assert pipe.vae.use_tiling
    assert not pipe.vae.use_slicing


@pytest.mark.parametrize("options", [RESIDENT, STREAMED], ids=["resident", "streamed"])
def test_a_decode_that_runs_out_of_memory_is_repeated_in_tiles(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    pipe = build()
    expected = in_tiles(pipe)
    handle = lowbits.apply(pipe, device="cpu", **options)
    held = run_out_of_memory(pipe.vae.decoder, lambda z: z.shape[-1] > 2)
    with caplog.at_level(logging.WARNING, "lowbits"):
        assert torch.equal(draw("flux", pipe), expected)
        assert handle.stats().recoveries == 1
        assert torch.equal(draw("flux", pipe), expected)
    assert len(held) == handle.stats().recoveries == 2
    (record,) = caplog.records
    assert "slicing and tiling" in record.message
    assert not pipe.vae.use_tiling
    assert not pipe.vae.use_slicing
    handle.restore()
    with pytest.raises(torch.OutOfMemoryError):
        draw("flux", pipe)


@pytest.mark.parametrize("options", [RESIDENT, STREAMED], ids=["resident", "streamed"])
def test_an_encode_is_repeated_too(options: dict[str, Any]) -> None:
    pipe = build()
    pipe.vae.tile_sample_min_size = 32
    image = torch.rand(1, 3, 64, 64)
    pipe.vae.enable_tiling()
    with torch.no_grad():
        expected = pipe.vae.encode(image).latent_dist.mode()
    pipe.vae.disable_tiling()
    handle = lowbits.apply(pipe, device="cpu", **options)
    run_out_of_memory(pipe.vae.encoder, lambda x: x.shape[-1] > 32)
    with torch.no_grad():
        assert torch.equal(pipe.vae.encode(image).latent_dist.mode(), expected)
        assert torch.equal(pipe.vae.encode(x=image, return_dict=False)[0].mode(), expected)
    assert handle.stats().recoveries == 2


def test_one_picture_at_a_time_comes_before_tiles() -> None:
    pipe = build()
    latents = torch.randn(3, pipe.vae.config.latent_channels, 4, 4)
    with torch.no_grad():
        expected = torch.cat([pipe.vae.decode(z).sample for z in latents[:, None]])
        handle = lowbits.apply(pipe, device="cpu")
        run_out_of_memory(pipe.vae.decoder, lambda z: len(z) > 1)
        assert torch.equal(pipe.vae.decode(latents).sample, expected)
    assert handle.stats().recoveries == 1
    assert not pipe.vae.use_slicing


def test_what_does_not_fit_in_tiles_either_says_what_to_do() -> None:
    pipe = build()
    handle = lowbits.apply(pipe, device="cpu")
    run_out_of_memory(pipe.vae.decoder, lambda _: True)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        draw("flux", pipe)
    assert any("smaller tiles" in note for note in caught.value.__notes__)
    assert handle.stats().recoveries == 0
    assert not pipe.vae.use_tiling
    assert not pipe.vae.use_slicing


def test_a_call_that_goes_into_a_graph_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random states cannot be read there, and nothing is run."""
    pipe = build()
    handle = lowbits.apply(pipe, device="cpu")
    run_out_of_memory(pipe.vae.decoder, lambda _: True)
    monkeypatch.setattr("lowbits.integrations.vae.is_capturing", lambda _: True)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError) as caught:
        pipe.vae.decode(torch.randn(2, pipe.vae.config.latent_channels, 4, 4))
    assert not hasattr(caught.value, "__notes__")
    assert handle.stats().recoveries == 0


def test_other_errors_go_through_at_once() -> None:
    pipe = build()
    lowbits.apply(pipe, device="cpu")
    calls = []

    def fail(z: torch.Tensor) -> bool:
        calls.append(z)
        raise ValueError

    run_out_of_memory(pipe.vae.decoder, fail)
    with pytest.raises(ValueError):  # noqa: PT011 - it has no text
        draw("flux", pipe)
    assert len(calls) == 1


@pytest.mark.parametrize("name", PIPELINES)
def test_every_vae_is_repeated_with_the_same_latents(name: str) -> None:
    pipe = PIPELINES[name].build()
    if not can_be_tiled(pipe.vae):
        pytest.skip(f"{type(pipe.vae).__name__} has no tiles")
    pipe.vae.enable_tiling()
    expected = draw(name, pipe)
    pipe.vae.disable_tiling()
    anatomy = Anatomy(pipe)
    handle = lowbits.apply(pipe, device="cpu")
    failed: list[Any] = []
    forward = pipe.vae.decoder.forward
    failed = run_out_of_memory(pipe.vae.decoder, lambda _: not failed)
    assert torch.equal(draw(name, pipe), expected)
    assert handle.stats().recoveries == 1
    handle.restore()
    del pipe.vae.decoder.forward
    assert pipe.vae.decoder.forward == forward
    anatomy.check()


def test_a_call_that_is_repeated_draws_the_same_numbers() -> None:
    """Decoders of LTX add noise; generators are given to them, or the global one draws."""
    pipe = build()
    generator = torch.Generator().manual_seed(3)
    noise: list[torch.Tensor] = []

    def draws(_: Any) -> bool:
        noise.append(torch.cat((torch.rand(2, generator=generator), torch.rand(2))))
        return len(noise) == 1

    lowbits.apply(pipe, device="cpu")
    run_out_of_memory(pipe.vae.decoder, draws)
    decode = type(pipe.vae).decode
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(pipe.vae), "decode", lambda self, z, generator=None: decode(self, z))
        pipe.vae.decode(torch.randn(2, pipe.vae.config.latent_channels, 4, 4), generator=generator)
    assert torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))])
def test_copies_of_a_vae_are_ordinary(copier: Callable[[Any], Any]) -> None:
    pipe = build()
    lowbits.apply(pipe, device="cpu")
    twin = copier(pipe.vae)
    z = torch.randn(1, pipe.vae.config.latent_channels, 4, 4)
    with torch.no_grad():
        assert torch.equal(twin.decode(z).sample, pipe.vae.decode(z).sample)
        run_out_of_memory(twin.decoder, lambda z: z.shape[-1] > 2)
        twin.tile_latent_min_size = 2
        with pytest.raises(torch.OutOfMemoryError):
            twin.decode(z)
        handle = lowbits.apply(twin, device="cpu")
        twin.decode(z)
    assert handle.stats().recoveries == 1


@pytest.mark.parametrize("scheme", every_scheme())
def test_every_scheme_in_a_ring_and_in_tiles(scheme: str) -> None:
    pipe = build()
    with lowbits.apply(pipe, scheme, device="cpu", keep_source="memory"):
        expected = in_tiles(pipe)
    lowbits.apply(pipe, scheme, never_oom={"denoiser", "vae"}, device="cpu", location="cpu")
    assert torch.equal(draw("flux", pipe), expected)


def test_forge_asks_for_it_by_its_own_names() -> None:
    labels = [option.label for option in forge.options()][4:]
    assert labels == [
        "Enabled for UNet (always maximize offload)", "Enabled for VAE (always tiled)",
    ]  # fmt: skip
    pipe = build()
    handle = forge.apply(
        pipe, diffusion_in_low_bits="bnb-nf4 (fp16 LoRA)", swap_method="ASYNC",
        swap_location="Shared", gpu_weights_mb=6144, never_oom_unet=True, never_oom_vae=True,
        device="cpu",
    )  # fmt: skip
    assert draw("flux", pipe).isfinite().all()
    assert pipe.vae.use_tiling
    denoiser = [u for u in handle.stats().units if u.name.startswith("transformer.")]
    assert not any(unit.is_resident for unit in denoiser if not unit.is_base)


def test_what_is_not_there_is_told() -> None:
    handle = lowbits.apply(nn.Linear(4, 4), device="cpu", never_oom=["vae"])
    note = "never_oom: there is no VAE that can work in tiles"
    assert note in handle.stats().notes
    assert note in handle.report().warnings
    pipe = build()
    pipe.register_modules(transformer=None)
    with pytest.raises(errors.ConfigError, match="the target has no denoiser; it has"):
        lowbits.apply(pipe, device="cpu", never_oom=["denoiser"])
    for wrong, message in (("vae", "got the string 'vae'"), (["unet"], "got 'unet', expected one")):
        with pytest.raises(errors.ConfigError, match=f"never_oom: {message}"):
            lowbits.apply(pipe, device="cpu", never_oom=wrong)
