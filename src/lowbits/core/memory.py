"""How much is decoded at a time, the CPU's scratch, what tensors lie in, and free host memory."""

from __future__ import annotations

import ctypes
import importlib
import math
import sys
import threading
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowbits.core.interception import is_streamed
from lowbits.core.tracing import needs_plain_ops
from lowbits.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

#: Weights that are packed, or decoded, at once on a CPU: 4 MB of float32. Fewer pay for calls of
#: torch, more for memory: libraries make three to five copies of what they quantize.
PART_WEIGHTS: Final = 1 << 20

#: Times as many are packed at once on an accelerator: launches would take longer than the work.
_DEVICE_PARTS: Final = 4

#: Weights of a part that is multiplied at once, at most: 64 MB of float32.
PRODUCT_WEIGHTS: Final = 1 << 24

_COMPARED_BYTES: Final = 1 << 24

_scratch = threading.local()


def part_weights(device: torch.device) -> int:
    """Return how many weights are packed at once on a device."""
    return PART_WEIGHTS if device.type == "cpu" else _DEVICE_PARTS * PART_WEIGHTS


def scratch(use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return this thread's CPU scratch for some use; the next call for that use overwrites it.

    What a decoder allocates for each part, the C library may give back to the system when it is
    freed, and the pages of the next part cost more than its arithmetic: five times as much for
    float8. Costs as many bytes as the largest request of the thread so far. It is an ordinary
    tensor, also when it is first needed under ``torch.inference_mode``, which it outlives.
    """
    elements = math.prod(shape)
    buffers: dict[tuple[str, torch.dtype], Tensor] = _scratch.__dict__.setdefault("buffers", {})
    buffer = buffers.get((use, dtype))
    if buffer is None or buffer.numel() < elements:
        with torch.inference_mode(mode=False):
            buffer = torch.empty(elements, dtype=dtype, device="cpu")
        buffers[use, dtype] = buffer
    return buffer[:elements].view(shape)


def temporary(use: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return room for a step of packing or decoding, of a tensor's shape, on its device.

    On a CPU the same room serves every part; what is larger than a part is not kept.

    Args:
        use: names what is alive at the same time.
        like: gives shape and device.
        dtype: of the values.
    """
    is_part = like.device.type == "cpu" and like.numel() <= PART_WEIGHTS
    if needs_plain_ops() or not is_part:
        return like.new_empty(like.shape, dtype=dtype)
    return scratch(use, tuple(like.shape), dtype)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind some tensors, shared ones counted once.

    A streamed tensor counts as its own bytes: what is behind it is a whole unit, or nothing. Other
    libraries' tensors that are made of several (torchao's) count as those.
    """
    sizes: dict[object, int] = {}
    for tensor in chain.from_iterable(map(_parts_of, tensors)):
        if is_streamed(tensor) or tensor.layout != torch.strided:
            sizes[id(tensor)] = held_bytes(tensor)
            continue
        storage = tensor.untyped_storage()
        # A meta tensor has no address: each counts as a storage of its own.
        key = (tensor.device, storage.data_ptr()) if storage.data_ptr() else id(tensor)
        sizes[key] = storage.nbytes() if tensor.device.type != "meta" else tensor.nbytes
    return sum(sizes.values())


def held_bytes(tensor: Tensor) -> int:
    """Return what a tensor's values take: of a sparse one, what it holds.

    Other libraries' tensors that are made of several (torchao's, quanto's) count as those.
    """
    if tensor.layout != torch.strided:
        return tensor._nnz() * (tensor.itemsize + 8 * tensor.ndim)
    return sum(part.nbytes for part in _parts_of(tensor))


def _parts_of(tensor: Any) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts_of(getattr(tensor, name))


def write_count(tensor: Tensor) -> int | None:
    """Return how often a tensor was written; None where torch does not count that.

    It does not for tensors of inference mode, and for those of it that were given other memory,
    which do not say that they are.
    """
    try:
        return None if tensor.is_inference() else tensor._version
    except RuntimeError:
        return None


def bytes_of(tensor: Tensor) -> memoryview:
    """View a tensor's bytes, without numpy, which torch can lack; the caller keeps the tensor.

    Raises:
        ConfigError: it is not contiguous, or not on the CPU.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ConfigError(
            f"expected a contiguous tensor on the CPU, got {tuple(tensor.shape)} with strides "
            f"{tensor.stride()} on {tensor.device}"
        )
    if not tensor.nbytes:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def same_bits(tensor: Tensor, other: Tensor) -> bool:
    """Say whether two tensors of one shape have the same bits, so that NaN equals itself.

    They are compared on the first one's device, and in its dtype, part by part: what copies take
    there for a moment stays small, but for tensors that cannot be viewed as one line.
    """
    step = _COMPARED_BYTES // tensor.itemsize
    pairs = (torch.split(_line(each), step) for each in (tensor, other))
    for mine, theirs in zip(*pairs, strict=True):
        moved = theirs.to(mine.device, mine.dtype)
        # Of a tensor whose elements do not lie side by side, a part has to be copied.
        if not torch.equal(*(part.contiguous().view(torch.uint8) for part in (mine, moved))):
            return False
    return True


def _line(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1)


def return_freed_memory() -> None:
    """Have the C library give what was freed back to the system, where it can be asked to (glibc).

    It keeps what may be of use again: hundreds of MB between large weights of different sizes.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def available_host_bytes() -> int | None:
    """Return the host bytes that may still be taken, cgroup's limit included; None if unknown."""
    candidates = [_system_available(), _cgroup_available()]
    known = [value for value in candidates if value is not None]
    return min(known) if known else None


def _system_available() -> int | None:
    if sys.platform != "linux":
        return int(importlib.import_module("psutil").virtual_memory().available)
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    """Read the limit of cgroup v2, else v1, of the group that a container sees as its root."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        root = Path("/sys/fs/cgroup")
        if (root / limit).exists() and (root / usage).exists():
            text = (root / limit).read_text().strip()
            return None if text == "max" else int(text) - int((root / usage).read_text())
    return None


def is_dense(tensor: Tensor) -> bool:
    """Say whether a tensor's memory has no holes: in which order of dimensions does not matter."""
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense.default(tensor)
    return dense


def storage_address(tensor: Tensor) -> int:
    """Return where a tensor's storage lies; that of the tensor below, inside torch's transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage().data_ptr()
