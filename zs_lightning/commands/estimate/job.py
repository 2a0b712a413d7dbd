"""What a configuration asks of the cards, without the objects that do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zs_lightning.models.checks import check_gradients, check_precision, check_trained_weights
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules import PolicyRL, SimulatorSFT
from zs_lightning.search import SimulatorSearch

PROMPT, SIMULATOR_PROMPT = 200, 160
"""Assumed tokens of a prompt: the template with a question, and with an answer and a query."""
SEARCHES, TURN, WRITTEN, RESULT = 3, 150, 250, 260
"""Assumed searches of a rollout, tokens of a turn, of a simulated result, and of what is appended for it; limits of the
configuration that are lower count instead."""


@dataclass(frozen=True)
class Rollouts:
    """What the policy writes in one training step."""

    questions: int
    group_size: int
    searches: int
    turn: int
    """Tokens of a turn."""
    result: int
    """Tokens that a search appends."""

    @property
    def count(self) -> int:
        return self.questions * self.group_size

    @property
    def sampled(self) -> int:
        """Tokens that the policy samples in one rollout."""
        return (self.searches + 1) * self.turn

    @property
    def context(self) -> int:
        return PROMPT + self.sampled + self.searches * self.result


@dataclass(frozen=True)
class Simulator:
    """The model that plays the search engine."""

    model: ModelSpec
    shared: bool
    slots: int
    length: int
    written: int
    """Tokens that it writes for one search."""


@dataclass(frozen=True)
class Job:
    """One training step.

    Args:
        tokens: most of one forward and backward pass.
        row: of the longest row, below which no pass can go.
        trained: tokens of all forward and backward passes.
        updates: passes over the trained tokens.
        slots: of the generator that the trained model writes with, of `length` tokens each.
        rollouts: None trains a simulator.
        critic: whether a second adapter is trained besides the policy's.
        steps: how many such steps a run has.
    """

    model: ModelSpec
    lora: LoraSpec | None
    optimizer: Callable[[Any], Any]
    precision: str
    checkpointing: bool
    tokens: int
    row: int
    trained: int
    updates: int
    reference: bool
    slots: int
    length: int
    rollouts: Rollouts | None = None
    simulator: Simulator | None = None
    critic: bool = False
    steps: int = 1


def read(module: PolicyRL | SimulatorSFT, batch_size: int, steps: int, precision: Any) -> Job:
    """The job of a module that is made but not set up.

    Raises:
        UserError: `fit` would not train these weights, or not in this precision.
    """
    check_trained_weights(module.model, module.lora)
    precision = check_precision(precision)
    check_gradients(module.model, precision)
    common: dict[str, Any] = {"model": module.model, "lora": module.lora, "optimizer": module.optimizer}
    common |= {"precision": precision, "checkpointing": module.checkpointing, "steps": steps}
    if isinstance(module, SimulatorSFT):
        row = SIMULATOR_PROMPT + module.simulator.max_new_tokens
        common |= {"slots": module.simulator.slots, "length": module.simulator.max_length, "row": row}
        tokens = max(row, min(batch_size * row, module.micro_batch_tokens))
        return Job(**common, tokens=tokens, trained=batch_size * row, updates=1, reference=False)
    limits, search = module.rollout, module.search
    rollouts = Rollouts(
        questions=batch_size,
        group_size=module.group_size,
        searches=min(limits.max_turns, SEARCHES),
        turn=min(limits.max_new_tokens, TURN),
        result=min(limits.max_observation_tokens, RESULT),
    )
    simulator = None
    if isinstance(search, SimulatorSearch):
        written = min(search.max_new_tokens, WRITTEN)
        simulator = Simulator(search.spec, search.shared, search.slots, search.max_length, written)
    return Job(
        **common,
        tokens=max(module.micro_batch_tokens, limits.max_length),
        row=limits.max_length,
        trained=rollouts.count * min(rollouts.context, limits.max_length),
        updates=module.updates_per_rollout,
        reference=module.loss.kl_coef > 0,
        slots=limits.slots,
        length=limits.max_length,
        rollouts=rollouts,
        simulator=simulator,
        critic=module.estimator == "ppo",
    )
