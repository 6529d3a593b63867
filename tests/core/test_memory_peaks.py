"""What a conversion may take, as benchmarks/conversion_memory.py measures it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Interpreter, allocator and threads: not what a layer costs.
SLACK = 8 << 20

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc/self/status (Linux)"
)


def measure(mode: str, *schemes: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield each scheme and its figures: one process for all of them, for it takes seconds."""
    path = Path(__file__).parents[2] / "benchmarks" / "conversion_memory.py"
    spec = importlib.util.spec_from_file_location("conversion_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield from zip(schemes, module.measure(mode, *schemes), strict=True)


def test_memory_keeps_model_and_packed_and_one_layer() -> None:
    for scheme, m in measure("memory", "bnb-nf4", "bnb-nf4-dq", "torchao-int8", "gguf-q4_0"):
        assert m["peak"] - m["before"] <= m["packed"] + m["layer"] + SLACK, scheme
        assert m["after"] - m["before"] <= m["packed"] + SLACK, scheme


def test_file_lets_originals_go_as_layers_are_packed() -> None:
    for scheme, m in measure("file", "bnb-nf4", "quanto-int8"):
        assert m["peak"] - m["before"] <= m["layer"] + SLACK, scheme
        assert m["before"] - m["after"] >= m["model"] - m["packed"] - SLACK, scheme


def test_a_model_that_is_mapped_from_its_file_is_never_in_memory() -> None:
    for scheme, m in measure("mapped", "bnb-nf4", "gguf-q4_0"):
        assert m["peak"] - m["before"] <= m["packed"] + m["layer"] + SLACK, scheme
        assert m["after"] - m["before"] <= m["packed"] + SLACK, scheme
