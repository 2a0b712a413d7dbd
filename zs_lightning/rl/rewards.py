"""What a trajectory earns. The score of its answer comes from outside; these functions only combine numbers."""

from __future__ import annotations


def outcome_reward(
    answer_score: float,
    format_share: float = 1.0,
    repeats: int = 0,
    format_weight: float = 0.0,
    repeat_cost: float = 0.0,
    searches: int = 0,
    search_cost: float = 0.0,
) -> tuple[float, dict[str, float]]:
    """The answer's score (the paper's reward: F1, all weights 0), with optional parts.

    Args:
        answer_score: F1 or exact match of the sampled answer, 0 without one.
        format_share: share of the policy's turns that were valid actions, in [0, 1].
        repeats: searches whose words had been searched before in this trajectory.
        format_weight: weight of the format part; the answer keeps 1 - format_weight.
        repeat_cost: what each repeat costs. A real engine answers the same words with the same documents.
        searches: of the policy, repeats among them.
        search_cost: what each search costs.

    Returns:
        The reward and its parts, which add up to it.
    """
    parts = {
        "answer": (1 - format_weight) * answer_score,
        "format": format_weight * format_share,
        "repeats": -repeat_cost * repeats,
        "searches": -search_cost * searches,
    }
    return sum(parts.values()), parts
