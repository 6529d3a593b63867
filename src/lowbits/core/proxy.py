"""What ``layer.weight`` reads as on a packed layer.

Much code reads a weight without computing with it: its dtype to cast an activation, its device to
place an adapter, its shape to size one. A proxy answers those at once, dequantizes when it is used
in maths, and refuses to be written: a write into a dequantized copy would be lost without a word.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch.utils._pytree import tree_leaves, tree_map

from lowbits.core.foreign import plain
from lowbits.core.memory import storage_address
from lowbits.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lowbits.core.backend import Packed, QuantBackend

#: Attributes and methods that the wrapper's own metadata answers.
_METADATA: Final = frozenset(
    """
    shape dtype device layout ndim requires_grad is_leaf is_cuda is_cpu is_xpu is_mps
    is_meta is_sparse is_quantized is_nested is_mkldnn grad grad_fn names nbytes itemsize
    _version size dim numel nelement ndimension stride element_size get_device
    is_contiguous is_floating_point is_complex is_signed is_inference is_same_size __len__
    __hash__ storage_offset _is_view _base output_nr _backward_hooks retains_grad is_maia
    is_hpu is_mtia is_vulkan is_ipu is_xla is_ort type
    """.split()  # noqa: SIM905 - a list of 50 short names reads better so
)
#: Reads that give the proxy itself.
_SELF: Final = frozenset(("data", "detach", "requires_grad_", "contiguous"))
#: Reads that need memory of the wrapper's own, which it has not.
STORAGE: Final = frozenset(("data_ptr", "untyped_storage", "storage", "_typed_storage"))


@final
class WeightProxy(torch.Tensor):
    """A packed weight as a tensor that is read only; it holds no values, and costs no memory."""

    _is_param = True  # isinstance(proxy, nn.Parameter), as the weight it stands for

    _read: Callable[[], Packed]
    _scheme: str
    _backend: QuantBackend
    _device: torch.device
    _dtype: torch.dtype
    _guard: weakref.ref[WeightProxy]

    @staticmethod
    def __new__(
        cls: type[WeightProxy],
        read: Callable[[], Packed],
        scheme: str,
        backend: QuantBackend,
        shape: torch.Size,
        marker: torch.Tensor,
    ) -> WeightProxy:
        """Make a proxy of this shape, with the marker's dtype and device.

        Args:
            cls: this class.
            read: gives what is stored; called when values are needed, for it may be elsewhere.
            scheme: name of the scheme that it is stored in.
            backend: the scheme's codec.
            shape: of the weight.
            marker: a tensor of the proxy's dtype and device.
        """
        proxy: WeightProxy = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=marker.dtype, device=marker.device, requires_grad=False
        )
        proxy._read, proxy._scheme, proxy._backend = read, scheme, backend
        proxy._device, proxy._dtype = marker.device, marker.dtype
        # torch.utils.swap_tensors asks no override, but refuses what is weakly referenced.
        proxy._guard = weakref.ref(proxy)
        return proxy

    def __init__(self, *_: object) -> None:
        super().__init__()

    # Adapter libraries read these a dozen times per layer; `__torch_function__` takes its time.
    @property
    def device(self) -> torch.device:  # type: ignore[override] # an attribute for torch's stubs
        """The marker's device."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override] # as above
        """The marker's dtype."""
        return self._dtype

    def dequantized(self) -> torch.Tensor:
        """Return the weight as an ordinary tensor; a copy."""
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype = self.shape, self.dtype
        return self._backend.unpack(self._read(), dtype).view(shape)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override] # torch names one option
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype, device = tuple(self.shape), self.dtype, self.device
        return f"WeightProxy({self._scheme}, shape={shape}, dtype={dtype}, device='{device}')"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer metadata, refuse writes, dequantize for the rest."""
        name, is_write = describe_call(func, kwargs)
        kwargs = dict(kwargs or {})
        written = written_argument(args, kwargs) if is_write else kwargs.get("out")
        proxy = None if written is None else _find(written)
        if proxy is not None:
            raise PatchError(_refusal(name, proxy))
        if args and isinstance(args[0], WeightProxy) and not is_write:
            if name in STORAGE:
                raise PatchError(_refusal(name, args[0]))
            if name in _SELF:
                if name == "requires_grad_" and (*args[1:], *kwargs.values(), True)[0]:
                    raise PatchError(_refusal(name, args[0]))
                return args[0]
            if name == "__repr__":
                return repr(args[0])
            if is_metadata(name, args):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
        dense = {id(p): p.dequantized() for p in tree_leaves((args, kwargs)) if type(p) is cls}
        args, kwargs = tree_map(lambda leaf: dense.get(id(leaf), leaf), (tuple(args), kwargs))
        return read_only(func(*args, **kwargs), dense.values())

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares a C function here
        cls, func: Any, *_: Any, **__: Any
    ) -> Any:
        """Refuse what reaches the wrapper past `__torch_function__`: it has no storage."""
        raise PatchError(f"{func} was called on a packed weight's proxy, which has no storage")


class _ReadOnlyView(torch.Tensor):
    """A view of a copy of a weight: a write into it would not reach the weight."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, is_write = describe_call(func, kwargs)
        kwargs = dict(kwargs or {})
        written = written_argument(args, kwargs) if is_write else kwargs.get("out")
        if any(isinstance(leaf, cls) for leaf in tree_leaves(written)):
            raise PatchError(_refusal(name, None))
        views = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            if all(kind is cls for kind in types):
                return read_only(func(*args, **kwargs), views)
            plain = {id(view): view.as_subclass(torch.Tensor) for view in views}
        # Others answer for themselves: a stand-in beside it has no bytes of its own.
        args, kwargs = tree_map(lambda leaf: plain.get(id(leaf), leaf), (tuple(args), kwargs))
        return read_only(func(*args, **kwargs), views)


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """Return an ordinary tensor in place of a view of a copy, which a Parameter made of one is."""
    if not isinstance(tensor, _ReadOnlyView):
        return tensor
    values = plain(tensor).clone()
    with torch._C.DisableTorchFunctionSubclass():
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        return torch.nn.Parameter(values, tensor.requires_grad) if is_parameter else values


