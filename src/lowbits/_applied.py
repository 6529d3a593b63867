"""The functions of `import lowbits` for what was applied: wiring only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowbits._target import modules_of
from lowbits.core.guards import allow_methods
from lowbits.core.handle import find_handle, handles_of, settle_adapters
from lowbits.core.packed import PackedLayer
from lowbits.core.surgery import dequantize_layers
from lowbits.errors import AlreadyPatchedError, NotPatchedError
from lowbits.streaming.engine import refuse_streamed

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import nn

    from lowbits.core.handle import Handle


def dequantize(target: Any) -> None:
    """Turn packed layers into ordinary ones, with the weights *as quantized*, in place.

    Lossy: the originals are let go. To get them back, use `restore` instead. Works on any packed
    module, copies and unpickled ones too.

    Raises:
        NotPatchedError: nothing in the target is packed.
    """
    roots = modules_of(target).values()
    modules = {id(module): module for root in roots for module in root.modules()}
    layers = [module for module in modules.values() if isinstance(module, PackedLayer)]
    if not layers:
        raise NotPatchedError(f"nothing in this {type(target).__name__} is packed")
    handles = handles_of(modules.values())
    settle_adapters(modules.values())
    _end_streaming(handles, roots)
    dequantize_layers(layers)
    for module in modules.values():
        owned = find_handle(module)
        # A handle of more than this target keeps the way back to the rest, and to this.
        if owned and not _reaches_beyond(owned, modules.values()):
            owned.release()
        allow_methods(module)
    for owned in handles:
        owned.place_again(must_fit=False)  # what else it is of


def _end_streaming(handles: Sequence[Handle], roots: Collection[nn.Module]) -> None:
    """End what handles stream; nothing changes where somebody else streams some of it."""
    ended: list[Handle] = []
    try:
        for owned in handles:
            owned.end_streaming()
            ended.append(owned)
        for root in roots:
            refuse_streamed(root)
    except BaseException:
        for owned in reversed(ended):
            owned.resume_streaming()
        raise


def handle(target: Any) -> Handle | None:
    """Return the handle of a module or pipeline that was applied, or None.

    A pipeline that has components of another one has its own handle, where it was applied too.
    """
    modules = list(modules_of(target).values())
    owners = [owned for owned in map(find_handle, modules) if owned]
    return min(owners, key=lambda owned: _reaches_beyond(owned, modules), default=None)


def _reaches_beyond(owned: Handle, modules: Collection[nn.Module]) -> bool:
    """Say whether a handle is of more than some modules."""
    known = {id(module) for module in modules}
    return any(id(component) not in known for component in owned.components.values())


def restore(target: Any) -> None:
    """Undo `apply` or `quantize`: see `Handle.restore`; all of a pipeline's handles."""
    left = _require_handles(target)
    while left:
        for owned in left:
            try:
                owned.restore()
            except AlreadyPatchedError:
                if owned is left[-1]:
                    raise  # else another one of these may stream it
            else:
                left.remove(owned)
                break


def merge_lora(target: Any) -> None:
    """Merge the adapters that act into the packed weights, with their strengths now.

    W + what they add is quantized from the original W, on the device that computes; only layers
    whose adapters, or strengths, are other ones than in their codes are written. Until it is called
    again, a strength that changes acts beside the codes.

    Raises:
        NotPatchedError: the target has no handle.
        SourceUnavailableError: originals were not kept; nothing changes.
        PatchError: an adapter is of a kind that cannot be merged; nothing changes.
    """
    for owned in _require_handles(target):
        owned.adapters.merge()


def unmerge_lora(target: Any) -> None:
    """Take out of the packed weights what was merged into them: their codes are as packed.

    Adapters that are there still act beside the weights again; what was merged and then unloaded is
    gone.

    Raises:
        NotPatchedError: the target has no handle.
        SourceUnavailableError: originals were not kept; nothing changes.
    """
    for owned in _require_handles(target):
        owned.adapters.unmerge()


def _require_handles(target: Any) -> list[Handle]:
    handles = handles_of(modules_of(target).values())
    if not handles:
        raise NotPatchedError(
            f"this {type(target).__name__} has no handle: it was not applied, was restored "
            "already, or is a copy of an applied one (lowbits.dequantize works on those)"
        )
    return handles
