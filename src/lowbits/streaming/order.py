"""In which order a model calls its units: guessed, traced, then verified at every pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from collections.abc import Sequence

#: A pass whose end nobody tells has at most so many times the uses that are expected.
_LONGEST_PASS: Final = 8


@final
class CallOrder:
    """The order that the next pass is expected to have.

    The first pass is traced. Later ones are compared with it: an order that two passes in a row
    have is expected from then on.

    Attributes:
        expected: numbers of units, in order; a unit that is called twice is there twice.
        is_traced: whether a pass has confirmed it.
    """

    def __init__(self, guess: Sequence[int]) -> None:
        self.expected = tuple(guess)
        self.is_traced = False
        self._position = 0
        self._trace: list[int] = []
        self._deviation: tuple[int, ...] | None = None

    def begin(self) -> None:
        """Begin a pass; an unfinished one is forgotten."""
        self._position = 0
        self._trace = []

    def enter(self, unit: int) -> bool:
        """Note that a unit is called; return whether it comes behind the one before, as expected.

        Nothing comes before the first one of a pass.
        """
        self._trace.append(unit)
        count = len(self.expected)
        for ahead in range(count):
            at = (self._position + ahead) % count
            if self.expected[at] == unit:
                self._position = at + 1
                return not ahead and len(self._trace) > 1
        return False

    def closes(self, unit: int) -> bool:
        """Say whether calling a unit begins a new pass, where nothing else says so."""
        if len(self._trace) >= _LONGEST_PASS * len(self.expected):
            return True  # what began with a unit that never comes again
        return (
            bool(self._trace)
            and self._trace[0] == unit
            and (len(self._trace) >= len(self.expected) or not self.is_traced)
        )

    @property
    def is_under_way(self) -> bool:
        """Whether a unit was called since the pass began."""
        return bool(self._trace)

    def upcoming(self) -> Sequence[int]:
        """Return the units that come next, into the next pass, as many as a pass has."""
        return self.expected[self._position :] + self.expected[: self._position]

    def end(self) -> bool:
        """End a pass that was completed; return whether another order is expected from now on."""
        trace = tuple(self._trace)
        self.begin()
        if not trace or trace == self.expected:
            self.is_traced = self.is_traced or bool(trace)
            self._deviation = None
            return False
        if self.is_traced and trace != self._deviation:
            self._deviation = trace
            return False
        self.expected, self._deviation, self.is_traced = trace, None, True
        return True
