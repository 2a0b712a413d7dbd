"""Before stage 2: teaches a policy the form of a trajectory, which small models never find."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from zs_lightning.errors import UserError
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules.demonstrations import Demonstrations
from zs_lightning.modules.policy_rl import PolicyRL
from zs_lightning.modules.ranks import gather, own_share
from zs_lightning.modules.trainable import TrainableModule
from zs_lightning.rl.rewards import judge
from zs_lightning.rollout import RolloutSpec
from zs_lightning.rollout.script import Demonstration, play
from zs_lightning.runs.outcomes import Outcome, share, total
from zs_lightning.search import SearchEngine
from zs_lightning.text.answers import cover_match, f1_score
from zs_lightning.text.protocol import forges
from zs_lightning.types import ActionKind, QAExample, Status, Trajectory


def alike(rewards: Tensor, groups: Tensor) -> Tensor:
    """An estimator: every trajectory counts the same. rewards: [N], groups: [N] int64."""
    return torch.ones_like(rewards)


class PolicySFT(PolicyRL):
    """A supervised start: cross-entropy on the turns of demonstrations, with the prompts, tokens
    and masks of RL. PolicyRL goes on with the adapter that it leaves, by model.model.adapter.

    It is PolicyRL with an advantage of 1 for whatever is demonstrated, whose gradient is that of
    the cross-entropy. Validations and tests roll the policy out.

    Args:
        search: answers the policy's queries in validations and tests.
        demonstrations: what is learnt.
        model: the policy's base model.
        prompts: template set; the same as RL will use.
        lora: adapter to train; null trains all weights.
        rollout: limits of a rollout, of which demonstrations that do not fit are left out.
        optimizer: e.g. AdamW with its learning rate, which decays by a cosine.
        warmup_steps: linear warm-up of the learning rate.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        micro_batch_tokens: most padded tokens of one forward and backward pass; does not change the
            gradient.
        checkpointing: keep only the layers' inputs and compute the rest again in the backward pass:
            far less memory, more time.
        decodings: how a test decodes; sampled is at temperature 1.
        seed: None takes seed_everything.
    """

    curves = "sft"
    headline = "sft/loss"
    learns_from_rollouts = False
    sequel = "fit --config POLICY.yaml --model.model.adapter {}/model"

    def __init__(
        self,
        search: SearchEngine,
        demonstrations: Demonstrations,
        model: ModelSpec = ModelSpec(),
        prompts: str = "zerosearch",
        lora: LoraSpec | None = LoraSpec(),
        rollout: RolloutSpec = RolloutSpec(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0),
        warmup_steps: int = 10,
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int = 8192,
        checkpointing: bool = False,
        decodings: list[Literal["greedy", "sampled"]] = ["greedy"],
        seed: int | None = None,
    ) -> None:
        super().__init__(
            search,
            model,
            prompts,
            lora,
            # What a sampling temperature does to log-probabilities is no matter of demonstrations.
            replace(rollout, temperature=1.0),
            group_size=1,
            optimizer=optimizer,
            warmup_steps=warmup_steps,
            max_grad_norm=max_grad_norm,
            micro_batch_tokens=micro_batch_tokens,
            checkpointing=checkpointing,
            decodings=decodings,
            seed=seed,
        )
        self.demonstrations = demonstrations
        # Small steps at the end, so that the last batches do not count most.
        self.decay = True
        self.advantages_of = alike
        self.best_metric = "val/valid_and_em"
        self.taught: dict[str, list[Trajectory]] = {}

    def setup(self, stage: str) -> None:
        # A test has nothing to learn, and may be where the file is not.
        if stage == "fit":
            self.demonstrations.setup()
        super().setup(stage)

    def on_train_start(self) -> None:
        """Has the demonstrations made of all questions that the run asks, so that what cannot be
        learnt from is said before the first step."""
        loader: Any = self.trainer.train_dataloader
        # From its beginning, also where the run goes on: its counts are those of the whole run.
        drawn: set[int] = set().union(*replace(loader.batch_sampler, done=0))
        self.demonstrate([loader.dataset[i] for i in sorted(drawn)])

    def demonstrate(self, examples: Sequence[QAExample]) -> None:
        """Takes the demonstrations of the questions, for `learn`. Raises UserError if there are
        none."""
        found, left_out = self.demonstrations.of(own_share(examples), self.rollout)
        actor = self.actor
        played = play(found, actor.encoder, self.prompts, self.rollout, actor.stop)
        good = []
        for demonstration, trajectory in zip(found, played, strict=True):
            if reason := self._unfit(demonstration, trajectory):
                left_out[reason] += 1
            else:
                good.append(trajectory)
        # For their lines in trajectories/train.jsonl; the update does not ask.
        judge(good, self.reward)
        self.taught, reasons = {}, Counter[str]()
        for ((theirs, without),) in gather([(good, left_out)]):
            reasons += without
            for trajectory in theirs:
                self.taught.setdefault(trajectory.group_id, []).append(trajectory)
        count = sum(map(len, self.taught.values()))
        why = "; ".join(f"{number} {reason}" for reason, number in reasons.most_common())
        said = f"{count} trajectories for {len(self.taught)} of {len(examples)} questions"
        if not count:
            change = "change the demonstrations, data.source or the limits of model.rollout"
            raise UserError(f"model.demonstrations: {said}: {why}; {change}")
        self.print(f"demonstrations: {said}{f'; left out: {why}' if why else ''}")

    def _unfit(self, demonstration: Demonstration, trajectory: Trajectory) -> str:
        """Why nobody should learn from it; empty if one should."""
        golds, turns = trajectory.example.golden_answers, trajectory.turns
        if trajectory.failure is not None:
            return "search more than was found"
        if any(turn.kind is ActionKind.INVALID for turn in turns) or forges(turns):
            return "have an invalid action, or one longer than rollout.max_new_tokens"
        if trajectory.status is not Status.ANSWERED:
            return "do not answer within rollout.max_turns and rollout.max_length"
        if f1_score(trajectory.answer, golds) < self.demonstrations.least_f1:
            return "have a wrong answer"
        # In what was cut the answer may be missing, and it would be taught to make one up.
        read = ""
        for turn in trajectory.searches:
            start, end = turn.observation_span or (0, 0)
            read += self.actor.encoder.decode(trajectory.token_ids[start:end])
        if demonstration.evidence and not cover_match(read, [demonstration.evidence]):
            return "lose what they answer to rollout.max_observation_tokens"
        return ""

    def learn(self, batch: list[QAExample], batch_idx: int) -> None:
        """One step on the demonstrations of the batch; without one, no weight changes."""
        self.trajectories = []
        for example in batch:
            self.trajectories += self.taught.get(example.key, [])
        _, sums = self.learn_from(self.trajectories)
        tokens = sums.get("tokens", 0.0)
        # No policy sampled them, so that the distance to old_logprobs of 0 is the cross-entropy.
        loss = sums.get("sampling_gap", 0.0) / max(1.0, tokens)
        norm = sums.get("grad_norm", 0.0)
        counts = {"sft/tokens": tokens, "sft/demonstrations": float(len(self.trajectories))}
        self.log_dict({"sft/loss": loss, "sft/grad_norm": norm, **counts})
        self.log("loss", loss, prog_bar=True, logger=False)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        rows = [Outcome.of(trajectory) for trajectory in self.validated]
        valid = 1 - total(rows, "invalid_actions") / max(1, total(rows, "turns"))
        self.log("val/valid", valid, prog_bar=True)
        # The form comes first, and early on there is nothing else to tell models apart by.
        self.log(self.best_metric, (valid + share(rows, "em")) / 2)

    def reasons(self) -> list[str]:
        return TrainableModule.reasons(self)
