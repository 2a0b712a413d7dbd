"""From rewards to advantages. N trajectories; trajectories of one example form a group.

| estimator | advantage of trajectory j in group g |
|---|---|
| reinforce | r_j (paper Table 5: the raw return) |
| reinforce_baseline | r_j - mean over the batch |
| rloo | r_j - mean of the others in the group |
| grpo | (r_j - mean of the group) / (std of the group + 1e-6), unbiased std |
| grpo_no_std | r_j - mean of the group (Dr. GRPO) |

With estimator ppo each token has an advantage of its own: see gae.py. One of one's own is a
function like these in a file of one's own, named as `--model.estimator my_estimators.mine`.
"""

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zs_lightning.errors import NotFiniteError, UserError
from zs_lightning.types import Trajectory

Estimator = Callable[[Tensor, Tensor], Tensor]
"""From rewards [N] float64 and groups [N] int64 (numbers from 0) to advantages [N] float64."""

NO_SIGNAL = 1e-6
"""Smaller advantages are rounding, and count as none."""


def _group_mean_and_size(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and size of each trajectory's own group, both [N]. rewards: [N] float; groups: [N]
    int64."""
    count = int(groups.max()) + 1 if len(groups) else 0
    sizes = torch.zeros(count, dtype=rewards.dtype).index_add_(0, groups, torch.ones_like(rewards))
    sums = torch.zeros(count, dtype=rewards.dtype).index_add_(0, groups, rewards)
    return (sums / sizes)[groups], sizes[groups]


def reinforce(rewards: Tensor, groups: Tensor) -> Tensor:
    return rewards.clone()


def reinforce_baseline(rewards: Tensor, groups: Tensor) -> Tensor:
    return rewards - rewards.mean()


def rloo(rewards: Tensor, groups: Tensor) -> Tensor:
    """A group of one has no others to compare with: its advantage is 0."""
    mean, size = _group_mean_and_size(rewards, groups)
    return (rewards - mean) * size / (size - 1).clamp(min=1)


def grpo_no_std(rewards: Tensor, groups: Tensor) -> Tensor:
    mean, _ = _group_mean_and_size(rewards, groups)
    return rewards - mean


def grpo(rewards: Tensor, groups: Tensor) -> Tensor:
    """A group of one, or of equal rewards, has advantage 0."""
    mean, size = _group_mean_and_size(rewards, groups)
    centred = rewards - mean
    squares, _ = _group_mean_and_size(centred**2, groups)
    std = (squares * size / (size - 1).clamp(min=1)).sqrt()
    return centred / (std + 1e-6)


ESTIMATORS: dict[str, Estimator] = {
    "reinforce": reinforce,
    "reinforce_baseline": reinforce_baseline,
    "rloo": rloo,
    "grpo": grpo,
    "grpo_no_std": grpo_no_std,
}
COMPARE = ("rloo", "grpo", "grpo_no_std")
"""Estimators that need several rollouts of each question."""


def find_estimator(name: str) -> Estimator:
    """The function of a name of ESTIMATORS, or of a dotted path such as my_estimators.mine. Raises
    UserError if there is none."""
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    module, _, function = name.rpartition(".")
    try:
        found: Estimator = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        known = ", ".join([*ESTIMATORS, "ppo"])
        raise UserError(
            f"model.estimator: there is no {name}; expected one of {known}, or a function such as "
            "my_estimators.mine in a file beside"
        ) from error
    return found


def compute_advantages(estimator: Estimator, rewards: Tensor, groups: Tensor) -> Tensor:
    """Advantages of one rollout step.

    Args:
        rewards: [N] float.
        groups: [N] int64, numbers from 0 of the groups.

    Returns:
        [N] float; exactly 0 where a group gives no signal.

    Raises:
        NotFiniteError: a reward is not finite.
        UserError: the estimator returns another shape, or numbers that are not finite.
    """
    if not rewards.isfinite().all():
        raise NotFiniteError("a reward was no finite number of float32; correct model.reward")
    # In double precision, or rounding turns a group of equal rewards into one with a signal: in
    # single precision, grpo makes advantages of 0.1 out of sixteen rewards of 0.7. The update skips
    # rows of zero advantage.
    advantages = estimator(rewards.double(), groups)
    if advantages.shape != rewards.shape or not advantages.isfinite().all():
        raise UserError(
            f"model.estimator: expected {len(rewards)} finite advantages of {len(rewards)} rewards; "
            f"got {tuple(advantages.shape)}, {int(advantages.isfinite().sum())} of them finite"
        )
    return torch.where(advantages.abs() < NO_SIGNAL, 0.0, advantages).to(rewards.dtype)


def set_advantages(trajectories: Sequence[Trajectory], estimator: Estimator) -> None:
    """Sets each trajectory's advantage. Baselines are of these trajectories: all usable ones of a
    step."""
    groups: dict[str, int] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group_id, len(groups))
    numbers = torch.tensor([groups[trajectory.group_id] for trajectory in trajectories])
    rewards = torch.tensor([trajectory.reward for trajectory in trajectories])
    advantages = compute_advantages(estimator, rewards, numbers).tolist()
    for trajectory, advantage in zip(trajectories, advantages, strict=True):
        trajectory.advantage = advantage
