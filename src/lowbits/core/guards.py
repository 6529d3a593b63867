"""Methods of diffusers' and transformers' models that must not run on packed ones as they are."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, final

from lowbits.core.packed import PackedLayer
from lowbits.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    #: Writes a packed model into a folder, in shards of so many bytes at most.
    Save = Callable[[nn.Module, Path, int | str | None], None]

_SAVE: Final = "save_pretrained"


def refuse_saving(*_: Any, **__: Any) -> None:
    """Stand for the ``save_pretrained`` of a copy of a packed model.

    Raises:
        PatchError: always. The model's own would write a folder that ``from_pretrained`` reads as
            random weights, and warns at most.
    """
    raise PatchError(
        "this is a copy of a packed model, whose own save_pretrained would write what "
        "from_pretrained reads as random weights: call lowbits.save(model, folder)"
    )


def refuse_fusing(*_: Any, **__: Any) -> None:
    """Stand for diffusers' ``fuse_qkv_projections`` of what is packed, copies included.

    Raises:
        PatchError: always. It would concatenate what packed layers decode to into new ordinary
            ones, which the model goes on using after `restore`.
    """
    raise PatchError(
        "fuse_qkv_projections would make full-size layers of the packed weights, and the model "
        "would keep them after lowbits.restore. Fuse before lowbits.apply, which packs the fused "
        "layers; now: lowbits.restore(target), fuse, and apply again"
    )


_REFUSALS: Final[Mapping[str, Callable[..., None]]] = MappingProxyType(
    {"fuse_qkv_projections": refuse_fusing, "fuse_projections": refuse_fusing}
)


@final
class _Saver:
    """Stands for a packed model's ``save_pretrained``: writes what `lowbits.load_pipeline` reads.

    Pipelines look at its parameters to know what it can be told.
    """

    def __init__(self, module: nn.Module, save: Save) -> None:
        self._module, self._save = weakref.ref(module), save

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,  # noqa: FBT001, FBT002 - as the methods that it stands for
        *,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write the model's config, and its weights as they are stored.

        Args:
            save_directory: a folder, made if it is not there.
            is_main_process: of several that run the same; the others write nothing.
            max_shard_size: bytes of a file's tensors, or a size as ``"5GB"``.
            push_to_hub: is refused.

        Raises:
            PatchError: `push_to_hub` is set.
        """
        if push_to_hub:
            raise PatchError(
                "save_pretrained of a packed model writes a folder and uploads nothing: save it "
                "without push_to_hub, then huggingface_hub.upload_folder"
            )
        if not is_main_process:
            return
        module = self._module()
        assert module is not None
        self._save(module, Path(save_directory), max_shard_size)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _refusal, ()


def _refusal() -> Callable[..., None]:
    """Return what copies and pickles have in place of a `_Saver`."""
    return refuse_saving


def guard_methods(module: nn.Module, save: Save) -> None:
    """Replace some methods of what holds packed layers; peft's save adapters only.

    Args:
        module: changed in place, and all modules in it.
        save: what ``save_pretrained`` does.
    """
    for part in module.modules():
        if type(part).__module__.startswith("peft.") or not _holds_packed(part):
            continue
        found = [name for name in _REFUSALS if getattr(part, name, None) is not None]
        part.__dict__.update((name, _REFUSALS[name]) for name in found)
        if _has_folder(part):
            part.__dict__[_SAVE] = _Saver(part, save)


@contextmanager
def saved_by(module: nn.Module, save: Save) -> Iterator[None]:
    """Let a model's ``save_pretrained`` do something else for a while, if it is packed.

    Args:
        module: changed in place, and changed back; a copy of a packed one too. Of what writes a
            folder for each of its models (several ControlNets), these are.
        save: what it does.
    """
    inside = (module,) if _has_folder(module) or not _is_saved(module) else module.modules()
    parts = [part for part in inside if _has_folder(part) and _holds_packed(part)]
    before = {part: part.__dict__.get(_SAVE) for part in parts}
    for part in before:
        part.__dict__[_SAVE] = _Saver(part, save)
    try:
        yield
    finally:
        for part, own in before.items():
            del part.__dict__[_SAVE]
            if own is not None:
                part.__dict__[_SAVE] = own


def _is_saved(module: nn.Module) -> bool:
    return getattr(module, _SAVE, None) is not None


def _has_folder(module: nn.Module) -> bool:
    """Say whether a model writes a folder of its own, and not one for each model in it."""
    is_model = hasattr(module, "save_config") or hasattr(module, "config")
    inside = (part for part in module.modules() if part is not module)
    return _is_saved(module) and (is_model or not any(map(_is_saved, inside)))


def _holds_packed(module: nn.Module) -> bool:
    return any(isinstance(part, PackedLayer) for part in module.modules())


def allow_methods(module: nn.Module) -> None:
    """Give a module its own methods back, unless it is packed still."""
    own = module.__dict__
    stubs = [name for name, stub in _REFUSALS.items() if own.get(name) is stub]
    saver = own.get(_SAVE)
    stubs += [_SAVE] if isinstance(saver, _Saver) or saver is refuse_saving else []
    if stubs and not _holds_packed(module):
        for name in stubs:
            del own[name]
