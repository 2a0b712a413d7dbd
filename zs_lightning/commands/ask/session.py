"""A policy that is ready for questions: the model, prompts and limits of a run, with any engine."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zs_lightning.configuration.arguments import instantiate, search_options
from zs_lightning.configuration.paths import read_module
from zs_lightning.errors import UserError
from zs_lightning.generation import Sampling
from zs_lightning.models.checks import AUTOCAST, check_precision, say_slow
from zs_lightning.modules import PolicyRL
from zs_lightning.rollout.rollouter import Watch, prompt_ids
from zs_lightning.runs.checkpoints import load_checkpoint
from zs_lightning.runs.folder import part_of
from zs_lightning.types import QAExample, Trajectory


def policy_config(file: Path) -> dict[str, Any]:
    """What a configuration file says. Raises UserError if it says nothing of a policy."""
    config = read_module(file, f"{file} describes no policy; expected a `model:` with its class_path")
    if str(config["model"].get("class_path")).rpartition(".")[2] == "SimulatorSFT":
        raise UserError(f"{file} trains a simulator, which answers none; expected one of PolicyRL")
    return config


def default_search(config: dict[str, Any]) -> list[str]:
    """Options of the engine to ask where nobody names one: of the miniature world, if the questions
    are about one, or else of Wikipedia."""
    # As a person writes it, not as the parser resolves it: a class may be a name or a mapping.
    source = part_of(config, "data").get("source") or "MiniatureSource"
    if not isinstance(source, dict):
        source = {"class_path": source}
    if str(source.get("class_path")).rpartition(".")[2] != "MiniatureSource":
        return ["--search=zs_lightning.search.MediaWikiSearch"]
    seed = (source.get("init_args") or {}).get("world_seed", 0)
    return ["--search=BM25Search", f"--search.world_seed={seed}"]


class Session:
    """Answers one question after another, as a test of the run would.

    Raises UserError if weights and config do not fit together, or an option is wrong.

    Args:
        config: from `policy_config`.
        checkpoint: of the trained weights; None asks the untrained base.
        search: `--search` options; none take the default engine.
    """

    def __init__(self, config: dict[str, Any], checkpoint: Path | None, search: Sequence[str]) -> None:
        model = config["model"]
        options = dict(model.get("init_args") or {})
        options["search"] = search_options(search, default_search(config))
        module = instantiate(PolicyRL, "model", {**model, "init_args": options})
        precision = check_precision(part_of(config, "trainer").get("precision"))
        say_slow(module.specs(), precision)
        # One question at a time needs no memory for more.
        module.rollout = replace(module.rollout, slots=1)
        module.setup("test")
        if checkpoint is not None:
            saved = load_checkpoint(checkpoint, "--ckpt")
            module.on_load_checkpoint(saved)
            module.load_state_dict(saved["state_dict"], strict=False)
        self.engine_name = module.search.name
        self.limits = module.rollout
        self.actor = module.actor
        self.decode = module.actor.encoder.decode
        self.device = module.policy.device.type
        self.cast = AUTOCAST[precision]

    def ask(self, question: str, watch: Watch) -> Trajectory:
        """One greedy rollout; `watch` sees it grow. Raises UserError for a question that is empty,
        no text, or too long."""
        if not question.strip():
            raise UserError("the question is empty")
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise UserError("the question is not UTF-8") from error
        example = QAExample(id="question", question=question, golden_answers=(), source="ask")
        actor = self.actor
        try:
            prompt_ids(actor.encoder, actor.prompts, actor.spec, example)
        except UserError as error:
            most = self.limits.max_length
            raise UserError(f"the question is too long for a context of {most} tokens") from error
        greedy = Sampling(temperature=0.0)
        # As Lightning does it in a test: in another precision other tokens may be written.
        enabled = self.cast is not None
        with torch.autocast(self.device, self.cast, enabled=enabled, cache_enabled=False):
            return actor.roll_out([example], 1, 0, 0.0, greedy, watch)[0]
