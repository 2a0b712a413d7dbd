"""What a rollout step shows of a run's health, as numbers, and those of the last steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from zs_lightning.text.answers import folded_match
from zs_lightning.text.prompts import EMPTY
from zs_lightning.text.protocol import forges, pieces
from zs_lightning.types import ActionKind, Status, Trajectory

FEW, WINDOW = 5, 20
"""Steps that make a habit, and steps that are remembered."""
ENOUGH = 64
"""Rollouts that a share must be of: fewer differ by chance."""
CURVES = "reward frac_reward_zero_std entropy kl grad_norm noise/planned policy/sampling_gap".split()
"""Metrics of modules/step_metrics.py that are watched."""

Step = dict[str, float]


def vitals(trajectories: Sequence[Trajectory], noise_prob: float) -> Step:
    """Counts over the trajectories of a step, of whose noise this was planned; rollouts that are
    kept clean are no part of it."""
    usable = [t for t in trajectories if t.status is not Status.FAILED]
    written = [turn for t in trajectories for turn in t.written]
    searches = [turn for t in trajectories for turn in t.searches]
    planned = [turn for t in trajectories if t.noise_prob == noise_prob for turn in t.searches]
    drawn = [turn.noise or 0.0 for turn in planned if turn.label is not None and not turn.repeated]
    # Of rewards of one's own, which may have no part of that name, the whole counts.
    scores = [t.reward_parts.get("answer", t.reward) for t in usable]
    right = [t for t in usable if folded_match(t.answer, t.example.golden_answers)]
    # A search that was ordered to find nothing did as it should.
    asked = [turn for turn in searches if turn.label != EMPTY]
    return {
        "rollouts": len(trajectories),
        "failed": len(trajectories) - len(usable),
        "scored": sum(score > 0 for score in scores),
        "right": len(right),
        "logprob": sum(sum(t.old_logprobs) for t in right),
        "tokens": sum(sum(t.loss_mask) for t in right),
        "forged": sum(forges(t.turns) for t in trajectories),
        "cut": sum(map(_was_cut, trajectories)),
        "spent": sum(map(_only_searched, trajectories)),
        "turns": len(written),
        "queries": sum(turn.kind is ActionKind.SEARCH for turn in written),
        "invalid": sum(turn.kind is ActionKind.INVALID for turn in written),
        "thought": sum(_thought(turn.text) for turn in written),
        "searches": len(asked),
        "empty": sum(not turn.documents for turn in asked),
        "draws": len(drawn),
        "noise": sum(drawn),
    }


def _was_cut(trajectory: Trajectory) -> bool:
    whys = {turn.content for turn in trajectory.turns if turn.kind is ActionKind.INVALID}
    return "turn_too_long" in whys or trajectory.status is Status.LENGTH_LIMIT


def _only_searched(trajectory: Trajectory) -> bool:
    kinds = {turn.kind for turn in trajectory.written}
    return trajectory.status is Status.TURN_LIMIT and kinds == {ActionKind.SEARCH}


def _thought(text: str) -> int:
    """Characters of a turn beside its tags and its action. Not words, which some scripts do not
    part."""
    return sum(len(content) for kind, content in pieces(text) if kind in ("think", "text"))


@dataclass
class History:
    """The vitals of a run. A step that was skipped has nothing but `skipped`."""

    first: Step = field(default_factory=dict)
    """The first step that was not skipped: what the policy was before it learnt."""
    recent: list[Step] = field(default_factory=list)
    """The last WINDOW steps, the newest last."""
    best: dict[str, float] = field(default_factory=dict)
    """The highest means so far: of `reward` over WINDOW steps, of `logprob` over half of them."""

    def add(self, step: Mapping[str, float]) -> None:
        if not self.first and not step.get("skipped"):
            self.first = dict(step)
        self.recent = [*self.recent, dict(step)][-WINDOW:]
        if len(rewards := self.values("reward", WINDOW)) == WINDOW:
            self._keep("reward", fmean(rewards))
        if (mean := self.logprob()) is not None:
            self._keep("logprob", mean)

    def _keep(self, name: str, mean: float) -> None:
        self.best[name] = max(mean, self.best.get(name, mean))

    def values(self, name: str, steps: int) -> list[float]:
        """The values of the last steps that have one."""
        return [step[name] for step in self.recent[-steps:] if name in step]

    def total(self, name: str, steps: int) -> float:
        return sum(self.values(name, steps))

    def tail(self) -> int:
        """The number of the last steps that make a habit and have ENOUGH rollouts; 0 if there are
        none."""
        for steps in range(FEW, len(self.recent) + 1):
            if self.total("rollouts", steps) >= ENOUGH:
                return steps
        return 0

    def share(self, name: str, of: str = "rollouts") -> float | None:
        """How much of the one the other is over the tail; None if it is too short."""
        steps = self.tail()
        # A name that is not watched in this run, such as searches where there are none.
        if not steps or not self.values(name, steps):
            return None
        return self.total(name, steps) / max(1.0, self.total(of, steps))

    def mean(self, name: str) -> float | None:
        """Of the tail; None if it is too short."""
        found = self.values(name, self.tail()) if self.tail() else []
        return fmean(found) if found else None

    def logprob(self) -> float | None:
        """Mean log-probability of the sampled tokens of right rollouts, over the last WINDOW / 2
        steps; None if these are few."""
        steps = WINDOW // 2
        is_enough = len(self.recent) >= steps and self.total("right", steps) >= ENOUGH
        return self.total("logprob", steps) / self.total("tokens", steps) if is_enough else None

    def state(self) -> dict[str, Any]:
        return {"first": dict(self.first), "recent": list(self.recent), "best": dict(self.best)}
