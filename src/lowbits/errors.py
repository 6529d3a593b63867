"""Every error that lowbits raises on purpose.

    LowbitsError
    |- ConfigError (ValueError)               a bad value: names the field and what is allowed
    |   `- UnknownSchemeError (LookupError)
    |- BackendError
    |   |- UnknownBackendError (LookupError)
    |   |- BackendUnavailableError (ImportError)
    |   |- DuplicateBackendError (ValueError)
    |   `- NoCapableBackendError              every layer was refused: .failures says why
    |- PatchError (RuntimeError)              a module cannot be changed, or used in this way
    |   |- AlreadyPatchedError
    |   |- NotPatchedError
    |   |- NonFiniteWeightError (ValueError)
    |   `- SourceUnavailableError             full-precision weights cannot be had again
    |- StreamError (RuntimeError)             a streamed unit cannot go on: .unit and .state
    |- InsufficientMemoryError (MemoryError)  .needed_bytes, .available_bytes, .device
    |- CancelledError
    `- FormatError (ValueError)               bytes that are not what they claim to be: .path,
                                             .tensor and .offset

Messages are lower case and say what, where, got, expected, and what to do.
"""

from __future__ import annotations

import difflib
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


class LowbitsError(Exception):
    """Base of all errors raised by lowbits."""


class ConfigError(LowbitsError, ValueError):
    """A value that an option does not accept."""


class UnknownSchemeError(ConfigError, LookupError):
    """A scheme name that no registered backend offers."""


class BackendError(LowbitsError):
    """Base of the errors about backends; the first argument is the message."""


class UnknownBackendError(BackendError, LookupError):
    """A backend name that nobody registered."""


class BackendUnavailableError(BackendError, ImportError):
    """A backend whose package is missing, too old or broken on this machine."""


class DuplicateBackendError(BackendError, ValueError):
    """A second backend, or scheme, of a name that is taken."""


class NoCapableBackendError(BackendError):
    """No layer of the target could be packed."""

    def __init__(self, message: str, failures: Mapping[str, str] | None = None) -> None:
        super().__init__(message, dict(failures or {}))

    @property
    def failures(self) -> dict[str, str]:
        """The reason for each layer that was considered, by its name."""
        failures: dict[str, str] = self.args[1]
        return failures

    def __str__(self) -> str:
        return str(self.args[0])


class PatchError(LowbitsError, RuntimeError):
    """A module cannot be changed, or a packed one cannot be used in this way."""


class AlreadyPatchedError(PatchError):
    """The target, or a part of it, is packed already."""


class NotPatchedError(PatchError):
    """The target is not packed."""


class NonFiniteWeightError(PatchError, ValueError):
    """A weight, or the scale made from it, holds NaN or infinity."""


class SourceUnavailableError(PatchError):
    """The full-precision weights of a packed layer cannot be had again."""


class StreamError(LowbitsError, RuntimeError):
    """A streamed unit, or the streamer, is in a state that does not allow what was asked."""

    def __init__(self, message: str, unit: str = "", state: str = "") -> None:
        super().__init__(message, unit, state)

    @property
    def unit(self) -> str:
        """The unit that it is about; empty where it is about the streamer."""
        return str(self.args[1])

    @property
    def state(self) -> str:
        """The state that the unit, or the streamer, was in; empty where none is to be told."""
        return str(self.args[2])

    def __str__(self) -> str:
        return str(self.args[0])


class InsufficientMemoryError(LowbitsError, MemoryError):
    """An operation that would not fit, refused before it began."""

    def __init__(
        self, message: str, needed_bytes: int = 0, available_bytes: int = 0, device: str = ""
    ) -> None:
        super().__init__(message, needed_bytes, available_bytes, device)

    @property
    def needed_bytes(self) -> int:
        """What it would take at least; 0 where that is not known."""
        return int(self.args[1])

    @property
    def available_bytes(self) -> int:
        """What there is, or may be used."""
        return int(self.args[2])

    @property
    def device(self) -> str:
        """Whose memory it is; empty where that is not known."""
        return str(self.args[3])

    def __str__(self) -> str:
        return str(self.args[0])


class CancelledError(LowbitsError):
    """The caller's cancel token was set; everything is as it was before the call."""


class FormatError(LowbitsError, ValueError):
    """Stored bytes whose shape, dtype or version is not the expected one."""

    def __init__(
        self, message: str, path: object = "", tensor: str = "", offset: int | None = None
    ) -> None:
        super().__init__(message, str(path), tensor, offset)

    @property
    def path(self) -> str:
        """The file; empty where it is about none."""
        return str(self.args[1])

    @property
    def tensor(self) -> str:
        """The tensor in the file; empty where it is about none."""
        return str(self.args[2])

    @property
    def offset(self) -> int | None:
        """The byte of the file that it is about, or that something begins at."""
        offset: int | None = self.args[3]
        return offset

    def __str__(self) -> str:
        where = "".join(f"{part}: " for part in (self.path, self.tensor) if part)
        at = "" if self.offset is None else f" (at byte {self.offset})"
        return f"{where}{self.args[0]}{at}"


@contextmanager
def located(path: object) -> Iterator[None]:
    """Let each `FormatError` that is about no file be about this one."""
    try:
        yield
    except FormatError as error:
        if error.path:
            raise
        raise FormatError(error.args[0], path, error.tensor, error.offset) from error


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
