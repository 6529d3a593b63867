"""Weights that are in low bits already: quantizing them once more adds a second error."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

from lowbits.core.report import format_bytes
from lowbits.errors import SourceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lowbits.core.select import Decision

#: Schemes that hold every value of a float8 dtype as it is.
_SAME_VALUES: Final = {
    "float8_e4m3fn": "float8-e4m3fn-raw",
    "float8_e5m2": "float8-e5m2-raw",
}


def requantized(decisions: Sequence[Decision], policy: str) -> tuple[str, ...]:
    """Return what to tell of weights that will be quantized a second time; one text for all.

    Args:
        decisions: of every parameter and buffer; nothing is changed yet.
        policy: one of `lowbits.LowbitsConfig.on_requantize`.

    Raises:
        SourceUnavailableError: the policy is ``"error"``, and there are such weights.
    """
    twice = [d for d in decisions if d.scheme and d.is_low_bit and not _is_exact(d)]
    if policy == "allow" or not twice:
        return ()
    steps: dict[str, list[Decision]] = defaultdict(list)
    for decision in twice:
        assert decision.scheme
        steps[f"{decision.stored_as} to {decision.scheme.name}"].append(decision)
    text = twice_text(
        {
            step: (len(nbytes := {d.tie: d.nbytes for d in group}), sum(nbytes.values()))
            for step, group in steps.items()
        }
    )
    if policy == "error":
        raise SourceUnavailableError(
            f"{twice[0].path} and others would be {text}. {_better(twice)}; on_requantize='allow' "
            "does it all the same"
        )
    return (f"{text}. {_better(twice)}, or pass on_requantize='allow' if that is meant",)


def twice_text(steps: Mapping[str, tuple[int, int]]) -> str:
    """Say what is quantized a second time.

    Args:
        steps: how many weights, and their bytes, by the names of both forms.
    """
    listed = ", ".join(
        f"{count} weights ({format_bytes(nbytes)}) from {step}"
        for step, (count, nbytes) in steps.items()
    )
    return f"quantized a second time: {listed}, which adds the second error to the first"


def _is_exact(decision: Decision) -> bool:
    assert decision.scheme
    return _SAME_VALUES.get(decision.stored_as) == decision.scheme.name


def _better(twice: Sequence[Decision]) -> str:
    if all(decision.is_packed for decision in twice):
        return (
            "Better: pack the model that these were packed from (handle.switch does), or its file"
        )
    return "Better: load the weights in 16 or 32 bits, and pack those"
