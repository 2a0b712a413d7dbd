"""From judged rollouts to optimiser steps: a plain object that PolicyRL composes.

A rollout step becomes micro-batches once (`prepare`), which carry all that is fixed before the
first update: advantages, the reference's log-probabilities, the critic's values. Each update
(`step`) then is forward, loss and backward over these, one sum of gradients over ranks, and one
optimiser step.

Every rank has judged all trajectories; it makes micro-batches of its own share only. Denominators
are of the whole step, so that neither micro-batches nor ranks change the gradient.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zs_lightning.errors import NotFiniteError, RunError
from zs_lightning.generation.memory import Fitting, completes
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.models.value_head import adapter_in_use, trained_as_before
from zs_lightning.modules.accidents import within_memory
from zs_lightning.modules.critic import Critic
from zs_lightning.modules.ranks import add_up, own_share, sum_gradients, sum_metrics
from zs_lightning.rl.advantages import Estimator, set_advantages
from zs_lightning.rl.choice import deepest, depth
from zs_lightning.rl.losses import LossSpec, is_kept, loss_denominator, micro_batch_loss
from zs_lightning.rollout.collate import collate, micro_batches, recut, row_length
from zs_lightning.rollout.rollouter import RolloutSpec, Tell
from zs_lightning.types import MicroBatch, Trajectory

REFERENCE = "reference"
"""peft's name of the frozen copy of an adapter that is trained on."""


@dataclass
class Prepared:
    """A rollout step as this rank updates on it."""

    batches: list[MicroBatch]
    """This rank's share."""
    lengths: list[int]
    """Of the rows of all ranks."""
    tokens: int
    """Trained tokens of all ranks."""
    denominator: int
    """Of the whole step's loss."""
    metrics: dict[str, float]
    """What the critic, and the choice of what is trained on, say of the step."""


