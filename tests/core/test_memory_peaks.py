"""What a conversion may take, as benchmarks/conversion_memory.py measures it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

#: Interpreter, allocator and threads: not what a layer costs.
SLACK = 8 << 20

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc/self/status (Linux)"
)


def measure(scheme: str, mode: str) -> dict[str, int]:
    path = Path(__file__).parents[2] / "benchmarks" / "conversion_memory.py"
    spec = importlib.util.spec_from_file_location("conversion_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    measured: dict[str, int] = module.measure(scheme, mode)
    return measured


@pytest.mark.parametrize("scheme", ["bnb-nf4", "bnb-nf4-dq", "torchao-int8", "gguf-q4_0"])
def test_memory_keeps_model_and_packed_and_one_layer(scheme: str) -> None:
    m = measure(scheme, "memory")
    assert m["peak"] - m["before"] <= m["packed"] + m["layer"] + SLACK
    assert m["after"] - m["before"] <= m["packed"] + SLACK


@pytest.mark.parametrize("scheme", ["bnb-nf4", "quanto-int8"])
def test_file_lets_originals_go_as_layers_are_packed(scheme: str) -> None:
    m = measure(scheme, "file")
    assert m["peak"] - m["before"] <= m["layer"] + SLACK
    assert m["before"] - m["after"] >= m["model"] - m["packed"] - SLACK
