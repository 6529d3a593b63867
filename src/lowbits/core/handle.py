"""What `lowbits.apply` returns: the report, and the way back."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar, final

from lowbits.core.guards import allow_methods, guard_methods
from lowbits.core.interception import streamed_part
from lowbits.core.names import WRAPPED
from lowbits.core.packed import PackedLayer, read_weight
from lowbits.core.surgery import Journal, journal_of, take_back, verify_sources
from lowbits.errors import AlreadyPatchedError, NotPatchedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from lowbits.core.guards import Save
    from lowbits.core.report import Report
    from lowbits.core.seams import Adapters, Placed, Target
    from lowbits.core.source import Source

_OWNED: Final = "_lowbits_handle"

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def _by_stand_in(
    method: Callable[Concatenate[Handle, _Given], _Result],
) -> Callable[Concatenate[Handle, _Given], _Result]:
    """Let the handle do it that has packed the target as before, where a switch has failed."""

    @functools.wraps(method)
    def call(self: Handle, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        return method(self._in_force(), *args, **kwargs)

    return call


@final
class Handle:
    """An applied target's report, and the way back.

    The target owns it: dropping it changes nothing, and `lowbits.handle` finds it again. Each
    component owns its part of the journal, and the handle refers to components weakly: one that is
    dropped from a pipeline is freed with its originals, a streamed one once its handle is dropped,
    or has restored it. Copies and pickles of the target are packed, but have no handle: originals
    are never copied along.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        report: Report,
        target: Target,
        placed: Placed,
        adapters: Adapters,
    ) -> None:
        self._components = weakref.WeakValueDictionary(components)
        self._report, self._target, self._placed = report, target, placed
        #: What merges and unmerges a LoRA: `lowbits.merge_lora`, `lowbits.unmerge_lora`.
        self.adapters = adapters
        self._journals: weakref.WeakSet[Journal] = weakref.WeakSet()
        self._homes: list[tuple[weakref.ref[nn.Module], torch.device]] = []
        self._hooks: list[RemovableHandle] = []
        self._successor: Handle | None = None
        self._stand_in: Handle | None = None
        self._is_restored = False

    def attach(self, journals: Mapping[str, Journal], save: Save) -> None:
        """Make each component own this handle, and its journal.

        Components that another handle owns stay that one's, which has the way back; it is noted
        there that this one may stream them.

        Args:
            journals: by component.
            save: what ``save_pretrained`` does where a component is packed.
        """
        for name, module in self.components.items():
            if find_handle(module) is None:
                journal = journals.get(name) or Journal()
                module.__dict__[_OWNED] = _Owned(self, journal)
                self._journals.add(journal)
                self._hooks.append(guard(module, save))
        for part in map(_owned, self._target.modules()):
            if part.handle is not self and self not in part.guests:
                part.guests.append(self)
        self.adapters.attach(self)

    @property
    def is_streamed(self) -> bool:
        """Whether its target's weights are streamed, or take turns under a `device_budget`."""
        return self._in_force()._placed.is_streamed

    @property
    def components(self) -> dict[str, nn.Module]:
        """The modules that this handle is for, by name; those that still exist."""
        return dict(self._components)

    @property
    def is_active(self) -> bool:
        """Whether the target is still packed, or streamed, by this handle."""
        owner = self._in_force()
        return bool(owner._parts()) or (owner.is_streamed and bool(owner._hosts()))

    def _hosts(self) -> list[_Owned]:
        """Return what models of the target have that are another handle's."""
        return [part for part in map(_owned, self._target.modules()) if self in part.guests]

    def _parts(self) -> list[_Owned]:
        mine = (part for part in map(_owned, self.components.values()) if part.handle is self)
        return list({id(part): part for part in mine}.values())

    def source_files(self) -> set[Path]:
        """Return the files that originals are read from when they are asked for."""
        sources = (source for part in self._parts() for source in part.journal.sources())
        return {source.path for source in sources if source.path is not None}

    @_by_stand_in
    def report(self) -> Report:
        """Return what was done to each layer, byte by byte.

        Layers that somebody replaced since (a LoRA of FLUX Control does that) are in the warnings.
        """
        return self._report.noting(self._replaced())

    def _replaced(self) -> Iterator[str]:
        """Say which packed layers are not in the target any more."""
        for module in self.components.values():
            present = {id(part) for part in module.modules()}
            for fqn, part in _owned(module).journal.modules():
                if id(part) not in present:
                    yield (
                        f"{fqn} was replaced by another module since it was packed (by a LoRA?), "
                        "made of the weight as quantized: restore() leaves that one in place"
                    )

    def find(self, layer: nn.Module) -> tuple[str, Source] | None:
        """Return the dotted name that a packed layer had, and the source of its weight, if any."""
        journal = journal_of(layer)
        return journal.find(layer) if journal and journal in self._journals else None

    def is_tied(self, layer: nn.Module) -> bool:
        """Say whether a packed layer shares its weight with another one."""
        found = self.find(layer)
        sources = [s for part in self._parts() for s in part.journal.sources()]
        return found is not None and sum(source is found[1] for source in sources) > 1

    @_by_stand_in
    def stats(self) -> Any:
        """Return what streaming did, as `lowbits.StreamStats`: bytes moved, stalls, peak bytes.

        Where nothing is streamed, only the bytes on the device are in it.
        """
        return self._placed.stats()

    def came_from(self, homes: Sequence[tuple[nn.Module, torch.device]]) -> None:
        """Remember where modules lay before they were moved: `restore` moves them back."""
        known = {id(reference()) for reference, _ in self._homes}
        self._homes += [(weakref.ref(m), device) for m, device in homes if id(m) not in known]

    @_by_stand_in
    def reconfigure(
        self,
        *,
        gpu_weights: int | str | None = None,
        reserve: int | str | None = None,
        swap: str | None = None,
        location: str | None = None,
    ) -> None:
        """Place the weights in another way; what is packed stays as it is.

        Args:
            gpu_weights: as for `lowbits.apply`; what is None stays as it is.
            reserve: as above.
            swap: as above.
            location: as above.

        Raises:
            NotPatchedError: the target was restored.
            InsufficientMemoryError: it does not fit in that way; it is placed as it was.
            ConfigError: a value that an option does not accept.
        """
        self._require_active("reconfigure")
        asked = {
            "gpu_weights": gpu_weights, "reserve": reserve, "swap": swap, "location": location,
        }  # fmt: skip
        changes = {option: value for option, value in asked.items() if value is not None}
        self._place_again(changes, must_fit=True)

    def place_again(self, *, must_fit: bool = True) -> None:
        """Place the weights as they would be placed now; nothing where the target was restored.

        Args:
            must_fit: False: where they do not fit, the next pass says so.
        """
        if self._stand_in is None and self.is_active:
            self._place_again({}, must_fit=must_fit)

    def _place_again(self, changes: Mapping[str, Any], *, must_fit: bool) -> None:
        self._placed = self._target.place_again(self, self._placed, changes, must_fit=must_fit)

    @_by_stand_in
    def restore(self) -> None:
        """Undo everything: bit-equal weights, the same classes, hooks and order as before.

        What the caller did since stays: a model that was cast or moved while packed is restored in
        the new dtype, on the new device.

        Raises:
            NotPatchedError: it was restored already.
            SourceUnavailableError: originals were not kept, or their file changed; nothing changes.
            AlreadyPatchedError: a `lowbits.LayerStreamer`, or another pipeline, streams it; nothing
                changes.
        """
        self._require_active("restore")
        journals = [part.journal for part in self._parts()]
        verify_sources(journals)  # before streaming ends: it is not begun again for nothing
        with self._placed.turn():
            self._placed.detach()
            try:
                self._require_unstreamed()
                take_back(journals)
            except BaseException:
                self._placed.attach(must_fit=False)
                raise
        self.adapters.forget()
        self._leave()
        self._is_restored = True
        for reference, device in self._homes:
            module = reference()
            if module is not None and streamed_part(module) is None:
                module.to(device)

    @_by_stand_in
    def switch(self, scheme: Any) -> Handle:
        """Pack the same components in another scheme, from the originals, with the same options.

        A LoRA that was fused stays, unloaded since or not, in layers that are packed in both.

        Args:
            scheme: as for `lowbits.apply`, but no `LowbitsConfig`. Rules that named the old scheme
                name this one.

        Returns:
            The new handle; this one is spent.

        Raises:
            SourceUnavailableError: originals were not kept.
            LowbitsError: whatever applying raises; the target is then as it was, in its old scheme,
                and this handle goes on.
        """
        self._require_active("switch")
        own = [name for name, module in self.components.items() if find_handle(module) is self]
        try:
            self._successor = self._target.switch(self, scheme)
        except BaseException:
            if not self.is_active:
                # What it packed is packed as before, by another one.
                owners = (find_handle(self.components[name]) for name in own)
                self._stand_in = next((owner for owner in owners if owner is not None), None)
            raise
        return self._successor

    def _in_force(self) -> Handle:
        """Return the handle that goes on for this one, where it could not be switched; or this."""
        return self._stand_in._in_force() if self._stand_in else self

    def end_streaming(self) -> None:
        """Stop streaming: weights are where they were before."""
        self._placed.detach()

    def resume_streaming(self) -> None:
        """Begin again as it was before `end_streaming`."""
        self._placed.attach(must_fit=False)

    @_by_stand_in
    def release(self) -> None:
        """Let the target go without restoring it: it stays packed, and has no handle.

        It is not streamed any more: its weights are where they were before.
        """
        self._require_active("release")
        self._placed.detach()
        self._leave()

    def _leave(self) -> None:
        """Detach, and let those who own what this one has streamed place it themselves."""
        hosts = {id(part.handle): part.handle for part in self._hosts() if self.is_streamed}
        self.detach()
        for host in hosts.values():
            if host is not None:
                host.place_again(must_fit=False)

    def detach(self) -> None:
        """Make the target forget this handle; nothing else changes.

        Components that are not packed any more may be saved, and fused, again.
        """
        self.adapters.detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for host in self._hosts():
            host.guests.remove(self)
        for module in self.components.values():
            if find_handle(module) is self:
                del module.__dict__[_OWNED]
                for part in module.modules():
                    allow_methods(part)

    def _require_active(self, what: str) -> None:
        if not self.is_active:
            raise NotPatchedError(
                f"cannot {what}: this handle is spent (its target was switched, restored or "
                "dequantized); lowbits.handle(target) gives the one in force, if there is one"
            )

    def _require_unstreamed(self) -> None:
        """Raise where somebody else streams a component: originals would be streamed no more."""
        for name, component in self.components.items():
            owned = _owned(component)
            is_packed = owned.handle is self and any(True for _ in owned.journal.modules())
            if is_packed and (part := streamed_part(component)) is not None:
                raise AlreadyPatchedError(
                    f"cannot restore {name or type(component).__name__}: its {part} is streamed by "
                    "a LayerStreamer, or as a part of another pipeline: call that one's detach(), "
                    "or restore that pipeline, first"
                )

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        last = self._in_force()
        while last._successor is not None:
            last = last._successor._in_force()
        if last.is_active:
            last.restore()

    def __repr__(self) -> str:
        end = "switched" if self._successor else "restored" if self._is_restored else "spent"
        state = "active" if self.is_active else end
        return f"Handle({state}: {self._report.summary()})"


