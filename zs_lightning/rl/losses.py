"""The policy-gradient loss. K trained tokens of a micro-batch, flattened; the denominator is the whole batch's."""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum_k A_k · ratio_k / denominator, with PPO's pessimistic clip if bounds are given.

    Without bounds the ratio is 1 in value and the gradient is that of A·log p (REINFORCE on fresh samples).

    Args:
        logprobs: [K] of the trained tokens, with gradient.
        old_logprobs: [K] at sampling time.
        advantages: [K], each token's trajectory's.
        denominator: trained tokens of the WHOLE batch, so that the gradient does not depend on the micro-batches.
        clip_low: ratio is kept above 1 - clip_low.
        clip_high: ratio is kept below 1 + clip_high.

    Returns:
        The loss to add up over micro-batches, and sums over the K tokens of metrics (divide by the denominator).
    """
    log_ratio = logprobs - old_logprobs
    if clip_low is None or clip_high is None:
        ratio = (logprobs - logprobs.detach()).exp()
        objective, clipped = ratio * advantages, torch.zeros_like(advantages)
    else:
        # Beyond 20 the ratio overflows, and infinity times an advantage of 0 is NaN.
        ratio = log_ratio.clamp(max=20).exp()
        bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
        objective = torch.minimum(ratio * advantages, bounded * advantages)
        clipped = (bounded * advantages < ratio * advantages).float()
    metrics = {
        "clip_fraction": clipped.sum().detach(),
        "sampling_gap": log_ratio.detach().abs().sum(),
    }
    return -objective.sum() / denominator, metrics


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float, denominator: float) -> tuple[Tensor, Tensor]:
    """kl_coef · sum_k k3_k / denominator, to be ADDED to the loss (the reference subtracts it), and sum_k k3_k."""
    estimate = kl_estimate(logprobs, ref_logprobs)
    return kl_coef * estimate.sum() / denominator, estimate.sum().detach()
