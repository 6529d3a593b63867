"""What the calls of a model take on the device beside weights, as its allocator counts."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lowbits.streaming.device_ops import DeviceOps


@final
class Activations:
    """The most that a call of one model took beside what was on the device when it was over.

    The allocator's peak is of the whole process, and setting it back would spoil what users
    measure: a call that reached a new one is known exactly, of others a bound.

    Attributes:
        nbytes: that a call took at most; None until one was measured.
        is_exact: whether a call is known to have taken that much.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self.nbytes: int | None = None
        self.is_exact = False

    @contextmanager
    def measured(self, ops: DeviceOps, *, is_due: bool) -> Iterator[None]:
        """Measure a call, where it is due and the device counts; one that fails tells nothing."""
        before = ops.used_bytes() if is_due else None
        yield
        if before is not None and (after := ops.used_bytes()) is not None:
            self._note(before[1], *after)

    def _note(self, peak_before: int, now: int, peak: int) -> None:
        if peak > peak_before:
            self.nbytes, self.is_exact = peak - now, True
        elif not self.is_exact:
            self.nbytes = min(peak - now, peak if self.nbytes is None else self.nbytes)

    def at_most(self, default: int) -> int:
        """Return what a call takes, or a default where no call is known that took more.

        Args:
            default: bytes.
        """
        if self.nbytes is None:
            return default
        return self.nbytes if self.is_exact else min(self.nbytes, default)
