"""Stage 2: trains the policy by reinforcement learning against a search engine that a model
simulates.

What is deliberately not here: Ray, a server, a second copy of the policy for generation,
re-tokenised text. The order of a step stands in PolicyRL.learn; what it calls is in these
places:

    rollout/actor.py, rollout/rollouter.py   questions to trajectories
    rl/rewards.py, rl/advantages.py          trajectories to rewards and advantages
    modules/update.py, rl/losses.py          trajectories to gradients
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import lazy_instance
from lightning.pytorch.cli import OptimizerCallable

from zs_lightning.errors import check_least, check_shares
from zs_lightning.generation import Sampling
from zs_lightning.models.checks import check_length, check_trained_weights
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.loading import load_model, load_tokenizer, recompute_activations
from zs_lightning.models.lora import TRAINED, add_adapter, add_lora
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.models.value_head import of_critic
from zs_lightning.modules.accidents import for_all_ranks
from zs_lightning.modules.critic import Critic, CriticSpec
from zs_lightning.modules.health import Health
from zs_lightning.modules.policy_checks import PPO, check_groups
from zs_lightning.modules.ranks import own_share, together
from zs_lightning.modules.step_metrics import memory, step_metrics
from zs_lightning.modules.trainable import TrainableModule
from zs_lightning.modules.update import REFERENCE, Prepared, Update
from zs_lightning.modules.validation import REAL_EM, check_validation, real_metrics, simulated_metrics
from zs_lightning.rl.advantages import find_estimator
from zs_lightning.rl.losses import LossSpec
from zs_lightning.rl.pool import Pool, RefillSpec, in_place, replaced
from zs_lightning.rl.rewards import AnswerReward, Reward, judge
from zs_lightning.rollout import Actor, RolloutSpec
from zs_lightning.runs.outcomes import Outcome, share
from zs_lightning.search import SearchEngine
from zs_lightning.search.simulator import check_weights, specs_of
from zs_lightning.streams import derive_seed, stream
from zs_lightning.text.prompts import get_prompts
from zs_lightning.types import QAExample, Trajectory


class PolicyRL(TrainableModule):
    """REINFORCE, RLOO, GRPO, Dr. GRPO, GSPO or PPO over multi-turn rollouts; a training step is a
    rollout step.

    Args:
        model: the policy's base model.
        search: answers the policy's queries, in training and in tests.
        prompts: template set.
        lora: adapter to train; null trains all weights.
        rollout: limits of a rollout.
        estimator: how rewards become advantages: reinforce, reinforce_baseline, rloo, grpo,
            grpo_no_std, ppo (which trains a critic besides the policy), or a function in a file,
            such as my_estimators.mine.
        critic: of estimator ppo.
        group_size: rollouts of each question.
        updates_per_rollout: optimiser steps on each batch of rollouts; above 1 the ratio to the
            sampling policy is clipped.
        refill: replaces groups of equal rewards by groups of other questions; null keeps them.
        loss: how the tokens of a batch make one loss.
        reward: what a trajectory earns.
        optimizer: e.g. AdamW with its learning rate.
        warmup_steps: linear warm-up of the learning rate, in rollout steps.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        micro_batch_tokens: most padded tokens of one forward and backward pass; does not change the
            gradient.
        checkpointing: keep only the layers' inputs and compute the rest again in the backward pass:
            far less memory, more time.
        noise_prob: probability of noisy documents; NoiseAnnealing overwrites it in training.
        validation_noise: the same in the validations of a fit, whose curve would else show the
            annealed noise as well.
        validation_search: a real engine that answers in the validations of a fit as well, for the
            curve of what holds outside of the simulator; the model that did best with it is kept.
        validation_turns: rollout.max_turns of the validations of a fit, where tests allow other
            than training; None is as in training.
        decodings: how a test decodes; sampled is at temperature 1.
        seed: None takes seed_everything.
    """

    task = "questions"
    curves = "policy"
    headline = "reward"
    learns_from_rollouts = True
    sequel = "test --config TEST.yaml --ckpt_path {}"
    validated: list[Trajectory]
    """Of the last validation, with the engine that trains."""
    with_real: list[Trajectory]
    """Of the same questions, with validation_search."""

    def __init__(
        self,
        search: SearchEngine,
        model: ModelSpec = ModelSpec(),
        prompts: str = "zerosearch",
        lora: LoraSpec | None = LoraSpec(),
        rollout: RolloutSpec = RolloutSpec(),
        estimator: str = "reinforce",
        critic: CriticSpec = CriticSpec(),
        group_size: int = 5,
        updates_per_rollout: int = 1,
        refill: RefillSpec | None = None,
        loss: LossSpec = LossSpec(),
        reward: Reward = lazy_instance(AnswerReward),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        warmup_steps: int = 5,
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int = 8192,
        checkpointing: bool = False,
        noise_prob: float = 0.0,
        validation_noise: float = 0.0,
        validation_search: SearchEngine | None = None,
        validation_turns: int | None = None,
        decodings: list[Literal["greedy", "sampled"]] = ["greedy"],
        seed: int | None = None,
    ) -> None:
        super().__init__(optimizer, warmup_steps, False, max_grad_norm, seed, checkpointing, micro_batch_tokens)
        check_least("model", group_size=(group_size, 1), updates_per_rollout=(updates_per_rollout, 1))
        check_shares("model", noise_prob=noise_prob, validation_noise=validation_noise)
        check_validation(validation_search, validation_turns)
        check_groups(estimator, group_size, lora, rollout.clean_share, refill)
        loss.check_updates(updates_per_rollout)
        self.model = model
        self.search = search
        self.prompts = get_prompts(prompts)
        self.lora = lora
        self.rollout = rollout
        self.estimator = estimator
        self.advantages_of = None if estimator == PPO else find_estimator(estimator)
        self.critic_spec = critic
        self.critic: Critic | None = None  # Under this name its weights are in checkpoints.
        self.group_size = group_size
        self.updates_per_rollout = updates_per_rollout
        self.pool = Pool(refill) if refill else None
        self.loss = loss
        self.reward = reward
        self.noise_prob = noise_prob
        self.validation_noise = validation_noise
        self.validation_search = validation_search
        self.validation_turns = validation_turns
        self.best_metric = REAL_EM if validation_search else ""
        self.decodings = decodings
        self.health = Health(search.name)
        self.rollout_step = 0
        self.trajectories: list[Trajectory] = []
        self.refilled: list[Trajectory] = []
        self.validated, self.with_real = [], []
        self.outcomes: list[Outcome] = []

    def specs(self) -> dict[str, ModelSpec]:
        return specs_of(self.model, self.search)

    # ------------------------------------------------------------------ setup

    def setup(self, stage: str) -> None:
        """Loads the policy, and a simulator that is on its base. What can be refused is, before
        weights are."""
        self.stage = stage
        # A fit that is followed by a test in one process keeps its weights.
        if hasattr(self, "policy"):
            return
        if stage == "fit":
            check_trained_weights(self.model, self.lora)
            self.reward.setup()
        check_weights(self.model, self.lora, self.search)
        check_length(self.model, self.rollout.max_length, "model.rollout.max_length")
        self.tokenizer = load_tokenizer(self.model.path)
        real = self.validation_search if stage == "fit" else None
        self.actor = Actor(self.tokenizer, self.search, self.prompts, self.rollout, real)
        self.actor.tell = self.phases
        # An adapter of the base's folder is trained on; it is merged only where all weights are.
        self.policy = load_model(self.model, merge=self.lora is None, tokenizer=self.tokenizer)
        if self.lora is not None:
            self.policy = add_lora(self.policy, self.lora, derive_seed(self.seed, "lora"))
        # Before the simulator's and the critic's adapters, so that these find the trained one on.
        frozen = self._reference() if stage == "fit" and self.loss.kl_coef > 0 else None
        if self.checkpointing:
            recompute_activations(self.policy)
        self.actor.attach(self.policy)
        if self.estimator == PPO and stage == "fit":
            self.critic = Critic(self.critic_spec, self.policy, derive_seed(self.seed, "critic"))
        self.update = Update(
            self.policy,
            self.loss,
            self.rollout,
            self.advantages_of,
            self.critic,
            frozen,
            is_clipped=self.updates_per_rollout > 1,
            fitting=self.fitting,
            pad_id=self.tokenizer.eos_token_id,
            tell=self.phases,
        )

    def _reference(self) -> Any:
        """What KL is measured against: a frozen model where all weights are trained; None where the
        policy with its adapter switched off is what training began with, or with a frozen copy of
        the adapter that it began with."""
        if self.lora is None:
            return load_model(self.model, tokenizer=self.tokenizer).requires_grad_(False)
        if self.model.adapter:
            add_adapter(self.policy, self.model.adapter, REFERENCE)
        return None

    def teardown(self, stage: str) -> None:
        """Ends what the search engine has running."""
        (self.actor if hasattr(self, "actor") else self.search).close()

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Sequence[QAExample], batch_idx: int) -> None:
        self.trajectories, self.refilled = [], []
        super().training_step(batch, batch_idx)
        if self.pool:
            self.pool.remember(self.trajectories + self.refilled)
        self.rollout_step += 1

    def learn(self, batch: list[QAExample], batch_idx: int) -> None:
        """One rollout step, in this order:

        1. The policy rolls out `group_size` trajectories for each question, with the noise of the
           moment; every rank rolls out its share, and all ranks get all trajectories.
        2. Failed ones are left out; the others are judged, and with `refill` groups are replaced.
        3. Advantages, and all else that is fixed before the first update, are made: micro-batches.
        4. `updates_per_rollout` times: loss, backward, optimiser. One that meets a number which is
           not finite is not taken and ends the step; those before it stand.
        5. The step is logged, without what was refilled; the learning rate goes on by one step.
        """
        start = time.monotonic()
        # A function of the step, so that a resumed run draws as one that never stopped.
        seed = derive_seed(self.seed, "rollout", self.rollout_step)
        self.trajectories = self.roll_out(batch, self.group_size, seed, self.noise_prob)
        usable = for_all_ranks(lambda: self.judge(self.trajectories))
        trained = self.refill(batch, usable)
        rolled_out = time.monotonic()
        prepared, sums = self.learn_from(trained)
        seconds = {"rollout": rolled_out - start, "update": time.monotonic() - rolled_out}
        orders = getattr(self.search, "orders", None)
        kinds = [kind for kind, weight in orders.weights.items() if weight] if orders else []
        metrics = step_metrics(self.trajectories, usable, sums, self.noise_prob, seconds, kinds)
        if self.pool:
            metrics |= self.pool.metrics(self.refilled, trained)
        if (hits := self.search.hit_rate()) is not None:
            metrics["search/cache_hits"] = hits
        self.log("reward", metrics.pop("reward"), prog_bar=True)
        self.log_dict(metrics | prepared.metrics | memory(self.device))
        self.log("noise", self.noise_prob, prog_bar=True, logger=False)

    def learn_from(self, trained: Sequence[Trajectory]) -> tuple[Prepared, dict[str, float]]:
        """All updates on these trajectories, with the metrics of the last one."""
        self.phases("update")
        with self.seeded(self.rollout_step):
            prepared = self.update.prepare(trained, self.device)
            passes = len(prepared.batches) * (1 + (self.critic is not None))
            self.phases("update", 0, passes * self.updates_per_rollout)
            for _ in range(self.updates_per_rollout):
                weights = self.trainable().values()
                sums = self.update.step(prepared, weights, self.optimise, self.manual_backward)
        return prepared, sums

    def refill(self, batch: Sequence[QAExample], usable: list[Trajectory]) -> list[Trajectory]:
        """The usable trajectories with groups of the pool in place of some of those without signal.
        A search that fails here is no reason to stop: few rollouts say little of the engine."""
        names = ("refill", self.rollout_step)
        chosen = self.pool.draw(usable, batch, stream(self.seed, *names)) if self.pool else []
        if not chosen:
            return usable
        self.refilled = self.roll_out(chosen, self.group_size, derive_seed(self.seed, *names), self.noise_prob)
        fresh = in_place(self.refilled)
        for_all_ranks(lambda: judge(fresh, self.reward))
        return replaced(usable, fresh)

    def forget_step(self, updated: bool) -> list[Trajectory]:
        rows = self.trajectories + self.refilled
        if not updated:
            self.trajectories, self.refilled = [], []
        return rows

    def roll_out(
        self,
        examples: Sequence[QAExample],
        group_size: int,
        seed: int,
        noise_prob: float,
        sampling: Sampling | None = None,
        search: SearchEngine | None = None,
        max_turns: int | None = None,
    ) -> list[Trajectory]:
        """The trajectories of all ranks, in the order of the examples; `search` answers in place of
        the engine that trains, and `max_turns` is another limit than training's."""
        # Draws are functions of question and seed: any number of ranks rolls out the same.
        arguments = (own_share(examples), group_size, seed, noise_prob, sampling)
        own = for_all_ranks(lambda: self.actor.roll_out(*arguments, search=search, max_turns=max_turns))
        if search is None:
            self.health.searched(own)
        if sampling is None:  # As in training. Each rank asks about its own, so that all hear the same.
            self.phases("score")
            self.reward.ask(own)
        self.phases("")  # Another rank may take hours for its share.
        return together(own, group_size)

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Sets rewards; returns those to learn from: failed ones are not, and no one's baseline."""
        self.phases("score")
        usable = self.health.usable(trajectories)
        judge(usable, self.reward)
        self.health.judged(usable)
        return usable

    def parameter_groups(self) -> list[tuple[dict[str, Any], int]]:
        if self.critic is None:
            return super().parameter_groups()
        policy = [p for name, p in self.trainable().items() if not of_critic(name)]
        critic = [p for name, p in self.trainable().items() if of_critic(name)]
        spec = self.critic_spec
        own = {"params": critic, "lr": spec.lr}
        return [({"params": policy}, self.warmup_steps), (own, spec.warmup_steps)]

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        self.validated, self.with_real = [], []
        self.began = time.monotonic()

    def validation_step(self, batch: list[QAExample], batch_idx: int) -> None:
        """Greedy, so that the curve is the policy's and not the draws'."""
        seed, greedy = derive_seed(self.seed, "validation", batch_idx), Sampling(temperature=0.0)
        is_fit = self.trainer.state.fn == "fit"
        noise_prob = self.validation_noise if is_fit else self.noise_prob
        turns = self.validation_turns if is_fit else None
        self.validated += self.roll_out(batch, 1, seed, noise_prob, greedy, max_turns=turns)
        if is_fit and self.validation_search:
            self.with_real += self.roll_out(batch, 1, seed, 0.0, greedy, self.validation_search, turns)

    def on_validation_epoch_end(self) -> None:
        found = simulated_metrics(self.validated)
        if self.with_real:
            found |= real_metrics(self.validated, self.with_real)
            found["seconds/validation"] = time.monotonic() - self.began
        for name, value in found.items():
            self.log(name, value, prog_bar=name in ("val/em", REAL_EM))

    def on_test_epoch_start(self) -> None:
        self.outcomes, self.trajectories = [], []

    def test_step(self, batch: list[QAExample], batch_idx: int) -> None:
        """Every question once with each decoding, by draws that depend on nothing else tested."""
        for decoding in self.decodings:
            sampling = Sampling(temperature=0.0 if decoding == "greedy" else 1.0)
            seed = derive_seed(self.seed, "test", decoding)
            finished = self.roll_out(batch, 1, seed, self.noise_prob, sampling)
            self.trajectories += finished
            self.outcomes += [Outcome.of(trajectory, decoding) for trajectory in finished]

    def on_test_epoch_end(self) -> None:
        for decoding in self.decodings:
            rows = [row for row in self.outcomes if row.decoding == decoding]
            for name in ("em", "f1", "searches"):
                self.log(f"test/{name}_{decoding}", share(rows, name))

    # ------------------------------------------------------------------ state

    def encoders(self) -> list[TextEncoder]:
        return self.actor.encoders()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["rollout_step"] = self.rollout_step
        checkpoint["pool"] = self.pool.state() if self.pool else []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The critic's weights are of no use but in training.
        if self.stage != "fit" and self.critic is None:
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {n: w for n, w in weights.items() if not of_critic(n)}
        super().on_load_checkpoint(checkpoint)
        self.rollout_step = int(checkpoint.get("rollout_step", 0))
        if self.pool:
            self.pool.load(checkpoint.get("pool", []))

    def reasons(self) -> list[str]:
        reasons = super().reasons() + self.health.reasons()
        if self.loss.kl_coef == 0 and not self.optimiser_step.had_gradients:
            reasons.append("model.loss.kl_coef is 0")
        return reasons

    def save_model(self, folder: Path) -> None:
        """The trained adapter as a plain PEFT folder, or all weights, with the tokenizer."""
        adapters = {} if self.lora is None else {"selected_adapters": [TRAINED]}
        self.policy.save_pretrained(folder, **adapters)
        self.tokenizer.save_pretrained(folder)
