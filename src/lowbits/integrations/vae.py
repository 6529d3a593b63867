"""VAEs of diffusers, in tiles: always, or where a call runs out of memory."""

from __future__ import annotations

import gc
import inspect
import logging
import weakref
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch.utils._pytree import tree_leaves

from lowbits.streaming.device_ops import device_ops, is_capturing
from lowbits.streaming.models import PlacedModels
from lowbits.streaming.repeat import RandomState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from lowbits.streaming.models import Placement
    from lowbits.streaming.stats import StreamStats

logger = logging.getLogger("lowbits.vae")

#: Calls that may run out of memory, and the ways to take less of it: one picture at a time, which
#: draws the same, before tiles, whose seams are blended.
_CALLS: Final = ("encode", "decode")
_SLICING: Final = "slicing"
_TILING: Final = "tiling"

_ADVICE: Final = (
    "lowbits: the VAE ran out of memory in tiles too, or its picture is no larger than a tile. Use "
    "smaller tiles (vae.enable_tiling takes their size, or vae.tile_sample_min_size is set), a "
    "smaller batch, or a smaller gpu_weights="
)


def can_be_tiled(module: nn.Module) -> bool:
    """Say whether a model is a VAE of diffusers that can work in tiles."""
    return f"use_{_TILING}" in vars(module) and any(hasattr(module, name) for name in _CALLS)


@final
class GuardedModels(PlacedModels):
    """Placed models whose VAEs work in tiles where they run out of memory, or always."""

    def __init__(
        self, placed: PlacedModels, modules: Mapping[str, nn.Module], *, is_always_tiled: bool
    ) -> None:
        """Remember what to do; nothing is touched before `attach`.

        Args:
            placed: the models.
            modules: the same, by name; not kept alive.
            is_always_tiled: whether VAEs work in tiles from the beginning.
        """
        self._placed, self._is_always_tiled = placed, is_always_tiled
        unique = {id(module): module for module in modules.values() if can_be_tiled(module)}
        self._guards = [_Guard(module) for module in unique.values()]

    @property
    def is_streamed(self) -> bool:
        """Whether models are streamed."""
        return self._placed.is_streamed

    def stats(self) -> StreamStats:
        """Return what was done so far, VAE calls that were repeated included."""
        stats = self._placed.stats()
        notes = stats.notes
        if self._is_always_tiled and not self._guards:
            notes = (*notes, "never_oom: there is no VAE that can work in tiles")
        recoveries = stats.recoveries + sum(guard.recoveries for guard in self._guards)
        return replace(stats, recoveries=recoveries, notes=notes)

    def attach(self, *, must_fit: bool = True) -> None:
        """Place the models, and stand before their VAEs' calls."""
        self._placed.attach(must_fit=must_fit)
        for guard in self._guards:
            guard.attach(is_always_tiled=self._is_always_tiled)

    def detach(self) -> None:
        """Undo `attach`."""
        self._placed.detach()
        for guard in self._guards:
            guard.detach()

    def resized(
        self, placement: Placement, modules: Mapping[str, nn.Module], *, must_fit: bool
    ) -> bool:
        """Do so; VAEs work as before."""
        return self._placed.resized(placement, modules, must_fit=must_fit)

    def turn(self) -> AbstractContextManager[Any]:
        """Keep others from running the models."""
        return self._placed.turn()


@final
class _Guard:
    """Stands before one VAE's calls.

    Attributes:
        recoveries: calls that ran out of memory, and were completed in another way.
    """

    def __init__(self, module: nn.Module) -> None:
        self.recoveries = 0
        self._module = weakref.ref(module)
        self._switched: list[_Switched] = []

    def attach(self, *, is_always_tiled: bool) -> None:
        """Begin; calls that somebody stands before already are left to him."""
        module = self._module()
        if module is None:
            return
        for name in _CALLS:
            if hasattr(module, name) and _is_its_own(module, name):
                module.__dict__[name] = _Call(self, module, name)
        if is_always_tiled:
            self._switched = [_Switched(module, (_SLICING, _TILING))]

    def detach(self) -> None:
        """Give the VAE its own calls back, and its switches as they were."""
        while self._switched:
            self._switched.pop().take_back()
        module = self._module()
        for name in _CALLS if module is not None else ():
            call = vars(module).get(name)
            if isinstance(call, _Call) and call.guard is self:
                del module.__dict__[name]

    def run(self, module: nn.Module, call: partial[Any], batch: int) -> Any:
        """Return what a call returns, in slices or tiles where it runs out of memory.

        The picture is of the same latents, and of the same random numbers.
        """
        *others, last = _ways(module, batch)
        device = next(module.parameters()).device
        if is_capturing(device):
            return call()
        random = RandomState(tree_leaves((call.args, call.keywords)), device)
        for way in others:
            with suppress(torch.OutOfMemoryError), _in(module, way):
                result = call()
                self._note(way)
                return result
            # Here the traceback is gone, and with it what the frames of the failed call held.
            gc.collect()
            device_ops(device).release_cached()
            random.return_to()
        with _in(module, last):
            try:
                result = call()
            except torch.OutOfMemoryError as error:
                error.add_note(_ADVICE)
                raise
        self._note(last)
        return result

    def _note(self, way: Sequence[str]) -> None:
        if not way:
            return
        if not self.recoveries:
            logger.warning(
                "a VAE ran out of memory, and its call was repeated with %s; stats().recoveries "
                "counts, never_oom={'vae'} begins in tiles", " and ".join(way),
            )  # fmt: skip
        self.recoveries += 1


def _is_its_own(module: nn.Module, name: str) -> bool:
    """Say whether nobody stands before a method; copies of VAEs have their own as an attribute."""
    method = vars(module).get(name)
    return method is None or getattr(method, "__func__", None) is getattr(type(module), name)


def _ways(module: nn.Module, batch: int) -> list[tuple[str, ...]]:
    """Return what to switch on for each try of a call; nothing for the first."""
    ways: list[tuple[str, ...]] = [()]
    if batch > 1 and vars(module).get(f"use_{_SLICING}") is False:
        ways.append((_SLICING,))
    if not vars(module)[f"use_{_TILING}"]:
        ways.append((_SLICING, _TILING))
    return ways


@final
class _Call:
    """Stands in place of one method of a VAE; copies and pickles of the VAE have their own."""

    def __init__(self, guard: _Guard, module: nn.Module, name: str) -> None:
        self.guard, self._name = guard, name
        self._module = weakref.ref(module)
        self.__signature__ = inspect.signature(getattr(module, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        module = self._module()
        assert module is not None
        method = partial(getattr(type(module), self._name), module, *args, **kwargs)
        if torch.compiler.is_compiling():
            return method()
        values = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return self.guard.run(module, method, next((len(v) for v in values if v.dim()), 1))

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return getattr, (self._module(), self._name)


@final
class _Switched:
    """Switches of a VAE that are on until they are taken back."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._module = weakref.ref(module)
        before = dict(vars(module))
        for name in names:
            if f"use_{name}" in before:
                getattr(module, f"enable_{name}")()
        after = vars(module)
        self._changed = {k: (v, after[k]) for k, v in before.items() if after[k] is not v}

    def take_back(self) -> None:
        """Set what was changed back, but for what somebody else has set since."""
        module = self._module()
        for name, (before, after) in self._changed.items() if module is not None else ():
            if vars(module).get(name) is after:
                module.__dict__[name] = before


@contextmanager
def _in(module: nn.Module, way: Sequence[str]) -> Iterator[None]:
    switched = _Switched(module, way)
    try:
        yield
    finally:
        switched.take_back()
