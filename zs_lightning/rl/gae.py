"""Actor and critic: advantages of tokens from a critic's values, and the loss of the critic. K
trained tokens, row by row.

A trajectory is the sequence of its trained tokens alone: what the environment inserted between them
is no action, so the token after a document follows the last one before it.
"""

import math

import torch
from torch import Tensor


def gae(values: Tensor, rewards: Tensor, rows: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16) with a reward on the last
    trained token of each row.

    Args:
        values: [K] of the state that each token was sampled in.
        rewards: [B] of each row.
        rows: [K] int64, each token's row; tokens of a row follow each other.
        gamma: discount of each trained token.
        lam: 1 compares the discounted reward with the value; 0 trusts the value of the next state.

    Returns:
        [K] float64. With the values they make the returns that the critic learns.
    """
    advantages: list[float] = []
    row, following, carried = -1, 0.0, 0.0
    # From the last token of the last row backwards: an advantage is made of those after it.
    for value, own in zip(reversed(values.tolist()), reversed(rows.tolist()), strict=True):
        if own != row:
            delta, carried = float(rewards[own]) - value, 0.0
        else:
            delta = gamma * following - value
        carried = delta + gamma * lam * carried
        row, following = own, value
        advantages.append(carried)
    return torch.tensor(advantages[::-1], dtype=torch.float64)


def variance(count: float, total: float, squares: float) -> float:
    """Unbiased, of `count` numbers with this sum and this sum of squares; 0 where there are fewer
    than two."""
    return max(0.0, squares - total**2 / count) / (count - 1) if count > 1 else 0.0


def whiten(advantages: Tensor, count: float, total: float, squares: float) -> Tensor:
    """[K] with mean 0 and variance 1 over the WHOLE batch, whose count, sum and sum of squares
    these are."""
    spread = math.sqrt(variance(count, total, squares) + 1e-8)
    return (advantages - total / max(1.0, count)) / spread


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None, denominator: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error, summed and divided by `denominator`; the worse of the value and of
    the value kept within `clip` of the old one counts, so that one batch of rollouts cannot move
    the critic further than that.

    Args:
        values: [K], with gradient.
        old_values: [K] before the first update on the batch.
        returns: [K].
        clip: None does not clip.
        denominator: of the WHOLE batch, so that the gradient does not depend on the micro-batches.

    Returns:
        The loss to add up over micro-batches, and the number of values whose gradient the clip
        takes away.
    """
    errors = (values - returns) ** 2
    if clip is None:
        return 0.5 * errors.sum() / denominator, torch.zeros_like(errors).sum()
    bounded = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
    loss = 0.5 * torch.maximum(errors, bounded).sum() / denominator
    return loss, (bounded > errors).sum().detach()
