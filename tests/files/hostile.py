"""A process for each file that may hang, crash, or take all memory."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

#: Forks, and limits on the address space that the system keeps to.
SUPPORTED = sys.platform == "linux"

REASON = "needs Linux: a fork with a limit on its memory"

#: Processor time is what is limited: others may use the cores as well. This ends what waits.
WALL_S = 60


@dataclass(frozen=True)
class Outcome:
    """What became of a call in a process of its own.

    Attributes:
        kind: "returned", "raised", "late" or "died".
        value: that it returned or raised, or how it died.
    """

    kind: str
    value: Any


def in_child(
    function: Callable[[], Any], seconds: int = 2, extra_bytes: int = 256 << 20
) -> Outcome:
    """Call a function in a forked process.

    Args:
        function: called without arguments; what it returns or raises is pickled.
        seconds: of processor time that it may take.
        extra_bytes: of address space that it may add.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Threads of the test runner hold no lock that the child needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _run(function, seconds, extra_bytes, writer)
    os.close(writer)
    answer = _receive(reader)
    if answer is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if answer is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return Outcome("late", f"more than {seconds} s")
    if not answer:
        return Outcome("died", f"wait status {status}")
    return Outcome(*pickle.loads(answer))


def _receive(reader: int) -> bytes | None:
    """Return what the child writes until it ends, None where it does not end."""
    parts: list[bytes] = []
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], WALL_S)[0]:
            part = pipe.read(1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
    return None


def _run(function: Callable[[], Any], seconds: int, extra_bytes: int, writer: int) -> NoReturn:
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    no_limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, no_limit[1]))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    try:
        outcome: tuple[str, Any] = ("returned", function())
    except BaseException as error:  # noqa: BLE001 - it is what the parent asks for
        outcome = ("raised", error)
    resource.setrlimit(resource.RLIMIT_AS, no_limit)
    try:
        answer = pickle.dumps(outcome)
    except (TypeError, AttributeError, pickle.PicklingError):
        answer = pickle.dumps((outcome[0], repr(outcome[1])))
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(answer)
    os._exit(0)
