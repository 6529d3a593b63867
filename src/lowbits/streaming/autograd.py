"""Gradients through units whose bytes are gone when the backward pass wants them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final
from weakref import ref

import torch
from torch.utils._pytree import tree_map_only

from lowbits.core.memory import storage_address
from lowbits.errors import StreamError

if TYPE_CHECKING:
    from weakref import ReferenceType

    from torch import Tensor

    from lowbits.streaming.layout import Place
    from lowbits.streaming.stored import Stored


@final
@dataclass(frozen=True)
class _Saved:
    """A view of a unit's tensor that autograd wanted to keep: where it can be read again."""

    entry: Stored
    place: Place
    resident: ReferenceType[Tensor] | None
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    version: int
    is_conj: bool
    is_neg: bool

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def read(self) -> Tensor:
        """Return the same view, of a new copy where the unit is not there any more.

        Raises:
            RuntimeError: the weight was written since, as torch says of any saved tensor.
        """
        if self.version != self.entry.master.version_of(self.place):
            raise _changed(self.entry)
        read = self._run().view(self.dtype)
        read = read.as_strided(self.shape, self.stride, read.storage_offset() + self.offset)
        # Both are marks on a view; the bytes are those of what it is a view of.
        read = torch.conj(read) if self.is_conj else read
        return torch._neg_view(read) if self.is_neg else read

    def _run(self) -> Tensor:
        flat = self.resident() if self.resident else None
        if flat is not None:
            return self.place.bytes_in(flat)
        # Moved as bytes: of a tensor with holes, a device would make one without.
        return self.place.run_of(self.entry.master.copy(self.place)).to(self.device)


class _Activation(NamedTuple):
    """What is no weight, as torch keeps it where there are no hooks.

    Without the graph that it belongs to: what an operation saves of its own result would keep both
    alive for ever. Torch puts them together again, but looks for writes only where it has no hooks.
    """

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Activation:
        """Keep a tensor."""
        return cls(tensor.detach(), tensor._version)

    def read(self) -> Tensor:
        """Return it.

        Raises:
            RuntimeError: it was written since, as torch says.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor that the backward pass needs was changed by an inplace operation: it is "
                f"at version {self.tensor._version}; expected version {self.version} instead"
            )
        return self.tensor


def reread_for_backward(
    entry: Stored, flat: Tensor, *, is_streamed: bool
) -> AbstractContextManager[Any]:
    """Let autograd keep the name of a unit's tensor in place of its bytes.

    The slot holds another unit by the time of the backward pass, which reads the master instead.
    A resident is read where it is, if it is there still: another plan, or another model, may want
    its memory, which a graph would keep beside the budget. What is no weight is left to the hooks
    of whoever calls: checkpoints count what is saved, and run the unit once more, which may be
    streamed then and was not, or the other way round.

    Args:
        entry: the unit.
        flat: its bytes on the device.
        is_streamed: whether they will be overwritten.
    """
    if not torch.is_grad_enabled():
        return nullcontext()
    hooks: Any = torch._C._autograd
    outer = hooks._top_saved_tensors_default_hooks(False)
    pack_other, unpack_other = outer or (_Activation.of, _Activation.read)
    storage, begin = flat.untyped_storage().data_ptr(), flat.storage_offset()
    versions = entry.buffer_versions()
    resident = None if is_streamed else ref(flat)

    def pack(tensor: Tensor) -> Any:
        if not tensor.numel() or storage_address(tensor) != storage:
            return pack_other(tensor)
        at = int(tensor.storage_offset() * tensor.itemsize - begin)
        place = entry.unit.place_at(at)
        if versions.get(place.offset, tensor._version) != tensor._version:
            return pack_other(tensor.clone())  # this forward has written it: it is no weight
        return _Saved(
            entry, place, resident, tensor.shape, tensor.stride(),
            (at - place.offset) // tensor.itemsize, tensor.dtype, tensor.device,
            entry.master.version_of(place), tensor.is_conj(), tensor.is_neg(),
        )  # fmt: skip

    def unpack(saved: Any) -> Tensor:
        tensor: Tensor = saved.read() if isinstance(saved, _Saved) else unpack_other(saved)
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _changed(entry: Stored) -> RuntimeError:
    return RuntimeError(
        f"a weight of {entry.unit.name!r} that the backward pass needs was changed after the "
        "forward pass"
    )


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
