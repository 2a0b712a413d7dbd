"""What a configuration asks of the cards, read as `fit` reads it, but nothing is loaded or
written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from zs_lightning.models.specs import LoraSpec, ModelSpec, choose_device, naming
from zs_lightning.modules import PolicyRL, SimulatorSFT
from zs_lightning.search import SimulatorSearch
from zs_lightning.search.simulator import specs_of

SIMULATOR_PROMPT = 160
"""Tokens that a simulator's prompt is assumed to have: the template, an answer and a query."""
POLICY_PROMPT = 200
"""Those of a policy's: the template and a question."""
READING, WRITING, SCORING, TRAINING = "read", "written", "scored, no gradient", "trained"
SIMULATOR = "simulator: "
"""What is done with the tokens of a step; the first two also by the simulator."""


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
    work: Mapping[str, float] = field(default_factory=dict)
    """Most tokens of a step, by what is done with them."""
    steps: int = 1


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


def read_job(args: Sequence[str], is_here: bool = False) -> Job:
    """The job of `fit` with these arguments, on what devices there are if `is_here`. Raises
    UserError if an option is wrong."""
    cli = Reader(["fit", *args])
    data = cli.datamodule
    job = job_of(cli.model, data.batch_size, cli.config["fit"]["trainer"]["precision"])
    if is_here:
        job = replace(job, model=_here(job.model, "model.model"))
        if job.simulator is not None and not job.simulator.shared:
            job.simulator.spec = _here(job.simulator.spec, "model.search.model")
    return replace(job, steps=data.steps)


def _here(spec: ModelSpec, key: str) -> ModelSpec:
    with naming(key):
        return replace(spec, device=str(choose_device(spec.device)))


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
        work = {TRAINING: batch_size * row}
        return Job("model", *trained, tokens, generator.slots, generator.max_length, work=work)
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
        work=_work(module, batch_size),
    )


def _work(module: PolicyRL, batch_size: int) -> dict[str, float]:
    """Tokens of a step in which every rollout uses all its turns, and each turn and result all its
    tokens, or the whole context."""
    limits, search = module.rollout, module.search
    rollouts = batch_size * module.group_size
    written = (limits.max_turns + 1) * limits.max_new_tokens
    found = limits.max_turns * limits.max_observation_tokens
    share = min(1, max(0, limits.max_length - POLICY_PROMPT) / (written + found))
    context = POLICY_PROMPT + share * (written + found)
    work = {WRITING: rollouts * share * written}
    # A group's rollouts begin with the same prompt.
    work[READING] = rollouts * share * found + batch_size * POLICY_PROMPT
    if isinstance(search, SimulatorSearch):
        searches = rollouts * share * limits.max_turns
        work[SIMULATOR + WRITING] = searches * search.max_new_tokens
        work[SIMULATOR + READING] = searches * SIMULATOR_PROMPT
    critic = module.estimator == "ppo"
    if scored := (module.loss.kl_coef > 0) + critic:
        work[SCORING] = scored * rollouts * context
    work[TRAINING] = (1 + critic) * module.updates_per_rollout * rollouts * context
    return work
