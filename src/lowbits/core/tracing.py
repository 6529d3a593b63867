"""What compilers need to be told."""

from __future__ import annotations

from functools import cache, wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")


def is_traced() -> bool:
    """Say whether only plain expressions will do: a compiler, or a transform of torch.func."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """Call a function once for each of its arguments; a compiler takes the result as a constant.

    For tables, and for what a compiler cannot look up itself, such as a device's properties.
    Results are made outside of inference mode: they are used in autograd's backward as well.
    """
    cached = cache(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(mode=False):
            return cached(*args, **kwargs)  # type: ignore[arg-type] # Hashable, as they are

    marked: Callable[P, R] = torch.compiler.assume_constant_result(call)  # type: ignore[no-untyped-call]
    return marked