@final
class _Owned:
    """What a component owns, which copies and pickles do not share.

    Attributes:
        handle: that has packed it; None: nobody has.
        journal: the way back.
        guests: handles of other targets that have it too, and may stream it.
    """

    def __init__(self, handle: Handle | None = None, journal: Journal | None = None) -> None:
        self.handle = handle
        self.journal = journal or Journal()
        self.guests: list[Handle] = []

    def __reduce__(self) -> tuple[type[_Owned], tuple[()]]:
        return _Owned, ()


def find_handle(module: nn.Module) -> Handle | None:
    """Return the handle of a component, if it has one."""
    return _owned(module).handle


def handles_of(modules: Iterable[nn.Module]) -> list[Handle]:
    """Return all handles of some modules, each once: first those that are to be restored first.

    These stream what another one has packed.
    """
    parts = list(map(_owned, modules))
    guests = [guest for part in parts for guest in part.guests if guest.is_streamed]
    owners = [part.handle for part in parts if part.handle is not None]
    return list({id(owned): owned for owned in (*guests, *owners)}.values())


def settle_adapters(modules: Iterable[nn.Module], *, takes_out: bool = False) -> None:
    """Let packed weights hold what adapters say now, for those who look at nothing else.

    Args:
        modules: all of a target.
        takes_out: what was merged unasked is not to be in them, until the next pass.
    """
    for owned in handles_of(modules):
        owned.adapters.settle(takes_out=takes_out)


