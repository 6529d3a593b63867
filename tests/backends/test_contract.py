"""Every built-in backend, and one of a third party, passes the contract suite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from schemes import LAYOUTS

import lowbits
from lowbits import testing

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

BUILT_IN = ("bnb", "float8", "gguf", "quanto", "torchao")


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_backend_is_available(name: str) -> None:
    info = next(info for info in lowbits.backends() if info.name == name)
    assert info.available, f"{info.reason}; {info.install}"


def built_in_checks() -> list[ParameterSet]:
    """What layers do is the same code for all schemes: one for each layout is not slow."""
    return [
        pytest.param(check, marks=pytest.mark.slow if is_slow(check) else (), id=str(check))
        for name in BUILT_IN
        for check in testing.checks(name)
    ]


def is_slow(check: testing.Check) -> bool:
    return check.subject == "layer" and check.scheme not in LAYOUTS


@pytest.mark.parametrize("check", built_in_checks())
def test_contract(check: testing.Check) -> None:
    check()


def toy_checks() -> list[ParameterSet]:
    """The package in tests/toy_backend; `nox -s tests` installs it."""
    if "toy" not in {info.name for info in lowbits.backends()}:
        reason = "needs lowbits-toy: pip install --no-deps ./tests/toy_backend"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(check) for check in testing.checks("toy")]


@pytest.mark.parametrize("check", toy_checks(), ids=str)
def test_third_party_contract(check: testing.Check) -> None:
    check()
