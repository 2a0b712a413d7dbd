"""Phases that keep the seconds of everything, for a profile."""

import time
from collections import defaultdict
from collections.abc import Callable

from zs_lightning.modules.phases import Phases
from zs_lightning.runs.profile import LAST, OTHER, ROLLOUTS, ROWS


class TimedPhases(Phases):
    """Charges every moment to exactly one name, so that the parts add up to the whole: to what was
    pushed last, such as a validation with phases of its own, else to the phase."""

    def __init__(self) -> None:
        super().__init__()
        self.settle: Callable[[], None] = lambda: None
        """Waits for what a card still computes."""
        self.pushed: list[str] = []
        self.charged = self.told = time.monotonic()
        self.clear()

    def clear(self) -> None:
        """Begins a step."""
        self.seconds_of: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, float] = defaultdict(float)
        """rounds, visits, late and passes of runs/profile.py."""

    def charge(self) -> None:
        # A card computes on when the host is at the next phase already.
        self.settle()
        now = time.monotonic()
        phase = self.name if self.name in ROWS else OTHER
        self.seconds_of[self.pushed[-1] if self.pushed else phase] += now - self.charged
        self.charged = now

    def push(self, name: str) -> None:
        self.charge()
        self.pushed.append(name)

    def pop(self) -> None:
        self.charge()
        self.pushed.pop()

    def __call__(self, name: str, done: int = 0, of: int = 0, tokens: int = 0) -> None:
        now = time.monotonic()
        # The rollouts of a validation are not those of the step.
        if not self.pushed:
            # It is told before each pass, whose time comes with the next word.
            if self.name in ROLLOUTS and 0 < LAST * self.of <= self.done:
                self.counts["late"] += now - self.told
            self.counts["rounds"] += name == "generate"
            self.counts["visits"] += name == "search" != self.name
            if name == "update":
                self.counts["passes"] = of
        self.told = now
        if name != self.name:
            self.charge()
        super().__call__(name, done, of, tokens)
