"""The policy-gradient loss of a micro-batch and its parts.

K is the number of trained tokens of a micro-batch, flattened row by row; a row is a trajectory. The
denominator is the whole batch's, so sums over micro-batches are the whole batch's loss, whatever
the split, as long as a trajectory stays in one piece.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zs_lightning.errors import UserError, check_least
from zs_lightning.types import MicroBatch, Trajectory

MOST_LOG_RATIO = 20.0
"""The exponential of more overflows, and infinity times an advantage of 0 is NaN."""


@dataclass(frozen=True)
class LossSpec:
    """How the tokens of a batch of rollouts make one loss.

    Args:
        mean: `token` over all sampled tokens of the batch; `sequence` over each rollout's tokens,
            then over rollouts, so that each rollout counts the same (GRPO, arXiv 2402.03300);
            `constant` divides by rollouts and by the most tokens that a rollout may sample, so that
            no length is preferred (Dr. GRPO, arXiv 2503.20783: with estimator grpo_no_std).
        ratio: to the sampling policy, of which the clip bounds are; of each `token`, or of each
            `sequence`: the geometric mean over its tokens (GSPO, arXiv 2507.18071; its bounds are
            far narrower: clip_low 3e-4, clip_high 4e-4).
        clip_low: the ratio is kept above 1 - clip_low. Both bounds count with updates_per_rollout
            above 1 only; the one update on fresh rollouts has a ratio of 1.
        clip_high: the ratio is kept below 1 + clip_high.
        dual_clip: most that the ratio counts where the advantage is negative, above 1 + clip_high
            (arXiv 1912.09729 uses 3).
        importance_cap: weighs each token by how much likelier it is when trained than when it was
            sampled, at most by this (truncated importance sampling). For a policy that is quantised
            or in low precision when it samples; the mismatch is logged as policy/sampling_gap.
        kl_coef: weight of KL(policy || reference), the policy before training; 0 skips its pass.
        likelihood_coef: weight of what keeps right rollouts from becoming less likely (LLDS, arXiv
            2512.04220, with 0.1 to 0.2), see likelihood_loss; for updates_per_rollout above 1 only.
        deepest_share: share of a step's rollouts that are trained on: those that search the most,
            see rl/choice.py (CuSearch, arXiv 2605.11611); 1 is all.
    """

    mean: Literal["token", "sequence", "constant"] = "token"
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    importance_cap: float | None = None
    kl_coef: float = 0.0
    likelihood_coef: float = 0.0
    deepest_share: float = 1.0

    def __post_init__(self) -> None:
        check_least(
            "loss",
            clip_low=(self.clip_low, 0),
            clip_high=(self.clip_high, 0),
            kl_coef=(self.kl_coef, 0),
            likelihood_coef=(self.likelihood_coef, 0),
        )
        if not 0 < self.deepest_share <= 1:
            given = self.deepest_share
            raise UserError(f"loss.deepest_share: expected a number above 0, at most 1; got {given:g}")
        if self.importance_cap is not None and not self.importance_cap > 0:
            given = self.importance_cap
            raise UserError(f"loss.importance_cap: expected a number above 0, or null; got {given}")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise UserError(
                f"loss.dual_clip: expected a number above 1 + clip_high = {1 + self.clip_high:g}, or "
                f"null; got {self.dual_clip:g}"
            )

    def check_updates(self, updates_per_rollout: int) -> None:
        """Raises UserError if likelihoods are to be held that no update has lowered yet."""
        if self.likelihood_coef > 0 and updates_per_rollout < 2:
            raise UserError(
                "model.loss.likelihood_coef: nothing has fallen yet in the only update on a batch of "
                "rollouts; set model.updates_per_rollout to 2 or more, or likelihood_coef to 0"
            )


def micro_batch_loss(
    batch: MicroBatch, logprobs: Tensor, spec: LossSpec, is_clipped: bool, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the loss, put together as the spec says.

    Args:
        batch: with advantages [K], and with first_logprobs and ref_logprobs where the spec needs
            them.
        logprobs: [K] of the policy, with gradient.
        is_clipped: whether the bounds count; they do not in the only update on a batch.
        denominator: loss_denominator of the whole batch.

    Returns:
        The loss to add up over micro-batches, and metrics: sums over tokens or rows, but for those
        whose name ends in _max.
    """
    low, high = (spec.clip_low, spec.clip_high) if is_clipped else (None, None)
    # What each token weighs, so that every rollout counts the same.
    shares = None
    if spec.mean == "sequence":
        shares = 1 / row_sizes(batch.rows).to(logprobs.dtype)
    metrics = sampling_gap(logprobs, batch.old_logprobs)
    weights, old_logprobs = shares, batch.old_logprobs
    if spec.importance_cap is not None and batch.first_logprobs is not None:
        # The clip is then around the policy of the first update, and what lies between that and the
        # policy that sampled (another precision) is weighed, not clipped.
        old_logprobs = batch.first_logprobs
        importance = importance_weights(old_logprobs, batch.old_logprobs, spec.importance_cap)
        weights = importance if shares is None else importance * shares
        metrics["importance_weight"] = importance.sum()
    loss, clipped = policy_gradient_loss(
        logprobs,
        old_logprobs,
        batch.advantages,
        denominator,
        low,
        high,
        dual_clip=spec.dual_clip,
        sequences=batch.rows if spec.ratio == "sequence" else None,
        weights=weights,
    )
    metrics |= {**clipped, "policy_loss": loss.detach()}
    if batch.ref_logprobs is not None:
        part = (spec.kl_coef, denominator, shares)
        penalty, metrics["kl"] = kl_penalty(logprobs, batch.ref_logprobs, *part)
        loss = loss + penalty
    if spec.likelihood_coef > 0 and batch.first_logprobs is not None:
        kept = torch.tensor(list(map(is_kept, batch.trajectories)), device=batch.rows.device)
        tokens = (logprobs, batch.first_logprobs, batch.rows, kept[batch.rows])
        penalty, fell = likelihood_loss(*tokens, spec.likelihood_coef, denominator, shares)
        loss, metrics = loss + penalty, metrics | fell
    return loss, metrics


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
    """[K] int64, for each token the number of its row's tokens. rows: [K] int64, each token's
    row."""
    return torch.bincount(rows)[rows]


