"""What cannot be loaded leaves no trace in a module."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any

import pytest
import torch
from files.plain import (
    WIDTH,
    assert_untouched,
    file_of,
    model,
    out,
    pack,
    saved,
    state,
)
from safetensors.torch import save_file
from torch import nn

import lowbits
from lowbits.errors import (
    AlreadyPatchedError,
    CancelledError,
    ConfigError,
    FormatError,
    PatchError,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


# What is refused, and leaves no trace


def test_layers_of_another_library_are_refused(tmp_path: Path) -> None:
    layers = pytest.importorskip("bitsandbytes").nn
    source = nn.Sequential(nn.Linear(128, 128))
    lowbits.quantize(source, "gguf-q8_0")
    lowbits.save(source, tmp_path / "x.safetensors")
    into = nn.Sequential(layers.Linear8bitLt(128, 128, has_fp16_weights=False)).to("cpu")
    expected = into(torch.ones(2, 128))
    with pytest.raises(PatchError, match="0 is a Linear8bitLt of bitsandbytes.*ordinary layers"):
        lowbits.load(tmp_path / "x.safetensors", into=into)
    assert torch.equal(into(torch.ones(2, 128)), expected)


class Odd(ABC, nn.Linear):
    """Laid out otherwise: its class cannot be set."""


@pytest.mark.parametrize("kind", ["a class", "a name"])
def test_a_layer_that_cannot_be_packed_leaves_the_others_as_they_were(
    tmp_path: Path, kind: str
) -> None:
    source = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.Linear(128, 128))
    lowbits.quantize(source, "gguf-q8_0", rules={"*": "gguf-q8_0"})
    lowbits.save(source, tmp_path / "x.safetensors")
    last = Odd(128, 128) if kind == "a class" else nn.Linear(128, 128)
    if kind == "a name":
        last.__dict__["weight_like"] = 1
    into = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), last)
    expected, weights = into(torch.ones(2, 128)), dict(into.named_parameters())
    with pytest.raises(PatchError, match="2"):
        lowbits.load(tmp_path / "x.safetensors", into=into)
    assert [type(module) for module in into] == [nn.Linear, nn.LayerNorm, type(last)]
    assert all(weights[name] is parameter for name, parameter in into.named_parameters())
    assert torch.equal(into(torch.ones(2, 128)), expected)


def test_a_packed_module_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, model())
    into = model(1)
    handle = lowbits.quantize(into, "bnb-nf4", rules={"*": "bnb-nf4"})
    before = out(into)
    with pytest.raises(AlreadyPatchedError, match="lowbits.restore.*or lowbits.dequantize"):
        lowbits.load(file, into=into)
    assert torch.equal(out(into), before)
    handle.restore()
    lowbits.load(file, into=into)
    loaded = model(1)
    lowbits.load(saved(tmp_path, model(), "bnb-nf4"), into=loaded)
    with pytest.raises(AlreadyPatchedError, match="Model holds packed layers"):
        lowbits.load(file, into=loaded)


@pytest.mark.parametrize("scheme", ["", "bnb-nf4"])
@pytest.mark.parametrize("budget", [None, 60_000])
def test_a_module_with_a_handle_is_refused(tmp_path: Path, scheme: str, budget: int | None) -> None:
    """Placed or streamed in its own precision: its handle would know nothing of what is new."""
    file = saved(tmp_path, model(), scheme)
    into = model(1)
    expected = out(into)
    options: dict[str, Any] = {} if budget is None else {"gpu_weights": budget}
    handle = lowbits.apply(into, "native", device="cpu", **options)
    with pytest.raises(AlreadyPatchedError, match="Model"):
        lowbits.load(file, into=into)
    assert torch.equal(out(into), expected)
    handle.restore()
    assert torch.equal(out(into), expected)
    lowbits.load(file, into=into)


def test_a_streamed_module_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, model())
    into = model(1)
    expected = out(into)
    with lowbits.LayerStreamer(into, device="cpu", budget=60_000):
        with pytest.raises(AlreadyPatchedError, match="is streamed already"):
            lowbits.load(file, into=into)
        assert torch.equal(out(into), expected)


def without(name: str) -> dict[str, Tensor]:
    return {n: t for n, t in model().state_dict().items() if n not in (name, "head.weight")}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("layers.2.weight"), "lacks 1 of the .* layers.2.weight"),
        (without("count"), "lacks 1 of the .* count"),
        (without("gain") | {"gain": torch.zeros(2)}, r"gain.*\[2\].*\[\]"),
        (
            without("layers.0.weight") | {"layers.0.weight": torch.zeros(WIDTH, 32)},
            r"layers.0.weight.*\[64, 32\].*\[64, 64\]",
        ),
        (without("") | {"layers.3.weight": torch.zeros(2, 2)}, "holds 1 .* layers.3.weight"),
    ],
    ids=["missing", "missing-buffer", "shape", "wide", "more"],
)
def test_a_file_of_another_model(tmp_path: Path, tensors: Any, message: str) -> None:
    file = tmp_path / "m.safetensors"
    save_file(tensors, file)
    into = model(1)
    before = state(into)
    with pytest.raises(FormatError, match=message):
        lowbits.load(file, into=into)
    assert_untouched(into, before)


class StopError(Exception):
    """What a callback raises."""


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 5, 12])
@pytest.mark.parametrize("scheme", ["", "bnb-nf4"])
def test_a_callback_that_raises(
    tmp_path: Path, scheme: str, at: int, error: type[BaseException]
) -> None:
    file = saved(tmp_path, model(), scheme)
    into = model(1)
    seen: list[Any] = []
    before = state(into)

    def progress(event: Any) -> None:
        seen.append(event)
        if len(seen) == at:
            raise error

    with pytest.raises(error):
        lowbits.load(file, into=into, progress=progress)
    assert_untouched(into, before)
    assert into.head.weight is into.embed.weight


def test_cancelled_midway(tmp_path: Path) -> None:
    file = saved(tmp_path, model(), "bnb-nf4")
    into, token = model(1), lowbits.CancelToken()
    seen: list[Any] = []
    before = state(into)

    def progress(event: Any) -> None:
        seen.append(event)
        if len(seen) == 3:
            token.cancel()

    with pytest.raises(CancelledError):
        lowbits.load(file, into=into, progress=progress, cancel=token)
    assert len(seen) == 3
    assert_untouched(into, before)


def test_the_last_tensor_is_broken(tmp_path: Path) -> None:
    file = saved(tmp_path, model(), "bnb-nf4")
    into = model(1)
    before = state(into)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError, match="m.safetensors"):
        lowbits.load(file, into=into)
    assert_untouched(into, before)


def test_the_file_is_cut_while_it_is_read(tmp_path: Path) -> None:
    file = saved(tmp_path, model(), "bnb-nf4")
    into = model(1)
    seen: list[Any] = []
    before = state(into)

    def progress(event: Any) -> None:
        if not seen:
            file.write_bytes(file.read_bytes()[:-1])
        seen.append(event)

    with pytest.raises(FormatError, match="changed or replaced"):
        lowbits.load(file, into=into, progress=progress)
    assert seen
    assert_untouched(into, before)


@pytest.mark.parametrize(("scheme", "field"), [("bnb-nf4", "scale"), ("gguf-q8_0", "qdata")])
def test_scales_that_are_not_finite(tmp_path: Path, scheme: str, field: str) -> None:
    weight = pack(torch.randn(8, WIDTH), scheme)
    weight[field].view(torch.float16 if field == "qdata" else weight[field].dtype).view(-1)[0] = (
        torch.nan
    )
    file = file_of(tmp_path, {"q.weight": weight})
    into: Any = nn.ModuleDict({"q": nn.Linear(WIDTH, 8, bias=False)})
    before = state(into)
    with pytest.raises(FormatError, match="q.weight.*NaN"):
        lowbits.load(file, into=into)
    assert_untouched(into, before)
    lowbits.load(file, into=into, allow_nonfinite=True)
    assert into["q"].weight.isnan().any()


# Pickles


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_pickles_only_on_demand(tmp_path: Path, suffix: str, *, wrapped: bool, old: bool) -> None:
    source, into = model(), model(1)
    tensors = {n: t for n, t in source.state_dict().items() if n != "head.weight"}
    file = tmp_path / f"m{suffix}"
    torch.save(
        {"state_dict": tensors} if wrapped else tensors,
        file,
        _use_new_zipfile_serialization=not old,
    )
    before = state(into)
    with pytest.raises(ConfigError, match="allow_pickle=True"):
        lowbits.load(file, into=into)
    assert_untouched(into, before)
    lowbits.load(file, into=into, allow_pickle=True)
    assert torch.equal(out(into), out(source))


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


def test_pickles_that_run_code_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, into = tmp_path / "m.pt", model(1)
    torch.save({"a": Evil()}, file)
    before = state(into)
    with pytest.raises(FormatError, match="m.pt"):
        lowbits.load(file, into=into, allow_pickle=True)
    assert "unpickled" not in capsys.readouterr().out
    assert_untouched(into, before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, "bfloat16"])
def test_dtypes_that_no_weight_can_be_in(tmp_path: Path, dtype: Any) -> None:
    into = model(1)
    before = state(into)
    with pytest.raises(ConfigError, match="dtype: got .*, expected a floating one"):
        lowbits.load(saved(tmp_path, model()), into=into, dtype=dtype)
    assert_untouched(into, before)


class Indexed(nn.Module):
    """Holds integers, and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.register_buffer("ids", torch.arange(4))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ids", torch.tensor([0, 1.5, 2, 3])),
        ("ids", torch.tensor([0, 1, 2, torch.nan])),
        ("ids", torch.tensor([0, 1, 2, 3e30])),
        ("weight", torch.tensor([1, 2, 3, 4j])),
    ],
)
def test_values_that_the_model_cannot_hold(tmp_path: Path, name: str, values: Tensor) -> None:
    file, into = tmp_path / "x.safetensors", Indexed()
    save_file({**into.state_dict(), name: values}, file)
    with pytest.raises(FormatError, match="and the model's is"):
        lowbits.load(file, into=into)
    assert torch.equal(into.ids, torch.arange(4))  # type: ignore[arg-type] # a buffer
    assert not into.weight.any()


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.int8, 1000), (torch.int32, 2**40), (torch.uint8, -1), (torch.bool, 2)],
)
def test_integers_that_the_model_cannot_hold(
    tmp_path: Path, dtype: torch.dtype, stored: int
) -> None:
    into = nn.Module()
    into.register_buffer("ids", torch.ones(4, dtype=dtype))
    save_file({"ids": torch.tensor([0, 1, 1, stored])}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=f"int64, and the model's is {dtype}"):
        lowbits.load(tmp_path / "x.safetensors", into=into)
    assert torch.equal(into.ids, torch.ones(4, dtype=dtype))  # type: ignore[arg-type]
    save_file({"ids": torch.tensor([0, 1, 1, 0])}, tmp_path / "x.safetensors")
    lowbits.load(tmp_path / "x.safetensors", into=into)
    assert into.ids.tolist() == [0, 1, 1, 0]  # type: ignore[operator]


