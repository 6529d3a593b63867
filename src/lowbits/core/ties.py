"""Tied weights are packed alike, or not at all: a tie broken costs memory and surprises."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from lowbits.core.scheme import rows_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbits.core.select import Decision


def settle_ties(decisions: Sequence[Decision]) -> list[Decision]:
    """Return decisions that are the same for all that share a tensor.

    Where they differ because one falls back to what its layer can be in (an Embedding, of a scheme
    for Linear layers), all do; else all are left alone.
    """
    groups = defaultdict(list)
    for decision in decisions:
        groups[decision.tie].append(decision)
    return [_settled(decision, groups[decision.tie]) for decision in decisions]


def _settled(decision: Decision, group: Sequence[Decision]) -> Decision:
    schemes = {d.scheme.name if d.scheme else None for d in group}
    if not decision.scheme or len(schemes) == 1:
        return decision
    model = next((d for d in group if _holds_all(d, group)), None)
    if model is decision:
        return decision
    if model is not None:
        reason = f"instead of {decision.scheme.name}: {model.path} has the same weight"
        return replace(decision, scheme=model.scheme, backend=model.backend, reason=reason)
    other = next(d for d in group if d is not decision)
    fate = f"stored as {other.scheme.name}" if other.scheme else other.reason
    return replace(decision, scheme=None, backend=None, reason=f"tied to {other.path}: {fate}")


def _holds_all(decision: Decision, group: Sequence[Decision]) -> bool:
    """Say whether all of a group are to be packed, and fall back to one's scheme, or have it."""
    scheme = decision.scheme
    return scheme is not None and all(
        each.scheme
        and scheme.name in (each.scheme.name, *each.scheme.fallbacks)
        and scheme.refusal(each.kind, rows_of(each.shape, each.kind)[1]) is None
        for each in group
    )