@dataclass(eq=False, repr=False)
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
        fitting: most padded tokens of a forward and backward pass.
        pad_id: fills rows up; any token will do.
        tell: is told how far the passes before the first update are.
    """

    policy: Any
    loss: LossSpec
    rollout: RolloutSpec
    estimator: Estimator | None
    critic: Critic | None
    frozen: Any
    is_clipped: bool
    fitting: Fitting
    pad_id: int
    tell: Tell
    counted: dict[str, int] = field(default_factory=dict)
    """Tokens of this rank's micro-batches of the last step: trained, read, and with padding."""

    def prepare(self, usable: Sequence[Trajectory], device: torch.device | str) -> Prepared:
        """Micro-batches with all that is fixed before the first update.

        Args:
            usable: the judged trajectories of all ranks, without failed ones, which nobody learns
                from and which are no one's baseline.

        Raises:
            NotFiniteError: rewards or the critic's values, on every rank alike.
        """
        if self.estimator is not None:
            set_advantages(usable, self.estimator)
        # Baselines are of all. From here on the step is the chosen ones: the loss is their mean, so
        # that a share does not make the step smaller, and a critic learns from the same.
        chosen = deepest(usable, self.loss.deepest_share)
        rows = self._learnt_from(chosen)
        lengths = [row_length(row) for row in rows]
        batches = within_memory(self.fitting, lengths, partial(self._batches, own_share(rows), device))
        self.counted = {
            "trained": sum(len(batch.rows) for batch in batches),
            "read": sum(map(row_length, own_share(rows))),
            "padded": sum(batch.input_ids.numel() for batch in batches),
        }
        metrics = {}
        if self.critic is not None:
            metrics = self.critic.evaluate(batches, chosen)
        if self.loss.deepest_share < 1:
            metrics["chosen/share"] = len(chosen) / max(1, len(usable))
            metrics["chosen/searches"] = sum(map(depth, chosen)) / max(1, len(chosen))
        # Also of those that were left out for having no advantage.
        tokens = max(1, sum(sum(row.loss_mask) for row in chosen))
        turns = (self.rollout.max_turns + 1) * self.rollout.max_new_tokens
        budget = min(turns, self.rollout.max_length)
        denominator = loss_denominator(self.loss.mean, tokens, len(chosen), budget)
        return Prepared(batches, lengths, tokens, denominator, metrics)

    def _learnt_from(self, chosen: list[Trajectory]) -> list[Trajectory]:
        """Those that give a gradient; the others count in the mean all the same."""
        if self.critic is not None or self.loss.kl_coef > 0:
            return chosen
        signal = [row for row in chosen if row.advantage != 0]
        # Where nothing has an advantage nothing moves, and there is nothing to hold.
        if self.loss.likelihood_coef == 0 or not signal:
            return signal
        return [row for row in chosen if row.advantage != 0 or is_kept(row)]

    def _batches(self, own: Sequence[Trajectory], device: torch.device | str, tokens: int) -> list[MicroBatch]:
        """This rank's micro-batches of at most so many tokens, with what frozen weights and the
        critic say of them."""
        # Each rank cuts its own share; no rank needs to know how the others cut theirs.
        batches = [collate(part, self.pad_id, device) for part in micro_batches(own, tokens)]
        if self.critic is not None:
            for number, batch in enumerate(batches):
                self.tell("values", number, len(batches), 0)
                self.critic.set_values(batch)
        if self.loss.kl_coef > 0:
            # Once: it is frozen. Without dropout, which an adapter that is trained on may have.
            self.policy.eval()
            for number, batch in enumerate(batches):
                self.tell("reference", number, len(batches), 0)
                batch.ref_logprobs = self.reference_logprobs(batch)
        return batches

    def step(
        self,
        prepared: Prepared,
        weights: Collection[torch.nn.Parameter],
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

        Raises:
            NotFiniteError: the loss, or what `take` raises; no weight has changed.
        """

        # In eval mode, as rollouts leave it, dropout and checkpointing do nothing.
        self.policy.train()

        def attempt(tokens: int) -> dict[str, float]:
            for weight in weights:
                weight.grad = None
            prepared.batches = recut(prepared.batches, tokens)
            sums: dict[str, float] = {}
            for batch in prepared.batches:
                sum_metrics(sums, self._backward(batch, prepared, backward))
            return sums

        sums = add_up(within_memory(self.fitting, prepared.lengths, attempt))
        if not math.isfinite(sums.pop("loss", 0.0)):
            raise NotFiniteError("the loss was not finite; lower the learning rate, or use precision 32-true")
        # Summed, not averaged: the denominator is of the whole step already.
        sum_gradients(weights)
        # A step without any gradient would still decay weights and move moments.
        norms = take() if prepared.lengths else [0.0]
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
        needs_first = self.loss.importance_cap is not None or self.loss.likelihood_coef > 0
        if needs_first and batch.first_logprobs is None:
            # The first update computes them anyway, so that no pass of their own is needed.
            batch.first_logprobs = logprobs.detach()
        whole = (self.loss, self.is_clipped, prepared.denominator)
        loss, metrics = micro_batch_loss(batch, logprobs, *whole)
        backward(loss)
        sums: dict[str, Any] = {**metrics, "entropy": entropy.sum(), "tokens": len(logprobs)}
        sums["loss"] = loss.detach()
        if self.critic is not None:
            # The backward pass too: checkpointing computes the forward again, with whichever
            # adapter is on by then.
            with self.critic.model.in_use():
                loss, more = self.critic.loss(batch, prepared.tokens)
                backward(loss)
            sums |= more
            sums["loss"] += loss.detach()
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
    """Clips each group's gradient to the norm, which 0 does not, and steps."""

    def __init__(self, max_grad_norm: float) -> None:
        self.most = max_grad_norm or math.inf
        self.had_gradients = False
        self.taken = 0

    def __call__(self, optimizer: Any) -> list[float]:
        """Returns the norm of each group's gradient before it is clipped.

        Raises:
            NotFiniteError: a gradient; clipping would make every weight NaN. No weight has changed.
            RunError: memory is full, as it can be at the first step, which makes AdamW's moments.
        """
        clip, groups = torch.nn.utils.clip_grad_norm_, optimizer.param_groups
        norms = [float(clip(group["params"], self.most)) for group in groups]
        if not all(map(math.isfinite, norms)):
            raise NotFiniteError("gradients were not finite; lower the learning rate")
        self.had_gradients = self.had_gradients or norms[0] > 0
        # Not again with less at a time: some of the weights have moved.
        if not completes(optimizer.step):
            change = "train less with model.lora (a lower r), set model.model.quantization: nf4, or another model.optimizer"
            raise RunError(f"memory is full in the optimizer's step, whose state has no room; {change}")
        self.taken += 1
        optimizer.zero_grad()
        return norms
