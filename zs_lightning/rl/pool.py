"""Groups without signal are replaced by groups of questions that are known to have some.

A group whose rollouts all earn the same has no advantage: its rollouts were paid for and teach
nothing. DAPO (arXiv 2503.14476) asks fresh questions until a batch is full of groups that do, which
has no bound where most questions are too easy or too hard. Here a step asks once more and never
again: questions that were neither always right nor always wrong when they were asked last, as many
as it has of groups without signal, at most a share of its questions, and no more than are known.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from zs_lightning.errors import UserError, check_least
from zs_lightning.rl.advantages import COMPARE, ESTIMATORS
from zs_lightning.types import QAExample, Status, Trajectory


@dataclass(frozen=True)
class RefillSpec:
    """How groups without signal are replaced.

    Args:
        share: most groups that a step replaces, as a share of its questions, in whole ones and at
            least one. It bounds what a step costs: at 0.5, half as many rollouts again.
        pool_size: most questions that are remembered; the ones asked longest ago are forgotten.
    """

    share: float = 0.5
    pool_size: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"model.refill.share: expected a number above 0, up to 1; got {self.share:g}")
        check_least("model.refill", pool_size=(self.pool_size, 1))

    def check(self, estimator: str, group_size: int) -> None:
        """Raises UserError where groups of equal rewards teach something, or all rewards of a group
        are equal."""
        if estimator in (*ESTIMATORS, "ppo") and estimator not in COMPARE:
            raise UserError(
                f"model.refill: expected an estimator that compares the rollouts of a group ({', '.join(COMPARE)}, or one of "
                f"your own); {estimator} learns from equal rewards, too; set another model.estimator or `refill: null`"
            )
        if group_size < 2:
            raise UserError(f"model.refill: expected model.group_size of 2 or more; got {group_size}, of which none has signal")


def by_group(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """The rollouts of each question, by its key, in the order in which questions come first."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group_id, []).append(trajectory)
    return groups


def has_signal(group: Sequence[Trajectory]) -> bool:
    """Whether the rewards of a question's rollouts differ."""
    return len({trajectory.reward for trajectory in group}) > 1


def without_signal(usable: Sequence[Trajectory]) -> list[str]:
    """Keys of the groups whose rewards are all equal."""
    return [key for key, group in by_group(usable).items() if not has_signal(group)]


class Pool:
    """Questions whose rollouts earned different rewards when they were asked last."""

    def __init__(self, spec: RefillSpec) -> None:
        self.spec = spec
        self.questions: dict[str, QAExample] = {}
        """By their keys, the one that was asked longest ago first."""

    def draw(self, usable: Sequence[Trajectory], asked: Collection[QAExample], rng: Random) -> list[QAExample]:
        """Questions for the groups that have no signal among a step's judged trajectories, without
        failed ones: none of them twice, and none of those that the step asked."""
        # Also those whose rollouts all failed: the engine may fail at them again.
        keys = {example.key for example in asked}
        most = max(1, round(self.spec.share * len(keys)))
        known = [example for key, example in self.questions.items() if key not in keys]
        # With the same pool on every rank and the step's own generator, all ranks draw the same.
        return rng.sample(known, min(len(without_signal(usable)), most, len(known)))

    def remember(self, trajectories: Sequence[Trajectory]) -> None:
        """Takes in the questions whose rollouts differ, and drops those whose rollouts do not. What
        failed says nothing, nor does a rollout that is left alone."""
        usable = [t for t in trajectories if t.status is not Status.FAILED]
        for key, group in by_group(usable).items():
            if len(group) > 1:
                # Also what is known already: it goes to the end, the last to be forgotten.
                self.questions.pop(key, None)
                if has_signal(group):
                    self.questions[key] = group[0].example
        self._forget()

    def _forget(self) -> None:
        for key in list(self.questions)[: -self.spec.pool_size]:
            del self.questions[key]

    def state(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [asdict(example) for example in self.questions.values()]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        # JSON and its like have no tuples.
        self.questions = {}
        for row in state:
            texts = {name: tuple(row[name]) for name in ("golden_answers", "support")}
            example = QAExample(**{**row, **texts})
            self.questions[example.key] = example
        self._forget()

    def metrics(self, refilled: Sequence[Trajectory], trained: Sequence[Trajectory]) -> dict[str, float]:
        """Questions that could be drawn from, that were drawn, and that are trained on."""
        # What was drawn for its past may have no signal this time.
        taken = [t for t in trained if t.refilled]
        return {
            "groups/pool": float(len(self.questions)),
            "groups/drawn": float(len(by_group(refilled))),
            "groups/refilled": float(len(by_group(taken))),
        }


def in_place(refilled: Sequence[Trajectory]) -> list[Trajectory]:
    """Marks rollouts of the pool's questions as such; returns those that did not fail."""
    for trajectory in refilled:
        trajectory.refilled = True
    return [t for t in refilled if t.status is not Status.FAILED]


def replaced(usable: Sequence[Trajectory], fresh: Sequence[Trajectory]) -> list[Trajectory]:
    """What a step trains on: its groups, of which the first without signal have made room for as
    many fresh ones, of other questions, that have some. All are judged, and none has failed."""
    # A fresh group without signal would teach no more than the one whose place it took, and the
    # data's own question is the one that the run was to see.
    found = [group for group in by_group(fresh).values() if has_signal(group)]
    gone = set(without_signal(usable)[: len(found)])
    kept = [trajectory for trajectory in usable if trajectory.group_id not in gone]
    return kept + [trajectory for group in found for trajectory in group]