def row_means(values: Tensor, rows: Tensor) -> Tensor:
    """[K], for each token the mean of its row's values. values: [K]; rows: [K] int64."""
    sums = values.new_zeros(int(rows.max()) + 1 if len(rows) else 0).index_add(0, rows, values)
    return sums[rows] / row_sizes(rows)


def importance_weights(train_logprobs: Tensor, sampled_logprobs: Tensor, cap: float) -> Tensor:
    """[K] min(p_train / p_sampled, cap) without gradient: truncated importance sampling (Ionides
    2008).

    Args:
        train_logprobs: [K] of the policy that sampled, as the training forward computes them.
        sampled_logprobs: [K] as the generator computed them.
        cap: above 0.
    """
    difference = (train_logprobs - sampled_logprobs).detach()
    return difference.clamp(max=MOST_LOG_RATIO).exp().clamp(max=cap)


def sampling_gap(logprobs: Tensor, sampled_logprobs: Tensor) -> dict[str, Tensor]:
    """How far the policy's log-probabilities [K] have gone from those [K] that the generator
    computed: sum and maximum over tokens of the absolute difference, in nats."""
    gap = (logprobs - sampled_logprobs).detach().abs()
    return {"sampling_gap": gap.sum(), "sampling_gap_max": gap.max() if len(gap) else gap.sum()}


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[K] k3 estimate of KL(policy || reference), never negative: exp(d) - 1 - d, d = ref - policy;
    both [K], the policy's with gradient."""
    difference = (ref_logprobs - logprobs).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
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
    """-sum_k w_k · A_k · ratio_k / denominator, with PPO's pessimistic clip if bounds are given.

    The clip is that of arXiv 1707.06347, equation 7. Without bounds the ratio is 1 in value and the
    gradient is that of A·log p (REINFORCE on fresh samples).

    Args:
        logprobs: [K] of the trained tokens, with gradient.
        old_logprobs: [K] of the policy that sampled.
        advantages: [K].
        denominator: of the WHOLE batch, so that the gradient does not depend on the micro-batches.
        clip_low: the ratio is kept above 1 - clip_low.
        clip_high: the ratio is kept below 1 + clip_high.
        dual_clip: most that the ratio counts where the advantage is negative.
        sequences: [K] int64, each token's row, for the ratio of the row (GSPO, equation 7); None
            for each token's own.
        weights: [K] without gradient; None is 1.

    Returns:
        The loss to add up over micro-batches, and the number of clipped tokens.
    """
    if clip_low is None or clip_high is None:
        # 1 in value; written so that its gradient is that of log p.
        ratio = (logprobs - logprobs.detach()).exp()
        objective = ratio * advantages
        clipped = torch.zeros_like(advantages)
    else:
        log_ratio = logprobs - old_logprobs
        if sequences is not None:
            log_ratio = row_means(log_ratio, sequences)
        ratio = log_ratio.clamp(max=MOST_LOG_RATIO).exp()
        bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
        counted = ratio if dual_clip is None else ratio.clamp(max=dual_clip)
        # The smaller one: an advantage is never enlarged by moving the ratio out of its bounds.
        objective = torch.minimum(counted * advantages, bounded * advantages)
        clipped = (objective != ratio * advantages).float()
    if weights is not None:
        objective = objective * weights
    return -objective.sum() / denominator, {"clip_fraction": clipped.sum().detach()}


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kl_coef: float,
    denominator: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """kl_coef · sum_k w_k · k3_k / denominator and sum_k k3_k; logprobs, ref_logprobs, weights:
    [K].

    It is to be ADDED to the loss; the reference code subtracts it, which drives the policy away.
    """
    estimate = kl_estimate(logprobs, ref_logprobs)
    weighted = estimate if weights is None else estimate * weights
    return kl_coef * weighted.sum() / denominator, estimate.sum().detach()


