"""The policy-gradient loss. K trained tokens of a micro-batch, flattened row by row; the denominator is the whole batch's.

Sums over micro-batches are the whole batch's loss, whatever the split, as long as a trajectory stays in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zs_lightning.errors import UserError


@dataclass(frozen=True)
class LossSpec:
    """How the tokens of a batch of rollouts make one loss.

    Args:
        mean: `token` over all sampled tokens of the batch; `sequence` over each rollout's tokens, then over rollouts, so that
            each rollout counts the same (GRPO, arXiv 2402.03300); `constant` divides by rollouts and by the most tokens that
            a rollout may sample, so that no length is preferred (Dr. GRPO, arXiv 2503.20783: with estimator grpo_no_std).
        ratio: to the sampling policy, of which the clip bounds are; of each `token`, or of each `sequence`: the geometric mean
            over its tokens (GSPO, arXiv 2507.18071; its bounds are far narrower: clip_low 3e-4, clip_high 4e-4).
        dual_clip: most that the ratio counts where the advantage is negative, above 1 + clip_high (arXiv 1912.09729 uses 3).
        importance_cap: weighs each token by how much likelier it is when trained than when it was sampled, at most by this
            (truncated importance sampling). For a policy that is quantised or in low precision when it samples; the mismatch
            is logged as policy/sampling_gap.
    """

    mean: Literal["token", "sequence", "constant"] = "token"
    ratio: Literal["token", "sequence"] = "token"
    dual_clip: float | None = None
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise UserError(f"loss.importance_cap: expected a number above 0, or null; got {self.importance_cap}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise UserError(f"loss.dual_clip: expected a number above 1 + clip_high, or null; got {self.dual_clip}")


def loss_denominator(mean: str, tokens: int, rollouts: int, budget: int) -> int:
    """What the sum over a batch is divided by.

    Args:
        mean: as in LossSpec.
        tokens: trained tokens of the whole batch.
        rollouts: of the whole batch, those without a trained token or an advantage among them.
        budget: most tokens that a rollout may sample.
    """
    return max(1, {"token": tokens, "sequence": rollouts, "constant": rollouts * budget}[mean])


def row_sizes(rows: Tensor) -> Tensor:
    """[K] int64 for each token, the number of its row's tokens. rows [K] int64: each token's row in the micro-batch."""
    return torch.bincount(rows)[rows]


def row_means(values: Tensor, rows: Tensor) -> Tensor:
    """[K] for each token, the mean of its row's values. values [K], rows [K] int64."""
    sums = values.new_zeros(int(rows.max()) + 1 if len(rows) else 0).index_add(0, rows, values)
    return sums[rows] / row_sizes(rows)


def importance_weights(train_logprobs: Tensor, sampled_logprobs: Tensor, cap: float) -> Tensor:
    """min(p_train / p_sampled, cap) of each token, without gradient: truncated importance sampling (Ionides 2008).

    Args:
        train_logprobs: [K] of the policy that sampled, as the training forward computes them.
        sampled_logprobs: [K] as the generator computed them.
        cap: above 0.
    """
    # Beyond 20 the exponential may overflow before it is cut off.
    return (train_logprobs - sampled_logprobs).detach().clamp(max=20).exp().clamp(max=cap)


def sampling_gap(logprobs: Tensor, sampled_logprobs: Tensor) -> dict[str, Tensor]:
    """How far the policy has gone from the distribution that was sampled: sum and maximum of |difference| over tokens."""
    gap = (logprobs - sampled_logprobs).detach().abs()
    return {"sampling_gap": gap.sum(), "sampling_gap_max": gap.max() if len(gap) else gap.sum()}


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token k3 estimate of KL(policy || reference), never negative: exp(d) - 1 - d with d = ref - policy.

    Args:
        logprobs: [K], with gradient.
        ref_logprobs: [K].
    """
    # Beyond 20 the exponential overflows the batch.
    difference = (ref_logprobs - logprobs).clamp(-20, 20)
    # exp(d) - 1 in one step: in two, rounding makes small distances negative.
    return difference.expm1() - difference


def policy_gradient_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    denominator: float,
    clip_low: float | None = None,
    clip_high: float | None = None,
    *,
    dual_clip: float | None = None,
    sequences: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum_k w_k · A_k · ratio_k / denominator, with PPO's pessimistic clip (arXiv 1707.06347, equation 7) if bounds are given.

    Without bounds the ratio is 1 in value and the gradient is that of A·log p (REINFORCE on fresh samples).

    Args:
        logprobs: [K] of the trained tokens, with gradient.
        old_logprobs: [K] of the policy that sampled.
        advantages: [K], each token's trajectory's.
        denominator: of the WHOLE batch, so that the gradient does not depend on the micro-batches.
        clip_low: ratio is kept above 1 - clip_low.
        clip_high: ratio is kept below 1 + clip_high.
        dual_clip: most that the ratio counts where the advantage is negative.
        sequences: [K] int64, each token's row, for the ratio of the row (GSPO, equation 7); None for each token's own.
        weights: [K] without gradient; None is 1.

    Returns:
        The loss to add up over micro-batches, and the number of clipped tokens.
    """
    if clip_low is None or clip_high is None:
        ratio = (logprobs - logprobs.detach()).exp()
        objective, clipped = ratio * advantages, torch.zeros_like(advantages)
    else:
        log_ratio = logprobs - old_logprobs
        if sequences is not None:
            log_ratio = row_means(log_ratio, sequences)
        # Beyond 20 the ratio overflows, and infinity times an advantage of 0 is NaN.
        ratio = log_ratio.clamp(max=20).exp()
        bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
        counted = ratio if dual_clip is None else ratio.clamp(max=dual_clip)
        objective = torch.minimum(counted * advantages, bounded * advantages)
        clipped = (objective != ratio * advantages).float()
    if weights is not None:
        objective = objective * weights
    return -objective.sum() / denominator, {"clip_fraction": clipped.sum().detach()}


def kl_penalty(
    logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float, denominator: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """kl_coef · sum_k w_k · k3_k / denominator, to be ADDED to the loss (the reference subtracts it), and sum_k k3_k."""
    estimate = kl_estimate(logprobs, ref_logprobs)
    weighted = estimate if weights is None else estimate * weights
    return kl_coef * weighted.sum() / denominator, estimate.sum().detach()
