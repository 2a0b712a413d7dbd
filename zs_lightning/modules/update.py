"""From judged rollouts to optimiser steps: a plain object that PolicyRL composes.

A rollout step becomes micro-batches once (`prepare`), which carry all that is fixed before the
first update: advantages, the reference's log-probabilities, the critic's values. Each update
(`step`) then is forward, loss and backward over these, one sum of gradients over ranks, and one
optimiser step.

Every rank has judged all trajectories; it makes micro-batches of its own share only. Denominators
are of the whole step, so that neither micro-batches nor ranks change the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zs_lightning.errors import RunError
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.models.value_head import adapter_in_use, trained_as_before
from zs_lightning.modules.critic import Critic
from zs_lightning.modules.ranks import add_up, own_share, sum_gradients, sum_metrics
from zs_lightning.rl.advantages import Estimator, set_advantages
from zs_lightning.rl.losses import LossSpec, loss_denominator, micro_batch_loss
from zs_lightning.rollout.collate import collate, micro_batches
from zs_lightning.rollout.rollouter import RolloutSpec
from zs_lightning.types import MicroBatch, Trajectory

REFERENCE = "reference"
"""peft's name of the frozen copy of an adapter that is trained on."""
SKIPPED_STEPS = 3
"""Steps in a row with gradients that are not finite before the run is stopped."""


@dataclass
class Prepared:
    """A rollout step as this rank updates on it."""

    batches: list[MicroBatch]
    """This rank's share."""
    tokens: int
    """Trained tokens of all ranks."""
    denominator: int
    """Of the whole step's loss."""
    has_signal: bool
    """Whether any rank has something to learn from."""
    metrics: dict[str, float]
    """What the critic says of the step."""


