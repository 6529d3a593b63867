"""One cap for all that a process has on a device: pipelines give way to each other."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import TYPE_CHECKING, Final, Protocol, final

from lowbits.config import parse_size
from lowbits.core.device import numbered_device, usable_device
from lowbits.errors import InsufficientMemoryError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import torch

    from lowbits.streaming.activations import Activations
    from lowbits.streaming.arbiter import Arbiter
    from lowbits.streaming.device_ops import DeviceOps


#: Left free for activations: a share of the device, at least this, and as much again on Windows,
#: whose driver moves device memory to the host before it refuses.
_RESERVE_SHARE: Final = 0.1
_RESERVE_BYTES: Final = 1 << 30


def reserve_bytes(
    ops: DeviceOps, free_bytes: int, activations: Collection[Activations], workspace_bytes: int
) -> int:
    """Return what ``"auto"`` leaves free: what calls took beside weights, and a workspace.

    For a model that was not called yet, 10 % of the device, at least 1 GiB, 1 more on Windows.

    Args:
        ops: of the device.
        free_bytes: there: stands for its memory where that is not known.
        activations: of each model that is to be there; none: nothing is known of any.
        workspace_bytes: of the largest packed weight while it is decoded.
    """
    share = int(_RESERVE_SHARE * (ops.total_bytes() or free_bytes))
    extra = _RESERVE_BYTES if sys.platform == "win32" else 0
    default = max(_RESERVE_BYTES, share) + extra
    if all(known.nbytes is None for known in activations):
        return default
    return max(known.at_most(default) for known in activations) + workspace_bytes


@final
class DeviceBudget:
    """What the weights of all pipelines may take on a device together.

    Whoever is called has what it needs, up to all of it: those called longest ago give way, as a
    whole, and come back when they are called. One forward runs at a time.

    Attributes:
        budget_bytes: the cap.
        peak_bytes: the most weight bytes that were on the device since it was set.
        lock: held for the whole of any pipeline's forward, see [Note: one forward at a time].
    """

    def __init__(self, budget_bytes: int) -> None:
        """Make one without pipelines; the device is not touched."""
        self.budget_bytes, self.peak_bytes = budget_bytes, 0
        self.lock = threading.RLock()
        # In the order in which their pipelines were called last.
        self._arbiters: weakref.WeakKeyDictionary[Arbiter, None] = weakref.WeakKeyDictionary()

    @property
    def device_bytes(self) -> int:
        """Weight bytes on the device now."""
        return sum(arbiter.device_bytes for arbiter in list(self._arbiters))

    def join(self, arbiter: Arbiter) -> None:
        """Let the models of one pipeline take part, from now on as those called last."""
        self._arbiters.pop(arbiter, None)
        self._arbiters[arbiter] = None

    def make_room(self, arbiter: Arbiter, wanted_bytes: int) -> int:
        """Let other pipelines give way to one that is called; return what it may have.

        Args:
            arbiter: of the one that is called.
            wanted_bytes: that it would like to have, what it has included.
        """
        self.join(arbiter)
        others = [other for other in self._arbiters if other is not arbiter]
        for other in others:
            if self._left(others) >= wanted_bytes:
                break
            other.park()
        return self._left(others)

    def _left(self, others: list[Arbiter]) -> int:
        return self.budget_bytes - sum(other.reserved_bytes for other in others)

    def note_peak(self) -> None:
        """Note that more is on the device than before."""
        self.peak_bytes = max(self.peak_bytes, self.device_bytes)


class Placed(Protocol):
    """What has weights on a device, and can place them again."""

    def place_again(self, *, must_fit: bool = True) -> None:
        """Place them as they would be placed now, or raise: they are placed once more then.

        Args:
            must_fit: False: where they do not fit, the next pass says so.
        """


@final
class Budgets:
    """The budgets of a process, and who has weights on which device, without keeping it alive."""

    def __init__(self) -> None:
        """Make one without budgets."""
        self._budgets: dict[torch.device, DeviceBudget] = {}
        self._placed: weakref.WeakKeyDictionary[Placed, torch.device] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def of(self, device: torch.device) -> DeviceBudget | None:
        """Return the budget of a device, if it has one."""
        return self._budgets.get(numbered_device(device)) if self._budgets else None

    def join(self, device: torch.device, placed: Placed) -> None:
        """Remember what has weights on a device, as long as it lives."""
        self._placed[placed] = device

    def set(self, device: torch.device, budget_bytes: int | None) -> DeviceBudget | None:
        """Set, change or take away a device's budget; all that is there is placed again.

        Raises:
            LowbitsError: what placing raises; everything is as it was.
        """
        place = numbered_device(device)
        with self._lock:
            before = self._budgets.get(place)
            # Where there is as much room as before, what does not fit now did not before either.
            is_less = budget_bytes is not None and (
                before is None or budget_bytes < before.budget_bytes
            )
            self._put(place, None if budget_bytes is None else DeviceBudget(budget_bytes))
            there = [
                p for p, where in list(self._placed.items()) if numbered_device(where) == place
            ]
            try:
                _place_all(there, must_fit=is_less)
            except BaseException as error:
                self._put(place, before)
                for placed in reversed(there):
                    try:
                        placed.place_again(must_fit=False)
                    except Exception as second:  # noqa: BLE001 - the first one is raised
                        error.add_note(f"lowbits: {placed!r} is not placed as before: {second}")
                raise
            return self._budgets.get(place)

    def _put(self, place: torch.device, budget: DeviceBudget | None) -> None:
        if budget is None:
            self._budgets.pop(place, None)
        else:
            self._budgets[place] = budget


def _place_all(there: Iterable[Placed], *, must_fit: bool) -> None:
    """Place them again.

    Raises:
        InsufficientMemoryError: of the one that needs most, so that what it says will do for all.
    """
    worst: InsufficientMemoryError | None = None
    for placed in there:
        try:
            placed.place_again(must_fit=must_fit)
        except InsufficientMemoryError as error:
            if worst is None or error.needed_bytes > worst.needed_bytes:
                worst = error
    if worst is not None:
        raise worst


#: Of this process: the second registry that it has, beside the one of backends.
BUDGETS = Budgets()


def device_budget(device: torch.device | str, size: int | str | None) -> DeviceBudget | None:
    """Cap the weights of all pipelines and streamers of this process on a device, together.

    Whoever is called has what it needs of the cap; pipelines called longest ago give way, as a
    whole, and come back by themselves when they are called. What several pipelines share counts
    once. Caps of ``gpu_weights=`` hold as before, each for its own pipeline.

    What is on the device already is placed again; what fits stays there until others need the room.

    Args:
        device: as ``"cuda"``.
        size: bytes, or a size as ``"10GB"``; None takes the cap away.

    Returns:
        What is there, in bytes; None where the cap was taken away.

    Raises:
        ConfigError: not a size, or there is no such device here.
        InsufficientMemoryError: too small for a pipeline that is there, of the one that needs most;
            nothing has changed.

    Example:
        >>> import lowbits
        >>> lowbits.device_budget("cpu", "4GB").budget_bytes
        4000000000
        >>> lowbits.device_budget("cpu", None)
    """
    budget_bytes = None if size is None else parse_size(size, "size")
    return BUDGETS.set(usable_device(device), budget_bytes)
