"""How a long operation tells its caller where it is, and how the caller stops it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from lowbits.errors import CancelledError


@final
@dataclass(frozen=True)
class ProgressEvent:
    """One finished step of a long operation.

    Attributes:
        stage: ``"pack"``, ``"save"``, ``"load"``, ``"convert"``, or ``"check"``, which comes before
            the writing of a GGUF file.
        fqn: dotted name of the layer that was just finished, component first.
        done_bytes: handled so far in this stage: of what is packed as it was before, of files as
            they are stored.
        total_bytes: that the stage will handle.
    """

    stage: str
    fqn: str
    done_bytes: int
    total_bytes: int


ProgressCallback = Callable[[ProgressEvent], None]


@final
class CancelToken:
    """Lets another thread stop an operation between two layers."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the operation that holds this token to stop."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._event.is_set()

    def raise_if_cancelled(self, stage: str) -> None:
        """Raise `CancelledError` where the token was set."""
        if self.cancelled:
            raise CancelledError(f"{stage} was cancelled; everything is as it was before")
