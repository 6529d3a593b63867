"""How much memory a piece of work took at most."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from types import TracebackType

_INTERVAL_S: Final = 0.005
_STATUS: Final = Path("/proc/self/status")


def resident_bytes() -> int | None:
    """Return the process's resident memory without mapped files; None where it cannot be read.

    Mapped files (weights on disk, libraries) are left out: the system takes those pages back
    whenever it needs them.
    """
    if not _STATUS.exists():
        return None
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    parts = [fields[name].split()[0] for name in ("RssAnon", "RssShmem") if name in fields]
    return sum(map(int, parts)) * 1024 if parts else None


def return_free_memory() -> None:
    """Give memory that nobody uses back to the system, as far as this C library can.

    glibc keeps what was freed: work that is served from there would seem to take nothing.
    """
    gc.collect()
    if _STATUS.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@final
class PeakSampler:
    """Samples the process's memory in a thread while its block runs.

    Peaks shorter than 5 ms may be missed, and nothing is sampled where `resident_bytes` is unknown.
    Free memory is returned first; what the C library keeps while the block runs is counted, and
    makes figures differ by some 10 MiB from run to run.
    """

    def __init__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="lowbits-memory", daemon=True)
        self._before = self._peak = 0
        self._is_known = False

    @property
    def peak_bytes(self) -> int | None:
        """The most that the process had above what it had when the block began."""
        return self._peak - self._before if self._is_known else None

    def __enter__(self) -> PeakSampler:
        return_free_memory()
        before = resident_bytes()
        if before is not None:
            self._is_known = True
            self._before = self._peak = before
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_known:
            self._done.set()
            self._thread.join()
            self._look()

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, resident_bytes() or 0)
