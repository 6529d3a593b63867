"""The contract suite on an accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from schemes import LAYOUTS

from lowbits import testing

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]

CHECKS = [
    check
    for name in ("bnb", "float8", "gguf", "quanto", "torchao")
    for check in testing.checks(name)
    if check.subject == "codec" or check.scheme in LAYOUTS
]


@pytest.fixture(autouse=True)
def _exact_convolutions() -> Iterator[None]:
    """Convolutions round their inputs to 10 bits there, if nobody forbids it."""
    was = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = was


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_contract_there(check: testing.Check) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    with device:
        check()
