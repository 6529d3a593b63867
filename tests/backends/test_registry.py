"""Who offers what, and what is said about a library that is missing or broken."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lowbits
from lowbits import errors
from lowbits.backends.bnb import BitsAndBytesBackend
from lowbits.backends.float8 import Float8Backend
from lowbits.core.registry import BackendRegistry

if TYPE_CHECKING:
    from types import ModuleType


def bnb_alone() -> BackendRegistry:
    fresh = BackendRegistry(discover=False)
    fresh.register(BitsAndBytesBackend())
    return fresh


def test_a_missing_package_is_reported_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    fresh = bnb_alone()
    (info,) = fresh.infos()
    assert not info.available
    assert info.version is None
    assert "bitsandbytes" in str(info.reason)
    assert info.install == "pip install 'lowbits[bnb]'"
    with pytest.raises(
        errors.BackendUnavailableError,
        match="scheme 'bnb-nf4' needs backend 'bnb': .*bitsandbytes.*; pip install 'lowbits",
    ):
        fresh.require("bnb-nf4")
    rows = {info.name: info for info in fresh.schemes()}
    assert rows["bnb-nf4"].available is False
    assert rows["native"].available is True


def test_a_package_that_is_too_old_is_found_by_using_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    monkeypatch.delattr(functional, "quantize_blockwise")
    (info,) = bnb_alone().infos()
    assert "quantize_blockwise" in str(info.reason)


def test_an_unavailable_scheme_is_refused_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("lowbits._api.DEFAULT", bnb_alone())
    model = nn.Linear(64, 64)
    with pytest.raises(ImportError, match="pip install"):
        lowbits.quantize(model, "bnb-nf4")
    assert type(model) is nn.Linear


def test_a_packed_model_runs_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(64, 64), torch.ones(1, 64)
    lowbits.quantize(model, "bnb-nf4")
    expected = model(x)
    hidden: dict[str, ModuleType | None] = {
        name: None for name in sys.modules if name.split(".")[0] == "bitsandbytes"
    }
    for name, module in hidden.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert torch.equal(model(x), expected)


def test_names_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = bnb_alone()
    with pytest.raises(errors.DuplicateBackendError, match="backend name 'bnb' is taken"):
        fresh.register(BitsAndBytesBackend())

    impostor = Float8Backend()
    monkeypatch.setattr(impostor, "schemes", BitsAndBytesBackend().schemes, raising=True)
    with pytest.raises(errors.DuplicateBackendError, match="scheme name 'bnb-nf4' of backend"):
        fresh.register(impostor)
    assert list(fresh.all()) == ["bnb"]


def test_unknown_names_come_with_a_suggestion() -> None:
    with pytest.raises(
        errors.UnknownBackendError, match="unknown backend 'bnd'; did you mean 'bnb'"
    ):
        lowbits.backend("bnd")


def test_a_broken_plugin_is_reported_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "broken"

        def load(self) -> Any:
            raise OSError("libmagic.so: cannot open shared object file")

    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [Entry()])
    fresh = BackendRegistry()
    fresh.register(Float8Backend())
    infos = {info.name: info for info in fresh.infos()}
    assert infos["float8"].available
    assert "libmagic.so" in str(infos["broken"].reason)
    with pytest.raises(errors.BackendUnavailableError, match="'broken' failed to load: OSError"):
        fresh.backend("broken")