class Update:
    """Updates a policy on its own rollouts.

    Args:
        policy: the model, whose trainable weights are in the optimiser.
        loss: how tokens make one loss.
        rollout: whose temperature the log-probabilities are of.
        estimator: how rewards become advantages; None where a critic makes them.
        critic: of estimator ppo.
        frozen: the reference model where all weights of the policy are trained.
        is_clipped: whether several updates follow each other on one batch of rollouts.
        micro_batch_tokens: most padded tokens of a forward and backward pass.
        pad_id: fills rows up; any token will do.
    """

    def __init__(
        self,
        policy: Any,
        loss: LossSpec,
        rollout: RolloutSpec,
        estimator: Estimator | None,
        critic: Critic | None,
        frozen: Any,
        is_clipped: bool,
        micro_batch_tokens: int,
        pad_id: int,
    ) -> None:
        self.policy = policy
        self.loss = loss
        self.rollout = rollout
        self.estimator = estimator
        self.critic = critic
        self.frozen = frozen
        self.is_clipped = is_clipped
        self.micro_batch_tokens = micro_batch_tokens
        self.pad_id = pad_id

    def prepare(self, usable: Sequence[Trajectory], device: torch.device | str) -> Prepared:
        """Micro-batches with all that is fixed before the first update.

        Args:
            usable: the judged trajectories of all ranks, without failed ones, which nobody learns
                from and which are no one's baseline.
        """
        if self.estimator is not None:
            set_advantages(usable, self.estimator)
        rows = list(usable)
        if self.critic is None and self.loss.kl_coef == 0:
            # Without an advantage there is nothing to learn from a row, but it counts in the mean.
            rows = [row for row in rows if row.advantage != 0]
        # Each rank cuts its own share; no rank needs to know how the others cut theirs.
        parts = micro_batches(own_share(rows), self.micro_batch_tokens)
        batches = [collate(part, self.pad_id, device) for part in parts]
        metrics = {}
        if self.critic is not None:
            metrics = self.critic.evaluate(batches, usable)
        if self.loss.kl_coef > 0:
            # Once: it is frozen. Without dropout, which an adapter that is trained on may have.
            was_training = self.policy.training
            self.policy.eval()
            for batch in batches:
                batch.ref_logprobs = self.reference_logprobs(batch)
            self.policy.train(was_training)
        # Of all usable rows, also of those that were left out for having no advantage.
        tokens = max(1, sum(sum(row.loss_mask) for row in usable))
        turns = (self.rollout.max_turns + 1) * self.rollout.max_new_tokens
        budget = min(turns, self.rollout.max_length)
        denominator = loss_denominator(self.loss.mean, tokens, len(usable), budget)
        return Prepared(batches, tokens, denominator, bool(rows), metrics)

    def step(
        self,
        prepared: Prepared,
        weights: Iterable[torch.nn.Parameter],
        take: Callable[[], list[float]],
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> dict[str, float]:
        """One optimiser step on the whole batch of rollouts.

        Args:
            weights: those that are trained.
            take: steps the optimiser; returns the norm of each of its groups' gradients.
            backward: of a loss; Lightning's calls the hooks of callbacks.

        Returns:
            Metrics: sums over the trained tokens of all ranks, or maxima where the name ends in
                _max.
        """
        sums: dict[str, float] = {}
        for batch in prepared.batches:
            sum_metrics(sums, self._backward(batch, prepared, backward))
        # Summed, not averaged: the denominator is of the whole step already.
        sum_gradients(weights)
        sums = add_up(sums)
        # A step without any gradient would still decay weights and move moments.
        norms = take() if prepared.has_signal else [0.0]
        return sums | dict(zip(("grad_norm", "value_grad_norm"), norms, strict=False))

    def _backward(
        self,
        batch: MicroBatch,
        prepared: Prepared,
        backward: Callable[[Tensor], None],
    ) -> dict[str, Any]:
        """Adds the micro-batch's gradients to those that are there; returns its metrics."""
        tensors = (batch.input_ids, batch.loss_mask, self.rollout.temperature)
        logprobs, entropy = token_logprobs(self.policy, *tensors)
        if self.loss.importance_cap is not None and batch.first_logprobs is None:
            # The first update computes them anyway, so that no pass of their own is needed.
            batch.first_logprobs = logprobs.detach()
        whole = (self.loss, self.is_clipped, prepared.denominator)
        loss, metrics = micro_batch_loss(batch, logprobs, *whole)
        backward(loss)
        sums: dict[str, Any] = {**metrics, "entropy": entropy.sum(), "tokens": len(logprobs)}
        if self.critic is not None:
            # The backward pass too: checkpointing computes the forward again, with whichever
            # adapter is on by then.
            with self.critic.model.in_use():
                loss, more = self.critic.loss(batch, prepared.tokens)
                backward(loss)
            sums |= more
        return sums

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> Tensor:
        """[K] under what training began with: the adapter switched off, or a frozen copy of the
        adapter or of the whole model. At the temperature of the rollouts, as the policy's."""
        tensors = (batch.input_ids, batch.loss_mask, self.rollout.temperature)
        if self.frozen is not None:
            return token_logprobs(self.frozen, *tensors)[0]
        if REFERENCE in self.policy.peft_config:
            with adapter_in_use(self.policy, REFERENCE):
                return token_logprobs(self.policy, *tensors)[0]
        with trained_as_before(self.policy), self.policy.disable_adapter():
            return token_logprobs(self.policy, *tensors)[0]


class OptimiserStep:
    """Clips gradients and steps.

    Args:
        max_grad_norm: most norm of each group's gradient; 0 does not clip.
    """

    def __init__(self, max_grad_norm: float) -> None:
        self.most = max_grad_norm or math.inf
        self.skipped = 0
        self.had_gradients = False

    def __call__(self, optimizer: Any) -> list[float]:
        """Returns the norm of each group's gradient before it is clipped.

        A gradient that is not finite is dropped with its step: clipping would make every weight
        NaN.

        Raises:
            RunError: that happened in several steps in a row.
        """
        norms = []
        for group in optimizer.param_groups:
            norms.append(float(torch.nn.utils.clip_grad_norm_(group["params"], self.most)))
        if all(map(math.isfinite, norms)):
            self.skipped = 0
            self.had_gradients = self.had_gradients or norms[0] > 0
            optimizer.step()
        else:
            self.skipped += 1
            if self.skipped >= SKIPPED_STEPS:
                raise RunError(f"gradients were not finite {self.skipped} steps in a row; lower the learning rate")
        optimizer.zero_grad()
        return norms
