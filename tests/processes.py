"""Processes beside the one that tests run in: torch may be changed there for good."""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

#: What a function is given: a test should fail, not hang.
TIMEOUT_S = 240


def new_process() -> ProcessPoolExecutor:
    """Start a process that imports what it is asked for, and knows nothing of this one."""
    # Not a fork: it would hold torch's threads' locks, and what was registered here.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,))


def run_in(process: ProcessPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of a module there; give its result, raise what it raises."""
    return process.submit(_seeded, function, *args).result(TIMEOUT_S)


def _seeded(function: Callable[..., Any], *args: Any) -> Any:
    gc.collect()  # what an earlier function has left would be streamed still
    torch.manual_seed(0)
    return function(*args)
