"""What a step is doing: told by those who work, read by a thread that shows it."""

import time
from collections import defaultdict, deque
from statistics import median

REMEMBERED = 20
"""Steps whose times say what is usual."""


class Phases:
    """The phase of the step under way, how far it is, and how long phases usually take.

    It is called with a phase's name and its numbers, many times in a phase, and compares nothing
    but the name. Phases of a step may come in turns, such as generate and search; their times add
    up.
    """

    def __init__(self) -> None:
        self.name = ""
        self.done = self.of = self.tokens = self.first = 0
        self.since = time.monotonic()
        self.spent: defaultdict[str, float] = defaultdict(float)
        """Seconds of this step by phase, without those of the phase under way since it was
        begun."""
        self.took: dict[str, deque[float]] = {}
        """Seconds by phase, of former steps."""

    def __call__(self, name: str, done: int = 0, of: int = 0, tokens: int = 0) -> None:
        """Tells where the step is.

        Args:
            name: of the phase.
            done: rollouts or passes of the phase.
            of: how many there are in all; 0 where that is not known.
            tokens: generated so far, from whatever number on.
        """
        if name != self.name:
            now = time.monotonic()
            # By the first number of a step: a generator counts on from step to step.
            self.first = self.first if self.spent[name] or name == "search" else tokens
            self.spent[self.name] += now - self.since
            self.name, self.since = name, now
        self.done, self.of, self.tokens = done, of, tokens

    def end(self, usual: bool = True) -> None:
        """Ends a step. If it was a usual one, its times tell how long the next one takes; those of
        a validation do not."""
        self("")
        for name, seconds in self.spent.items():
            if usual and name:
                self.took.setdefault(name, deque(maxlen=REMEMBERED)).append(seconds)
        self.spent.clear()

    def seconds(self) -> float:
        """Seconds that this step has spent in the phase."""
        # By get: reading must not add names while the other thread goes through them.
        return self.spent.get(self.name, 0.0) + time.monotonic() - self.since

    def usually(self) -> float | None:
        """The median of the phase's seconds in former steps, if there were any."""
        took = list(self.took.get(self.name, ()))
        return median(took) if took else None

    def line(self) -> str:
        """The phase in at most 60 characters; empty between steps."""
        if not self.name:
            return ""
        seconds, usual = self.seconds(), self.usually()
        said = [f"{self.name} {min(self.done, self.of)}/{self.of}" if self.of else self.name]
        # At least the tokens of one second: the first ones come at once.
        if tokens := self.tokens - self.first:
            before = self.spent.get("generate", 0.0) + self.spent.get("search", 0.0)
            working = before + time.monotonic() - self.since
            said.append(f"{tokens / max(1.0, working):,.0f} tokens/s")
        if usual is None and 0 < self.done < self.of:
            usual = seconds * self.of / self.done
        if usual is not None and usual > seconds:
            said.append(f"{usual - seconds:.0f} s left")
        else:
            said.append(f"{seconds:.0f} s")
        return ", ".join(said)
