"""peft's LoRA on streamed pipelines: the same pictures as on resident ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pipelines import PIPELINES, draw
from safetensors.torch import save_file
from streamed import MODES, Anatomy, mode_name, smallest_budget, stream
from streaming.models import WIDE, frozen, inputs

import lowbits
from lowbits import errors

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=MODES, ids=mode_name)
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def states(pipe: Any, lora: Path) -> list[torch.Tensor]:
    """Draw with a LoRA loaded, scaled, switched off and on, and taken away."""
    pictures = [draw("flux", pipe)]
    pipe.load_lora_weights(lora, adapter_name="one")
    pictures.append(draw("flux", pipe))
    pipe.set_adapters(["one"], [0.5])
    pictures.append(draw("flux", pipe))
    pipe.disable_lora()
    pictures.append(draw("flux", pipe))
    pipe.enable_lora()
    pictures.append(draw("flux", pipe))
    pipe.unload_lora_weights()
    pictures.append(draw("flux", pipe))
    return pictures


@pytest.mark.parametrize("scheme", ["native", "bnb-nf4", "torchao-int8"])
def test_a_lora_comes_and_goes_while_streamed(
    scheme: str, mode: dict[str, Any], lora: Path
) -> None:
    pipe: Any = PIPELINES["flux"].build()
    with lowbits.apply(pipe, scheme, device="cpu", keep_source="memory"):
        expected = states(pipe, lora)
    anatomy = Anatomy(pipe)  # peft leaves attributes behind
    budget = 4 * smallest_budget(pipe, scheme, keep_source="memory")
    handle = lowbits.apply(
        pipe, scheme, device="cpu", gpu_weights=budget, keep_source="memory", **mode
    )
    found = states(pipe, lora)
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * 6
    assert handle.stats().peak_device_bytes <= budget
    handle.restore()
    anatomy.check()


def test_the_factors_count_in_the_budget(lora: Path) -> None:
    pipe: Any = PIPELINES["flux"].build()
    budget = 2 * smallest_budget(pipe)
    handle = lowbits.apply(pipe, device="cpu", gpu_weights=budget, swap="queue")
    pipe.load_lora_weights(lora)
    for _ in range(2):
        with pytest.raises(errors.InsufficientMemoryError) as caught:
            draw("flux", pipe)
    handle.reconfigure(gpu_weights=caught.value.needed_bytes)
    picture = draw("flux", pipe)
    assert handle.stats().peak_device_bytes <= caught.value.needed_bytes
    handle.restore()
    assert torch.equal(draw("flux", pipe), picture)


@pytest.mark.parametrize("scheme", ["native", "bnb-nf4", "torchao-int8"])
def test_what_an_error_asks_for_will_do(scheme: str, mode: dict[str, Any], lora: Path) -> None:
    pipe: Any = PIPELINES["flux"].build()
    handle = stream(pipe, scheme, keep_source="memory", **mode)
    before = draw("flux", pipe)
    pipe.load_lora_weights(lora, adapter_name="one")
    # The text encoder, which has no adapter: another model's takes its room.
    with pytest.raises(errors.InsufficientMemoryError, match="adapters of other models") as caught:
        draw("flux", pipe)
    needed = caught.value.needed_bytes
    handle.reconfigure(gpu_weights=needed)
    picture = draw("flux", pipe)
    assert handle.stats().peak_device_bytes <= needed
    with pytest.raises(errors.InsufficientMemoryError):
        handle.reconfigure(gpu_weights=needed // 2)
    assert handle.stats().budget_bytes == needed
    assert torch.equal(draw("flux", pipe), picture)
    handle.restore()
    handle = stream(pipe, scheme, keep_source="memory", **mode)  # in what `apply` asks for
    assert torch.equal(draw("flux", pipe), picture)
    pipe.unload_lora_weights()
    assert torch.equal(draw("flux", pipe), before)


def test_a_reconfigure_that_fails_keeps_a_cap_that_is_too_small_now(
    mode: dict[str, Any], lora: Path
) -> None:
    pipe: Any = PIPELINES["flux"].build()
    handle = stream(pipe, "bnb-nf4", keep_source="memory", **mode)
    before, cap = draw("flux", pipe), handle.stats().budget_bytes
    pipe.load_lora_weights(lora)
    for _ in range(2):
        with pytest.raises(errors.InsufficientMemoryError):
            handle.reconfigure(gpu_weights=cap)
        assert handle.stats().budget_bytes == cap
        with pytest.raises(errors.InsufficientMemoryError):
            draw("flux", pipe)
    with pytest.raises(errors.InsufficientMemoryError):
        handle.switch("gguf-q8_0")
    owned = lowbits.handle(pipe)
    assert owned is not None
    assert owned.stats().budget_bytes == cap
    pipe.unload_lora_weights()
    assert torch.equal(draw("flux", pipe), before)
    assert owned.stats().peak_device_bytes <= cap


def test_a_native_lora_is_fused_while_streamed(mode: dict[str, Any], lora: Path) -> None:
    def fused(pipe: Any) -> list[torch.Tensor]:
        pipe.load_lora_weights(lora, adapter_name="one")
        pipe.fuse_lora(lora_scale=0.7)
        pictures = [draw("flux", pipe)]
        pipe.unfuse_lora()
        return [*pictures, draw("flux", pipe)]

    expected = fused(PIPELINES["flux"].build())
    pipe: Any = PIPELINES["flux"].build()
    budget = 4 * smallest_budget(pipe)
    handle = lowbits.apply(pipe, device="cpu", gpu_weights=budget, **mode)
    found = fused(pipe)
    handle.restore()
    found.append(draw("flux", pipe))
    expected.append(expected[-1])
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * 3


def test_a_fused_native_lora_outlives_the_streaming(mode: dict[str, Any], lora: Path) -> None:
    pipe: Any = PIPELINES["flux"].build()
    handle = lowbits.apply(pipe, device="cpu", gpu_weights=4 * smallest_budget(pipe), **mode)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = draw("flux", pipe)
    handle.reconfigure(gpu_weights="all")
    assert torch.equal(draw("flux", pipe), fused)
    handle.restore()
    assert torch.equal(draw("flux", pipe), fused)
    assert not torch.equal(draw("flux", PIPELINES["flux"].build()), fused)


def test_fusing_without_a_source_is_refused(mode: dict[str, Any], lora: Path) -> None:
    pipe: Any = PIPELINES["flux"].build()
    budget = 4 * smallest_budget(pipe, "bnb-nf4", keep_source="none")
    lowbits.apply(pipe, "bnb-nf4", device="cpu", gpu_weights=budget, keep_source="none", **mode)
    pipe.load_lora_weights(lora)
    beside = draw("flux", pipe)
    with pytest.raises(errors.SourceUnavailableError, match="lora='fp16'"):
        pipe.fuse_lora()
    assert torch.equal(draw("flux", pipe), beside)


@pytest.mark.parametrize("scheme", ["native", "gguf-q8_0"])
def test_a_lora_fused_before_is_not_undone_by_the_file(
    scheme: str, lora: Path, tmp_path: Path
) -> None:
    pipe: Any = PIPELINES["flux"].build()
    state = {name: value.contiguous() for name, value in pipe.transformer.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    plain = draw("flux", pipe)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    anatomy = Anatomy(pipe)
    fused = draw("flux", pipe)
    assert not torch.equal(plain, fused)
    with lowbits.apply(pipe, scheme, device="cpu", keep_source="memory"):
        expected = draw("flux", pipe)
    options: dict[str, Any] = {"source": tmp_path, "keep_source": "memory", "location": "disk"}
    budget = smallest_budget(pipe, scheme, **options)
    with lowbits.apply(pipe, scheme, device="cpu", gpu_weights=budget, **options) as handle:
        assert torch.equal(draw("flux", pipe), expected)
        assert handle.stats().disk_bytes > 0
    anatomy.check()
    assert torch.equal(draw("flux", pipe), fused)


@pytest.mark.parametrize("resident", [False, True])
@torch.no_grad()
def test_a_lora_that_came_while_streamed_is_merged_then_switched_off(*, resident: bool) -> None:
    """peft takes it out of the weights inside a forward, by `.data`, which nobody counts."""

    def script(model: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
        wrapped = get_peft_model(model, config).eval()
        results = [model(inputs(WIDE))]
        wrapped.merge_adapter()
        results.append(model(inputs(WIDE)))
        with wrapped.disable_adapter():
            results += [model(inputs(WIDE)) for _ in range(3)]
        results.append(model(inputs(WIDE)))
        wrapped.merge_adapter()
        return [*results, model(inputs(WIDE))]

    expected, model = script(frozen()), frozen()
    budget = 10**7 if resident else 100_000
    with lowbits.LayerStreamer(model, device="cpu", budget=budget, method="queue"):
        assert all(map(torch.equal, script(model), expected))
    assert torch.equal(model(inputs(WIDE)), expected[-1])
