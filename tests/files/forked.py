"""Functions that are called in a forked process: they may hang, crash, or take all memory."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

#: Of address space, that a function may add.
MEMORY_BYTES = 256 << 20
#: Of processor time: others may use the cores as well.
CPU_S = 2
#: Times as long, where a tracer looks at every line: coverage.
TRACED = 10
#: This ends what waits.
WALL_S = 60

needs_fork = pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux: a fork with a limit on its memory"
)


class DiedError(Exception):
    """A process was ended by a signal: by SIGPROF where it took too long, by SIGALRM where it hung.

    Attributes:
        signal: that ended it.
    """

    def __init__(self, ended_by: signal.Signals) -> None:
        super().__init__(f"ended by {ended_by.name}")
        self.signal = ended_by


def in_child(function: Callable[[], Any]) -> Any:
    """Return what a function gives in a process of its own, or raise what it raises.

    Args:
        function: called without arguments; what it returns or raises is pickled. Too much memory
            shows as a MemoryError.

    Raises:
        DiedError: the process was ended by a signal.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # The other threads of a test process hold no lock that the function takes.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        os.close(reader)
        _run(function, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        raise DiedError(signal.Signals(os.WTERMSIG(status)))
    assert answer, f"no answer, and wait status {status}"
    is_error, result = pickle.loads(answer)
    if is_error:
        raise result
    return result


def become_nobody() -> None:
    """Give up the rights to read and write everything, where this process has them."""
    if os.geteuid() == 0:
        os.setuid(65534)


def limit_files(nbytes: int) -> None:
    """Let no file grow larger, as if the disk were full: writing raises EFBIG."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def _run(function: Callable[[], Any], writer: int) -> NoReturn:
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        no_limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit, no_limit[1]))
        # What the test process holds is not for this one to collect, which would copy all of it.
        gc.freeze()
        for alarm in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(alarm, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, CPU_S * (TRACED if sys.gettrace() else 1))
        signal.alarm(WALL_S)
        try:
            outcome: tuple[bool, Any] = (False, function())
        except BaseException as error:  # noqa: BLE001 - raised again on the other side
            outcome = (True, error)
        resource.setrlimit(resource.RLIMIT_AS, no_limit)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(_pickled(outcome))
    finally:
        os._exit(0)


def _pickled(outcome: tuple[bool, Any]) -> bytes:
    try:
        return pickle.dumps(outcome)
    except (TypeError, AttributeError, pickle.PicklingError):
        return pickle.dumps((True, TypeError(f"cannot be pickled: {outcome[1]!r}")))
