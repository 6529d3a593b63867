"""Fixtures for what changes torch for good, as `fake_accelerator` does."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from processes import new_process, run_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import ProcessPoolExecutor


@pytest.fixture
def run_in_fresh_process() -> Iterator[Callable[..., Any]]:
    """Call functions of modules, with arguments that pickle, in a process of this test's own."""
    with new_process() as process:
        yield partial(run_in, process)


@pytest.fixture(scope="session")
def _fakegpu_process() -> Iterator[ProcessPoolExecutor]:
    with new_process() as process:
        yield process


@pytest.fixture
def run_beside(_fakegpu_process: ProcessPoolExecutor) -> Callable[..., Any]:
    """As `run_in_fresh_process`, in one process for all tests that use this: imports cost once.

    For functions that call `fake_accelerator`, and change nothing else for good.
    """
    return partial(run_in, _fakegpu_process)
