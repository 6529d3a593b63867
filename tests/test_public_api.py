"""The public names and signatures: a change here is a change for every user."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pickle
import pkgutil
from typing import Any

import pytest
import torch
from torch import nn

import lowbits
from lowbits import errors

NAMES = {
    "BackendInfo", "CancelToken", "Handle", "LayerReport", "LayerStreamer", "LowbitsConfig",
    "Packed", "ProgressEvent", "QuantBackend", "Report", "Scheme", "SchemeInfo", "StreamStats",
    "UnitStats", "__version__", "adopt", "apply", "backend", "backends", "convert", "dequantize",
    "device_budget", "errors", "files", "forge", "handle", "inspect", "load", "load_pipeline",
    "merge_lora", "quantize", "register_backend", "restore", "save", "save_gguf", "schemes",
    "testing", "unmerge_lora",
}  # fmt: skip

SCHEMES = [
    "native",
    "bnb-nf4",
    "bnb-nf4-dq",
    "bnb-fp4",
    "bnb-int8",
    "torchao-int8",
    "torchao-int4",
    "torchao-float8",
    "torchao-int8-dynamic",
    "torchao-float8-dynamic",
    "quanto-int8",
    "quanto-int4",
    "quanto-int2",
    "quanto-float8",
    "float8-e4m3fn",
    "float8-e5m2",
    "float8-e4m3fn-raw",
    "float8-e5m2-raw",
    "gguf-q8_0",
    "gguf-q4_0",
    "gguf-q4_1",
    "gguf-q5_0",
    "gguf-q5_1",
]


def test_public_names() -> None:
    assert set(lowbits.__all__) == NAMES
    assert set(dir(lowbits)) == NAMES
    for name in NAMES:
        assert getattr(lowbits, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        lowbits.nope  # noqa: B018 - the attribute access is the test


def test_first_class_schemes() -> None:
    assert {scheme.name for scheme in lowbits.schemes()} >= set(SCHEMES)


def test_apply_takes_what_the_config_holds() -> None:
    parameters = list(inspect.signature(lowbits.apply).parameters.values())[1:]
    fields = dataclasses.fields(lowbits.LowbitsConfig)
    assert [p.name for p in parameters] == [f.name for f in fields]
    assert [p.default for p in parameters] == [f.default for f in fields]
    assert all(f.metadata["help"] for f in fields)


def test_every_module_imports_and_public_things_are_documented() -> None:
    for module_info in pkgutil.walk_packages(lowbits.__path__, "lowbits."):
        module = importlib.import_module(module_info.name)
        assert module.__doc__, module_info.name
    for name in NAMES - {"__version__"}:
        assert inspect.getdoc(getattr(lowbits, name)), name


@pytest.mark.parametrize(
    "error", [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
)
def test_errors_survive_pickling(error: type[errors.LowbitsError]) -> None:
    made = error("what, where, got, expected")
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is error
    assert str(again) == str(made) == "what, where, got, expected"


def test_errors_are_what_plain_handlers_catch() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.BackendUnavailableError, ImportError)
    assert issubclass(errors.UnknownBackendError, LookupError)
    assert issubclass(errors.PatchError, RuntimeError)
    assert issubclass(errors.InsufficientMemoryError, MemoryError)


def test_backends_is_a_function_and_a_package() -> None:
    import lowbits.backends.float8 as module

    assert module.Float8Backend.name in {info.name for info in lowbits.backends()}


WRONG: dict[str, Any] = {
    "skip": [None, 3, [0], "0"],
    "rules": [{0: "bnb-nf4"}, ["0"]],
    "components": [3, [None]],
    "source": [3],
    "cancel": [True],
    "progress": [True],
    "compute_dtype": [torch.float8_e4m3fn, torch.int8, "float16"],
    "gpu_weights": ["ALL", None, -1, 0.5, True],
    "keep_source": [None],
    "lora": [3],
}


@pytest.mark.parametrize("option", WRONG)
def test_values_that_no_option_takes_are_refused_by_name(option: str) -> None:
    for value in WRONG[option]:
        model = nn.Linear(64, 64)
        with pytest.raises(errors.ConfigError, match=f"^{option}: got"):
            lowbits.apply(model, "bnb-nf4", **{option: value})
        assert type(model) is nn.Linear


def test_what_would_do_is_said() -> None:
    with pytest.raises(errors.ConfigError, match="or a size as .*, or 'auto', or 'all'"):
        lowbits.LowbitsConfig(gpu_weights="most")
    with pytest.raises(errors.ConfigError, match="file, none$"):
        lowbits.LowbitsConfig(keep_source=None)  # type: ignore[arg-type]
    assert lowbits.LowbitsConfig(gpu_weights=6e9).gpu_weights == 6_000_000_000  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"quantize\(\) got .* 'schema'"):
        lowbits.quantize(nn.Linear(64, 64), "bnb-nf4", schema=1)


def test_what_is_no_backend_is_refused() -> None:
    for value in (None, lowbits.QuantBackend):
        with pytest.raises(errors.ConfigError, match="expected an instance"):
            lowbits.register_backend(value)  # type: ignore[arg-type]
    with pytest.raises(errors.UnknownBackendError, match="None"):
        lowbits.backend(None)  # type: ignore[arg-type]


def test_a_rule_is_advised_where_it_helps() -> None:
    small, odd = nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(72, 64))
    for model, is_advised in ((small, True), (odd, False), (nn.Sequential(), False)):
        with pytest.raises(errors.NoCapableBackendError) as caught:
            lowbits.quantize(model, "gguf-q8_0")
        assert ("rules=" in str(caught.value)) is is_advised
    lowbits.quantize(small, "gguf-q8_0", rules={"*": "gguf-q8_0"})
    with pytest.raises(errors.UnknownSchemeError):
        lowbits.quantize(odd, "")
