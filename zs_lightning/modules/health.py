"""What a run says in a sentence: an engine that fails or finds nothing, and a training that learns
nothing."""

import logging
from collections.abc import Sequence

from zs_lightning.errors import RunError
from zs_lightning.rl.alarms import ENOUGH_SEARCHES, MOST_EMPTY, empty_results
from zs_lightning.rl.pool import by_group, has_signal
from zs_lightning.types import Status, Trajectory

MOST_FAILED = 0.2
"""A rollout step with a larger share of failed searches stops the run: it would train on the
engine's trouble."""

_log = logging.getLogger(__name__)


class Health:
    """Counts what a policy's rollouts with the engine of this name were worth."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.searches = self.empty = self.rollouts = self.rewarded = self.groups = self.equal = 0
        self.recent: list[bool] = []
        self.has_warned = False
        self.speaks = True
        """Whether it warns of empty results; a callback that does so in a fit sets it."""

    def searched(self, trajectories: Sequence[Trajectory]) -> None:
        """Counts searches; warns once if most of the latest found nothing."""
        found = [not turn.documents for trajectory in trajectories for turn in trajectory.searches]
        self.searches += len(found)
        self.empty += sum(found)
        self.recent += found
        if len(self.recent) >= ENOUGH_SEARCHES:
            wrong = empty_results(sum(self.recent), len(self.recent))
            if wrong and self.speaks and not self.has_warned:
                self.has_warned = True
                _log.warning(
                    "search: %s %s; see the queries in the run's trajectories, and whether the "
                    "engine (its corpus, its endpoint) knows what the questions are about",
                    self.engine,
                    wrong,
                )
            self.recent = []

    def usable(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Those that did not fail. Raises RunError if they are too few."""
        usable = [t for t in trajectories if t.status is not Status.FAILED]
        failed = len(trajectories) - len(usable)
        if failed > MOST_FAILED * len(trajectories):
            failure = next(t.failure for t in trajectories if t.failure)
            raise RunError(
                f"{failed} of {len(trajectories)} rollouts failed (the search engine is {self.engine}), "
                f"for example: {failure}; repair what failed and resume with --ckpt_path"
            )
        return usable

    def judged(self, usable: Sequence[Trajectory]) -> None:
        """Counts rewards."""
        self.rollouts += len(usable)
        self.rewarded += sum(trajectory.reward != 0 for trajectory in usable)
        groups = by_group(usable).values()
        self.groups += len(groups)
        self.equal += sum(not has_signal(group) for group in groups)

    def reasons(self) -> list[str]:
        """Why nothing may have been learnt."""
        found = []
        if not self.rewarded:
            found.append(f"none of {self.rollouts} rollouts earned a reward")
        if self.equal == self.groups:
            found.append(f"all {self.groups} groups of rollouts had equal rewards")
        if self.empty >= MOST_EMPTY * max(1, self.searches):
            share = f"{self.empty / self.searches:.0%} of {self.searches} searches"
            found.append(f"{self.engine} found nothing in {share}")
        return found
