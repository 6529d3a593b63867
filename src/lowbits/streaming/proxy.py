"""What a streamed weight reads as while it is not on the device.

Outside the forward of its unit a weight has no bytes on the device. Much code looks at it all the
same: for its dtype, its device, its shape; to save it, to load another value, to merge an adapter.
A stand-in answers as the weight would on the device, reads the master where values are needed, and
hands every write to the master, so that the next copy has it.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lowbits.core.interception import mark_streamed
from lowbits.core.memory import same_bits
from lowbits.core.proxy import STORAGE, describe_call, is_metadata, read_only, written_argument
from lowbits.errors import PatchError, StreamError
from lowbits.streaming.layout import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lowbits.streaming.masters import Master

_NO_META: Final = (
    "cannot move a part of a streamed model to the meta device: detach the streamer first "
    "(lowbits.restore, or LayerStreamer.detach), or change how it is streamed (handle.reconfigure)"
)


@final
class StreamedTensor(torch.Tensor):
    """A streamed Parameter or buffer, as it is seen between two uses of its unit."""

    _place: Place
    _master: Master | None
    _count_read: Callable[[], None]
    _guard: weakref.ref[StreamedTensor]

    @staticmethod
    def __new__(
        cls: type[StreamedTensor],
        place: Any,
        *arguments: Any,
        **_: Any,
    ) -> StreamedTensor:
        """Make the stand-in of one place of a unit.

        Args:
            cls: this class.
            place: of the tensor.
            arguments: the master, which holds its bytes and is asked at each read; the device that
                the unit computes on, where the stand-in says that it lies; what is called whenever
                values are read that the unit should have had.

        Raises:
            StreamError: somebody makes one as if it were an ordinary tensor.
        """
        if not isinstance(place, Place):
            # accelerate and others make new Parameters of an old one's class.
            raise StreamError(
                "the weights of a streamed model are not placed by others: undo the streaming "
                "first (lowbits.restore, or LayerStreamer.detach)"
            )
        original, (master, device, count_read) = place.original, arguments
        proxy: StreamedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            place.shape,
            strides=place.stride,
            dtype=place.dtype,
            device=device,
            requires_grad=original.requires_grad,
        )
        proxy.__dict__.update(original.__dict__)
        proxy._place, proxy._master, proxy._count_read = place, master, count_read
        # torch.utils.swap_tensors asks no override, but refuses what is weakly referenced.
        proxy._guard = weakref.ref(proxy)
        mark_streamed(proxy)
        if isinstance(original, nn.Parameter):
            proxy._is_param = True  # isinstance(proxy, nn.Parameter), as what it stands for
        return proxy

    def __init__(self, *_: object) -> None:
        super().__init__()

    def on_host(self) -> torch.Tensor:
        """Return the master's tensor, on the CPU; it may share the master's memory."""
        return self._living().tensor(self._place)

    def on_device(self) -> torch.Tensor:
        """Return a copy of the master's tensor where the stand-in says that it is."""
        with torch._C.DisableTorchFunctionSubclass():
            device = self.device
        self._count_read()
        return self.on_host().to(device, copy=True)

    def retire(self) -> None:
        """Stand for nothing any more: what is read, or written, from now on raises."""
        # Its unit, which knows it, and has the master: gigabytes would wait for the collector.
        self._master, self._count_read = None, _nothing

    def _living(self) -> Master:
        if self._master is None:
            raise StreamError(
                f"{self._place.holders[0].fqn!r} was read from the model while it was streamed; it "
                "is streamed otherwise now, or not any more: read it from the model again (an "
                "optimizer has to be made anew)"
            )
        return self._master

    def store(self, value: torch.Tensor) -> None:
        """Replace the master's tensor."""
        place = self._place
        if value.is_meta:
            raise StreamError(_NO_META)
        if value.shape != place.shape or value.dtype != place.dtype:
            raise StreamError(
                f"cannot set a streamed weight of {place.dtype} {tuple(place.shape)} to "
                f"{value.dtype} {tuple(value.shape)}; undo the streaming first (lowbits.restore, "
                "or LayerStreamer.detach)"
            )
        self._living().write(place, value.detach())

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self._plain(self.on_host().clone())
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = self._plain(self.on_host())
        return plain.__reduce_ex__(protocol)

    def _plain(self, values: torch.Tensor) -> torch.Tensor:
        """Return an ordinary Parameter, or buffer, of these values."""
        original = self._place.original
        if isinstance(original, nn.Parameter):
            return nn.Parameter(values, requires_grad=original.requires_grad)
        return values

    def __repr__(self, **_: Any) -> str:  # type: ignore[override] # torch names one option
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype, device = tuple(self.shape), self.dtype, self.device
        return f"StreamedTensor(shape={shape}, dtype={dtype}, device='{device}')"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer metadata, hand writes to the master, read it for the rest."""
        name, is_write = describe_call(func, kwargs)
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, StreamedTensor):
            if name in STORAGE:
                raise StreamError(f"a streamed weight has no {name} between two uses of its block")
            if name in _ANSWERS and not is_write:
                return _ANSWERS[name](first)
            if name == "data":
                return first.store(args[1])
            if name == "requires_grad_" or (name == "requires_grad" and is_write):
                first._place.original.requires_grad_(*args[1:], **kwargs)
                first._living().flag_changes += 1
                name = "requires_grad"
            if is_metadata(name, args):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
        return _compute(func, args, kwargs, writes=is_write)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares a C function here
        cls, func: Any, *_: Any, **__: Any
    ) -> Any:
        """Refuse what reaches the wrapper past `__torch_function__`: it has no storage."""
        raise StreamError(f"{func} was called on a streamed weight outside its block's forward")


def _nothing() -> None:
    """Count nothing."""


#: Reads that are answered without the bytes on the device.
_ANSWERS: Final[dict[str, Callable[[StreamedTensor], Any]]] = {
    "data": lambda proxy: proxy,  # what is written into it reaches the master
    "detach": lambda proxy: proxy.on_host().detach(),  # state dicts are made of it
    "__repr__": repr,
}


#: Functions that write into what they are given, although nothing in their names says so:
#: running statistics, and the rows that ``max_norm`` scales.
_SECRET_WRITERS: Final = frozenset(
    (
        *("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "instance_norm"),
        *("embedding", "embedding_bag"),
    )
)


def _may_write(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    name, _ = describe_call(func)
    scales = kwargs.get("max_norm") is not None or not name.startswith("embedding")
    return name in _SECRET_WRITERS and scales


@torch.compiler.disable  # type: ignore[untyped-decorator] # a graph would keep these values
def _compute(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], *, writes: bool
) -> Any:
    """Run a function of torch on values read from the masters, and store what it wrote."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StreamedTensor)]
    values = {id(leaf): leaf.on_device() for leaf in leaves}
    written = written_argument(args, kwargs) if writes else kwargs.get("out")
    targets = [leaf for leaf in tree_leaves(written) if isinstance(leaf, StreamedTensor)]
    new_args, new_kwargs = tree_map(lambda x: values.get(id(x), x), (tuple(args), kwargs))
    result = func(*new_args, **new_kwargs)
    if isinstance(result, torch.Tensor) and result.is_meta:
        raise PatchError(_NO_META)
    if _may_write(func, kwargs):
        targets = [leaf for leaf in leaves if not same_bits(values[id(leaf)], leaf.on_host())]
    for target in targets:
        target.store(values[id(target)])
    # An in-place function returns what it was called on.
    stand_ins = {id(values[id(target)]): target for target in targets}
    result = tree_map(lambda leaf: stand_ins.get(id(leaf), leaf), result)
    return result if targets else read_only(result, values.values())
