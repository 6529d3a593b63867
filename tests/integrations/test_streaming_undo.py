"""Whatever fails while a pipeline begins or ends to be streamed: it is as it was."""

from __future__ import annotations

import gc
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pipelines import PIPELINES, draw
from safetensors.torch import save_file
from streamed import ASYNC_DISK, MODES, Anatomy, mode_name, smallest_budget

import lowbits
from lowbits import errors
from lowbits.core.interception import streamed_part
from lowbits.integrations import diffusers as integration
from lowbits.streaming import engine
from lowbits.streaming.arbiter import Arbiter
from lowbits.streaming.foreign import HookGuard
from lowbits.streaming.layout import Place
from lowbits.streaming.stored import Stored
from lowbits.streaming.tiers import Tier

if TYPE_CHECKING:
    from pathlib import Path

FAULTS = (torch.OutOfMemoryError, KeyboardInterrupt)


@pytest.fixture(scope="module")
def pipe() -> Any:
    made: Any = PIPELINES["flux"].build()
    draw("flux", made)
    return made


@pytest.fixture(params=MODES, ids=mode_name)
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give scratch files a folder of the test's own, and see that nothing is left in it."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    assert not list(folder.iterdir())


class Fails:
    """Raises at the n-th call of a function, and only then."""

    def __init__(self, function: Any, number: int, fault: type[BaseException]) -> None:
        self.function, self.left, self.fault = function, number, fault

    def __get__(self, owner: Any, _: Any) -> Any:
        return lambda *args, **kwargs: self(owner, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.fault
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("number", [1, 40])
def test_a_fault_at_the_n_th_unit_that_is_stored(
    number: int,
    fault: type[BaseException],
    mode: dict[str, Any],
    pipe: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget, anatomy = smallest_budget(pipe), Anatomy(pipe)
    expected = draw("flux", pipe)
    fails = Fails(Tier.store, number, fault)
    monkeypatch.setattr(Tier, "store", fails)
    with pytest.raises(fault):
        lowbits.apply(pipe, device="cpu", gpu_weights=budget, **mode)
    assert fails.left == 0
    anatomy.check()
    assert torch.equal(draw("flux", pipe), expected)


@pytest.mark.parametrize("number", [1, 2, 40])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Stored, "hide"), (engine, "intercept"), (HookGuard, "install"), (Arbiter, "add")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_interrupt_when_masters_are_made(
    owner: Any,
    name: str,
    number: int,
    mode: dict[str, Any],
    pipe: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    anatomy = Anatomy(pipe)
    options: dict[str, Any] = {"keep_source": "memory", **mode}
    budget = smallest_budget(pipe, "bnb-nf4", **options)
    expected = draw("flux", pipe)
    fails = Fails(getattr(owner, name), min(number, 4 if owner in {HookGuard, Arbiter} else 40),
                  KeyboardInterrupt)  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(KeyboardInterrupt):
            lowbits.apply(pipe, "bnb-nf4", device="cpu", gpu_weights=budget, **options)
    assert fails.left == 0
    anatomy.check()
    assert torch.equal(draw("flux", pipe), expected)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("number", [1, 4])
def test_a_fault_while_a_component_is_announced(
    number: int, fault: type[BaseException], pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, anatomy = smallest_budget(pipe), Anatomy(pipe)
    fails = Fails(integration.announce_device, number, fault)
    monkeypatch.setattr("lowbits._api.announce_device", fails)
    with pytest.raises(fault):
        lowbits.apply(pipe, device="cpu", gpu_weights=budget, **ASYNC_DISK)
    anatomy.check()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_after_the_streaming_began(
    fault: type[BaseException], pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = smallest_budget(pipe, "bnb-nf4", keep_source="memory")
    anatomy = Anatomy(pipe)
    monkeypatch.setattr(lowbits.Handle, "attach", Fails(lowbits.Handle.attach, 1, fault))
    with pytest.raises(fault):
        lowbits.apply(pipe, "bnb-nf4", device="cpu", gpu_weights=budget, keep_source="memory")
    anatomy.check()


@pytest.mark.parametrize("layer", [1, 30])
def test_an_interrupt_from_the_progress_callback(layer: int, mode: Any, pipe: Any) -> None:
    budget = smallest_budget(pipe, "bnb-nf4", keep_source="memory")
    anatomy = Anatomy(pipe)
    fails = Fails(lambda *_: None, layer, KeyboardInterrupt)
    options = {"keep_source": "memory", "progress": fails, **mode}
    with pytest.raises(KeyboardInterrupt):
        lowbits.apply(pipe, "bnb-nf4", device="cpu", gpu_weights=budget, **options)
    anatomy.check()


def test_a_cancelled_apply(mode: dict[str, Any], pipe: Any) -> None:
    budget = smallest_budget(pipe, "bnb-nf4", keep_source="memory")
    anatomy = Anatomy(pipe)
    token = lowbits.CancelToken()
    options: dict[str, Any] = {"keep_source": "memory", "cancel": token, **mode}
    with pytest.raises(errors.CancelledError):
        lowbits.apply(
            pipe, "bnb-nf4", device="cpu", gpu_weights=budget,
            progress=lambda _: token.cancel(), **options,
        )  # fmt: skip
    anatomy.check()


def test_a_budget_that_is_too_small_changes_nothing(mode: dict[str, Any], pipe: Any) -> None:
    anatomy = Anatomy(pipe)
    for scheme in ("native", "bnb-nf4"):
        budget = smallest_budget(pipe, scheme, keep_source="memory", **mode) - 1
        anatomy.check()
        with pytest.raises(errors.InsufficientMemoryError, match="need at least") as caught:
            lowbits.apply(pipe, scheme, device="cpu", gpu_weights=budget, keep_source="memory")
        assert caught.value.needed_bytes == budget + 1
        assert caught.value.available_bytes == budget
        anatomy.check()


@pytest.mark.parametrize("number", [1, 60])
def test_a_reconfigure_that_fails_keeps_what_was(
    number: int, mode: dict[str, Any], pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, anatomy = smallest_budget(pipe), Anatomy(pipe)
    expected = draw("flux", pipe)
    handle = lowbits.apply(pipe, device="cpu", gpu_weights=2 * budget, **mode)
    with monkeypatch.context() as patch:
        patch.setattr(Tier, "store", Fails(Tier.store, number, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            handle.reconfigure(gpu_weights=budget)
    with pytest.raises(errors.ConfigError, match="location"):
        handle.reconfigure(location="ssd")
    with pytest.raises(errors.InsufficientMemoryError):
        handle.reconfigure(gpu_weights=1)
    stats = handle.stats()
    assert (stats.budget_bytes, stats.method, stats.location) == (2 * budget, *mode.values())
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()
    anatomy.check()
    with pytest.raises(errors.NotPatchedError, match="cannot reconfigure"):
        handle.reconfigure(gpu_weights="all")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("number", [1, 200])
@pytest.mark.parametrize("ends", ["reconfigure", "restore", "switch"])
def test_a_fault_while_streaming_ends_streams_all_again(
    ends: str,
    number: int,
    fault: type[BaseException],
    mode: dict[str, Any],
    pipe: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    anatomy = Anatomy(pipe)
    options: dict[str, Any] = {"keep_source": "memory", **mode}
    budget = 2 * smallest_budget(pipe, "bnb-nf4", **options)
    handle = lowbits.apply(pipe, "bnb-nf4", device="cpu", gpu_weights=budget, **options)
    expected = draw("flux", pipe)
    arguments: dict[str, dict[str, Any]] = {
        "reconfigure": {"swap": "async" if mode["swap"] == "queue" else "queue"},
        "restore": {},
        "switch": {"scheme": "gguf-q8_0"},
    }
    with monkeypatch.context() as patch:
        fails = Fails(Place.give_back, number, fault)
        patch.setattr(Place, "give_back", fails)
        with pytest.raises(fault):
            getattr(handle, ends)(**arguments[ends])
        assert fails.left <= 0
    models = handle.components.values()
    assert all(streamed_part(model) == type(model).__name__ for model in models)
    assert "decode" in vars(pipe.vae)  # its calls are run in tiles where memory is short
    assert "_hf_hook" in vars(pipe.transformer)
    assert torch.equal(draw("flux", pipe), expected)
    assert 0 < handle.stats().peak_device_bytes <= budget
    handle.restore()
    anatomy.check()


def test_detach_inside_a_forward_changes_nothing(mode: dict[str, Any], pipe: Any) -> None:
    anatomy = Anatomy(pipe)
    handle = lowbits.apply(pipe, device="cpu", gpu_weights=smallest_budget(pipe), **mode)
    caught: list[BaseException] = []

    def restore(*_: Any) -> None:
        with pytest.raises(errors.StreamError) as raised:
            handle.restore()
        caught.append(raised.value)

    # Of the pipeline's models the last one ends first: by then others have ended.
    hook = pipe.text_encoder.register_forward_hook(restore)
    expected = draw("flux", pipe)
    hook.remove()
    assert caught
    assert all(map(streamed_part, handle.components.values()))
    assert torch.equal(draw("flux", pipe), expected)
    handle.restore()
    anatomy.check()


def test_restore_where_the_source_has_changed(pipe: Any, tmp_path: Path) -> None:
    made: Any = PIPELINES["flux"].build()
    file = tmp_path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in made.transformer.state_dict().items()}, file)
    options: dict[str, Any] = {
        "components": ["transformer"], "keep_source": "file", "source": file, "location": "cpu",
    }  # fmt: skip
    budget = 2 * smallest_budget(made, "gguf-q8_0", **options)
    handle = lowbits.apply(made, "gguf-q8_0", device="cpu", gpu_weights=budget, **options)
    expected = draw("flux", made)
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + bytes(4))
    with pytest.raises(errors.SourceUnavailableError):
        handle.restore()
    assert handle.is_active
    file.write_bytes(whole)
    assert torch.equal(draw("flux", made), expected)
    assert handle.stats().passes
    handle.restore()
    assert torch.equal(draw("flux", made), draw("flux", pipe))


def test_a_dropped_pipeline_leaves_no_scratch_file() -> None:
    made: Any = PIPELINES["flux"].build()
    lowbits.apply(made, device="cpu", gpu_weights=smallest_budget(made), **ASYNC_DISK)
    draw("flux", made)
    del made
    gc.collect()


def test_a_handle_is_a_context_manager(mode: dict[str, Any], pipe: Any) -> None:
    anatomy = Anatomy(pipe)
    budget = smallest_budget(pipe)
    with (
        pytest.raises(InterruptedError),
        lowbits.apply(pipe, device="cpu", gpu_weights=budget, **mode),
    ):
        _draw_and_fail(pipe)
    anatomy.check()


def _draw_and_fail(pipe: Any) -> None:
    draw("flux", pipe)
    raise InterruptedError
