"""What a configuration asks of the cards, read as `fit` reads it, but nothing is loaded or
written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from zs_lightning.configuration.lightning_cli import ZeroSearchCLI
from zs_lightning.configuration.paths import check_schema
from zs_lightning.models.checks import (
    check_gradients,
    check_precision,
    check_trained_weights,
    say_slow,
)
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules import PolicyRL, SimulatorSFT
from zs_lightning.search import SimulatorSearch
from zs_lightning.search.simulator import specs_of

SIMULATOR_PROMPT = 160
"""Tokens that a simulator's prompt is assumed to have: the template, an answer and a query."""


@dataclass(frozen=True)
class Job:
    """One training step."""

    whose: str  # policy or model, a word for the trained model
    model: ModelSpec
    lora: LoraSpec | None
    optimizer: Callable[[Any], Any]
    precision: str
    checkpointing: bool
    tokens: int  # most of one forward and backward pass
    slots: int  # rows of the generator that the trained model writes with
    length: int  # tokens of each such row
    reference: bool = False  # kl_coef needs the model as it was
    critic: bool = False  # a second adapter is trained besides the policy's
    simulator: SimulatorSearch | None = None


class Reader(ZeroSearchCLI):
    """Makes the modules of a configuration, but no trainer and no run folder."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Past the checks of ZeroSearchCLI, which refuse a run folder that is there already.
        LightningCLI.parse_arguments(self, parser, args)
        check_schema(self.config["fit"]["schema"])

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def read_job(args: Sequence[str]) -> Job:
    """The job of `fit` with these arguments. Raises UserError if an option is wrong."""
    cli = Reader(["fit", *args])
    return job_of(cli.model, cli.datamodule.batch_size, cli.config["fit"]["trainer"]["precision"])


def warn_of_formats(job: Job, is_here: bool) -> None:
    """Warns of models in formats that are slow on this machine. Where its cards are not meant,
    `is_here`, only what is kept on the CPU is known to be slow."""
    specs = {"model.model": job.model}
    if job.simulator is not None:
        specs = specs_of(job.model, job.simulator)
    say_slow({k: s for k, s in specs.items() if is_here or s.device == "cpu"}, job.precision)


def job_of(module: PolicyRL | SimulatorSFT, batch_size: int, precision: Any) -> Job:
    """The job of a module that is made but not set up. Raises UserError if `fit` would not train
    these weights, or not in this precision."""
    # What `fit` refuses is not worth a table.
    check_trained_weights(module.model, module.lora)
    precision = check_precision(precision)
    check_gradients(module.model, precision)
    trained = (module.model, module.lora, module.optimizer, precision, module.checkpointing)
    if isinstance(module, SimulatorSFT):
        generator = module.simulator
        row = SIMULATOR_PROMPT + generator.max_new_tokens
        # A batch may be smaller than what a pass could hold, and a row is never split.
        tokens = max(row, min(batch_size * row, module.micro_batch_tokens))
        return Job("model", *trained, tokens, generator.slots, generator.max_length)
    search = module.search
    limits = module.rollout
    tokens = max(module.micro_batch_tokens, limits.max_length)
    return Job(
        "policy",
        *trained,
        tokens,
        limits.slots,
        limits.max_length,
        reference=module.loss.kl_coef > 0,
        critic=module.estimator == "ppo",
        simulator=search if isinstance(search, SimulatorSearch) else None,
    )
