"""How pipelines are called while they are streamed: callbacks, interrupts, other sizes, compile."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, draw
from streamed import ASYNC_DISK, MODES, QUEUE_CPU, Anatomy, mode_name, stream

import lowbits
from lowbits import errors


@pytest.fixture(params=MODES, ids=mode_name)
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def call(pipe: Any, **options: Any) -> torch.Tensor:
    settings = {**PIPELINES["flux"].call, **options}
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(**settings, generator=generator, return_dict=False)[0])


VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_inference_steps": 4},
    {"height": 96, "width": 48},
    {"num_images_per_prompt": 3},
    {"true_cfg_scale": 3.0, "negative_prompt": "a dog"},
    {"num_inference_steps": 1},
    {"prompt": ["a cat", "a dog"]},
    {},
]


def test_steps_sizes_and_counts_may_change(mode: dict[str, Any]) -> None:
    pipe: Any = PIPELINES["flux"].build()
    expected = [call(pipe, **options) for options in VARIANTS]
    handle = stream(pipe, **mode)
    for options, picture in zip(VARIANTS, expected, strict=True):
        assert torch.equal(call(pipe, **options), picture), options
    stats = handle.stats()
    assert stats.peak_device_bytes <= stats.budget_bytes
    handle.restore()


def test_a_callback_may_call_the_denoiser(mode: dict[str, Any]) -> None:
    pipe: Any = PIPELINES["flux"].build()

    def again(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors["latents"]
        result = pipe.transformer(
            hidden_states=latents,
            timestep=t.expand(1) / 1000,
            guidance=torch.ones(1),
            pooled_projections=torch.ones(1, 64),
            encoder_hidden_states=torch.ones(1, 16, 64),
            txt_ids=torch.zeros(16, 3),
            img_ids=torch.zeros(latents.shape[1], 3),
        )[0]
        pipe.vae.decode(torch.zeros(1, 16, 4, 4))
        return {"latents": latents + 0.1 * step * result}

    expected = call(pipe, callback_on_step_end=again)
    handle = stream(pipe, **mode)
    assert torch.equal(call(pipe, callback_on_step_end=again), expected)
    assert torch.equal(call(pipe, callback_on_step_end=again), expected)
    handle.restore()


class StopError(Exception):
    pass


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_an_error_in_a_callback_leaves_the_next_call_right(
    error: type[BaseException], mode: dict[str, Any]
) -> None:
    pipe: Any = PIPELINES["flux"].build()
    expected = call(pipe)
    anatomy = Anatomy(pipe)
    handle = stream(pipe, **mode)

    def stop(*_: Any) -> dict[str, Any]:
        raise error

    for _ in range(2):
        with pytest.raises(error):
            call(pipe, callback_on_step_end=stop)
        assert torch.equal(call(pipe), expected)
    handle.restore()
    anatomy.check()


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_an_error_inside_a_block_leaves_the_next_call_right(
    error: type[BaseException], mode: dict[str, Any]
) -> None:
    pipe: Any = PIPELINES["flux"].build()
    expected = call(pipe)

    def stop(*_: Any) -> None:
        raise error

    handle = stream(pipe, times=2, **mode)
    for block in (pipe.transformer.transformer_blocks[1], pipe.vae.decoder.mid_block):
        hook = block.register_forward_hook(stop)
        with pytest.raises(error):
            call(pipe)
        hook.remove()
        assert torch.equal(call(pipe), expected)
    handle.restore()
    assert torch.equal(call(pipe), expected)


def test_an_interrupted_pipeline(mode: dict[str, Any]) -> None:
    pipe: Any = PIPELINES["flux"].build()

    def interrupt(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    whole = call(pipe, num_inference_steps=4)
    cut = call(pipe, num_inference_steps=4, callback_on_step_end=interrupt)
    assert not torch.equal(whole, cut)
    handle = stream(pipe, **mode)
    assert torch.equal(call(pipe, num_inference_steps=4, callback_on_step_end=interrupt), cut)
    assert torch.equal(call(pipe, num_inference_steps=4), whole)
    handle.restore()


def test_two_pipelines_share_a_text_encoder(mode: dict[str, Any]) -> None:
    one: Any = PIPELINES["flux"].build()
    two: Any = PIPELINES["flux"].build(seed=1)
    two.text_encoder, two.text_encoder_2 = one.text_encoder, one.text_encoder_2
    two.register_modules(text_encoder=one.text_encoder, text_encoder_2=one.text_encoder_2)
    expected = [draw("flux", one), draw("flux", two)]
    handle = stream(one, **mode)
    with pytest.raises(errors.AlreadyPatchedError):
        lowbits.apply(two, device="cpu", gpu_weights="300KB")
    other = lowbits.apply(two.transformer, device="cpu", gpu_weights="300KB", **mode)
    for _ in range(2):
        assert torch.equal(draw("flux", one), expected[0])
        assert torch.equal(draw("flux", two), expected[1])
    handle.restore()
    assert torch.equal(draw("flux", two), expected[1])
    other.restore()
    assert [torch.equal(draw("flux", p), e) for p, e in zip((one, two), expected, strict=True)] == [
        True,
        True,
    ]


def test_two_threads_take_turns(mode: dict[str, Any]) -> None:
    pipe: Any = PIPELINES["flux"].build()
    latents = [torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]

    def denoise(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = pipe.transformer(
                hidden_states=x, timestep=torch.tensor([0.5]), guidance=torch.ones(1),
                pooled_projections=torch.ones(1, 64), encoder_hidden_states=torch.ones(1, 16, 64),
                txt_ids=torch.zeros(16, 3), img_ids=torch.zeros(16, 3),
            )[0]  # fmt: skip
        return result

    expected = [denoise(x) for x in latents]
    found: list[torch.Tensor | None] = [None, None]

    def work(number: int) -> None:
        for _ in range(3):
            found[number] = denoise(latents[number])

    handle = stream(pipe, **mode)
    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.restore()
    assert all(f is not None and torch.equal(f, e) for f, e in zip(found, expected, strict=True))


# Every two of the three choices meet.
@pytest.mark.parametrize(
    ("first", "scheme", "mode"),
    [
        ("apply", "native", QUEUE_CPU),
        ("apply", "torchao-int8", ASYNC_DISK),
        ("compile", "native", ASYNC_DISK),
        ("compile", "torchao-int8", QUEUE_CPU),
    ],
)
def test_repeated_blocks_compile_once(first: str, scheme: str, mode: dict[str, Any]) -> None:
    pipe: Any = PIPELINES["flux"].build()
    with lowbits.apply(pipe, scheme, device="cpu", keep_source="memory") as resident:
        expected = call(pipe)
        budget = resident.stats().peak_device_bytes * 3 // 5  # whole blocks: parts do not compile

    def compile_blocks() -> None:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")

    def apply() -> lowbits.Handle:
        return lowbits.apply(
            pipe, scheme, device="cpu", gpu_weights=budget, keep_source="memory", **mode
        )

    if first == "apply":
        handle = apply()
        compile_blocks()
    else:
        compile_blocks()
        handle = apply()
    assert torch.allclose(call(pipe), expected, atol=1e-5)
    assert torch.allclose(call(pipe), expected, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.allclose(call(pipe), expected, atol=1e-5)
    stats = handle.stats()
    assert stats.copied_bytes
    assert stats.peak_device_bytes <= budget
    handle.restore()
    assert call(pipe).isfinite().all()


@pytest.mark.parametrize("swap", ["auto"])
@pytest.mark.parametrize("location", ["cpu", "disk"])
def test_the_method_is_chosen_by_trial(swap: str, location: str) -> None:
    pipe: Any = PIPELINES["flux"].build()
    expected = call(pipe, num_inference_steps=6)
    handle = stream(pipe, swap=swap, location=location)
    for _ in range(2):
        assert torch.equal(call(pipe, num_inference_steps=6), expected)
    assert handle.stats().method
    handle.restore()


def test_reconfigured_from_one_way_to_the_next() -> None:
    pipe: Any = PIPELINES["flux"].build()
    expected = call(pipe)
    anatomy = Anatomy(pipe)
    handle = stream(pipe, **ASYNC_DISK)
    for options in (QUEUE_CPU, {"gpu_weights": "all"}, {"gpu_weights": "300KB"}, ASYNC_DISK):
        handle.reconfigure(**options)
        assert torch.equal(call(pipe), expected)
    handle.restore()
    anatomy.check()
