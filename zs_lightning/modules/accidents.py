"""What a training step does about numbers that are not finite and about memory that is full: the
same on every rank, or the others would wait for one of them for ever."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from zs_lightning.errors import NotFiniteError, RunError
from zs_lightning.generation.memory import Fitting, completes
from zs_lightning.modules.ranks import add_up, gather

T = TypeVar("T")

MOST_SKIPPED = 3
"""Steps in a row that are skipped before the run is stopped."""


def for_all_ranks(work: Callable[[], T]) -> T:
    """What this rank's work returns. Raises NotFiniteError if any rank's does."""
    found: list[T] = []
    reason = ""
    try:
        found.append(work())
    except NotFiniteError as error:
        reason = str(error)
    for (theirs,) in gather([reason]):
        if theirs:
            raise NotFiniteError(theirs)
    return found[0]


def within_memory(fitting: Fitting, lengths: Sequence[int], attempt: Callable[[int], T]) -> T:
    """What the attempt returns when no rank's memory was full.

    Args:
        fitting: how many padded tokens are in a forward and backward pass.
        lengths: of the rows of all ranks: no fewer tokens than the longest has are of use.
        attempt: of so many tokens; it may begin anew after a part of it was done.

    Raises:
        RunError: one row is too much.
    """
    longest = max(lengths, default=1)
    while True:
        found: list[T] = []
        # The closure is called before the loop goes on.
        fits = completes(lambda: found.append(attempt(fitting.now)))  # noqa: B023
        if not add_up({"full": float(not fits)})["full"]:
            return found[0]
        fitting.halve(longest, longest * len(lengths))


class Skipped:
    """Counts the steps of a run that were skipped."""

    def __init__(self) -> None:
        self.total = self.in_a_row = 0
        self.write: Callable[[int, str, Sequence[Any]], None] = lambda step, reason, rows: None
        """Writes down a step's trajectories, or the rows that it was given; a callback sets it."""

    def add(self, step: int, reason: str, rows: Sequence[Any]) -> None:
        """Raises RunError if too many in a row were skipped."""
        self.total += 1
        self.in_a_row += 1
        self.write(step, reason, rows)
        if self.in_a_row >= MOST_SKIPPED:
            raise RunError(f"{self.in_a_row} steps in a row were skipped, the last since {reason}")
