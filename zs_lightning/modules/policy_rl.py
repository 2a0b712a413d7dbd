"""Stage 2: trains the policy by reinforcement learning against a search engine that a model simulates.

What is deliberately not here: Ray, a server, a second copy of the policy for generation, re-tokenised text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable

from zs_lightning.errors import UserError
from zs_lightning.generation import Generator, MixedAdapters, Sampling, StopTags
from zs_lightning.models.adapters import TRAINED, add_adapter, add_lora
from zs_lightning.models.checks import check_length, check_trained_weights
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.loading import LoraSpec, ModelSpec, load_model, load_tokenizer, read_config
from zs_lightning.models.value_head import of_critic
from zs_lightning.models.vocabulary import end_ids
from zs_lightning.modules.critic import Critic, CriticSpec
from zs_lightning.modules.health import Health
from zs_lightning.modules.policy_update import REFERENCE, PolicyUpdate
from zs_lightning.modules.ranks import own_share, together
from zs_lightning.modules.trainable import check_least, check_shares
from zs_lightning.rl.advantages import compute_advantages
from zs_lightning.rl.losses import LossSpec
from zs_lightning.rl.rewards import outcome_reward
from zs_lightning.rollout import Rollout, RolloutSpec
from zs_lightning.runs.outcomes import record
from zs_lightning.search import SearchEngine, SimulatorSearch
from zs_lightning.search.simulator import ADAPTER, check_weights, specs_of
from zs_lightning.streams import derive_seed
from zs_lightning.text.answers import f1_score, folded_match
from zs_lightning.text.prompts import get_prompts
from zs_lightning.text.protocol import STOP_TAGS, query_key
from zs_lightning.types import ActionKind, QAExample, Trajectory


class PolicyRL(PolicyUpdate):
    """REINFORCE, RLOO, GRPO, Dr. GRPO, GSPO or PPO over multi-turn rollouts; one training step is one rollout step.

    Args:
        model: the policy's base model.
        search: answers the policy's queries, in training and in tests.
        prompts: template set.
        lora: adapter to train; null trains all weights.
        rollout: limits of a rollout.
        estimator: how rewards become advantages; ppo trains a critic besides the policy.
        critic: of estimator ppo.
        group_size: rollouts of each question.
        updates_per_rollout: optimiser steps on each batch of rollouts; above 1 the ratio to the sampling policy is clipped.
        clip_low: the ratio is kept above 1 - clip_low.
        clip_high: the ratio is kept below 1 + clip_high.
        loss: how the tokens of a batch make one loss.
        kl_coef: weight of KL(policy || base model) in the loss; 0 skips the reference pass.
        answer_score: what an answer earns: f1 of its words (the paper), or em, 1 for a (folded) exact match and else 0.
        format_weight: share of the reward for valid actions; the paper uses none.
        repeat_cost: reward that each search with the same words as an earlier one of its trajectory costs; the paper has none.
        search_cost: reward that each search costs; the paper has none.
        optimizer: e.g. AdamW with its learning rate.
        warmup_steps: linear warm-up of the learning rate, in rollout steps.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        micro_batch_tokens: most padded tokens of one forward and backward pass; does not change the gradient.
        checkpointing: keep only the layers' inputs and compute the rest again in the backward pass: far less memory, more time.
        noise_prob: probability of noisy documents; NoiseAnnealing overwrites it in training.
        validation_noise: the same in the validations of a fit, whose curve would else show the annealed noise as well.
        decodings: how a test decodes; sampled is at temperature 1.
        seed: None takes seed_everything.
    """

    task = "questions"

    def __init__(
        self,
        search: SearchEngine,
        model: ModelSpec = ModelSpec(),
        prompts: str = "zerosearch",
        lora: LoraSpec | None = LoraSpec(),
        rollout: RolloutSpec = RolloutSpec(),
        estimator: Literal["reinforce", "reinforce_baseline", "rloo", "grpo", "grpo_no_std", "ppo"] = "reinforce",
        critic: CriticSpec = CriticSpec(),
        group_size: int = 5,
        updates_per_rollout: int = 1,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        loss: LossSpec = LossSpec(),
        kl_coef: float = 0.0,
        answer_score: Literal["f1", "em"] = "f1",
        format_weight: float = 0.0,
        repeat_cost: float = 0.0,
        search_cost: float = 0.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        warmup_steps: int = 5,
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int = 8192,
        checkpointing: bool = False,
        noise_prob: float = 0.0,
        validation_noise: float = 0.0,
        decodings: list[Literal["greedy", "sampled"]] = ["greedy"],
        seed: int | None = None,
    ) -> None:
        super().__init__(optimizer, warmup_steps, False, max_grad_norm, seed, checkpointing)
        check_least(
            group_size=(group_size, 1),
            updates_per_rollout=(updates_per_rollout, 1),
            kl_coef=(kl_coef, 0),
            clip_low=(clip_low, 0),
            clip_high=(clip_high, 0),
            repeat_cost=(repeat_cost, 0),
            search_cost=(search_cost, 0),
            micro_batch_tokens=(micro_batch_tokens, 1),
        )
        check_shares(noise_prob=noise_prob, validation_noise=validation_noise, format_weight=format_weight)
        if group_size < 2 and estimator in ("rloo", "grpo", "grpo_no_std"):
            raise UserError(f"model: estimator {estimator} compares the rollouts of a group; set group_size to 2 or more")
        if estimator == "ppo" and lora is None:
            raise UserError(
                "model: estimator ppo has its critic on the policy's base model, which `lora: null` would train; set lora, "
                "such as lora: {r: 16}"
            )
        self.spec, self.search, self.prompts, self.lora, self.limits = model, search, get_prompts(prompts), lora, rollout
        self.estimator, self.group_size, self.updates_per_rollout = estimator, group_size, updates_per_rollout
        if loss.dual_clip is not None and loss.dual_clip <= 1 + clip_high:
            raise UserError(f"model: loss.dual_clip must be above 1 + clip_high = {1 + clip_high:g}; got {loss.dual_clip:g}")
        self.clip = (clip_low, clip_high) if updates_per_rollout > 1 else None
        self.critic_spec, self.critic = critic, None
        self.objective, self.kl_coef, self.answer_score = loss, kl_coef, answer_score
        self.format_weight, self.repeat_cost, self.search_cost = format_weight, repeat_cost, search_cost
        self.noise_prob, self.validation_noise, self.decodings = noise_prob, validation_noise, decodings
        self.micro_batch_tokens, self.health, self.rollout_step = micro_batch_tokens, Health(search.name), 0
        self.trajectories: list[Trajectory] = []
        self.records: list[dict[str, Any]] = []

    def specs(self) -> dict[str, ModelSpec]:
        return specs_of(self.spec, self.search)

    def setup(self, stage: str) -> None:
        self.stage = stage
        if hasattr(self, "policy"):
            return
        if stage == "fit":
            check_trained_weights(self.spec, self.lora)
        check_weights(self.spec, self.lora, self.search)
        check_length(read_config(self.spec.path), self.spec.path, self.limits.max_length, "model.rollout.max_length")
        self.tokenizer = load_tokenizer(self.spec.path)
        self.encoder, self.stop = TextEncoder(self.tokenizer), StopTags(self.tokenizer, STOP_TAGS)
        # Before weights are loaded, which takes long: a chat template that refuses, a server that is down.
        self.encoder.prompt(self.limits.template(self.prompts), {}, self.prompts.chat, thinking=self.prompts.thinking)
        if isinstance(self.search, SimulatorSearch) and self.search.shared:
            self.search.check_room(self.tokenizer)
        self.search.setup()
        self.policy = load_model(self.spec, merge=self.lora is None, tokenizer=self.tokenizer)
        self.stop.end_ids = end_ids(self.tokenizer, self.policy)
        if self.lora is not None:
            self.policy = add_lora(self.policy, self.lora, derive_seed(self.seed, "lora"))
            if self.spec.adapter and self.kl_coef > 0 and stage == "fit":
                add_adapter(self.policy, self.spec.adapter, REFERENCE)
        elif self.kl_coef > 0:
            # In a list: outside of the module tree, so that it is neither trained, cast, nor saved.
            self.frozen = [load_model(self.spec, tokenizer=self.tokenizer).requires_grad_(False)]
        self.ready_to_train(self.policy)
        self.generator: Generator | None = None
        if isinstance(self.search, SimulatorSearch) and self.search.shared:
            self.share_base(self.search)
        if self.estimator == "ppo" and stage == "fit":
            self.critic = Critic(self.critic_spec, self.policy, derive_seed(self.seed, "critic"))

    def share_base(self, simulator: SimulatorSearch) -> None:
        """The simulator's adapter on the policy's base model, frozen."""
        if simulator.spec.adapter:
            add_adapter(self.policy, simulator.spec.adapter, ADAPTER, "model.search.model")
        simulator.attach(self.policy, self.tokenizer)

    def teardown(self, stage: str) -> None:
        """Ends what the search engine has running. A simulator in the policy's generator leaves with it."""
        self.generator = None
        self.search.close()

    # ------------------------------------------------------------------ rollout

    @contextmanager
    def sampling_mode(self) -> Iterator[Generator]:
        """The policy in eval mode with a generator; K/V memory is given back on a GPU, where the update needs it."""
        training = self.policy.training
        self.policy.eval()
        if self.generator is None:
            self.generator = self.make_generator()
        try:
            with self.generator.adapters or nullcontext():
                yield self.generator
        except (Exception, KeyboardInterrupt):
            self.search.close()  # Lightning calls teardown only at the end of a run that nothing stopped.
            raise
        finally:
            self.policy.train(training)
            if self.device.type == "cuda":
                self.generator = None
                self.search.close()

    def make_generator(self) -> Generator:
        """For the policy alone, or for the policy and a simulator on the same base model."""
        simulator, slots, length = self.search, self.limits.slots, self.limits.max_length
        if not isinstance(simulator, SimulatorSearch) or not simulator.shared:
            return Generator(self.policy, slots, length)
        adapters = MixedAdapters(self.policy, [TRAINED, *([ADAPTER] if simulator.spec.adapter else [])])
        generator = Generator(
            self.policy, slots + simulator.slots, max(length, simulator.max_length), adapters, reserved=simulator.slots
        )
        simulator.join(generator)
        return generator

    def roll_out(
        self, examples: list[QAExample], group_size: int, seed: int, sampling: Sampling | None, noise: float | None = None
    ) -> list[Trajectory]:
        noise = self.noise_prob if noise is None else noise
        with self.sampling_mode() as generator:
            rollout = Rollout(generator, self.encoder, self.search, self.prompts, self.limits, self.stop, noise)
            rollout.adapter = TRAINED if generator.adapters else ""
            finished = rollout.run(examples, group_size, seed, sampling)
        self.health.searched(finished)
        return finished

    def judge(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Sets rewards and advantages; returns the trajectories to learn from. Failed ones are not, and no one's baseline."""
        usable = self.health.usable(trajectories)
        groups: dict[str, int] = {}
        earned = {"f1": f1_score, "em": folded_match}[self.answer_score]
        for trajectory in usable:
            written = trajectory.written
            valid = sum(turn.kind is not ActionKind.INVALID for turn in written) / max(1, len(written))
            queries = [query_key(turn.content) for turn in trajectory.searches]
            trajectory.reward, trajectory.reward_parts = outcome_reward(
                earned(trajectory.answer, trajectory.example.golden_answers),
                valid,
                len(queries) - len(set(queries)),
                self.format_weight,
                self.repeat_cost,
                sum(turn in written for turn in trajectory.searches),
                self.search_cost,
            )
        self.health.judged(usable)
        if self.estimator == "ppo":
            return usable  # The critic knows their advantages, and only when it has seen their tokens.
        numbers = torch.tensor([groups.setdefault(t.group_id, len(groups)) for t in usable])
        rewards = torch.tensor([t.reward for t in usable])
        for trajectory, advantage in zip(usable, compute_advantages(self.estimator, rewards, numbers).tolist(), strict=True):
            trajectory.advantage = advantage
        return usable

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: list[QAExample], batch_idx: int) -> None:
        seed = derive_seed(self.seed, "validation", batch_idx)
        noise = self.validation_noise if self.trainer.state.fn == "fit" else None
        finished = together(self.roll_out(own_share(batch), 1, seed, Sampling(temperature=0.0), noise), 1)
        rows = [record(t) for t in finished]
        for name in ("em", "f1", "searches", "truncated"):
            self.log(f"val/{name}", sum(row[name] for row in rows) / len(rows), batch_size=len(rows), prog_bar=name == "em")

    def on_test_epoch_start(self) -> None:
        self.records, self.trajectories = [], []

    def test_step(self, batch: list[QAExample], batch_idx: int) -> None:
        for decoding in self.decodings:
            sampling = Sampling(temperature=0.0 if decoding == "greedy" else 1.0)
            seed = derive_seed(self.seed, "test", decoding)
            finished = together(self.roll_out(own_share(batch), 1, seed, sampling), 1)
            self.trajectories += finished
            self.records += [record(t, decoding) for t in finished]

    def on_test_epoch_end(self) -> None:
        for decoding in self.decodings:
            rows = [row for row in self.records if row["decoding"] == decoding]
            for name in ("em", "f1", "searches"):
                self.log(f"test/{name}_{decoding}", sum(row[name] for row in rows) / len(rows))

    # ------------------------------------------------------------------ state

    def encoders(self) -> list[TextEncoder]:
        return [self.encoder, *([self.search.encoder] if isinstance(self.search, SimulatorSearch) else [])]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.stage != "fit" and self.critic is None:  # The critic's weights are of no use but in training.
            kept = {name: weight for name, weight in checkpoint["state_dict"].items() if not of_critic(name)}
            checkpoint["state_dict"] = kept
        super().on_load_checkpoint(checkpoint)
        self.rollout_step = int(checkpoint.get("rollout_step", 0))

    def reasons(self) -> list[str]:
        kl = ["model.kl_coef is 0"] if self.kl_coef == 0 and not self.had_gradients else []
        return super().reasons() + self.health.reasons() + kl

    def save_model(self, folder: Path) -> None:
        """The trained adapter as a plain PEFT folder, or all weights, with the tokenizer."""
        adapters = {} if self.lora is None else {"selected_adapters": [TRAINED]}
        self.policy.save_pretrained(folder, **adapters)
        self.tokenizer.save_pretrained(folder)
