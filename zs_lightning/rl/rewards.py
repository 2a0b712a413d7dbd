"""What a trajectory earns. A reward of one's own is a class with one method, in a file of one's
own."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Literal

from zs_lightning.errors import NotFiniteError, UserError, check_least, check_shares
from zs_lightning.text.answers import f1_score, folded_match, holds, telling
from zs_lightning.text.protocol import document_lines, forges, query_key
from zs_lightning.types import ActionKind, Trajectory


class Reward(ABC):
    """A function of a finished trajectory. To add one, write `parts` in a class of its own and name
    it:

    `--model.reward my_rewards.MyReward`
    """

    @abstractmethod
    def parts(self, trajectory: Trajectory) -> dict[str, float]:
        """The parts of the reward, by name; they add up to it and are kept with the trajectory.

        A trajectory whose search failed is not asked about: nobody learns from it.
        """

    def setup(self) -> None:  # noqa: B027 - optional
        """Called once before a fit: what cannot be used is said before weights are loaded."""

    def ask(self, trajectories: Sequence[Trajectory]) -> None:  # noqa: B027 - optional
        """Asks others about a process's own finished trajectories, all at once, before `parts`.

        One that gets no answer ends as one whose search failed: with the status and a failure.
        """

    def counted(self) -> dict[str, float]:
        """What was counted of asking; fit writes it to search.json."""
        return {}


class AnswerReward(Reward):
    """The answer's score (the paper's reward: F1 alone), with optional parts for how it was found.

    Args:
        score: what an answer earns: f1 of its words (the paper), or em, 1 for a (folded) exact
            match and else 0.
        format_weight: weight of the share of turns that are valid actions, where a missing answer
            counts as a turn that is none; the answer keeps the rest of 1. The paper uses none.
        repeat_cost: what each search costs whose words were searched before in the same trajectory.
            A real engine answers the same words with the same documents. The paper has none.
        search_cost: what each search costs. The paper has none.
        surfaced_weight: the share of what its answer lacks that a trajectory earns for a search of
            its own that found a golden answer; less than a right answer earns. The paper has none.
        unsearched_cost: the share of its score that an answer loses without any search that asked
            for something of the question. The paper has none.
    """

    def __init__(
        self,
        score: Literal["f1", "em"] = "f1",
        format_weight: float = 0.0,
        repeat_cost: float = 0.0,
        search_cost: float = 0.0,
        surfaced_weight: float = 0.0,
        unsearched_cost: float = 0.0,
    ) -> None:
        shares = {"surfaced_weight": surfaced_weight, "unsearched_cost": unsearched_cost}
        check_shares("reward", format_weight=format_weight, **shares)
        check_least("reward", repeat_cost=(repeat_cost, 0), search_cost=(search_cost, 0))
        if 0 < surfaced_weight >= 1 - unsearched_cost:
            raise UserError(
                "reward.surfaced_weight: a wrong answer must earn less than a right one; expected less "
                f"than 1 - unsearched_cost, {1 - unsearched_cost:g}; got {surfaced_weight:g}"
            )
        self.score = score
        self.format_weight = format_weight
        self.repeat_cost = repeat_cost
        self.search_cost = search_cost
        self.surfaced_weight = surfaced_weight
        self.unsearched_cost = unsearched_cost

    def scored(self, trajectory: Trajectory) -> float:
        """The answer's score, from 0 to 1."""
        score = f1_score if self.score == "f1" else folded_match
        return score(trajectory.answer, trajectory.example.golden_answers)

    def parts(self, trajectory: Trajectory) -> dict[str, float]:
        written = trajectory.written
        # Who only searches, until its turns are spent, has not kept to the form.
        turns = len(written) + (trajectory.answer is None)
        valid = sum(turn.kind is not ActionKind.INVALID for turn in written) / max(1, turns)
        # The same words in another order or case are the same search to an engine.
        queries = [query_key(turn.content) for turn in trajectory.searches]
        # The search that the environment makes by itself (retrieve_first) costs the policy nothing,
        # but to repeat it does.
        searches = sum(turn in written for turn in trajectory.searches)
        answer = self.scored(trajectory)
        lacks = 1 - answer
        if self.unsearched_cost and all(turn.withheld for turn in trajectory.searches):
            answer *= 1 - self.unsearched_cost
        parts = {
            "answer": (1 - self.format_weight) * answer,
            "format": self.format_weight * valid,
            "repeats": -self.repeat_cost * (len(queries) - len(set(queries))),
            "searches": -self.search_cost * searches,
        }
        if self.surfaced_weight:
            share = lacks * surfaced(trajectory)
            parts["surfaced"] = (1 - self.format_weight) * self.surfaced_weight * share
        return parts


def surfaced(trajectory: Trajectory) -> bool:
    """Whether a trajectory that ends in an answer has searched for what holds a golden one.

    It is looked for in what the engine returned, never in what the policy wrote, and not where the
    question or the query names it: any engine may bring back what it was told.
    """
    golds = telling(trajectory.example.golden_answers)
    if trajectory.answer is None or holds(trajectory.example.question, *golds):
        return False
    for turn in trajectory.written:
        documents = "\n".join(document_lines(turn.documents))
        if holds(documents, *golds) and not holds(turn.content, *golds):
            return True
    return False


def judge(trajectories: Iterable[Trajectory], reward: Reward) -> None:
    """Sets each trajectory's reward and its parts.

    Raises:
        UserError: the reward returns something else than parts.
        NotFiniteError: a part is no finite number. All rewards are set.
    """
    name = f"model.reward: {type(reward).__module__}.{type(reward).__qualname__}"
    wrong = ""
    for trajectory in trajectories:
        parts = reward.parts(trajectory)
        if not isinstance(parts, dict) or not all(isinstance(part, Real) for part in parts.values()):
            raise UserError(f"{name} returned {str(parts)[:200]}; expected parts by name, such as {{'answer': 1.0}}")
        parts = {part: float(value) for part, value in parts.items()}
        if forges(trajectory.turns):
            # It pays what it owes, or a forged result would save the costs of searches.
            parts = {part: min(0.0, value) for part, value in parts.items()}
        trajectory.reward_parts = parts
        trajectory.reward = sum(parts.values())
        if not math.isfinite(trajectory.reward):
            wrong = f"{name} returned {parts} for {trajectory.group_id}; correct it"
    if wrong:
        raise NotFiniteError(wrong)
