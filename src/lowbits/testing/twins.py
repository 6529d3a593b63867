"""The operators of the fake accelerator: the CPU's, over the same memory.

[Note: twins]
A tensor of the fake device is an ordinary `torch.Tensor` on torch's spare backend (PrivateUse1).
Its storage is on the device, and points to the memory of a CPU storage, its *twin*, which it keeps
alive. An operator that torch has no kernel for there, which is every one that computes, runs on CPU
tensors over the twins, and what comes out gets a storage of the device over its own. So results are
the CPU's, bit for bit, and views share memory. What differs from the CPU is what differs on a GPU:
where tensors are, what may be mixed, and what is a copy.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME: Final = "fakegpu"
#: Operators that take indices from the host, as CUDA's do.
_HOST_INDICES: Final = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))


def copy_bytes(target: Tensor, source: Tensor, *_: Any) -> Tensor:
    """Copy to, from and on the device: the kernel of ``copy_``."""
    _twin(target).copy_(_twin(source))
    if target.device.type != NAME:
        _count(target.nbytes)
    return target


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the twins: the kernel of all operators that have none on the device.

    Raises:
        RuntimeError: a tensor of the host is among the arguments, and is no scalar; or what the
            operator raises.
    """
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == NAME]
    if tensors:
        _refuse_mixed(op, leaves)
    storages = [leaf for leaf in leaves if isinstance(leaf, torch.UntypedStorage)]
    storages += [tensor.untyped_storage() for tensor in tensors]
    twins: dict[int, Any] = {id(tensor): _twin(tensor) for tensor in tensors}
    twins |= {id(storage): _memory(storage) for storage in storages}

    def to_host(leaf: Any) -> Any:
        if isinstance(leaf, torch.device) and leaf.type == NAME:
            return torch.device("cpu")
        return twins.get(id(leaf), leaf)

    with torch._C._AutoDispatchBelowAutograd():
        host_args, host_kwargs = tree_map(to_host, (args, kwargs))
        result = op(*_numbers_as_tensors(op, host_args), **host_kwargs)
    if op is torch.ops.aten._local_scalar_dense.default:
        _count(tensors[0].itemsize)
    for tensor in tensors:
        _follow(tensor, twins[id(tensor)], storages)
    owners = {id(twins[id(tensor)]): tensor for tensor in tensors}

    def to_device(leaf: Any) -> Any:
        if id(leaf) in owners:
            return owners[id(leaf)]
        return _on_device(leaf, tensors) if isinstance(leaf, Tensor) else leaf

    return tree_map(to_device, result)


def device_storage(memory: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return a storage of the device over the memory of a CPU storage, which it keeps alive."""
    storage = _storage_at(memory, torch.device(NAME, 0))
    # Python's part of a storage lives as long as the storage: so does, now, the memory.
    storage.twin = memory
    untyped: torch.UntypedStorage = storage
    return untyped


def _count(nbytes: int) -> None:
    for counter in torch.get_device_module(NAME).counters:
        counter.add(nbytes)


def _refuse_mixed(op: Any, leaves: list[Any]) -> None:
    if op._schema.name.removeprefix("aten::") in _HOST_INDICES:
        return
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.device.type != NAME and leaf.dim():
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:0 and {leaf.device}! (when calling {op})"
            )


def _numbers_as_tensors(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Undo that torch hands a number over where it made a tensor of it; most operators mind."""
    if torch._C._should_allow_numbers_as_tensors(op._schema.name.removeprefix("aten::")):
        return args
    wanted = [isinstance(argument.type, torch.TensorType) for argument in op._schema.arguments]
    return tuple(
        torch.tensor(value) if is_tensor and isinstance(value, (int, float)) else value
        for value, is_tensor in zip(args, wanted, strict=False)
    )


def _memory(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return the CPU storage behind a storage."""
    if storage.device.type != NAME:
        return storage
    twin: torch.UntypedStorage | None = getattr(storage, "twin", None)
    # Storages that torch makes over a pointer have none: somebody else keeps their memory.
    return _storage_at(storage, torch.device("cpu")) if twin is None else twin


def _storage_at(memory: torch.UntypedStorage, device: torch.device) -> Any:
    return torch._C._construct_storage_from_data_pointer(memory.data_ptr(), device, memory.nbytes())


def _twin(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over the memory of a tensor."""
    if tensor.device.type != NAME:
        return tensor
    place = (tensor.storage_offset(), tensor.size(), tensor.stride())
    with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
        empty = torch.empty(0, dtype=tensor.dtype, device="cpu")
        return empty.set_(_memory(tensor.untyped_storage()), *place)


def _on_device(result: Tensor, tensors: list[Tensor]) -> Tensor:
    """Return the tensor of the device over a CPU tensor; a view of one of ``tensors``, if it is."""
    place = (result.size(), result.stride(), result.storage_offset())
    memory = result.untyped_storage()
    candidates = (t for t in tensors if t.dtype == result.dtype)
    base = next((t for t in candidates if _is_over(t.untyped_storage(), memory)), None)
    with _metadata_only():
        if base is None:
            base = torch._C._acc.create_empty_tensor((0,), result.dtype)
            _bind(base, memory, [tensor.untyped_storage() for tensor in tensors])
        view: Tensor = torch.ops.aten.as_strided.default(base, *place)
        return view


def _follow(tensor: Tensor, twin: Tensor, storages: list[torch.UntypedStorage]) -> None:
    """Give a tensor the shape, or memory, that an operator gave its twin: ``out=``, ``resize_``."""
    place, memory = (twin.size(), twin.stride(), twin.storage_offset()), twin.untyped_storage()
    is_same = _is_over(tensor.untyped_storage(), memory)
    if is_same and place == (tensor.size(), tensor.stride(), tensor.storage_offset()):
        return
    with _metadata_only():
        if not is_same:
            _bind(tensor, memory, storages)
        torch.ops.aten.as_strided_.default(tensor, *place)


def _is_over(storage: torch.UntypedStorage, memory: torch.UntypedStorage) -> bool:
    """Say whether a storage is one of the device, over this memory and as large as it is now."""
    is_twin = storage.device.type == NAME and _memory(storage)._cdata == memory._cdata
    return is_twin and storage.nbytes() == memory.nbytes()


def _bind(
    tensor: Tensor, memory: torch.UntypedStorage, storages: list[torch.UntypedStorage]
) -> None:
    """Give a tensor, emptied, the storage over some memory: a known one, or a new one."""
    storage = next((known for known in storages if _is_over(known, memory)), None)
    if storage is None:
        storage = device_storage(memory)
    torch.ops.aten.set_.source_Storage_storage_offset(tensor, storage, 0, (0,), (1,))


@contextmanager
def _metadata_only() -> Iterator[None]:
    """Use torch's kernels for tensors without memory: they make views of any device's storage."""
    was = torch._C._meta_in_tls_dispatch_include()
    with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            yield
        finally:
            torch._C._set_meta_in_tls_dispatch_include(was)