def is_kept(trajectory: Trajectory) -> bool:
    """Whether the trajectory is not to become less likely: it did better than its baseline, or as
    well and earned something.

    LLDS keeps all advantages >= 0, also those of groups without a right answer, which are 0: that
    holds on to wrong answers, at the price of their passes.
    """
    is_equal = trajectory.advantage == 0 and trajectory.reward > 0
    return trajectory.advantage > 0 or is_equal


def likelihood_loss(
    logprobs: Tensor,
    first_logprobs: Tensor,
    rows: Tensor,
    kept: Tensor,
    likelihood_coef: float,
    denominator: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """likelihood_coef · sum_k w_k · max(0, fall_k) / denominator, fall = first_logprobs - logprobs,
    over the kept rows whose falls add up to more than 0 (LLDS, arXiv 2512.04220, gated by
    response).

    What has become likelier in such a row is left alone, and so is a row that has as a whole.

    Args:
        logprobs: [K], with gradient.
        first_logprobs: [K] of the policy before the first update, by the same forward: against
            those of sampling, another precision would count as a fall.
        rows: [K] int64, each token's row.
        kept: [K] bool, whether its row may not become less likely.
        weights: [K] without gradient; None is 1, which with mean `token` is the paper's.

    Returns:
        The loss to add up over micro-batches, and the numbers of kept rows and of those that fell.
    """
    fall = first_logprobs - logprobs
    fell = kept & (row_means(fall.detach(), rows) > 0)
    # Of relu at 0 the gradient is 0: a token that did not move is not pushed.
    penalty = torch.where(fell, fall.relu(), 0.0)
    if weights is not None:
        penalty = penalty * weights
    sizes = row_sizes(rows)
    counts = {"kept_rows": (kept / sizes).sum(), "fallen_rows": (fell / sizes).sum()}
    return likelihood_coef * penalty.sum() / denominator, counts
