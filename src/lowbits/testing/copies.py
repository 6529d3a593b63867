"""The part of the contract about copies, casts, moves and saving: stored bytes stay as they are."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import load_model, save_model
from torch import nn

import lowbits
from lowbits.core.packed import stored_bytes
from lowbits.core.registry import DEFAULT
from lowbits.testing.layers import (
    Model,
    dense_twin,
    model_for,
    packed_model,
    same_codes,
    stored,
    tokens,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowbits.core.backend import QuantBackend
    from lowbits.core.scheme import Scheme

_RELOAD: Final = "import sys; from lowbits.testing import copies; copies.reload(sys.argv[1])"


def check_copies_are_packed_alike(backend: QuantBackend, scheme: Scheme) -> None:
    """Copies by deepcopy, pickle and torch.save give the same output, without the handle."""
    model, _ = packed_model(scheme.name)
    expected = model(tokens())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),  # noqa: S301 - made in the line
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(twin(tokens()), expected)
        assert lowbits.handle(twin) is None
        assert _is_tied(twin)


def _is_tied(model: Model) -> bool:
    ties = zip(model.table.parameters(), model.tied.parameters(), strict=True)
    return all(a is b for a, b in ties)


def check_state_dict_round_trip(backend: QuantBackend, scheme: Scheme) -> None:
    """The state dict is plain tensors, loads strictly, and is refused where it does not belong."""
    model, _ = packed_model(scheme.name)
    state = model.state_dict()
    assert all(type(value) in (torch.Tensor, nn.Parameter) for value in state.values())
    assert "blocks.0.weight" not in state
    assert state["blocks.0.weight"].shape == model.blocks[0].weight.shape
    twin, _ = packed_model(scheme.name, seed=1)
    twin.load_state_dict(state)
    assert torch.equal(twin(tokens()), model(tokens()))
    for strict in (True, False):
        try:
            twin.load_state_dict(model_for(scheme.name).state_dict(), strict=strict)
        except RuntimeError as error:
            assert "full-precision weight" in str(error)  # noqa: PT017 - no pytest here
            continue
        raise AssertionError("full-precision weights were loaded into packed layers")
    assert torch.equal(twin(tokens()), model(tokens()))


def check_safetensors_round_trip(backend: QuantBackend, scheme: Scheme) -> None:
    """A packed model goes through a safetensors file as any other does, tied weights once."""
    model, _ = packed_model(scheme.name)
    twin, _ = packed_model(scheme.name, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_model(model, str(path))
        assert path.stat().st_size < sum(p.nbytes for p in model.state_dict().values()) + 20_000
        missing, unexpected = load_model(twin, path)
    assert not missing
    assert not unexpected
    assert same_codes(twin, stored(model))
    assert torch.equal(twin(tokens()), model(tokens()))


def check_loads_in_a_fresh_process(backend: QuantBackend, scheme: Scheme) -> None:
    """A pickle and a state dict give the same output in a process that packed nothing before."""
    model, _ = packed_model(scheme.name)
    parts = {
        "backend": type(backend),
        "device": torch.get_default_device(),
        "allow_tf32": torch.backends.cudnn.allow_tf32,
        "model": pickle.dumps(model),
        "state": model.state_dict(),
        "expected": model(tokens()).detach(),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt")
        torch.save(parts, path)
        child = subprocess.run(  # noqa: S603 - this interpreter, and a program of ours
            [sys.executable, "-c", _RELOAD, str(path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
    assert child.returncode == 0, child.stderr


def reload(path: str) -> None:
    """Load what `check_loads_in_a_fresh_process` wrote, and compare: the child's whole program.

    The skeleton for the state dict is the unpickled model, emptied: packing one would import the
    backend's library, which takes seconds, and which loading does not need.
    """
    parts = torch.load(path, weights_only=False)
    torch.set_default_device(parts["device"])
    torch.backends.cudnn.allow_tf32 = parts["allow_tf32"]
    if parts["backend"].name not in DEFAULT.all():
        # Known to the parent by `register_backend`, and not by an entry point.
        lowbits.register_backend(parts["backend"]())
    unpickled = pickle.loads(parts["model"])  # noqa: S301 - written by the parent
    loaded = copy.deepcopy(unpickled).to_empty(device=torch.get_default_device())
    loaded.load_state_dict(parts["state"], strict=True)
    for model in (unpickled, loaded):
        assert torch.allclose(model(tokens()), parts["expected"], rtol=1e-5, atol=1e-6)


def check_casts_keep_the_codes(backend: QuantBackend, scheme: Scheme) -> None:
    """Casts change the dtype that layers answer and compute in, and nothing stored; ties hold."""
    model, _ = packed_model(scheme.name)
    layer: Any = model.blocks[0]
    codes, bits = stored(model), stored_bytes(layer)
    here = torch.get_default_device()
    casts: dict[torch.dtype, tuple[Callable[[Model], Any], ...]] = {
        torch.float16: (Model.half, lambda m: m.to(torch.float16)),
        torch.bfloat16: (Model.bfloat16, lambda m: m.to(here, torch.bfloat16)),
        torch.float64: (Model.double, lambda m: m.to(dtype=torch.float64)),
        torch.float32: (Model.float, lambda m: m.to(torch.zeros(1))),
    }
    for dtype, ways in casts.items():
        for cast in ways:
            cast(model)
            assert next(layer.parameters()).dtype == layer.weight.dtype == dtype
            assert same_codes(model, codes)
            assert stored_bytes(layer) == bits
            assert _is_tied(model)
        with torch.no_grad():
            y = model(tokens())
        assert y.dtype == dtype
        assert y.isfinite().all()


def check_double_computes_in_double(backend: QuantBackend, scheme: Scheme) -> None:
    """The dtype that a layer computes in follows a cast: float64 is not rounded to float32."""
    model, _ = packed_model(scheme.name)
    model.double()
    twin = dense_twin(model)
    if "dynamic" not in scheme.name:
        with torch.no_grad():
            got, expected = model(tokens()), twin(tokens())
        assert float((got - expected).norm() / expected.norm()) <= 1e-12


def check_moves_keep_the_codes(backend: QuantBackend, scheme: Scheme) -> None:
    """A move copies what is stored: nothing is quantized again, no tensor stays behind."""
    model, _ = packed_model(scheme.name)
    state, expected = copy.deepcopy(model.state_dict()), model(tokens())
    codes = stored(model)
    model.cpu().to(torch.get_default_device())
    assert same_codes(model, codes)
    assert _is_tied(model)
    for load in (_assign, _fill):
        twin = copy.deepcopy(model).to("meta")
        assert all(p.is_meta for p in (*twin.parameters(), *twin.buffers()))
        load(twin, state)
        assert not any(p.is_meta for p in (*twin.parameters(), *twin.buffers()))
        assert torch.equal(twin(tokens()), expected)


def _assign(twin: Model, state: dict[str, Any]) -> None:
    twin.load_state_dict(state, assign=True)


def _fill(twin: Model, state: dict[str, Any]) -> None:
    twin.to_empty(device=torch.get_default_device()).load_state_dict(state)


def check_dtypes_of_a_state_dict_are_kept(backend: QuantBackend, scheme: Scheme) -> None:
    """A state dict of a cast model loads into one that is not: codes are never converted."""
    model, _ = packed_model(scheme.name)
    twin, _ = packed_model(scheme.name, seed=1)
    twin.load_state_dict(copy.deepcopy(model).bfloat16().state_dict())
    assert same_codes(twin, stored(model))
    with torch.no_grad():
        # Biases and norms went through bfloat16.
        error = (twin(tokens()) - model(tokens())).norm() / model(tokens()).norm()
    assert float(error) < 0.02
