"""A policy that is ready for questions: the model, prompts and limits of a run, with any engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from zs_lightning.configuration.arguments import build, search_options
from zs_lightning.configuration.paths import check_config_file
from zs_lightning.errors import UserError
from zs_lightning.generation import Sampling
from zs_lightning.miniature.world import make_world
from zs_lightning.models.checks import AUTOCAST, check_precision, say_slow
from zs_lightning.modules import PolicyRL
from zs_lightning.modules.trainable import TrainableModule
from zs_lightning.rollout.rollouter import Watch, prompt_ids
from zs_lightning.runs.folder import config_beside, find_checkpoint, load_checkpoint
from zs_lightning.types import QAExample, Trajectory

SAMPLES = 3


def run_files(run: Path) -> tuple[Path, Path]:
    """Configuration and checkpoint of a run, of which `run` is the folder or the checkpoint.

    Raises:
        UserError: one of them is missing or is none.
    """
    checkpoint = find_checkpoint(run, "--ckpt")
    return config_beside(checkpoint, "--ckpt"), checkpoint


def read_config(file: Path) -> dict[str, Any]:
    """What stands in a configuration file. Raises UserError if it is none of a policy."""
    check_config_file(file)
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("init_args") or {}, dict):
        raise UserError(f"{file} describes no policy; expected `model:` with class_path and init_args")
    if str(model.get("class_path")).rpartition(".")[2] == "SimulatorSFT":
        raise UserError(f"{file} trains a simulator, which answers no questions; expected one of PolicyRL")
    return config


def world_seed(config: dict[str, Any]) -> int | None:
    """Of the miniature world that a configuration's questions are about; None if they are about something else."""
    data = config.get("data")
    source = (data.get("source") if isinstance(data, dict) else None) or "MiniatureSource"
    name = str(source.get("class_path") if isinstance(source, dict) else source)
    if name.rpartition(".")[2] != "MiniatureSource":
        return None
    options = source.get("init_args") if isinstance(source, dict) else None
    return int(options.get("world_seed", 0)) if isinstance(options, dict) else 0


def default_search(config: dict[str, Any]) -> list[str]:
    """Options of the engine to ask where nobody names one: the world that the questions are about, or else Wikipedia."""
    seed = world_seed(config)
    if seed is None:
        return ["--search=zs_lightning.search.MediaWikiSearch"]
    return ["--search=BM25Search", f"--search.world_seed={seed}"]


def sample_questions(config: dict[str, Any]) -> list[str]:
    """A few held-out questions about the configuration's world; empty where it has none."""
    seed = world_seed(config)
    return [] if seed is None else [question.text for question in make_world(seed).questions()["test"][:SAMPLES]]


class Session:
    """Answers one question after another, as a test of the run would.

    Args:
        config: from `read_config`.
        checkpoint: of the trained weights; None asks the untrained base.
        search: `--search` options; none take the default engine.

    Raises:
        UserError: weights and config do not fit together.
        UserError: an option is wrong.
    """

    def __init__(self, config: dict[str, Any], checkpoint: Path | None, search: Sequence[str]) -> None:
        model = config["model"]
        options = {**(model.get("init_args") or {}), "search": search_options(search, default_search(config))}
        module = build(TrainableModule, "model", {**model, "init_args": options})
        if not isinstance(module, PolicyRL):
            raise UserError(f"model: {type(module).__name__} answers no questions; expected PolicyRL")
        trainer = config.get("trainer")
        precision = check_precision(trainer.get("precision") if isinstance(trainer, dict) else None)
        say_slow(module.specs(), precision)
        module.rollout = replace(module.rollout, slots=1)
        module.setup("test")
        if checkpoint is not None:
            _load(module, checkpoint)
        world = getattr(module.search, "corpus", "") is None or module.search.name == "simulator"
        self.elsewhere = module.model.path == "miniature" and not world
        """Whether a policy that knows its fictional world only searches in other texts."""
        self.engine_name = module.search.name
        self.model_path = module.model.path
        self.limits = module.rollout
        self.actor = module.actor
        self.decode = module.actor.encoder.decode
        self.device = module.policy.device.type
        self.autocast = AUTOCAST[precision]

    def ask(self, question: str, watch: Watch) -> Trajectory:
        """One greedy rollout; `watch` sees it grow.

        Raises:
            UserError: the question is empty, no text, or too long.
        """
        if not question.strip():
            raise UserError("the question is empty")
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise UserError("the question is not UTF-8") from error
        example = QAExample(id="question", question=question, golden_answers=(), source="ask")
        try:
            prompt_ids(self.actor.encoder, self.actor.prompts, self.actor.spec, example)
        except UserError as error:
            raise UserError(f"the question is too long for a context of {self.limits.max_length} tokens") from error
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            return self.actor.roll_out([example], 1, 0, 0.0, Sampling(temperature=0.0), watch)[0]


def _load(module: PolicyRL, file: Path) -> None:
    checkpoint = load_checkpoint(file, "--ckpt")
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
