"""The loss of a micro-batch, put together from the parts in losses.py as the config says."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zs_lightning.rl.losses import (
    LossSpec,
    importance_weights,
    kl_penalty,
    policy_gradient_loss,
    row_sizes,
    sampling_gap,
)


@dataclass(kw_only=True)
class Tokens:
    """The K trained tokens of a micro-batch, row by row. All but `rows` are floats [K]."""

    logprobs: Tensor
    """Of the policy, with gradient."""
    sampled_logprobs: Tensor
    """As the generator computed them when it sampled."""
    advantages: Tensor
    rows: Tensor
    """int64, each token's row in the micro-batch. A trajectory is never spread over micro-batches."""
    first_logprobs: Tensor | None = None
    """Of the policy before the first update on this batch, for importance_cap."""
    ref_logprobs: Tensor | None = None
    """Of the reference policy, if KL has a weight."""


def surrogate_loss(
    tokens: Tokens, spec: LossSpec, clip: tuple[float, float] | None, kl_coef: float, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The micro-batch's part of the loss.

    Args:
        clip: the ratio is kept between 1 - clip[0] and 1 + clip[1]; None in the only update on a batch.
        denominator: loss_denominator of the whole batch.

    Returns:
        The loss to add up over micro-batches, and metrics: sums over tokens, but for sampling_gap_max.
    """
    low, high = clip or (None, None)
    shares = 1 / row_sizes(tokens.rows).to(tokens.logprobs.dtype) if spec.mean == "sequence" else None
    weights, old_logprobs = shares, tokens.sampled_logprobs
    metrics = sampling_gap(tokens.logprobs, tokens.sampled_logprobs)
    if spec.importance_cap is not None and tokens.first_logprobs is not None:
        old_logprobs = tokens.first_logprobs
        importance = importance_weights(old_logprobs, tokens.sampled_logprobs, spec.importance_cap)
        weights = importance if shares is None else importance * shares
        metrics["importance_weight"] = importance.sum()
    loss, clipped = policy_gradient_loss(
        tokens.logprobs,
        old_logprobs,
        tokens.advantages,
        denominator,
        low,
        high,
        dual_clip=spec.dual_clip,
        sequences=tokens.rows if spec.ratio == "sequence" else None,
        weights=weights,
    )
    metrics |= {**clipped, "policy_loss": loss.detach()}
    if tokens.ref_logprobs is not None:
        penalty, metrics["kl"] = kl_penalty(tokens.logprobs, tokens.ref_logprobs, kl_coef, denominator, shares)
        loss = loss + penalty
    return loss, metrics
