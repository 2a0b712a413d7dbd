"""Times several sides of the same work in one process, and refuses to if their results differ."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

REPEATS = 3
"""Timed rounds; the median counts."""
ALMOST = 0.99
"""Share of equal tokens that is enough where float32 near-ties of a random model decide differently in other batches."""


class UnequalResultsError(Exception):
    """Two sides of a bench did not do the same work, so their times say nothing."""


class Unavailable(Exception):
    """The bench has nothing to say on this machine; the message says why. That is no failure."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: what our side and a peer need for the same work.

    Args:
        required: least peer / ours; None is only reported.
        equal: how the results of the two sides were found equal.
        details: further figures of this line, printed under the table.
    """

    case: str
    peer: str
    ours: float
    theirs: float
    required: float | None
    equal: str
    unit: Literal["s", "mb"] = "s"
    details: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours

    @property
    def reached(self) -> bool:
        return self.required is None or self.ratio >= self.required

    def as_json(self) -> dict[str, Any]:
        figures = {f"ours_{self.unit}": round(self.ours, 4), f"peer_{self.unit}": round(self.theirs, 4)}
        found = {"case": self.case, "peer": self.peer, **figures, "ratio": round(self.ratio, 3)}
        return {**found, "required": self.required, "equal": self.equal, **({"details": self.details} if self.details else {})}


@contextmanager
def stopwatch(seconds: list[float]) -> Iterator[None]:
    """Appends the process's CPU seconds; other programs on the machine hardly change them."""
    gc.collect()
    start = time.process_time()
    try:
        yield
    finally:
        seconds.append(time.process_time() - start)


def compare(
    sides: dict[str, Callable[[], Any]], same: Callable[[Any, Any], str], repeats: int | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """Runs the sides in turn, `repeats` rounds, and checks every result against the first side's.

    Args:
        sides: name to work; the first is ours. They must be warm: nothing is left out here.
        same: raises UnequalResultsError, or says in words how two results are equal.

    Returns:
        Median CPU seconds by name, and for each other side how its results equal ours. No time leaves this function
        before the results were found equal.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    equal: dict[str, str] = {}
    ours = next(iter(sides))
    for _ in range(REPEATS if repeats is None else repeats):
        results = {}
        for name, work in sides.items():
            with stopwatch(seconds[name]):
                results[name] = work()
        for name in list(sides)[1:]:
            equal[name] = same(results[ours], results[name])
    return {name: median(times) for name, times in seconds.items()}, equal


def same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """Compares greedy output, one list for each turn."""
    if [len(ids) for ids in ours] != [len(ids) for ids in theirs]:
        raise UnequalResultsError("the sides generated different numbers of tokens")
    pairs = [pair for one, other in zip(ours, theirs, strict=True) for pair in zip(one, other, strict=True)]
    share = sum(a == b for a, b in pairs) / len(pairs)
    if share < ALMOST:
        raise UnequalResultsError(f"only {share:.2%} of the tokens are the same, expected at least {ALMOST:.0%}")
    return "tokens identical" if share == 1 else f"{share:.2%} of tokens, rest near-ties"
