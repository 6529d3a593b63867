"""One live bar on stderr: the phase that is running."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console


@final
class Bars:
    """Shows a bar for each phase of the work while its block runs, one at a time.

    Nothing is shown where the console is no terminal, and nothing stays when the block ends.

    Args:
        console: to draw on.
        in_bytes: whether amounts are bytes, shown with the time that is left.
    """

    def __init__(self, console: Console, *, in_bytes: bool = False) -> None:
        amounts = (TaskProgressColumn(), TimeElapsedColumn())
        bytes_left = (DownloadColumn(binary_units=True), TimeRemainingColumn(), TextColumn("left"))
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *(bytes_left if in_bytes else amounts),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._phase = ""

    def track(self, phase: str, done: float, total: float | None) -> None:
        """Say how far a phase is, if that is known; a new name begins a new bar."""
        if phase != self._phase:
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._progress.add_task(phase, total=total)
            self._phase = phase
        self._progress.update(self._progress.task_ids[0], completed=done, total=total)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
