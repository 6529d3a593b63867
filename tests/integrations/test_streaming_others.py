"""What other code may do to a pipeline while it is streamed: the table in the design."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig, FluxImg2ImgPipeline
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from pipelines import PIPELINES, draw
from safetensors.torch import load_file, save_file, save_model
from streamed import ASYNC_DISK, QUEUE_CPU, Anatomy, smallest_budget, stream

import lowbits
from lowbits import errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")
PLAIN = (torch.Tensor, torch.nn.Parameter)


@pytest.fixture(params=["native", "bnb-nf4"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def mode(scheme: str) -> dict[str, Any]:
    return ASYNC_DISK if scheme == "native" else QUEUE_CPU


def build(scheme: str = "native") -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    """Make tiny FLUX; return it, its picture and state in a scheme."""
    pipe: Any = PIPELINES["flux"].build()
    with lowbits.apply(pipe, scheme, device="cpu", keep_source="memory"):
        state = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
        expected = draw("flux", pipe)
    return pipe, expected, state


def same_state(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(state) and all(
        type(value) in PLAIN and value.device == CPU and torch.equal(value, state[key])
        for key, value in found.items()
    )


def test_where_it_computes_already_is_no_move(scheme: str, mode: dict[str, Any]) -> None:
    pipe, expected, _ = build(scheme)
    handle = stream(pipe, scheme, **mode)
    assert pipe.to("cpu") is pipe
    assert pipe.transformer.cpu() is pipe.transformer
    assert pipe.transformer.to("cpu", torch.float32) is pipe.transformer
    assert pipe._execution_device == pipe.transformer.device == CPU
    assert pipe.transformer.dtype == torch.float32
    pipe.maybe_free_model_hooks()
    pipe.remove_all_hooks()
    pipe.reset_device_map()
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()


MOVES: dict[str, Callable[[Any], Any]] = {
    "pipeline": lambda pipe: pipe.to("meta"),
    "model": lambda pipe: pipe.transformer.to("meta"),
    "model and dtype": lambda pipe: pipe.transformer.to("meta", torch.float16),
    "empty": lambda pipe: pipe.vae.to_empty(device="meta"),
    "block": lambda pipe: pipe.transformer.transformer_blocks[0].to("meta"),
}


@pytest.mark.parametrize("move", MOVES)
def test_another_device_is_refused_before_anything_moves(
    move: str, scheme: str, mode: dict[str, Any]
) -> None:
    pipe, expected, _ = build(scheme)
    anatomy = Anatomy(pipe)
    handle = stream(pipe, scheme, keep_source="memory", times=2, **mode)
    with pytest.raises(errors.PatchError, match="cannot move a streamed.*handle.reconfigure"):
        MOVES[move](pipe)
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()
    anatomy.check()


@pytest.mark.parametrize("name", ["text_encoder_2", "transformer", "vae"])
def test_half_is_honoured(name: str, scheme: str, mode: dict[str, Any]) -> None:
    inputs = {
        "text_encoder_2": lambda _: (torch.arange(8)[None],),
        "vae": lambda dtype: (torch.ones(1, 3, 32, 32, dtype=dtype),),
    }
    pipe = PIPELINES["flux"].build()
    if name == "transformer":
        _cast_and_compare(pipe.transformer, scheme, mode, lambda d: (), _flux_inputs)
    else:
        _cast_and_compare(getattr(pipe, name), scheme, mode, inputs[name], lambda _: {})


def _flux_inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.ones(1, 16, 64, dtype=dtype),
        "encoder_hidden_states": torch.ones(1, 8, 64, dtype=dtype),
        "pooled_projections": torch.ones(1, 64, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([1.0], dtype=dtype),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def _cast_and_compare(
    model: Any,
    scheme: str,
    mode: dict[str, Any],
    args: Callable[[torch.dtype], tuple[Any, ...]],
    kwargs: Callable[[torch.dtype], dict[str, Any]],
) -> None:
    other = copy.deepcopy(model)
    lowbits.apply(other, scheme, device="cpu", keep_source="memory")
    handle = stream(model, scheme, keep_source="memory", times=4, **mode)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            for target in (other, model):
                target.to(dtype)
            got, expected = (m(*args(dtype), **kwargs(dtype))[0] for m in (model, other))
            assert model.dtype == got.dtype == dtype
            assert torch.equal(got, expected)
    handle.restore()
    lowbits.restore(other)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
def test_sdxl_in_float16_upcasts_its_streamed_vae(mode: dict[str, Any]) -> None:
    pipe: Any = PIPELINES["sdxl"].build(dtype=torch.float16)
    expected = draw("sdxl", pipe)
    handle = stream(pipe, times=2, **mode)
    assert torch.equal(draw("sdxl", pipe), expected)
    assert pipe.vae.dtype == pipe.unet.dtype == torch.float16
    assert torch.equal(draw("sdxl", pipe), expected)
    handle.restore()
    assert torch.equal(draw("sdxl", pipe), expected)


def _sequential(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")


def _accelerate(pipe: Any) -> None:
    import accelerate

    accelerate.cpu_offload(pipe.transformer, execution_device=CPU)


def _group(pipe: Any) -> None:
    pipe.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level", use_stream=False
    )


def _model_group(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    )


def _model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def _function_group(pipe: Any) -> None:
    apply_group_offloading(
        pipe.text_encoder_2, onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    )


def _dispatch(pipe: Any) -> None:
    import accelerate

    parts = dict.fromkeys((name for name, _ in pipe.transformer.named_children()), "cpu")
    parts["transformer_blocks"] = "disk"
    with tempfile.TemporaryDirectory() as folder:
        accelerate.dispatch_model(pipe.transformer, parts, main_device="cpu", offload_dir=folder)


def _one_hook(pipe: Any) -> None:
    hook = AlignDevicesHook(CPU, offload=True, place_submodules=True)
    add_hook_to_module(pipe.transformer.x_embedder, hook)


@pytest.mark.parametrize(
    "offload",
    [
        _sequential,
        _accelerate,
        _group,
        _model_group,
        _model_offload,
        _function_group,
        _dispatch,
        _one_hook,
    ],
)
def test_another_way_to_offload_is_refused(offload: Callable[[Any], None], scheme: str) -> None:
    pipe, expected, _ = build(scheme)
    anatomy = Anatomy(pipe)
    handle = stream(pipe, scheme, keep_source="memory", **QUEUE_CPU)
    with pytest.raises(errors.LowbitsError, match="handle.reconfigure"):
        offload(pipe)
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()
    anatomy.check()


def test_a_hook_on_a_layer_inside_of_a_unit_is_refused(scheme: str) -> None:
    """No call of lowbits stands before such a layer, but its weights are stand-ins."""
    pipe, expected, _ = build(scheme)
    handle = stream(pipe, scheme, keep_source="memory", **QUEUE_CPU)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    with pytest.raises(errors.LowbitsError, match="handle.reconfigure"):
        add_hook_to_module(layer, AlignDevicesHook(CPU, offload=True))
    remove_hook_from_module(layer)
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()


@pytest.mark.parametrize("is_method", [True, False])
def test_layerwise_casting_is_refused(
    scheme: str, mode: dict[str, Any], *, is_method: bool
) -> None:
    pipe, expected, _ = build(scheme)
    anatomy = Anatomy(pipe)
    handle = stream(pipe, scheme, keep_source="memory", **mode)
    dtypes = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    casting: Callable[..., None] = partial(apply_layerwise_casting, pipe.text_encoder_2)
    if is_method:
        casting = pipe.transformer.enable_layerwise_casting
    with pytest.raises(errors.PatchError, match="float8-e4m3fn-raw"):
        casting(**dtypes)
    assert pipe.transformer.dtype == torch.float32
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()
    anatomy.check()


def test_what_is_cast_already_is_refused() -> None:
    pipe: Any = PIPELINES["flux"].build()
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(errors.PatchError, match=r"load the model without it.*float8-e4m3fn-raw"):
        lowbits.LayerStreamer(pipe.transformer, device="cpu", budget=10**6).attach()


def test_the_scheme_that_the_refusal_names_is_what_casting_makes() -> None:
    pipe: Any = PIPELINES["flux"].build()
    other = copy.deepcopy(pipe.transformer)
    apply_layerwise_casting(other, torch.float8_e4m3fn, torch.float32)
    handle = stream(pipe, keep_source="memory", **QUEUE_CPU).switch("float8-e4m3fn-raw")
    assert handle.stats().units
    cast = dict(other.named_parameters())["transformer_blocks.0.attn.to_q.weight"]
    assert cast.dtype == torch.float8_e4m3fn
    stored = pipe.transformer.state_dict().values()
    assert any(
        value.element_size() == 1 and value.shape == cast.shape and same_bits(value, cast)
        for value in stored
    )
    handle.restore()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_caches_of_diffusers_are_no_offloading() -> None:
    pipe, _, _ = build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    expected = draw("flux", pipe)
    pipe.transformer.disable_cache()
    handle = stream(pipe, **QUEUE_CPU)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()
    assert torch.equal(draw("flux", pipe), expected)


def test_hooks_that_were_there_before_are_refused() -> None:
    pipe, expected, _ = build()
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(errors.PatchError, match="remove_all_hooks"):
        lowbits.apply(pipe, device="cpu", gpu_weights="200KB")
    pipe.remove_all_hooks()
    handle = stream(pipe, **ASYNC_DISK)
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()


def test_what_is_saved_are_the_masters(scheme: str, mode: dict[str, Any], tmp_path: Path) -> None:
    pipe, expected, state = build(scheme)
    handle = stream(pipe, scheme, keep_source="memory", **mode)
    draw("flux", pipe)
    model = pipe.transformer
    assert same_state(dict(model.state_dict()), state)
    save_file(dict(model.state_dict()), tmp_path / "file.safetensors")
    assert same_state({k: load_file(tmp_path / "file.safetensors")[k] for k in state}, state)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert same_state(torch.load(tmp_path / "state.pt"), state)
    assert (tmp_path / "state.pt").stat().st_size < 1.3 * sum(
        t.nbytes for t in state.values()
    ) + 1e5
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()


def test_safetensors_saves_a_model(scheme: str, mode: dict[str, Any], tmp_path: Path) -> None:
    pipe, _, state = build(scheme)
    handle = stream(pipe, scheme, keep_source="memory", **mode)
    save_model(pipe.transformer, str(tmp_path / "model.safetensors"))
    assert same_state({k: load_file(tmp_path / "model.safetensors")[k] for k in state}, state)
    handle.restore()


def _deep(model: Any) -> Any:
    return copy.deepcopy(model)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [_deep, _pickled, _saved])
def test_copies_are_ordinary_models(
    duplicate: Callable[[Any], Any], scheme: str, mode: dict[str, Any]
) -> None:
    pipe, expected, state = build(scheme)
    handle = stream(pipe, scheme, keep_source="memory", **mode)
    draw("flux", pipe)
    made = {name: duplicate(part) for name, part in handle.components.items()}
    other = type(pipe)(**{**pipe.components, **made})
    other.set_progress_bar_config(disable=True)
    handle.restore()
    assert same_state(dict(made["transformer"].state_dict()), state)
    assert all(type(p) in PLAIN for part in made.values() for p in part.parameters())
    assert lowbits.handle(other) is None
    assert torch.equal(draw("flux", other), expected)
    assert not any("_lowbits_interceptor" in m.__dict__ for m in made["transformer"].modules())


def test_save_pretrained_of_a_native_model(mode: dict[str, Any], tmp_path: Path) -> None:
    pipe, _, state = build()
    encoder = {key: value.clone() for key, value in pipe.text_encoder_2.state_dict().items()}
    handle = stream(pipe, **mode)
    pipe.save_pretrained(tmp_path)
    handle.restore()
    again = type(pipe).from_pretrained(tmp_path)
    assert same_state(dict(again.transformer.state_dict()), state)
    assert same_state(dict(again.text_encoder_2.state_dict()), encoder)


def test_save_pretrained_of_a_packed_model(tmp_path: Path) -> None:
    pipe, expected, _ = build("bnb-nf4")
    handle = stream(pipe, "bnb-nf4", keep_source="memory", **ASYNC_DISK)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()
    again = lowbits.load_pipeline(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw("flux", again), expected)


@pytest.mark.parametrize("again", ["native", "gguf-q8_0"])
def test_a_second_apply_names_the_ways_out(again: str, scheme: str) -> None:
    pipe, expected, _ = build(scheme)
    handle = stream(pipe, scheme, keep_source="memory")
    for target in (pipe, pipe.transformer, pipe.vae):
        with pytest.raises(errors.AlreadyPatchedError, match="switch.*reconfigure"):
            lowbits.apply(target, again, device="cpu")
        with pytest.raises(errors.AlreadyPatchedError):
            lowbits.apply(target, again, device="cpu", gpu_weights="1MB")
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()


def test_another_pipeline_over_the_same_components(scheme: str, mode: dict[str, Any]) -> None:
    pipe, expected, _ = build(scheme)
    handle = stream(pipe, scheme, keep_source="memory", **mode)
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(draw("flux", other), expected)
    assert torch.equal(draw("flux", pipe), expected)
    assert lowbits.handle(other) is handle
    lowbits.restore(other)
    assert lowbits.handle(pipe) is None


def test_from_pipe(scheme: str) -> None:
    pipe, expected, _ = build(scheme)
    handle = stream(pipe, scheme, keep_source="memory")
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    again = type(pipe).from_pipe(other)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw("flux", again), expected)
    handle.restore()


def test_the_smallest_budget_is_of_the_largest_need() -> None:
    pipe, _, _ = build()
    alone = max(smallest_budget(part) for part in (pipe.transformer, pipe.text_encoder_2, pipe.vae))
    assert smallest_budget(pipe) >= alone
