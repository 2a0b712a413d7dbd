"""From rewards to advantages. N trajectories; trajectories of one example form a group.

| estimator | advantage of trajectory j in group g |
|---|---|
| reinforce | r_j (paper Table 5: the raw return) |
| reinforce_baseline | r_j - mean over the batch |
| rloo | r_j - mean of the others in the group |
| grpo | (r_j - mean of the group) / (std of the group + 1e-6), unbiased std |
| grpo_no_std | r_j - mean of the group (Dr. GRPO) |

With estimator ppo each token has an advantage of its own: see values.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zs_lightning.errors import UserError

Estimator = Callable[[Tensor, Tensor], Tensor]


def _group_mean_and_size(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and size of each trajectory's own group, both [N]."""
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


def compute_advantages(estimator: str, rewards: Tensor, groups: Tensor) -> Tensor:
    """Advantages of one rollout step.

    Args:
        estimator: a name of ESTIMATORS.
        rewards: [N] float.
        groups: [N] int64, numbers from 0 of the groups.

    Returns:
        [N] float; exactly 0 where a group gives no signal.
    """
    if rewards.shape != groups.shape or rewards.ndim != 1:
        raise UserError(f"expected rewards and groups of one shape [N]; got {tuple(rewards.shape)} and {tuple(groups.shape)}")
    # In double precision, or rounding turns a group of equal rewards into one with a signal: in single precision, grpo
    # makes advantages of 0.1 out of sixteen rewards of 0.7. The update pass skips rows of zero advantage.
    advantages = ESTIMATORS[estimator](rewards.double(), groups)
    return torch.where(advantages.abs() < 1e-6, 0.0, advantages).to(rewards.dtype)