def read_only(result: Any, copies: Iterable[torch.Tensor]) -> Any:
    """Guard those results that share memory with copies: a write into them would be lost.

    Numpy's arrays are made read only.
    """
    with torch._C.DisableTorchFunctionSubclass():
        pointers = {storage_address(copy) for copy in copies} - {0}

        def guard(leaf: Any) -> Any:
            if hasattr(leaf, "__array_interface__"):
                leaf.setflags(write=False)
                return leaf
            is_view = (
                isinstance(leaf, torch.Tensor)
                and type(leaf) in (torch.Tensor, _ReadOnlyView)
                # What a transform of torch.func has wrapped has no memory to ask for.
                and not torch._C._functorch.is_functorch_wrapped_tensor(leaf)
                and leaf.untyped_storage().data_ptr() in pointers
            )
            return leaf.as_subclass(_ReadOnlyView) if is_view else leaf

        return tree_map(guard, result)


def written_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a writing function writes into: its first argument, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _find(written: Any) -> WeightProxy | None:
    return next((leaf for leaf in tree_leaves(written) if isinstance(leaf, WeightProxy)), None)


def is_metadata(name: str, args: Sequence[Any]) -> bool:
    """Say whether the wrapper itself can answer: ``type()`` does, and ``type(dtype)`` converts."""
    return name in _METADATA and not (name == "type" and len(args) > 1)


def describe_call(
    func: Callable[..., Any], kwargs: Mapping[str, Any] | None = None
) -> tuple[str, bool]:
    """Return the name of the attribute or function asked for by a `__torch_function__`.

    Also whether it writes into its first argument.
    """
    if (kwargs or {}).get("inplace") is True:  # as torch.nn.functional's activations
        return getattr(func, "__name__", ""), True
    if isinstance(func, torch._ops.OpOverload):
        schema = func._schema
        first = schema.arguments[0].alias_info if schema.arguments else None
        return func._opname, first is not None and first.is_write
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(getattr(func, "__self__", None), "__name__", name), name != "__get__"
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    augmented = name.startswith("__i") and name not in ("__index__", "__invert__", "__int__")
    return name, in_place or augmented or name == "__setitem__"


def _refusal(name: str, proxy: WeightProxy | None) -> str:
    stored = f"a weight stored as {proxy._scheme}" if proxy is not None else "a view of a weight"
    return (
        f"cannot apply {name!r} to {stored}: it is read only. To change the weight, call "
        "lowbits.restore(target) first; for a copy of its values, weight.clone()"
    )
