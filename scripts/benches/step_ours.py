"""Our side of step-vs-trl: PolicyRL with a SimulatorSearch in one Lightning training step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import lightning as L
from torch.utils.data import DataLoader

from benches.step_plan import QUERY, Clock, Step, Work
from zs_lightning.models.loading import load_tokenizer
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules import PolicyRL
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search import SimulatorSearch
from zs_lightning.text.prompts import get_prompts
from zs_lightning.text.protocol import Action
from zs_lightning.types import ActionKind, QAExample, Trajectory

OWN = ("ka", "lo", "mi", "tra", "ven", "dos", "qui", "ster")
"""First words of the questions: no two prompts are alike, so that only the rollouts of a question share its K/V."""


class Judged(PolicyRL):
    """Random text earns nothing, and a trajectory without advantage is not trained on: these alternate."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.update.estimator = None

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        usable = super().judge(trajectories)
        for i, trajectory in enumerate(usable):
            trajectory.advantage = 1.0 if i % 2 else -1.0
        return usable


class Counting(SimulatorSearch):
    """Its generator is gone when the rollouts have ended."""

    sampled_tokens = 0

    def close(self) -> None:
        if self.generator is not None:
            self.sampled_tokens += self.generator.sampled_tokens
        super().close()


class WholeStep(L.Callback):
    """CPU seconds of the one training step."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.start = clock, 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.seconds["total"] = time.process_time() - self.start


def questions(path: str, count: int, tokens: int) -> list[QAExample]:
    """Questions of exactly so many tokens, the final question mark among them."""
    tokenizer, found = load_tokenizer(path), []
    for word in OWN[:count]:
        text = word
        while len(tokenizer(text + "?")["input_ids"]) < tokens:
            text += " ka"
        found.append(QAExample(id=word, question=text + "?", golden_answers=("lo",), source="bench"))
    return found


def make_module(paths: tuple[str, str], work: Work, prompt: int, result: int) -> Judged:
    """`result`: tokens that enter the context after a search."""
    # As TRL's tool is told: whatever the query is.
    search = Counting(ModelSpec(path=paths[1], device="cpu"), "miniature", 1, work.result, slots=work.rows, guard="paper")
    search.prompts = replace(search.prompts, simulator_useful="{query}", simulator_noisy="{query}", simulator_stop=())
    length = prompt + (work.searches + 1) * work.turn + work.searches * result
    limits = RolloutSpec(
        max_turns=work.searches,
        max_new_tokens=work.turn,
        max_observation_tokens=result,
        max_length=length + 8,
        slots=work.rows,
    )
    module = Judged(
        search,
        ModelSpec(path=paths[0], device="cpu"),
        "miniature",
        LoraSpec(),
        limits,
        estimator="grpo",
        group_size=work.group,
        micro_batch_tokens=work.micro * length,
        seed=0,
    )
    module.prompts = replace(get_prompts("miniature"), policy="{question}")
    return module


def run(paths: tuple[str, str], work: Work, counts: dict[str, int]) -> Step:
    """One step with as many tokens as in `counts`."""
    prompt = counts["prompt tokens"] // work.rows
    result = counts["result tokens"] // (work.rows * work.searches)
    module, clock = make_module(paths, work, prompt, result), Clock()
    module.roll_out = clock.wrap("rollout", module.roll_out)  # type: ignore[method-assign]
    for name in ("submit", "poll"):
        setattr(module.search, name, clock.wrap("simulator", getattr(module.search, name)))
    loader = DataLoader(questions(paths[0], work.questions, prompt), batch_size=work.questions, collate_fn=list)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    with tempfile.TemporaryDirectory() as folder, patch("zs_lightning.rollout.rollouter.parse_action") as action:
        action.return_value = Action(ActionKind.SEARCH, QUERY)
        trainer = L.Trainer(max_steps=1, accelerator="cpu", default_root_dir=folder, callbacks=[WholeStep(clock)], **quiet)
        trainer.fit(module, loader)
    done = module.trajectories
    masks = [mask for t in done for mask in t.loss_mask]
    found = {
        "prompt tokens": sum(len(t.prompt_ids) for t in done),
        "sampled tokens": sum(masks),
        "result tokens": len(masks) - sum(masks),
        "simulator tokens": module.search.sampled_tokens,
        "trained weights": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }
    return Step(seconds=clock.split(), counts=found)
