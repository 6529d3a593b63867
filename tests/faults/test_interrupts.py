"""Whatever fails, at whatever layer: the model is as it was."""

from __future__ import annotations

import contextlib
import copy
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowbits
from lowbits import _api, errors
from lowbits.core import convert
from lowbits.core.packed import PackedLayer
from lowbits.core.registry import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

SCHEME = "float8-e4m3fn"
FAULTS = (RuntimeError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit)


class Tied(nn.Module):
    """Tied embedding and head, a plain layer, a convolution, a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 64)
        self.middle = nn.Linear(64, 64)
        self.conv = nn.Conv1d(64, 64, 1)
        self.head = nn.Linear(64, 8, bias=False)
        self.head.weight = self.table.weight
        self.middle.register_forward_hook(lambda *_: None)


LAYERS = 3  # the head shares the table's


def anatomy(model: nn.Module, *, objects: bool = True) -> list[Any]:
    return [
        (
            fqn,
            id(module),
            type(module),
            [(k, objects and id(v)) for k, v in module._parameters.items()],
            sorted(module.__dict__),
            len(module._forward_hooks),
            len(module._state_dict_hooks),
        )
        for fqn, module in model.named_modules()
    ]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Untouched:
    """Raises where a model is not what it was when this was made."""

    def __init__(self, model: Tied, *, objects: bool = True) -> None:
        self.model, self.objects = model, objects
        self.anatomy, self.bits = anatomy(model, objects=objects), bits(model)

    def check(self) -> None:
        assert anatomy(self.model, objects=self.objects) == self.anatomy
        now = self.model.state_dict()
        assert list(now) == list(self.bits)
        assert all(torch.equal(self.bits[name], value) for name, value in now.items())
        if self.objects and not isinstance(self.model.head, PackedLayer):
            assert self.model.head.weight is self.model.table.weight
        assert lowbits.handle(self.model) is None


def options(mode: str, model: Tied, folder: Path) -> dict[str, Any]:
    chosen: dict[str, Any] = {"rules": {"*": SCHEME}, "keep_source": mode}
    if mode == "file":
        state = {k: v for k, v in model.state_dict().items() if k != "head.weight"}
        save_file(state, folder / "model.safetensors")
        chosen["source"] = folder
    return chosen


@pytest.fixture(params=["memory", "none", "file"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_backend_that_fails_at_any_layer_changes_nothing(
    layer: int,
    fault: type[BaseException],
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Tied()
    chosen = options(mode, model, tmp_path)
    untouched = Untouched(model, objects=mode != "file")
    calls = iter(range(LAYERS))
    backend = type(lowbits.backend("float8"))
    pack = backend.pack

    def fail(self: Any, *args: Any) -> Any:
        if next(calls) == layer:
            raise fault
        return pack(self, *args)

    monkeypatch.setattr(backend, "pack", fail)
    with pytest.raises(fault):
        lowbits.quantize(model, SCHEME, **chosen)
    untouched.check()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_a_progress_callback_that_raises_changes_nothing(
    layer: int, fault: type[BaseException], mode: str, tmp_path: Path
) -> None:
    model = Tied()
    chosen = options(mode, model, tmp_path)
    untouched = Untouched(model, objects=mode != "file")
    calls = iter(range(LAYERS + 1))

    def progress(_: lowbits.ProgressEvent) -> None:
        if next(calls) == layer:
            raise fault

    with pytest.raises(fault):
        lowbits.quantize(model, SCHEME, progress=progress, **chosen)
    untouched.check()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_token_that_is_cancelled_at_any_layer_changes_nothing(
    layer: int, mode: str, tmp_path: Path
) -> None:
    model = Tied()
    chosen = options(mode, model, tmp_path)
    untouched = Untouched(model, objects=mode != "file")
    token = lowbits.CancelToken()
    events: list[lowbits.ProgressEvent] = []

    def progress(event: lowbits.ProgressEvent) -> None:
        events.append(event)
        if len(events) > layer:
            token.cancel()

    with pytest.raises(errors.CancelledError):
        lowbits.quantize(model, SCHEME, progress=progress, cancel=token, **chosen)
    untouched.check()


def test_a_roll_back_from_a_file_keeps_a_tie_that_was_half_packed(tmp_path: Path) -> None:
    model = Tied()

    def progress(_: lowbits.ProgressEvent) -> None:
        raise KeyboardInterrupt  # the table is packed, the head is not

    with pytest.raises(KeyboardInterrupt):
        lowbits.quantize(model, SCHEME, progress=progress, **options("file", model, tmp_path))
    assert model.head.weight is model.table.weight


class InterruptAt:
    """Raises KeyboardInterrupt before the n-th line that runs in some files, or in one function."""

    def __init__(self, n: int, *places: str) -> None:
        self.n, self.places, self.fired = n, places, False

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not f"{code.co_filename}:{code.co_qualname}".endswith(self.places) and not (
            code.co_filename.endswith(self.places)
        ):
            return None
        if event == "line":
            self.n -= 1
            if self.n == 0:
                self.fired = True
                raise KeyboardInterrupt
        return self.trace

    def __call__(self, function: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                function()
        finally:
            sys.settrace(before)


def test_an_interrupt_between_any_two_statements_of_packing_changes_nothing() -> None:
    lowbits.quantize(Tied(), SCHEME)
    for n in range(1, 1000):
        model = Tied()
        untouched = Untouched(model)
        interrupt = InterruptAt(n, "core/surgery.py", ":_pack_all", ":_pack_one")
        interrupt(
            lambda: lowbits.quantize(model, SCHEME, rules={"*": SCHEME}, keep_source="memory")  # noqa: B023
        )
        if not interrupt.fired:
            break
        untouched.check()
    assert n > 50


def test_an_interrupt_between_any_two_statements_of_packing_once_more_changes_nothing() -> None:
    packed, quietly = Tied(), {"on_requantize": "allow"}
    lowbits.quantize(packed, "gguf-q8_0", rules={"*": "gguf-q8_0"})
    for n in range(1, 1000):
        model = copy.deepcopy(packed)
        untouched = Untouched(model)
        interrupt = InterruptAt(n, "core/surgery.py", ":_pack_all", ":_pack_one", ":_values_of")
        interrupt(
            partial(lowbits.quantize, model, SCHEME, **options("memory", model, Path()), **quietly)
        )
        if not interrupt.fired:
            break
        untouched.check()
    assert n > 50
    lowbits.restore(model)
    assert all(torch.equal(untouched.bits[name], value) for name, value in bits(model).items())


def test_a_restore_that_was_interrupted_anywhere_can_be_repeated() -> None:
    for n in range(1, 1000):
        model = Tied()
        untouched = Untouched(model)
        handle = lowbits.quantize(model, SCHEME, rules={"*": SCHEME}, keep_source="memory")
        interrupt = InterruptAt(n, "core/surgery.py", "core/handle.py")
        interrupt(handle.restore)
        if not interrupt.fired:
            break
        if lowbits.handle(model) is not None:
            lowbits.restore(model)
        untouched.check()
    assert n > 50


def test_a_fault_after_the_last_layer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tied()
    untouched = Untouched(model)

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(convert, "_report", fail)
    with pytest.raises(MemoryError):
        lowbits.quantize(model, SCHEME, rules={"*": SCHEME}, keep_source="memory")
    untouched.check()


def test_an_interrupt_while_the_handle_is_made_changes_nothing() -> None:
    model = Tied()
    untouched = Untouched(model)
    interrupt = InterruptAt(3, ":Handle.__init__")
    interrupt(lambda: lowbits.quantize(model, SCHEME, rules={"*": SCHEME}, keep_source="memory"))
    assert interrupt.fired
    untouched.check()


def test_a_move_that_fails_changes_nothing_where_no_source_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Tied()
    untouched = Untouched(model)
    here = torch.device("cpu")
    calls: list[object] = []

    def fail_once(*_: object) -> nn.Module:
        calls.append(None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return model

    monkeypatch.setattr("lowbits._api.homes_of", lambda *_: [(model, here)])
    monkeypatch.setattr(Tied, "to", fail_once)
    with pytest.raises(torch.OutOfMemoryError):
        lowbits.apply(model, SCHEME, rules={"*": SCHEME}, keep_source="none", device=here)
    untouched.check()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_dequantize_takes_all_layers_or_none(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tied()
    untouched = Untouched(model)
    handle = lowbits.quantize(model, SCHEME, rules={"*": SCHEME}, keep_source="memory")
    packed = anatomy(model)
    calls = iter(range(LAYERS))
    from lowbits.core.packed import dequantized

    def fail(packed: PackedLayer, *args: Any) -> torch.Tensor:
        if next(calls) == layer:
            raise MemoryError
        return dequantized(packed, *args)

    monkeypatch.setattr("lowbits.core.surgery.dequantized", fail)
    with pytest.raises(MemoryError):
        lowbits.dequantize(model)
    assert anatomy(model) == packed
    monkeypatch.undo()
    handle.restore()
    untouched.check()


def test_a_switch_whose_new_scheme_fails_midway_keeps_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Tied()
    untouched = Untouched(model)
    handle = lowbits.quantize(model, SCHEME, keep_source="memory", skip=("conv",))
    codes = model.middle.get_parameter("weight_qdata").clone()
    backend = type(lowbits.backend("gguf"))

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    DEFAULT.require("gguf-q8_0")  # probed while it works
    monkeypatch.setattr(backend, "pack", fail)
    with pytest.raises(torch.OutOfMemoryError):
        handle.switch("gguf-q8_0")
    assert torch.equal(model.middle.get_parameter("weight_qdata"), codes)
    lowbits.restore(model)
    untouched.check()


def test_a_switch_that_is_cancelled_keeps_the_old_scheme() -> None:
    model = Tied()
    token = lowbits.CancelToken()
    handle = lowbits.quantize(
        model, SCHEME, rules={"middle": SCHEME}, keep_source="memory", cancel=token
    )
    token.cancel()
    with pytest.raises(errors.CancelledError):
        handle.switch("gguf-q8_0")
    assert isinstance(model.middle, PackedLayer)


def test_a_switch_whose_progress_callback_raises_keeps_the_old_scheme() -> None:
    model = Tied()
    quiet = [True]

    def progress(_: lowbits.ProgressEvent) -> None:
        if not quiet[0]:
            raise KeyboardInterrupt

    handle = lowbits.quantize(
        model, SCHEME, rules={"middle": SCHEME}, keep_source="memory", progress=progress
    )
    quiet[0] = False
    with pytest.raises(KeyboardInterrupt):
        handle.switch("gguf-q8_0")
    assert isinstance(model.middle, PackedLayer)


def test_a_switch_whose_weights_are_in_no_file_any_more_keeps_the_old_scheme(
    tmp_path: Path,
) -> None:
    """A cast since: what it is made of then is kept in memory."""
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    model.bfloat16()
    handle = lowbits.quantize(model, SCHEME, keep_source="file", source=tmp_path / "x.safetensors")
    model.half()
    with pytest.raises(errors.SourceUnavailableError):
        handle.switch("gguf-q8_0")
    now = lowbits.handle(model)
    assert now is not None
    assert {layer.scheme for layer in now.report().packed} == {SCHEME}
    now.restore()
    assert model[0].weight.dtype == torch.float16


def test_a_switch_that_is_interrupted_when_it_is_done_keeps_the_old_scheme(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Tied()
    untouched = Untouched(model)
    handle = lowbits.quantize(model, SCHEME, rules={"middle": SCHEME}, keep_source="memory")
    applied = _api._apply

    def interrupted(modules: Any, config: Any, *args: Any, **options: Any) -> lowbits.Handle:
        made = applied(modules, config, *args, **options)
        if config.scheme != SCHEME:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(_api, "_apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handle.switch("gguf-q8_0")
    assert {layer.scheme for layer in lowbits.handle(model).report().packed} == {SCHEME}  # type: ignore[union-attr]
    lowbits.restore(model)
    untouched.check()
