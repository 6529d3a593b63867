"""Gradients through units whose bytes are gone when the backward pass wants them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch.utils._pytree import tree_map_only

from lowbits.errors import StreamError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lowbits.streaming.layout import Place
    from lowbits.streaming.stored import Stored


@final
@dataclass(frozen=True)
class _Saved:
    """A view of a unit's tensor that autograd wanted to keep: where it can be read again."""

    entry: Stored
    place: Place
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    version: int

    def read(self) -> Tensor:
        """Return the same view of a new copy.

        Raises:
            RuntimeError: the weight was written since, as torch says of any saved tensor.
        """
        if self.version != self.entry.master.version:
            raise RuntimeError(
                f"a weight of {self.entry.unit.name!r} that the backward pass needs was changed "
                "after the forward pass"
            )
        # Moved as bytes: of a tensor with holes, a device would make one without.
        run = self.place.run_of(self.entry.master.copy(self.place)).to(self.device)
        return run.view(self.dtype).as_strided(self.shape, self.stride, self.offset)


def reread_for_backward(entry: Stored, tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Let autograd keep the name of a unit's tensor in place of its bytes.

    The slot holds another unit by the time of the backward pass, which reads the master instead.

    Args:
        entry: the unit.
        tensors: its tensors on the device, by place, where they will be overwritten; else none.
    """
    if not (tensors and torch.is_grad_enabled()):
        return nullcontext()
    first = tensors[0]
    storage = first.untyped_storage().data_ptr()
    # The first place begins where the unit does.
    begin = first.storage_offset() * first.itemsize - entry.unit.places[0].offset

    def pack(tensor: Tensor) -> Tensor | _Saved:
        if tensor.untyped_storage().data_ptr() != storage:
            return tensor
        at = tensor.storage_offset() * tensor.itemsize - begin
        place = next(p for p in entry.unit.places if p.offset <= at < p.offset + p.nbytes)
        return _Saved(
            entry, place, tensor.shape, tensor.stride(), (at - place.offset) // tensor.itemsize,
            tensor.dtype, tensor.device, entry.master.version,
        )  # fmt: skip

    def unpack(saved: Tensor | _Saved) -> Tensor:
        return saved.read() if isinstance(saved, _Saved) else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def refuse_training(entry: Stored, result: Any) -> Any:
    """Return what a unit's forward returned; a backward pass to its weights is refused.

    They are frozen while they are in use: an optimizer would see no gradient, and change nothing.
    """
    is_trained = torch.is_grad_enabled() and entry.unit.module.training and entry.wants_grad
    if not is_trained:
        return result

    def refuse(_: Tensor) -> None:
        raise StreamError(
            f"weights of {entry.unit.name!r} require gradients, and what is streamed is frozen: "
            "call model.requires_grad_(False) and train adapters, or detach the streamer",
            entry.unit.name,
            "training",
        )

    def guard(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            tensor.register_hook(refuse)  # type: ignore[no-untyped-call]
        return tensor

    return tree_map_only(torch.Tensor, guard, result)
