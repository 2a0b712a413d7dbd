"""Which trajectories of a step are trained on: those with the deepest search (CuSearch, arXiv
2605.11611)."""

from collections.abc import Sequence

from zs_lightning.types import Trajectory

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, without their whole parts, fill the unit interval evenly, however many."""


def depth(trajectory: Trajectory) -> int:
    """The number of the policy's searches that found something."""
    return sum(bool(turn.documents) for turn in trajectory.written)


def deepest(trajectories: Sequence[Trajectory], share: float) -> list[Trajectory]:
    """The share of the trajectories that search the deepest, at least one, in their order.

    They are chosen over the whole batch, not within groups, and whatever they earned: a baseline is
    that of all, so advantages are to be set before. Of equally deep ones those are taken that lie
    evenly over the batch: by order, whole groups of its first questions would be, and by number in
    the group those that clean_share keeps without noise.
    """
    if share >= 1:
        return list(trajectories)
    places = range(len(trajectories))
    ranked = sorted(places, key=lambda place: (-depth(trajectories[place]), place * GOLDEN % 1))
    chosen = sorted(ranked[: max(1, round(share * len(places)))])
    return [trajectories[place] for place in chosen]
