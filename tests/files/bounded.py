"""Functions that are run in a forked process, which may take two seconds and 256 MB."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY_BYTES = 256 << 20
CPU_S = 2
#: Times as long, where a tracer looks at every line: coverage.
TRACED = 10
#: A machine may be busy: only what waits for nothing may be taken for a hang.
WALL_S = 60

needs_fork = pytest.mark.skipif(
    sys.platform != "linux", reason="needs fork and /proc, which are Linux's"
)


def bounded(function: Callable[[], Any]) -> Any:
    """Return what a function gives there, or raise what it raises.

    Raises:
        AssertionError: it took too long, or died; too much memory shows as a MemoryError.
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
    assert not os.WIFSIGNALED(status), f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    result = pickle.loads(answer)
    if isinstance(result, BaseException):
        raise result
    return result


def _run(function: Callable[[], Any], pipe: int) -> NoReturn:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for alarm in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(alarm, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, CPU_S * (TRACED if sys.gettrace() else 1))
        signal.alarm(WALL_S)
        try:
            result = function()
        except Exception as error:  # noqa: BLE001 - raised again on the other side
            result = error
        with os.fdopen(pipe, "wb") as file:
            file.write(pickle.dumps(result))
    finally:
        os._exit(0)
