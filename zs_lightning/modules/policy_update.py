"""The update side of PolicyRL: from judged rollouts to optimiser steps."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zs_lightning.generation import Sampling
from zs_lightning.models.loading import LoraSpec
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.models.value_head import adapter_in_use, of_critic, trained_as_before
from zs_lightning.modules.critic import Critic, CriticSpec
from zs_lightning.modules.ranks import add_up, own_share, sum_gradients, together
from zs_lightning.modules.step_metrics import step_metrics
from zs_lightning.modules.trainable import TrainableModule
from zs_lightning.rl.losses import LossSpec, loss_denominator
from zs_lightning.rl.surrogate import Tokens, surrogate_loss
from zs_lightning.rollout import RolloutSpec, collate, micro_batches
from zs_lightning.streams import derive_seed
from zs_lightning.types import QAExample, Trajectory, TrajectoryBatch

REFERENCE = "reference"
"""peft's name of the frozen copy of an adapter that is trained on."""


class PolicyUpdate(TrainableModule, ABC):
    """A module that trains a policy on its own rollouts. What is declared here is set by the subclass."""

    policy: Any
    tokenizer: Any
    lora: LoraSpec | None
    frozen: list[Any]
    critic: Critic | None
    critic_spec: CriticSpec
    limits: RolloutSpec
    group_size: int
    updates_per_rollout: int
    micro_batch_tokens: int
    clip: tuple[float, float] | None
    kl_coef: float
    objective: LossSpec
    noise_prob: float
    rollout_step: int
    trajectories: list[Trajectory]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.first_logprobs: dict[int, Tensor] = {}
        """Of each micro-batch's trained tokens, before the first update on a batch of rollouts; for importance_cap."""

    @abstractmethod
    def roll_out(self, examples: list[QAExample], group_size: int, seed: int, sampling: Sampling | None) -> list[Trajectory]:
        """`group_size` trajectories of each example."""

    @abstractmethod
    def judge(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Sets rewards and advantages; returns the trajectories to learn from."""

    def training_step(self, batch: list[QAExample], batch_idx: int) -> None:
        start = time.monotonic()
        seed = derive_seed(self.seed, "rollout", self.rollout_step)
        self.trajectories = together(self.roll_out(own_share(batch), self.group_size, seed, None), self.group_size)
        rolled_out = time.monotonic()
        usable = self.judge(self.trajectories)
        self.first_logprobs.clear()
        sums: dict[str, float] = {}
        with self.seeded(self.rollout_step):
            metrics = self.critic.evaluate(self.own_batches(usable), usable) if self.critic is not None else {}
            for _ in range(self.updates_per_rollout):
                sums = self.update(usable)
        self.step_scheduler()
        seconds = {"rollout": rolled_out - start, "update": time.monotonic() - rolled_out}
        self.log_dict(step_metrics(self.trajectories, sums, self.noise_prob, seconds) | metrics)
        self.log("reward", sum(t.reward for t in usable) / max(1, len(usable)), prog_bar=True, logger=False)
        self.log("noise", self.noise_prob, prog_bar=True, logger=False)
        self.rollout_step += 1

    def own_batches(self, rows: Sequence[Trajectory]) -> Iterator[tuple[list[Trajectory], TrajectoryBatch]]:
        """This rank's micro-batches."""
        for micro_batch in micro_batches(own_share(rows), self.micro_batch_tokens):
            yield micro_batch, collate(micro_batch, self.tokenizer.eos_token_id, self.device)

    def update(self, usable: list[Trajectory]) -> dict[str, float]:
        """One optimiser step; the denominator is of all usable trajectories."""
        tokens = max(1, sum(sum(t.loss_mask) for t in usable))
        budget = min((self.limits.max_turns + 1) * self.limits.max_new_tokens, self.limits.max_length)
        denominator = loss_denominator(self.objective.mean, tokens, len(usable), budget)
        rows = [t for t in usable if self.critic is not None or self.kl_coef > 0 or t.advantage != 0]
        sums: dict[str, float] = {}
        for number, (_, batch) in enumerate(self.own_batches(rows)):
            loss, metrics = self.loss(batch, denominator, number)
            self.manual_backward(loss)
            if self.critic is not None:
                with self.critic.model.in_use():
                    loss, more = self.critic.loss(batch, number, tokens)
                    self.manual_backward(loss)
                metrics |= more
            for name, value in metrics.items():
                before = sums.get(name, 0.0)
                sums[name] = max(before, float(value)) if name.endswith("_max") else before + float(value)
        sum_gradients(self.trainable().values())
        sums = add_up(sums) | {"trained_tokens": float(tokens)}
        norms = self.optimise() if rows else [0.0]
        return sums | dict(zip(("grad_norm", "value_grad_norm"), norms, strict=False))

    def loss(self, batch: TrajectoryBatch, denominator: float, number: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The part of the loss of micro-batch `number`, and metrics: sums over its trained tokens, or their maximum."""
        logprobs, entropy = token_logprobs(self.policy, batch.input_ids, batch.loss_mask, self.limits.temperature)
        trained = batch.loss_mask[:, 1:]
        rows = torch.arange(len(trained), device=trained.device)[:, None].expand_as(trained)[trained]
        tokens = Tokens(
            logprobs=logprobs,
            sampled_logprobs=batch.old_logprobs[:, 1:][trained],
            advantages=batch.advantages[rows] if self.critic is None else self.critic.targets[number].advantages,
            rows=rows,
        )
        if self.objective.importance_cap is not None:
            # The first update computes them, so that no further pass over the batch is needed.
            tokens.first_logprobs = self.first_logprobs.setdefault(number, logprobs.detach())
        if self.kl_coef > 0:
            tokens.ref_logprobs = self.reference_logprobs(batch)
        loss, metrics = surrogate_loss(tokens, self.objective, self.clip, self.kl_coef, denominator)
        return loss, {**metrics, "entropy": entropy.sum(), "tokens": len(logprobs)}

    @torch.no_grad()
    def reference_logprobs(self, batch: TrajectoryBatch) -> Tensor:
        """[K] under what training began with: the adapter switched off, or a frozen copy of the adapter or the model."""
        tensors = (batch.input_ids, batch.loss_mask, self.limits.temperature)
        if self.lora is None:
            return token_logprobs(self.frozen[0], *tensors)[0]
        if REFERENCE in self.policy.peft_config:
            with adapter_in_use(self.policy, REFERENCE):
                return token_logprobs(self.policy, *tensors)[0]
        with trained_as_before(self.policy), self.policy.disable_adapter():
            return token_logprobs(self.policy, *tensors)[0]

    def parameter_groups(self) -> list[tuple[dict[str, Any], int]]:
        if self.critic is None:
            return super().parameter_groups()
        policy, critic = ([p for n, p in self.trainable().items() if of_critic(n) == mine] for mine in (False, True))
        spec = self.critic_spec
        return [({"params": policy}, self.warmup_steps), ({"params": critic, "lr": spec.lr}, spec.warmup_steps)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["rollout_step"] = self.rollout_step
