"""What a trajectory earns. A reward of one's own is a class with one method, in a file of one's
own."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from numbers import Real
from typing import Literal

from zs_lightning.errors import NotFiniteError, UserError, check_least, check_shares
from zs_lightning.text.answers import f1_score, folded_match
from zs_lightning.text.protocol import forges, query_key
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


class AnswerReward(Reward):
    """The answer's score (the paper's reward: F1 alone), with optional parts for how it was found.

    Args:
        score: what an answer earns: f1 of its words (the paper), or em, 1 for a (folded) exact
            match and else 0.
        format_weight: weight of the share of turns that are valid actions; the answer keeps the
            rest of 1. The paper uses none.
        repeat_cost: what each search costs whose words were searched before in the same trajectory.
            A real engine answers the same words with the same documents. The paper has none.
        search_cost: what each search costs. The paper has none.
    """

    def __init__(
        self,
        score: Literal["f1", "em"] = "f1",
        format_weight: float = 0.0,
        repeat_cost: float = 0.0,
        search_cost: float = 0.0,
    ) -> None:
        check_shares("reward", format_weight=format_weight)
        check_least("reward", repeat_cost=(repeat_cost, 0), search_cost=(search_cost, 0))
        self.score = score
        self.format_weight = format_weight
        self.repeat_cost = repeat_cost
        self.search_cost = search_cost

    def parts(self, trajectory: Trajectory) -> dict[str, float]:
        scored = f1_score if self.score == "f1" else folded_match
        written = trajectory.written
        valid = sum(turn.kind is not ActionKind.INVALID for turn in written) / max(1, len(written))
        # The same words in another order or case are the same search to an engine.
        queries = [query_key(turn.content) for turn in trajectory.searches]
        # The search that the environment makes by itself (retrieve_first) costs the policy nothing,
        # but to repeat it does.
        searches = sum(turn in written for turn in trajectory.searches)
        answer = scored(trajectory.answer, trajectory.example.golden_answers)
        return {
            "answer": (1 - self.format_weight) * answer,
            "format": self.format_weight * valid,
            "repeats": -self.repeat_cost * (len(queries) - len(set(queries))),
            "searches": -self.search_cost * searches,
        }


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
