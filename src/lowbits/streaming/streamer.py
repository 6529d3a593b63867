"""`LayerStreamer`: any module, in any amount of device memory."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Self, final

from torch import nn

from lowbits.config import LOCATIONS, SWAPS, parse_size, require_choice
from lowbits.core.device import named_device, usable_device
from lowbits.core.packed import workspace_bytes
from lowbits.core.source import SourceFiles
from lowbits.errors import AlreadyPatchedError, ConfigError, NotPatchedError
from lowbits.streaming.activations import Activations
from lowbits.streaming.arbiter import Arbiter
from lowbits.streaming.budget import BUDGETS, reserve_bytes
from lowbits.streaming.device_ops import DeviceOps, device_ops
from lowbits.streaming.engine import Engine, cut, require_fit
from lowbits.streaming.plan import DEEPEST

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    import torch

    from lowbits.streaming.stats import StreamStats


@final
class LayerStreamer:
    """Runs a module whose weights do not fit on the device: they are copied there as it runs.

    Works on any `torch.nn.Module`, in place: packed or not, on any device that torch knows. Blocks
    of `ModuleList`, `ModuleDict` and `Sequential` are moved one at a time; those that fit stay.
    Results are bit-equal to the module's own. Until `attach` nothing is touched; `detach` gives
    every Parameter back, the same object with the same bits.

    While it is attached, weights outside the forward of their block read as stand-ins: right dtype,
    device and shape at once, values from the master; what is written into them reaches the master.
    State dicts, pickles and copies have ordinary tensors. Forwards of one module run one at a time:
    other threads wait.

    Costs: at most the budget on the device; on the host, or on the disk, the module's bytes once.

    Example:
        >>> import torch
        >>> from lowbits import LayerStreamer
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
        >>> with LayerStreamer(model, device="cpu", budget="60KB", location="disk") as streamer:
        ...     _ = model(torch.ones(1, 64))
        ...     assert streamer.stats().peak_device_bytes <= 60_000
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        device: torch.device | str,
        budget: int | str,
        method: str = "async",
        location: str = "auto",
        depth: int | str = "auto",
        source: str | Path | None = None,
    ) -> None:
        """Remember what to do; nothing is touched before `attach`.

        Args:
            module: is changed in place by `attach`, and owned by the caller.
            device: that it computes on.
            budget: bytes of weights on the device at any instant, a hard cap: an int, a string as
                ``"6GB"`` or ``"6GiB"``, or ``"auto"``: what is free at `attach` but a reserve, as
                `lowbits.apply` leaves; attached again, what calls are known to take.
            method: ``"queue"`` copies a block, then computes it; ``"async"`` copies ahead into a
                ring of slots; ``"auto"`` times two passes of each and keeps the faster.
            location: of the weights: ``"cpu"`` is host memory, ``"shared"`` page-locked host
                memory, which copies faster, ``"disk"`` a scratch file; ``"auto"``: shared within
                40 % of the free host memory, else cpu, else disk; on a device whose memory is the
                host's, disk.
            depth: slots of the ring, 1 to 6; ``"auto"``: what a simulation finds best.
            source: safetensors file, or folder, that the weights may come from: on the disk, those
                that are there bit for bit are read there, and not copied to a scratch file.

        Raises:
            ConfigError: a value that an option does not accept.
        """
        self.module = _module(module)
        self.device = named_device(device)
        self._budget = budget if budget == "auto" else parse_size(budget, "budget")
        require_choice("method", method, SWAPS)
        require_choice("location", location, LOCATIONS)
        self._method, self._location = method, location
        self._depth = _depth(depth)
        self._source = None if source is None else SourceFiles(source)
        self._activations = Activations()
        self._engine: Engine | None = None
        self._is_wanted = False

    @property
    def is_attached(self) -> bool:
        """Whether the module is streamed by this object now."""
        return self._engine is not None

    def attach(self) -> Self:
        """Begin to stream the module: its bytes move to where they stay.

        All or nothing: whatever is raised, the module is as it was.

        Returns:
            This object.

        Raises:
            ConfigError: there is no such device here.
            AlreadyPatchedError: the module, or a part of it, is streamed already.
            PatchError: it has offload hooks of another library, or no bytes (the meta device).
            InsufficientMemoryError: the budget, the host's memory or the disk is too small;
                `needed_bytes` says how much would do.
        """
        if self._engine is not None:
            raise AlreadyPatchedError("this streamer is attached already")
        usable_device(self.device)
        self._attach(must_fit=True)
        self._is_wanted = True
        BUDGETS.join(self.device, self)
        return self

    def _attach(self, *, must_fit: bool) -> None:
        ops = device_ops(self.device)
        budget = self._budget if isinstance(self._budget, int) else self._free_budget(ops)
        shared = BUDGETS.of(self.device)
        arbiter = Arbiter(ops, budget, method=self._method, depth=self._depth, shared=shared)
        locate = partial(self._source.locate, "") if self._source else None
        layout = cut(self.module, arbiter)
        if must_fit:
            require_fit(layout, arbiter)
        self._engine = Engine(
            "", self.module, layout, arbiter, self._location, self._activations, locate
        )

    def _free_budget(self, ops: DeviceOps) -> int:
        """Return what ``budget="auto"`` is now: what is free, but a reserve.

        Raises:
            ConfigError: the device does not say what is free.
        """
        free = ops.free_bytes()
        if free is None:
            raise ConfigError(f"budget: {ops.device} does not say what is free; give a size")
        workspace = workspace_bytes(self.module)
        return max(0, free - reserve_bytes(ops, free, [self._activations], workspace))

    def place_again(self, *, must_fit: bool = True) -> None:
        """Stream the module in the budget that its device has now; nothing where it is detached.

        Args:
            must_fit: False: where it does not fit, its next pass says so.
        """
        with self._engine.lock if self._engine else nullcontext():
            if self._engine is not None:
                self._engine.detach()
                self._engine = None
            if self._is_wanted:
                self._attach(must_fit=must_fit)

    def detach(self) -> None:
        """Stop streaming: every Parameter and buffer is the object that it was, bit for bit.

        Raises:
            NotPatchedError: it is not attached.
            StreamError: called inside the module's forward.
            FormatError: the scratch file cannot be read; the module is streamed still.
        """
        self._require_engine().detach()
        self._engine, self._is_wanted = None, False

    def stats(self) -> StreamStats:
        """Return what was done since `attach`."""
        return self._require_engine().stats()

    def _require_engine(self) -> Engine:
        if self._engine is None:
            raise NotPatchedError("this streamer is not attached")
        return self._engine

    def __enter__(self) -> Self:
        return self if self.is_attached else self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_attached:
            self.detach()


def _module(value: Any) -> nn.Module:
    if not isinstance(value, nn.Module):
        got = type(value).__name__
        raise ConfigError(
            f"module: got {got}, expected a torch.nn.Module; lowbits.apply streams pipelines"
        )
    return value


def _depth(value: int | str) -> int | None:
    if value == "auto":
        return None
    if not isinstance(value, int) or not 1 <= value <= DEEPEST:
        raise ConfigError(f"depth: got {value!r}, expected 'auto' or 1 to {DEEPEST}")
    return value
