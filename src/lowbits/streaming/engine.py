"""One streamed model at work: between its callers and its modules."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import nn

from lowbits.core.interception import (
    Interceptor,
    intercept,
    interceptor_of,
    release,
    streamed_part,
)
from lowbits.errors import AlreadyPatchedError, PatchError, StreamError
from lowbits.streaming.component import Component
from lowbits.streaming.cut import is_called, lay_out
from lowbits.streaming.foreign import HookGuard, has_cache_hook, refuse_foreign, refuse_hook
from lowbits.streaming.layout import ModelLayout, held_tensors
from lowbits.streaming.plan import UnitCost, make_plan
from lowbits.streaming.repeat import Moment
from lowbits.streaming.stats import StreamStats, make_stats
from lowbits.streaming.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lowbits.streaming.activations import Activations
    from lowbits.streaming.arbiter import Arbiter
    from lowbits.streaming.stage import Stage
    from lowbits.streaming.tiers import Locate

_ADVICE: Final = (
    "lowbits: every block is streamed already, or the pass cannot be run again (gradients, "
    "training mode, a cache hook, inputs or buffers that it may have changed). Use a smaller "
    "budget (gpu_weights=), a smaller picture or batch, or VAE tiling"
)

_WHOLE_COMPILE: Final = (
    "the blocks of a model that lowbits streams are compiled one by one, not the whole: "
    "model.compile_repeated_blocks(fullgraph=True), or block.compile(fullgraph=True) for each; "
    "before streaming begins, so that no block is cut into smaller parts"
)

_CAPTURE: Final = (
    "a streamed model cannot be {}: its blocks are copied as it runs. Undo the streaming first "
    "(lowbits.restore, LayerStreamer.detach), or compile its blocks one by one instead"
)


def _outside_of_graphs(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a method, and what it calls, out of graphs, but for what is compiled by itself."""
    disabled: Callable[..., Any] = torch.compiler.disable(  # type: ignore[no-untyped-call]
        method, reason=_WHOLE_COMPILE
    )
    return disabled


