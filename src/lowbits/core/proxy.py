"""What ``layer.weight`` reads as on a packed layer.

Much code reads a weight without computing with it: its dtype to cast an activation, its device to
place an adapter, its shape to size one. A proxy answers those at once, dequantizes when it is used
in maths, and refuses to be written: a write into a dequantized copy would be lost without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch.utils._pytree import tree_map

from lowbits.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
_STORAGE: Final = frozenset(("data_ptr", "untyped_storage", "storage", "_typed_storage"))


@final
class WeightProxy(torch.Tensor):
    """A packed weight as a tensor that is read only; made anew at each read, a few microseconds."""

    _is_param = True  # isinstance(proxy, nn.Parameter), as the weight it stands for

    _packed: Packed
    _backend: QuantBackend
    _fqn: str

    @staticmethod
    def __new__(
        cls: type[WeightProxy],
        packed: Packed,
        backend: QuantBackend,
        shape: torch.Size,
        marker: torch.Tensor,
    ) -> WeightProxy:
        """Make a proxy of this shape, with the marker's dtype and device."""
        proxy: WeightProxy = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=marker.dtype, device=marker.device, requires_grad=False
        )
        proxy._packed, proxy._backend = packed, backend
        return proxy

    def __init__(self, *_: object) -> None:
        super().__init__()

    def dequantized(self) -> torch.Tensor:
        """Return the weight as an ordinary tensor; a copy."""
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype = self.shape, self.dtype
        return self._backend.unpack(self._packed, dtype).view(shape)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override] # torch names one option
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype, device = tuple(self.shape), self.dtype, self.device
        return (
            f"WeightProxy({self._packed.scheme}, shape={shape}, dtype={dtype}, device='{device}')"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer metadata, refuse writes, dequantize for the rest."""
        name, is_write = _describe(func)
        first_is_proxy = bool(args) and isinstance(args[0], WeightProxy)
        if first_is_proxy and not is_write:
            if name in _SELF:
                return args[0]
            if name == "__repr__":
                return repr(args[0])
            if name in _METADATA and not (name == "type" and len(args) > 1):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **(kwargs or {}))
        out = (kwargs or {}).get("out")
        if name in _STORAGE or isinstance(out, WeightProxy) or (is_write and first_is_proxy):
            raise PatchError(_refusal(name, args[0] if first_is_proxy else out))
        args, kwargs = tree_map(_dense, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares a C function here
        cls, func: Any, *_: Any, **__: Any
    ) -> Any:
        """Refuse what reaches the wrapper past `__torch_function__`: it has no storage."""
        raise PatchError(f"{func} was called on a packed weight's proxy, which has no storage")


def _dense(value: Any) -> Any:
    return value.dequantized() if isinstance(value, WeightProxy) else value


def _describe(func: Callable[..., Any]) -> tuple[str, bool]:
    """Return the name of the attribute or function that is asked for, and whether it writes."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(getattr(func, "__self__", None), "__name__", name), name != "__get__"
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    augmented = name.startswith("__i") and name not in ("__index__", "__invert__", "__int__")
    return name, in_place or augmented or name == "__setitem__"


def _refusal(name: str, proxy: Any) -> str:
    scheme = proxy._packed.scheme if isinstance(proxy, WeightProxy) else "packed"
    return (
        f"cannot apply {name!r} to a weight stored as {scheme}: it is read only. To change the "
        "weight, call lowbits.restore(target) first; for a copy of its values, weight.clone()"
    )
