"""What estimator ppo adds to an update: advantages of tokens from a critic, and the critic's
loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zs_lightning.errors import NotFiniteError, UserError
from zs_lightning.models.value_head import ValueModel
from zs_lightning.modules.ranks import add_up, own_share, together
from zs_lightning.rl.gae import gae, value_loss, variance, whiten
from zs_lightning.types import MicroBatch, Trajectory


@dataclass(frozen=True)
class CriticSpec:
    """The critic of estimator ppo; no other has one. As in the paper's Table 5, but for this:

    - The critic is a second LoRA adapter on the policy's base, of the policy's rank, with a linear
      head; the paper has a second model, which a workstation has no room for. A head alone on the
      policy's own states would cost no pass of its own, but could only read off what the policy
      happens to know of its success, and every update of the policy would move it. An adapter is
      learnt apart: the policy does not feel it, and memory grows by what an adapter and its
      optimizer take. It costs a forward pass before the first update and a forward and backward
      pass in each.
    - Documents carry no value and no advantage: a token after a document follows the last sampled
      one before it.
    - KL is in the loss (loss.kl_coef), not in the reward.

    To switch it on: `estimator: ppo` with `updates_per_rollout: 2`, `loss: {kl_coef: 0.001}` and,
    where the values below do not suit, `critic: {lr: 5.0e-5}`.

    Args:
        lr: learning rate of the critic; ten times the policy's, as in the paper.
        warmup_steps: linear warm-up of it, in rollout steps; 1.5 % of the run in the paper.
        gamma: discount of each sampled token.
        lam: lambda of GAE.
        clip: a batch of rollouts moves values at most this far; null does not clip. The paper does
            not say; 0.5 is what its framework takes.
    """

    lr: float = 1e-4
    warmup_steps: int = 3
    gamma: float = 1.0
    lam: float = 1.0
    clip: float | None = 0.5

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.warmup_steps < 0:
            given = f"{self.lr:g} and {self.warmup_steps}"
            raise UserError(f"critic: lr must be above 0 and warmup_steps >= 0; got {given}")
        if not (0 < self.gamma <= 1 and 0 <= self.lam <= 1):
            given = f"{self.gamma:g} and {self.lam:g}"
            raise UserError(f"critic: gamma must be in (0, 1] and lam in [0, 1]; got {given}")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"critic.clip: expected a number above 0, or null; got {self.clip:g}")


class Critic(torch.nn.Module):
    """The value model on a policy, which is a PEFT model, and what it makes of a rollout step. The
    seed is that of its adapter."""

    def __init__(self, spec: CriticSpec, policy: Any, seed: int) -> None:
        super().__init__()
        self.spec = spec
        self.model = ValueModel(policy, seed)

    @torch.no_grad()
    def set_values(self, batch: MicroBatch) -> None:
        """Before the first update: the targets of all updates on a step are made of them."""
        with self.model.in_use():
            batch.values = self.model(batch.input_ids, batch.loss_mask)

    @torch.no_grad()
    def evaluate(
        self,
        batches: Sequence[MicroBatch],
        usable: Sequence[Trajectory],
    ) -> dict[str, float]:
        """Sets the batches' returns and advantages, and the trajectories' advantages: means over
        their tokens. Advantages are whitened over the tokens of all ranks.

        Args:
            batches: this rank's micro-batches, with values.
            usable: the trajectories of all ranks.

        Returns:
            Metrics of the whole step.

        Raises:
            NotFiniteError: a value is not finite, of whichever rank.
        """
        found = [self._advantages(batch) for batch in batches]
        # A return is what the value should have been: value plus advantage, before it is whitened.
        returns = []
        for batch, advantages in zip(batches, found, strict=True):
            assert batch.values is not None
            returns.append(batch.values.double().cpu() + advantages)
            batch.returns = returns[-1].to(batch.values)
        # Three sums are enough for mean and variance over the tokens of all ranks.
        sums = add_up(moments("advantage", found) | moments("return", returns))
        if not all(map(math.isfinite, sums.values())):
            raise NotFiniteError("values of the critic were not finite; lower model.critic.lr")
        for batch, advantages in zip(batches, found, strict=True):
            whitened = whiten(advantages, *(sums[f"advantage{power}"] for power in range(3)))
            batch.advantages = whitened.to(batch.old_logprobs)
            rows = batch.rows.cpu()
            for row, trajectory in enumerate(batch.trajectories):
                own = whitened[rows == row]
                trajectory.advantage = float(own.mean()) if len(own) else 0.0
        # Each rank knows its own trajectories' advantages; every rank writes down all of them.
        shared = together([t.advantage for t in own_share(usable)], 1)
        for trajectory, advantage in zip(usable, shared, strict=True):
            trajectory.advantage = advantage
        return _metrics(sums)

    def _advantages(self, batch: MicroBatch) -> Tensor:
        """[K] float64, before they are whitened."""
        assert batch.values is not None
        rewards = torch.tensor([t.reward for t in batch.trajectories], dtype=torch.float64)
        return gae(batch.values, rewards, batch.rows.cpu(), self.spec.gamma, self.spec.lam)

    def loss(self, batch: MicroBatch, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's part of the loss, the mean over all `tokens` of the step; and metrics to
        add up. It is to be propagated in `model.in_use()`."""
        assert batch.values is not None
        assert batch.returns is not None
        values = self.model(batch.input_ids, batch.loss_mask)
        loss, clipped = value_loss(values, batch.values, batch.returns, self.spec.clip, tokens)
        return loss, {"value_loss": loss.detach(), "value_clipped": clipped}


def moments(name: str, parts: Sequence[Tensor]) -> dict[str, float]:
    """Count, sum and sum of squares over all parts [K], as NAME0, NAME1 and NAME2."""
    found = {}
    for power in range(3):
        found[f"{name}{power}"] = sum(float((part**power).sum()) for part in parts)
    return found


def _metrics(sums: dict[str, float]) -> dict[str, float]:
    """The advantage, before it is whitened, is what the value misses of the return."""
    count = max(1.0, sums["return0"])
    metrics = {
        "critic/value": (sums["return1"] - sums["advantage1"]) / count,
        "critic/return": sums["return1"] / count,
    }
    missed = variance(*(sums[f"advantage{power}"] for power in range(3)))
    spread = variance(*(sums[f"return{power}"] for power in range(3)))
    if spread > 1e-12:  # Nothing to explain where all returns are equal.
        metrics["critic/explained_variance"] = 1 - missed / spread
    return metrics
