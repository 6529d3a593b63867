"""What compilers, transforms and tracers need to be told."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch.utils import _python_dispatch

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")


def needs_plain_ops() -> bool:
    """Say whether only operations on fresh tensors will do, and nothing may be kept between calls.

    For compilers, tracers, transforms of torch.func, and whatever intercepts operations.
    """
    return (
        torch.compiler.is_compiling()
        or is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_transformed() -> bool:
    """Say whether torch.func transforms what is computed: grad, vmap, jvp, ..."""
    # Not by `peek_interpreter_stack`: a compiler takes what it returns outside of them for a stack.
    return torch._C._are_functorch_transforms_active()


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """Call a function once for each of its arguments; a compiler takes the result as a constant.

    For tables, and for what a compiler cannot look up itself, such as a device's properties.
    Results are ordinary tensors wherever the first call is: in inference mode, in an export that
    computes on fake tensors.
    """
    results: dict[tuple[object, ...], R] = {}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        key = (*args, *kwargs.items())
        if key not in results:
            # Not around a look-up: every forward makes some, and entering costs ten of them.
            with torch.inference_mode(mode=False), _python_dispatch._disable_current_modes():
                results[key] = function(*args, **kwargs)
        return results[key]

    marked: Callable[P, R] = torch.compiler.assume_constant_result(call)  # type: ignore[no-untyped-call]
    return marked