def _owned(module: nn.Module) -> _Owned:
    owned = module.__dict__.get(_OWNED)
    return owned if isinstance(owned, _Owned) else _Owned()


def guard(module: nn.Module, save: Save) -> RemovableHandle:
    """Let a packed model answer look-ups of its weights, and not run what would lose them.

    Args:
        module: changed in place.
        save: what ``save_pretrained`` does.

    Returns:
        What ends the answers; `allow_methods` gives a part its own methods back.
    """
    register: Any = module._register_state_dict_hook
    hook: RemovableHandle = register(_answer_weight_lookups)
    guard_methods(module, save)
    return hook


class _StateDict(OrderedDict[str, Any]):
    """A state dict that answers look-ups of packed weights without listing them.

    LoRA loaders read ``state_dict()["layer.weight"]`` for its shape; saving must not see it.
    """

    module: nn.Module | None = None

    def __missing__(self, key: str) -> Any:
        fqn, _, name = key.rpartition(".")
        layer: Any = self.module
        for part in fqn.split(".") if fqn else []:
            layer = layer._modules[part] if layer is not None and part in layer._modules else None
        while layer is not None and WRAPPED in layer._modules:
            layer = layer._modules[WRAPPED]  # what adapter libraries wrap, asked by its name
        if isinstance(layer, PackedLayer) and name in type(layer).lowbits_names:
            return read_weight(layer, name)
        raise KeyError(key)

    def __reduce__(self) -> tuple[Any, ...]:
        attributes = {key: value for key, value in vars(self).items() if key != "module"}
        return OrderedDict, (), attributes, None, iter(self.items())


def _answer_weight_lookups(
    module: nn.Module, state_dict: OrderedDict[str, Any], prefix: str, _: Any
) -> OrderedDict[str, Any] | None:
    if prefix:
        return None  # a part of another module's state dict
    answering = _StateDict(state_dict)
    answering.module = module
    if hasattr(state_dict, "_metadata"):
        answering._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return answering
