"""What a backend has to hold, as checks that a third party can run on its own.

import pytest
from lowbits import testing

@pytest.mark.parametrize("check", testing.checks("mybackend"), ids=str)
def test_contract(check):
    check()
"""

from __future__ import annotations

from lowbits.testing.contract import Check, checks

__all__ = ["Check", "checks"]
