"""What step-vs-trl asks of both sides, and what it gets back."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

QUERY = "ka lo mi tra " * 6
"""What every search asks; it is the simulator's whole prompt."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Sizes of a step: `searches` + 1 turns of `turn` tokens, `result` tokens written by the simulator for a search."""

    questions: int
    group: int
    searches: int
    turn: int
    result: int
    micro: int = 8
    """Rollouts of one forward and backward pass."""

    @property
    def rows(self) -> int:
        return self.questions * self.group


@dataclass(frozen=True, kw_only=True)
class Step:
    """`seconds`: total, generation, simulator, training. `counts`: of tokens in all rollouts, and of trained weights."""

    seconds: dict[str, float]
    counts: dict[str, int]


class Clock:
    """CPU seconds by name, of functions that are wrapped."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **options)
            finally:
                self.seconds[name] += time.process_time() - start

        return timed

    def split(self) -> dict[str, float]:
        """Generation is what is left of the rollout, training what is left of the step."""
        s = self.seconds
        generation = s["generation"] or s["rollout"] - s["simulator"]
        training = s["total"] - generation - s["simulator"]
        return {"total": s["total"], "generation": generation, "simulator": s["simulator"], "training": training}
