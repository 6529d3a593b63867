"""What packed layers compute: linear layers, convolutions' weights, embeddings.

Three cases, in each function: while compiling, the plain expression; where a gradient is wanted, an
exact function that does not keep the dequantized weight; else the fastest that the device has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lowbits.core.memory import PART_WEIGHTS, PRODUCT_WEIGHTS, scratch
from lowbits.core.tracing import is_transformed, needs_plain_ops
from lowbits.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lowbits.core.backend import Packed, QuantBackend


def linear(
    x: Tensor, packed: Packed, bias: Tensor | None, backend: QuantBackend, dtype: torch.dtype
) -> Tensor:
    """Compute ``x @ weight.T + bias``.

    Args:
        x: ``(..., row_length)`` floating.
        packed: a 2-D weight.
        bias: ``(rows,)`` or None.
        backend: the codec of `packed`.
        dtype: that the product runs in.

    Returns:
        ``(..., rows)`` in x's dtype, or autocast's where that is on.
    """
    rows, row_length = packed.shape
    if x.shape[-1] != row_length:
        lines = x.shape[:-1].numel()
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({lines}x{x.shape[-1]} and "
            f"{row_length}x{rows})"
        )

    def multiply(x: Tensor, dtype: torch.dtype) -> Tensor:
        inputs = _in_dtype(x, dtype)
        added = bias if bias is None else _in_dtype(bias, dtype)
        if is_transformed() or (needs_plain_ops() and _wants_grad(inputs, added)):
            # Not backend.linear: rounded activations have no derivative, kernels of others no rule.
            return functional.linear(inputs, backend.unpack(packed, dtype), added)
        if needs_plain_ops():
            return backend.matmul(inputs, packed, added)
        if _wants_grad(inputs, added):
            y: Tensor = _FrozenLinear.apply(inputs, added, packed, backend)  # type: ignore[no-untyped-call]
            return y
        return _linear_eager(inputs, packed, added, backend)

    return computed(x, multiply, dtype)


def convolution(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    backend: QuantBackend,
    dtype: torch.dtype,
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Compute a convolution on the dequantized weight.

    Args:
        x: floating, as the convolution takes it.
        packed: the weight, an output channel a row.
        bias: or None.
        backend: the codec of `packed`.
        dtype: that the convolution runs in.
        convolve: called with x, the weight as ``(rows, row_length)``, and the bias, in that dtype.
    """

    def compute(x: Tensor, dtype: torch.dtype) -> Tensor:
        inputs = _in_dtype(x, dtype)
        added = bias if bias is None else _in_dtype(bias, dtype)
        # Autograd would keep the scratch, which the next layer overwrites.
        is_kept = needs_plain_ops() or _wants_grad(inputs, added) or x.device.type != "cpu"
        out = None if is_kept else scratch("weight", packed.shape, dtype)
        return convolve(inputs, backend.unpack(packed, dtype, out=out), added)

    return computed(x, compute, dtype)


def computed(
    x: Tensor, function: Callable[[Tensor, torch.dtype], Tensor], dtype: torch.dtype
) -> Tensor:
    """Call a function that computes in a dtype; the result has x's dtype, or autocast's.

    Raises:
        PatchError: x is not floating; converted, the result would come back truncated.
    """
    if not x.is_floating_point():
        raise PatchError(f"a packed layer takes floating inputs, as any other; got {x.dtype}")
    device_type = x.device.type
    is_left_alone = not _has_autocast(device_type) or x.dtype == torch.float64
    if is_left_alone or not torch.is_autocast_enabled(device_type):
        return _in_dtype(function(x, dtype), x.dtype)
    with torch.autocast(device_type, enabled=False):
        return function(x, dtype).to(torch.get_autocast_dtype(device_type))


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # A `to` that changes nothing costs the host a tenth of what it takes to give a layer's orders.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(device_type: str) -> bool:
    # A constant to compilers: that of torch 2.11 does not know the function.
    return torch.amp.is_autocast_available(device_type)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _linear_eager(x: Tensor, packed: Packed, bias: Tensor | None, backend: QuantBackend) -> Tensor:
    if x.device.type != "cpu":
        return backend.matmul(x, packed, bias)
    y = backend.linear(x, packed, bias)
    return linear_by_rows(x, packed, bias, backend) if y is None else y


def linear_by_rows(x: Tensor, packed: Packed, bias: Tensor | None, backend: QuantBackend) -> Tensor:
    """Compute a linear layer on a CPU, a part of the weight at a time.

    Few inputs: a part that stays in the cache. Many: a part as large as the inputs, since a product
    copies its inputs into an order of its own for each part; 70 % slower at 4096 rows otherwise.

    Args:
        x: ``(..., row_length)``, in the dtype that the product runs in.
        packed: a 2-D weight.
        bias: ``(rows,)`` in x's dtype.
        backend: the codec of `packed`.
    """
    rows, row_length = packed.shape
    flat = x.reshape(-1, row_length)
    # Not a view: compilers have another graph for those.
    made = x.new_empty(*x.shape[:-1], rows)
    result = made.view(-1, rows)
    part_weights = max(PART_WEIGHTS, min(flat.numel(), PRODUCT_WEIGHTS))
    step = packed.rows_at_once(max(1, part_weights // row_length))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = scratch("weight", (stop - start, row_length), x.dtype)
        backend.unpack(packed, x.dtype, out=weight, rows=(start, stop))
        part = result[:, start:stop]
        if bias is None:
            torch.mm(flat, weight.t(), out=part)
        else:
            torch.addmm(bias[start:stop], flat, weight.t(), out=part)
    return made


class _FrozenLinear(torch.autograd.Function):
    """A linear layer whose weight gets no gradient, and is dequantized again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, packed: Packed, backend: QuantBackend
    ) -> Tensor:
        # Saved one by one: a streamer takes saved tensors away, and reads them again for backward.
        ctx.save_for_backward(*packed.tensors.values())
        ctx.names, ctx.empty, ctx.backend = [*packed.tensors], replace(packed, tensors={}), backend
        return _linear_eager(x, packed, bias, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
            packed = replace(ctx.empty, tensors=tensors)
            grad_x = grad @ ctx.backend.unpack(packed, grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, None, None


def embedding(indices: Tensor, packed: Packed, backend: QuantBackend, dtype: torch.dtype) -> Tensor:
    """Look rows up, decoding only those.

    Args:
        indices: integers of any shape.
        packed: a table ``(rows, row_length)``.
        backend: the codec of `packed`.
        dtype: of the result.

    Returns:
        ``(*indices.shape, row_length)``.
    """
    if not needs_plain_ops():
        _check_range(indices, packed.shape[0])
    rows = backend.unpack(packed, dtype, rows=indices.reshape(-1))
    return rows.view(*indices.shape, packed.shape[1])


def _check_range(indices: Tensor, rows: int) -> None:
    """Refuse what an ordinary embedding refuses; on accelerators the gather itself does."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= rows:
            raise IndexError(
                f"embedding index out of range: got {low}..{high}, table has {rows} rows"
            )
