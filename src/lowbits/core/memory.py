"""Which dtype a device multiplies fast in, how much host memory is free, and the CPU's scratch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

#: Rows that a CPU dequantizes at a time: 3 MB of scratch at 3072 columns stay in the cache.
CHUNK_ROWS: Final = 256

#: Lowest CUDA capability (major) whose 16-bit matrix products are fast in the dtype.
_CUDA_BF16: Final = 8
_CUDA_FP16: Final = 7

#: Whether this CPU multiplies bfloat16 itself; a constant, for compilers cannot look the flag up.
_CPU_BF16: Final = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

_scratch = threading.local()


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a layer of ``dtype`` should compute in on a device.

    16-bit products are 10 to 130 times slower than float32 on a CPU without AMX or AVX512-bf16, and
    GTX 10xx and 16xx cards have no fast ones either.
    """
    if dtype in (torch.float32, torch.float64):
        return dtype
    if device.type == "cpu":
        return dtype if dtype == torch.bfloat16 and _CPU_BF16 else torch.float32
    if device.type == "cuda" and torch.version.hip is None:
        major = torch.cuda.get_device_properties(device).major
        if major < _CUDA_FP16:
            return torch.float32
        return dtype if major >= _CUDA_BF16 else torch.float16
    if device.type == "mps":
        return torch.float16
    return dtype


def scratch(rows: int, row_length: int, dtype: torch.dtype) -> Tensor:
    """Return ``(rows, row_length)`` of this thread's CPU scratch; the next call overwrites it.

    Costs as many bytes as the largest request of the thread so far. It is an ordinary tensor, also
    when it is first needed under ``torch.inference_mode``, because it outlives that block.
    """
    elements = rows * row_length
    buffers: dict[torch.dtype, Tensor] = _scratch.__dict__.setdefault("buffers", {})
    buffer = buffers.get(dtype)
    if buffer is None or buffer.numel() < elements:
        with torch.inference_mode(mode=False):
            buffer = buffers[dtype] = torch.empty(elements, dtype=dtype)
    return buffer[:elements].view(rows, row_length)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind some tensors, shared ones counted once."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # A meta tensor has no address: each counts as a storage of its own.
        key = (tensor.device, storage.data_ptr()) if storage.data_ptr() else id(tensor)
        sizes[key] = storage.nbytes() if tensor.device.type != "meta" else tensor.nbytes
    return sum(sizes.values())


def available_host_bytes() -> int | None:
    """Return the host bytes that may still be taken, cgroup's limit included; None if unknown."""
    candidates = [_linux_available(), _cgroup_available()]
    known = [value for value in candidates if value is not None]
    return min(known) if known else None


def _linux_available() -> int | None:
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
