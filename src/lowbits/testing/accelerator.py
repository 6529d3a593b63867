"""An accelerator that is none: a torch device without a GPU, for tests of code that moves things.

How it computes: see [Note: twins] in `lowbits.testing.twins`. It has no streams: those are
`lowbits.testing.streams`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import torch

from lowbits.testing.twins import NAME, copy_bytes, device_storage, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

#: Operators whose kernel for any device chooses what to call by the device, and knows not this one.
_CHOSEN_BY_DEVICE: Final = ("convolution", "convolution_backward")
_ATTENTION: Final = "scaled_dot_product_attention"


def fake_accelerator() -> torch.device:
    """Make torch know the device ``fakegpu:0``, once per process, and return it.

    From then on `torch.accelerator.current_accelerator` answers it, to everybody in the process,
    for good: call it in a process of its own where other tests want the CPU. Tensors on it compute
    what the CPU computes, bit for bit; mixed with the host's they raise, as CUDA's do. A Parameter
    that is moved stays the same object, as on CUDA. Random numbers are the CPU generator's. Call it
    before the first backward pass of the process, at which torch's autograd counts the devices.

    It has no streams or events, no memory statistics, and page-locks nothing; autocast casts
    nothing; safetensors cannot load to it.

    Raises:
        RuntimeError: torch's spare backend was taken by another package in this process.
    """
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", NAME):
        raise RuntimeError(f"cannot register {NAME!r}: this process has the backend {taken!r}")
    if taken != NAME:
        _register()
    return torch.device(NAME, 0)


@final
class HostCopies:
    """What was copied from the fake accelerator to the host; see `count_host_copies`.

    Attributes:
        nbytes: sum over the copies that count.
        largest_bytes: the largest copy, whether it counts or not.
    """

    def __init__(self, over: int) -> None:
        self.nbytes = self.largest_bytes = 0
        self._over = over

    def add(self, nbytes: int) -> None:
        """Count one copy."""
        self.largest_bytes = max(self.largest_bytes, nbytes)
        if nbytes > self._over:
            self.nbytes += nbytes


@contextmanager
def count_host_copies(over: int = 0) -> Iterator[HostCopies]:
    """Count what any thread copies from the fake accelerator to the host meanwhile.

    Args:
        over: copies of so many bytes or fewer do not count; ``.item()`` is one of a few bytes.
    """
    copies = HostCopies(over)
    counters = torch.get_device_module(fake_accelerator()).counters
    counters.append(copies)
    try:
        yield copies
    finally:
        counters.remove(copies)


@final
class _Module:
    """What torch asks of a device type's module, ``torch.fakegpu``."""

    def __init__(self) -> None:
        self.counters: list[HostCopies] = []
        # Libraries that nobody holds take their kernels with them.
        self.libraries: list[Any] = []

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, _: int) -> None:
        """Do nothing: random numbers are the CPU generator's."""

    def get_rng_state(self, _: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, _: Any = None) -> None:
        """Do nothing, as above: who restores a state restores the CPU's, too."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def device(self, _: Any) -> AbstractContextManager[None]:
        """Return a context that changes nothing: there is one device."""
        return nullcontext()

    def synchronize(self, _: Any = None) -> None:
        """Do nothing: the host computes."""

    def empty_cache(self) -> None:
        """Do nothing: nothing is cached."""


def _register() -> None:
    from torch.utils import backend_registration

    module, library = _Module(), torch.library
    setup: Any = backend_registration._setup_privateuseone_for_python_backend
    setup(NAME, backend_module=module)
    make_library: Any = library.Library
    everything, aten = make_library("_", "IMPL"), make_library("aten", "IMPL")
    module.libraries += [everything, aten]
    everything.fallback(run, "PrivateUse1")
    # Autocast is accepted, and casts nothing.
    everything.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")
    aten.impl("copy_", copy_bytes, "PrivateUse1")
    aten.impl(_ATTENTION, _attention, "AutogradPrivateUse1")
    for name in (_ATTENTION, *_CHOSEN_BY_DEVICE, *_shadowed()):
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aten.impl(name, partial(run, op), "PrivateUse1")
    _keep_identity()
    _make_storages()


def _shadowed() -> Iterator[str]:
    """Name the operators whose kernel for any device stands in front of the fallback.

    The CPU has one of its own, which may round differently, or lay out its result differently.
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    explicit = "CompositeExplicitAutograd"
    composite = ("CompositeImplicitAutograd", explicit, f"{explicit}NonFunctional")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and has(name, "CPU") and any(has(name, k) for k in composite):
            yield name.removeprefix("aten::")


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attend with the CPU's kernel, which torch does not choose here; plainly for a gradient."""
    needs_grad = any(tensor.requires_grad for tensor in (query, key, value))
    if torch.is_grad_enabled() and needs_grad:
        plain = torch.ops.aten._scaled_dot_product_attention_math.default
        return plain(query, key, value, *args, **kwargs)[0]
    op = torch.ops.aten.scaled_dot_product_attention.default
    return run(op, query, key, value, *args, **kwargs)


class _Named(property):
    """A property that a ``__torch_function__`` finds the name of, as it does torch's own."""

    __name__ = "data"


def _keep_identity() -> None:
    """Let ``parameter.data = `` cross devices, as CUDA's does; `nn.Module.to` goes that way then.

    torch takes only backends that it knows for compatible, and replaces the Parameter otherwise.
    """
    torch_: Any = torch
    is_compatible, data = torch_._has_compatible_shallow_copy_type, torch_.Tensor.data

    def crosses(a: Tensor, b: Tensor) -> bool:
        return {a.device.type, b.device.type} == {"cpu", NAME}

    def read(self: Tensor) -> Any:
        return data.__get__(self)

    def write(self: Tensor, value: Tensor) -> None:
        # A class with a ``__torch_function__`` is asked first, wherever the tensors lie.
        if not crosses(self, value) or torch.overrides.has_torch_function((self,)):
            data.__set__(self, value)
            return
        gradient, self.grad = self.grad, None
        content = value.detach().requires_grad_(self.requires_grad)
        torch._C._swap_tensor_impl(self, content)
        # torch leaves the gradient behind, for the caller to move; here it would not be accepted.
        self.grad = None if gradient is None else gradient.to(value.device)

    torch_.Tensor.data = _Named(read, write)
    torch_._has_compatible_shallow_copy_type = lambda a, b: crosses(a, b) or is_compatible(a, b)


def _make_storages() -> None:
    """Let ``torch.UntypedStorage(n, device="fakegpu")``, which deepcopy and torch.load call, work.

    torch asks an allocator that a backend without C++ cannot have, and crashes.
    """
    storage_class: Any = torch.UntypedStorage
    original = storage_class.__new__

    def make(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None or torch.device(device).type != NAME:
            return original(cls, *args, device=device, **kwargs)
        return device_storage(original(cls, *args, **kwargs))

    storage_class.__new__ = make