def test_values_beyond_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    file, into = tmp_path / "x.safetensors", Indexed()
    save_file({**into.state_dict(), "weight": torch.full((4,), 1e6)}, file)
    with pytest.raises(FormatError, match=r"weight: it has values beyond torch.float16"):
        lowbits.load(file, into=into, dtype=torch.float16)
    assert not into.weight.any()
    lowbits.load(file, into=into, dtype=torch.float16, allow_nonfinite=True)
    assert into.weight.isinf().all()


class Stateful(nn.Linear):
    """Keeps a state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        """Do nothing."""


def test_a_state_that_files_do_not_hold(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"cannot save 0: a Stateful keeps a state .*torch.save"):
        lowbits.save(nn.Sequential(Stateful(4, 4)), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


class Positioned(nn.Linear):
    """Has a table that no file holds."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("positions", torch.arange(4), persistent=False)


def test_buffers_without_values_that_no_file_holds(tmp_path: Path) -> None:
    lowbits.save(nn.Sequential(Positioned()), tmp_path / "x.safetensors")
    with torch.device("meta"):
        into = nn.Sequential(Positioned())
    with pytest.raises(PatchError, match=r"0.positions has no values .*include_buffers=False"):
        lowbits.load(tmp_path / "x.safetensors", into=into)
    assert all(tensor.is_meta for tensor in (*into.parameters(), *into.buffers()))
    into[0].positions = torch.arange(4)
    lowbits.load(tmp_path / "x.safetensors", into=into)
    assert not into[0].weight.is_meta


