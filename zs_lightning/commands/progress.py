"""How far a build is, and how long it takes yet."""

import sys
import time

EVERY = 10
"""Seconds between two lines of progress where there is no terminal."""


class Line:
    """A line after a batch, in a terminal in place of the one before, else now and then.

    Args:
        name: what is built; the line begins with it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.told = time.monotonic()
        self.first: tuple[float, float] | None = None
        """What was done after the first batch, and when."""

    def __call__(self, share: float, done: str) -> None:
        """Says what is done, which is this share of everything."""
        now = time.monotonic()
        # What an earlier part of the build did says nothing of the time that this one takes.
        first, begun = self.first = self.first or (share, now)
        left = f", about {(now - begun) * (1 - share) / (share - first):.0f} s left" if share > first else ""
        line = f"{self.name}: {done}{left}"
        if sys.stdout.isatty():
            print(f"\r{line:<79}", end="\n" if share == 1 else "", flush=True)
        elif share == 1 or now - self.told >= EVERY:
            self.told = now
            print(line, flush=True)
