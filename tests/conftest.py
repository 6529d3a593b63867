"""Shared fixtures."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

# Before torch: no hub, and no spinning threads where cores are shared.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None)
hypothesis.settings.register_profile("default", max_examples=40, deadline=None)
hypothesis.settings.load_profile("default")

logging.getLogger("torchao").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Give each test the same random numbers, and one thread of each worker's core."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.compiler.reset()