def test_integers_that_a_file_holds_as_floats(tmp_path: Path) -> None:
    """As GGUF files do."""
    file, into = tmp_path / "x.safetensors", Indexed()
    save_file({**into.state_dict(), "ids": torch.tensor([3.0, 2, 1, 0])}, file)
    lowbits.load(file, into=into)
    assert torch.equal(into.ids, torch.tensor([3, 2, 1, 0]))  # type: ignore[arg-type] # a buffer


def test_a_folder_that_was_saved_into_twice(tmp_path: Path) -> None:
    """Which weights are newer, nothing tells."""
    lowbits.save(model(), tmp_path)
    lowbits.load(tmp_path, into=model(1))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"new")
    for read in (lambda: lowbits.load(tmp_path, into=model(1)), lambda: lowbits.inspect(tmp_path)):
        with pytest.raises(ConfigError, match="was saved into twice"):
            read()


def test_a_file_that_is_not_what_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("hello hello hello")
    with pytest.raises(FormatError, match="not a GGUF file: it begins with"):
        lowbits.inspect(tmp_path / "x.gguf")
    save_file({"weight": torch.randn(64, 64)}, tmp_path / "y.gguf")
    assert lowbits.inspect(tmp_path / "y.gguf").format == "safetensors"


def test_shards_of_no_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_shard_size: got '0MB'"):
        lowbits.save(torch.nn.Linear(64, 64), tmp_path / "x.safetensors", max_shard_size="0MB")
    assert not list(tmp_path.iterdir())