@final
class Engine:
    """A model that is streamed, from now until `detach`.

    Attributes:
        name: of the model in a pipeline; may be empty.
        root: the model.
        component: its units and masters.
        activations: what its calls take on the device beside weights.
        recoveries: passes that ran out of memory, and were run again.
    """

    @torch.inference_mode(mode=False)
    def __init__(
        self,
        name: str,
        root: nn.Module,
        layout: ModelLayout,
        arbiter: Arbiter,
        location: str,
        activations: Activations,
        locate: Locate | None = None,
        *,
        is_ring_only: bool = False,
    ) -> None:
        """Begin: all or nothing.

        Args:
            name: for messages.
            root: is changed in place.
            layout: of the root: see `require_fit`.
            arbiter: has the device's budget.
            location: one of `lowbits.config.LOCATIONS`.
            activations: kept, and told what calls take.
            locate: says which file a tensor comes from, for masters on the disk.
            is_ring_only: whether no unit may stay on the device.

        Raises:
            AlreadyPatchedError: it is streamed already.
            PatchError: it has hooks that move its weights, or no bytes.
        """
        _require_streamable(root)
        self.name, self.root = name, root
        self._arbiter, self.activations = arbiter, activations
        self._is_running = self._is_over = False
        self.recoveries = 0
        tier = Tier(location, layout.nbytes, arbiter.ops, locate)
        self.component = Component(name, root, layout, tier, arbiter.ops.device)
        self.component.is_ring_only = is_ring_only
        self._calls: list[nn.Module] = []
        self._guard = HookGuard(root)
        try:
            self.component.attach()
        except BaseException:
            tier.close()
            raise
        try:
            arbiter.add(self.component)
            self._intercept()
            self._guard.install()
        except BaseException:
            self.detach()
            raise

    def _intercept(self) -> None:
        """Stand before the model, its children, which some callers call alone, and its units."""
        units = {id(e.unit.module): n for n, e in enumerate(self.component.units)}
        modules = [self.root, *_callable_children(self.root)]
        modules += [entry.unit.module for entry in self.component.units]
        for module in {id(module): module for module in modules}.values():
            call = _Call(self, module, units.get(id(module)), is_root=module is self.root)
            intercept(module, call)
            self._calls.append(module)

    @torch.inference_mode(mode=False)
    def detach(self) -> None:
        """Give the model back as it was."""
        with self._arbiter.lock:
            if self._is_running:
                raise StreamError("a streamed model cannot be detached inside its own forward")
            self._arbiter.remove(self.component)
            try:
                self.component.detach()
            except BaseException:
                self._arbiter.add(self.component)
                raise
            self._is_over = True
            self._guard.remove()
            for module in self._calls:
                if interceptor_of(module) is not None:
                    release(module)
            self.component.tier.close()

    def run(self, call: _Call, forward: partial[Any]) -> Any:
        """Run the forward of the model, or of one of its modules."""
        with self._arbiter.lock:
            if self._is_running:
                return self._run_part(call, forward)
            if not self._is_over:
                self._is_running = True
                try:
                    return self._run_first(call, forward)
                finally:
                    self._is_running = False
        # While this thread waited for its turn, the streaming ended: somebody else may have begun.
        return call.module(*forward.args, **forward.keywords)

    def _run_part(self, call: _Call, forward: partial[Any]) -> Any:
        if call.unit is None:
            return forward()
        entry = self.component.units[call.unit]
        stage = self._arbiter.stage_of(self.component)
        return stage.run_unit(entry, forward)

    def _run_first(self, call: _Call, forward: partial[Any]) -> Any:
        """Run what was called from outside, once more with fewer residents if memory runs out."""
        while True:
            stage = self._enter()
            is_pass = stage.is_begun_by(self.component) and call.is_root
            if is_pass:
                stage.begin_pass()
            moment = self._moment(call, stage, forward)
            stage.uses += 1
            try:
                is_due = stage.timing.times_uses
                measured = self.activations.measured(self._arbiter.ops, is_due=is_due)
                with measured, _casts_let_go(self.device):
                    result = self._run_part(call, forward)
            except torch.OutOfMemoryError as error:
                if moment is None or not self._may_repeat(moment, stage):
                    error.add_note(_ADVICE)
                    raise
            else:
                if is_pass:
                    stage.finish_pass()
                return result
            finally:
                stage.uses -= 1
                if is_pass:
                    stage.leave_pass()
            # Here the traceback is gone, and with it what the frames of the failed pass held, but
            # for what refers to itself.
            gc.collect()
            moment.return_to()
            stage.shrink()
            self.recoveries += 1

    def _enter(self) -> Stage:
        if self._arbiter.ops.is_capturing:
            raise StreamError(_CAPTURE.format("captured into a CUDA graph"))
        if _is_tracing():
            raise StreamError(_CAPTURE.format("traced"))
        refuse_foreign(self.root, self.name or type(self.root).__name__)
        self._guard.install()
        self.component.unsettle()
        stage = self._arbiter.enter(self.component)
        stage.look()
        return stage

    def _moment(self, call: _Call, stage: Stage, forward: partial[Any]) -> Moment | None:
        """Return what a pass begins with; None where something would remember a first one."""
        is_impure = torch.is_grad_enabled() or self.root.training or not call.is_root
        return None if is_impure else Moment(stage, (forward.args, forward.keywords), self.device)

    def _may_repeat(self, moment: Moment, stage: Stage) -> bool:
        return not moment.is_over and stage.can_shrink and not has_cache_hook(self.root)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Let all modules hold stand-ins, which read as ordinary tensors of the host."""
        with self._arbiter.lock, ExitStack() as hidden:
            base = self.component.base
            base.check()
            base.keep_changes()
            for entry in self.component.entries:
                hidden.enter_context(entry.hidden())
            yield

    def settle(self) -> None:
        """Take the model off the device, so that modules hold stand-ins until the next pass.

        What has no stand-in comes along: copies are of one device.
        """
        with self._arbiter.lock, torch.inference_mode(mode=False):
            if not self._is_running:
                self._arbiter.stage_of(self.component).park()
                for entry in self.component.units:
                    with suppress(StreamError):  # what is of another shape is copied as it is
                        entry.accept_all()
                self.component.settle()
                self._guard.remove()

    @torch.inference_mode(mode=False)
    def convert(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Do what ``module.to(dtype)`` asks for; refuse what ``module.to(device)`` does.

        Raises:
            PatchError: another device than the one that the model computes on.
            StreamError: called inside the model's forward.
        """
        with self._arbiter.lock:
            if not self._is_running:
                self.component.notice_new()  # what came since the last pass is converted, too
        square = torch.empty(2, 2, 2, 2, device=self.device)
        dtypes = {}
        for dtype in self.component.dtypes():
            probe = function(torch.empty(0, dtype=dtype, device=self.device))
            if probe.device != square.device:
                raise PatchError(
                    f"cannot move a streamed {type(self.root).__name__} to {probe.device}: its "
                    f"blocks are copied to {self.device} as it runs. To make room there, "
                    "handle.reconfigure(gpu_weights=...) caps what it takes, and "
                    "lowbits.device_budget what all pipelines take together; to use it elsewhere, "
                    "undo the streaming first (handle.restore, LayerStreamer.detach)"
                )
            if probe.dtype != dtype:
                dtypes[dtype] = probe.dtype
        if function(square).stride() != square.stride():
            raise PatchError(
                "cannot change the memory format of a streamed model: do it before streaming begins"
            )
        if not dtypes:
            return
        with self._arbiter.lock:
            if self._is_running:
                raise StreamError("a streamed model cannot be converted inside its own forward")
            stage = self._arbiter.stage_of(self.component)
            stage.park()
            self.component.cast(dtypes, module)
            stage.renumber()

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held for the whole of a forward."""
        return self._arbiter.lock

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self._arbiter.ops.device

    def stats(self) -> StreamStats:
        """Return what was done so far."""
        return make_stats([self], self._arbiter)

    def enter(self) -> None:
        """Bring the model to the device: for callers that compute with its own tensors."""
        with self._arbiter.lock:
            if not self._is_running:
                self._enter()


@final
class _Call(Interceptor):
    """Stands before one module of a streamed model."""

    def __init__(
        self, engine: Engine, module: nn.Module, unit: int | None, *, is_root: bool
    ) -> None:
        self.unit, self.is_root = unit, is_root
        self._engine, self.module = engine, module

    @_outside_of_graphs
    def call(
        self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run the forward with its weights on the device."""
        return self._engine.run(self, partial(forward, *args, **kwargs))

    def settled(self) -> AbstractContextManager[None]:
        """Let the model's modules hold what can be saved."""
        return self._engine.settled()

    def settle(self) -> None:
        """Let them hold it until they are called."""
        self._engine.settle()

    def convert(self, function: Callable[..., Any]) -> None:
        """Convert masters instead of what modules hold."""
        self._engine.convert(self.module, function)

    def refuse(self, attribute: str) -> None:
        """Raise before accelerate's hooks move weights."""
        refuse_hook(self.module, attribute)


