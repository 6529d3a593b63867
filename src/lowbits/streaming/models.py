"""Models that share a device's weight budget, as `lowbits.apply` puts them there."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, final

from lowbits.core.report import format_bytes
from lowbits.errors import InsufficientMemoryError
from lowbits.streaming.activations import Activations
from lowbits.streaming.arbiter import Arbiter
from lowbits.streaming.budget import reserve_bytes
from lowbits.streaming.device_ops import device_ops
from lowbits.streaming.engine import Engine, cut, cut_again, require_fit
from lowbits.streaming.layout import kept_bytes
from lowbits.streaming.stats import StreamStats, make_stats, resident_stats, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import nn

    from lowbits.core.source import SourceFiles
    from lowbits.streaming.budget import DeviceBudget
    from lowbits.streaming.layout import ModelLayout


@final
@dataclass(frozen=True)
class Placement:
    """Where weights are to be.

    Attributes:
        device: that computes.
        gpu_weights: ``"auto"``, ``"all"``, or bytes.
        reserve: left free by ``"auto"``: ``"auto"``, or bytes.
        method: one of `lowbits.config.SWAPS`.
        location: one of `lowbits.config.LOCATIONS`.
        ring_only: names of models none of whose units stay on the device.
        shared: what all pipelines may take on the device together, if there is such a cap.
        activations: what calls of each model take, by name; is told what they take from now on.
        workspace_bytes: of the largest packed weight while it is decoded.
    """

    device: torch.device
    gpu_weights: int | str = "auto"
    reserve: int | str = "auto"
    method: str = "auto"
    location: str = "auto"
    ring_only: frozenset[str] = frozenset()
    shared: DeviceBudget | None = None
    activations: Mapping[str, Activations] = field(default_factory=dict)
    workspace_bytes: int = 0

    def budget(self, nbytes: int, held_bytes: int) -> int | None:
        """Return the bytes that weights may take on the device; None: they all stay there.

        Args:
            nbytes: of all weights as they will be stored.
            held_bytes: of weights that are on the device now, and make room.

        Raises:
            InsufficientMemoryError: ``"all"`` does not fit.
        """
        cap = self._cap(nbytes, held_bytes)
        if self.shared is not None:
            return self.shared.budget_bytes if cap is None else min(cap, self.shared.budget_bytes)
        if self.ring_only:
            return cap if cap is not None else 2 * nbytes
        return None if cap is None or nbytes <= cap else cap

    def _cap(self, nbytes: int, held_bytes: int) -> int | None:
        """Return the bytes that weights may take; None where there is no limit to know."""
        if isinstance(self.gpu_weights, int):
            return self.gpu_weights
        ops = device_ops(self.device)
        free = ops.free_bytes()
        # What is loaded fits: a copy on the disk would only be slower. Sizes ask for it.
        if self.device.type == "cpu" or free is None:
            return None
        free += held_bytes
        if self.shared is not None:
            free += self.shared.device_bytes  # all of it gives way
        if self.gpu_weights == "all":
            if nbytes > free:
                raise InsufficientMemoryError(
                    f"gpu_weights='all': weights take {format_bytes(nbytes)}, and "
                    f"{format_bytes(free)} are free on {self.device}: pass gpu_weights='auto' or a "
                    "size, or a smaller scheme",
                    nbytes,
                    free,
                    str(self.device),
                )
            return free
        if isinstance(self.reserve, int):
            return max(0, free - self.reserve)
        known = self.activations.values()
        return max(0, free - reserve_bytes(ops, free, known, self.workspace_bytes))


class PlacedModels(ABC):
    """Models on their device, for good or in turns."""

    @property
    @abstractmethod
    def is_streamed(self) -> bool:
        """Whether they take turns."""

    @abstractmethod
    def stats(self) -> StreamStats:
        """Return what was done so far."""

    @abstractmethod
    def attach(self, *, must_fit: bool = True) -> None:
        """Begin, or begin again, to place them; all or nothing.

        Args:
            must_fit: False: where one does not fit any more, its next pass says so.
        """

    @abstractmethod
    def detach(self) -> None:
        """Leave them where they were, all of them or none."""

    @abstractmethod
    def resized(
        self, placement: Placement, modules: Mapping[str, nn.Module], *, must_fit: bool
    ) -> bool:
        """Place all models of a target in another budget where no weight has to move for that.

        Args:
            placement: with that budget.
            modules: of the target, by name.
            must_fit: as for `attach`.

        Returns:
            Whether that is done; False: they have to be placed anew.

        Raises:
            InsufficientMemoryError: one does not fit; all are as they were.
        """

    def turn(self) -> AbstractContextManager[Any]:
        """Keep others from running them: who waits for a turn goes on when this is over."""
        return nullcontext()


@final
class ResidentModels(PlacedModels):
    """Models that are on the device for good."""

    is_streamed = False

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device | None) -> None:
        """Remember them; `lowbits.apply` moves them.

        Args:
            modules: by name; not kept alive.
            device: that they are on; None: wherever that is.
        """
        self._modules = weakref.WeakValueDictionary(modules)
        self._device = device

    def stats(self) -> StreamStats:
        """Return the bytes that they take now."""
        live = list(self._modules.values())
        devices = dict.fromkeys(str(self._device or tensor.device) for tensor in tensors_of(live))
        return resident_stats(", ".join(devices), live)

    def attach(self, *, must_fit: bool = True) -> None:
        """Nothing to do."""

    def detach(self) -> None:
        """Nothing to do."""

    def resized(self, *_: Any, **__: Any) -> bool:
        """Have no budget."""
        return False


@final
class StreamedModels(PlacedModels):
    """Models that take turns in one budget."""

    is_streamed = True

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        placement: Placement,
        budget_bytes: int,
        announce: Callable[[nn.Module, Engine], Callable[[], None]] | None = None,
        source: SourceFiles | None = None,
    ) -> None:
        """Remember what to do; nothing is touched before `attach`.

        Args:
            modules: by name; changed in place.
            placement: where weights are to be.
            budget_bytes: that all of them may take on the device at any time.
            announce: tells others that a model is streamed; returns what takes that back.
            source: files that weights may come from.
        """
        self._modules = _with_tensors(modules)
        self._placement, self._budget_bytes = placement, budget_bytes
        self._arbiter: Arbiter | None = None
        self._engines: dict[str, Engine] = {}
        self._announce, self._source = announce, source
        self._take_back: dict[str, Callable[[], None]] = {}

    def attach(self, *, must_fit: bool = True) -> None:
        """Begin to stream all of them, or none."""
        where = self._placement
        self._arbiter = Arbiter(
            device_ops(where.device), self._budget_bytes, method=where.method, depth=None,
            shared=where.shared,
        )  # fmt: skip
        layouts = self._layouts(self._modules, self._arbiter, cut, must_fit=must_fit)
        try:
            for name, layout in layouts.items():
                self._stream(name, layout)
        except BaseException:
            self.detach()
            raise

    def _layouts(
        self,
        modules: Mapping[str, nn.Module],
        arbiter: Arbiter,
        cut_by: Callable[..., ModelLayout],
        *,
        must_fit: bool,
    ) -> dict[str, ModelLayout]:
        """Cut models as they are now; what others keep on the device is not there for one.

        Raises:
            InsufficientMemoryError: of the model that needs most, so that what it says will do for
                all of them.
        """
        kept = {name: kept_bytes(module) for name, module in modules.items()}
        layouts: dict[str, ModelLayout] = {}
        worst: InsufficientMemoryError | None = None
        for name, module in modules.items():
            apart = sum(kept.values()) - kept[name]
            is_ring_only = name in self._placement.ring_only
            layouts[name] = cut_by(module, arbiter, is_ring_only=is_ring_only, apart_bytes=apart)
            try:
                require_fit(layouts[name], arbiter, apart_bytes=apart)
            except InsufficientMemoryError as error:
                if worst is None or error.needed_bytes > worst.needed_bytes:
                    worst = error
                    worst.add_note(f"lowbits: of a {type(module).__name__}")
        if must_fit and worst is not None:
            raise worst
        return layouts

    def _stream(self, name: str, layout: ModelLayout) -> None:
        assert self._arbiter
        where, module = self._placement, self._modules[name]
        locate = partial(self._source.locate, name) if self._source else None
        known = where.activations.get(name, Activations())
        engine = Engine(
            name, module, layout, self._arbiter, where.location, known, locate,
            is_ring_only=name in where.ring_only,
        )  # fmt: skip
        self._engines[name] = engine
        if self._announce is not None:
            self._take_back[name] = self._announce(module, engine)

    def resized(
        self, placement: Placement, modules: Mapping[str, nn.Module], *, must_fit: bool
    ) -> bool:
        """Give them another budget where that does not change what is moved at once."""
        arbiter, is_all = self._arbiter, len(self._engines) == len(_with_tensors(modules))
        if arbiter is None or arbiter.is_in_use or not (is_all and self._is_like(placement)):
            return False
        nbytes = sum(engine.component.nbytes for engine in self._engines.values())
        budget = placement.budget(nbytes, arbiter.device_bytes)
        if budget is None:
            return False
        new = Arbiter(arbiter.ops, budget, method=placement.method, depth=None)
        entries = [entry for engine in self._engines.values() for entry in engine.component.entries]
        with ExitStack() as stack:
            for entry in entries:
                stack.enter_context(entry.outlined())
            layouts = self._layouts(self._modules, new, cut_again, must_fit=must_fit)
        if not all(e.component.is_cut_as(layouts[name]) for name, e in self._engines.items()):
            return False
        arbiter.resize(budget)
        self._placement, self._budget_bytes = placement, budget
        return True

    def _is_like(self, placement: Placement) -> bool:
        """Say whether another placement differs in the budget alone, which nobody else shares."""
        was = self._placement
        known = replace(
            placement,
            gpu_weights=was.gpu_weights,
            reserve=was.reserve,
            activations=was.activations,
            workspace_bytes=was.workspace_bytes,
        )
        return known == was and was.shared is None

    def turn(self) -> AbstractContextManager[Any]:
        """Hold the lock of every forward."""
        return self._arbiter.lock if self._arbiter else nullcontext()

    def detach(self) -> None:
        """Stop, the last one first: all of them, or none."""
        done: list[str] = []
        try:
            for name in reversed(list(self._engines)):
                self._engines[name].detach()
                done.append(name)
                del self._engines[name]
                if name in self._take_back:
                    self._take_back.pop(name)()
        except BaseException:
            ended = {name: self._modules[name] for name in reversed(done)}
            assert self._arbiter
            for name, layout in self._layouts(ended, self._arbiter, cut, must_fit=False).items():
                self._stream(name, layout)
            raise

    def stats(self) -> StreamStats:
        """Return what was done so far, all models together."""
        assert self._arbiter
        return make_stats(list(self._engines.values()), self._arbiter)


def _with_tensors(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules that have any, each once."""
    unique = {id(module): (name, module) for name, module in modules.items()}
    return dict(found for found in unique.values() if _has_tensors(found[1]))


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(), module.buffers()))