def cut(
    root: nn.Module, arbiter: Arbiter, *, is_ring_only: bool = False, apart_bytes: int = 0
) -> ModelLayout:
    """Return a model cut into units, as small ones as can be for a ring only; nothing is changed.

    Args:
        root: the model.
        arbiter: has the device's budget.
        is_ring_only: whether no unit may stay on the device.
        apart_bytes: of the budget, which other models keep for good.

    Raises:
        AlreadyPatchedError: it is streamed already.
        PatchError: it has hooks that move its weights, or no bytes.
    """
    _require_streamable(root)
    return cut_again(root, arbiter, is_ring_only=is_ring_only, apart_bytes=apart_bytes)


def cut_again(
    root: nn.Module, arbiter: Arbiter, *, is_ring_only: bool, apart_bytes: int
) -> ModelLayout:
    """Do what `cut` does for a model that is streamed, and outlined for the moment."""
    room = 0 if is_ring_only else max(0, arbiter.budget_bytes - apart_bytes)
    return lay_out(root, budget_bytes=room, depth=arbiter.depth if arbiter.is_ahead else 1)


def require_fit(layout: ModelLayout, arbiter: Arbiter, *, apart_bytes: int = 0) -> None:
    """Raise where a model cannot be streamed in an arbiter's budget.

    Raises:
        InsufficientMemoryError: the budget is too small for it.
    """
    make_plan(
        [UnitCost(unit.nbytes, 0.0) for unit in layout.units],
        range(len(layout.units)),
        bandwidth=1.0,
        budget_bytes=arbiter.budget_bytes,
        fixed_bytes=layout.fixed_bytes + apart_bytes,
        depth=arbiter.depth,
        prefetch=arbiter.is_ahead,
        device=str(arbiter.ops.device),
    )


@contextmanager
def _casts_let_go(device: torch.device) -> Iterator[None]:
    """Let autocast keep no casts of weights: all of a model's, in the end, beside its budget."""
    is_kept = torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled()
    if is_kept:  # compilers guard this switch
        torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        if is_kept:
            torch.set_autocast_cache_enabled(True)


def _is_tracing() -> bool:
    """Say whether what runs now is written down for later: weights would be constants there."""
    proxy: Any = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return torch._C._is_tracing() or proxy is not None


def refuse_streamed(root: nn.Module) -> None:
    """Raise where a model, or a part of it, is streamed.

    Raises:
        AlreadyPatchedError: naming the part.
    """
    if (part := streamed_part(root)) is not None:
        raise AlreadyPatchedError(
            f"{part} is streamed already, alone, in something larger, or in another model that has "
            "its weights too: call that LayerStreamer's detach(), or lowbits.restore on what was "
            "applied, first"
        )


def _require_streamable(root: nn.Module) -> None:
    refuse_streamed(root)
    for name, module in root.named_modules():
        refuse_foreign(module, name or type(root).__name__)
        _require_ordinary(module, name or type(root).__name__)
    for holder, tensor in held_tensors(root):
        if nn.parameter.is_lazy(tensor):
            raise PatchError(f"{holder.fqn} has no shape yet (lazy): run the model once before")
        if tensor.is_meta and tensor.numel():
            raise PatchError(
                f"{holder.name} of a {type(holder.module).__name__} has no bytes (the meta "
                "device): load the weights before streaming"
            )


def _require_ordinary(module: nn.Module, where: str) -> None:
    """Raise where a module's tensors, or modules, cannot be exchanged."""
    kept: tuple[Any, ...] = (module._parameters, module._buffers, module._modules)
    if not all(isinstance(slots, dict) or not len(slots) for slots in kept):
        raise PatchError(
            f"{where} is of torch.jit (script, trace), which lets nobody exchange its tensors: "
            "stream the model with the module that it was made of"
        )


def _callable_children(root: nn.Module) -> list[nn.Module]:
    """Return the children that may be called by themselves: ``vae.decode`` never calls the VAE."""
    return list(filter(is_called, root.children()))
