"""fit, validate and test: LightningCLI with short class names, a run folder and plain error
messages."""

import importlib.metadata
import inspect
import logging
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from zs_lightning import __version__, callbacks
from zs_lightning.callbacks.board import Curves
from zs_lightning.callbacks.ending import Ending
from zs_lightning.callbacks.profile import Hooks, Profile
from zs_lightning.callbacks.progress import StepProgress
from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.callbacks.signs_of_life import SignsOfLife
from zs_lightning.configuration.messages import explain
from zs_lightning.configuration.paths import SCHEMA, check_schema
from zs_lightning.data import QADataModule
from zs_lightning.data.sources import QASource, say
from zs_lightning.errors import UserError
from zs_lightning.models.checks import check_gradients, check_precision, say_slow
from zs_lightning.modules import PolicyRL, PolicySFT, SimulatorSFT  # noqa: F401 - short names in YAML
from zs_lightning.modules.demonstrations import Demonstrations
from zs_lightning.modules.ranks import Ranks
from zs_lightning.modules.timed_phases import TimedPhases
from zs_lightning.modules.trainable import TrainableModule
from zs_lightning.rl.rewards import Reward
from zs_lightning.runs.checkpoints import find_checkpoint, identity, write_whole
from zs_lightning.runs.folder import CONFIG, newest, refuse_existing_run
from zs_lightning.runs.older import modernised
from zs_lightning.runs.resume import finished, position, refuse_another_run
from zs_lightning.search import SearchEngine

TRAINER = {
    "max_epochs": 1,
    "enable_checkpointing": False,  # RunFiles saves the run.
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
    # The module shares the rows out, so that trajectories are those of one process.
    "use_distributed_sampler": False,
}
"""Defaults of the trainer that are other ones than Lightning's."""

# These would break the plan of a run (its rows, noise, learning rate, last checkpoint), or do
# nothing here.
ELSEWHERE: dict[str, tuple[Any, str]] = {
    "max_epochs": (1, "data.steps"),
    "min_epochs": (None, "data.steps"),
    "max_steps": (-1, "data.steps"),
    "min_steps": (None, "data.steps"),
    "limit_train_batches": (None, "data.steps"),
    "fast_dev_run": (False, "data.steps: 1"),
    "overfit_batches": (0.0, "data.steps and a data.source with few rows"),
    "reload_dataloaders_every_n_epochs": (0, "data.steps"),
    "check_val_every_n_epoch": (1, "trainer.val_check_interval"),
    "accumulate_grad_batches": (1, "data.batch_size; model.micro_batch_tokens bounds the memory"),
    "gradient_clip_val": (None, "model.max_grad_norm"),
    "gradient_clip_algorithm": (None, "model.max_grad_norm"),
    "use_distributed_sampler": (False, "trainer.devices, which shares the rows out"),
}
"""Options of the trainer with the value that each has to keep, and what to set instead."""

CLASSES = {
    "model": TrainableModule,
    "search": SearchEngine,
    "validation_search": SearchEngine,
    "demonstrations": Demonstrations,
    "reward": Reward,
    "source": QASource,
    "sources": QASource,
}


class Parser(LightningArgumentParser):
    """The parser of fit, validate and test, and of what other commands read as they do."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # The help of a class would name __main__.py, and files would begin with the version of
        # Lightning.
        options = {"prog": "python -m zs_lightning", **options, "dump_header": None}
        super().__init__(*args, **options)

    def _apply_actions(self, cfg: Any, *others: Any, **options: Any) -> Any:
        """Every configuration passes here, of a file, of a run folder and of the command line."""
        return super()._apply_actions(modernised(cfg), *others, **options)

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        # On the way to an option of a class, jsonargparse makes the text `None` of null:
        # `--model.search.model.adapter null`.
        words = sys.argv[1:] if args is None else args
        words = [re.sub("=None$", "=null", word) for word in words]
        return super().parse_args(words, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # A parser inside of the parser, which tries type after type.
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        names = {key: list(_subclasses(base)) for key, base in CLASSES.items()}
        names["callbacks"] = [name for name in callbacks.__all__ if name != "RunFiles"]
        known = [action.dest for action in parser._actions]
        raise UserError(explain(message, known, names)) from ex


def _subclasses(base: type[Any]) -> Iterator[str]:
    for child in type.__subclasses__(base):
        # jsonargparse makes a class of a default that is not built yet.
        if not inspect.isabstract(child) and not child.__name__.startswith("LazyInstance"):
            yield child.__name__
        yield from _subclasses(child)


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run folder, with versions at its head."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: a run that fails while it loads must not occupy its folder."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or self.already_saved:
            return
        self.already_saved = True
        path = Path(str(self.config["run"].folder)) / CONFIG
        number = 1
        # A resumed run keeps the configuration it began with.
        while path.exists():
            number += 1
            path = path.with_name(f"config-{number}.yaml")
        head = {"command": self.parser.prog.split()[-1]}
        if ckpt_path := self.config["ckpt_path"]:
            head["checkpoint"] = identity(Path(ckpt_path))
        head |= versions()
        lines = "".join(f"# {name}: {value}\n" for name, value in head.items())
        write_whole(path, lines + self.parser.dump(self.config, skip_none=False))

    on_validation_start = on_test_start = on_train_start


def versions() -> dict[str, str]:
    """Versions of the program, its libraries and, in a git checkout, its commit."""
    found = {"zs_lightning": __version__, "python": platform.python_version()}
    for name in ("torch", "lightning", "transformers", "peft", "bitsandbytes", "jsonargparse"):
        found[name] = importlib.metadata.version(name)
    root = Path(__file__).parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
        said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if said.returncode == 0:
            found["git"] = said.stdout.strip()
    return found


class ZeroSearchCLI(LightningCLI):
    """fit, validate and test."""

    def __init__(self, args: list[str] | None) -> None:
        self.command = (sys.argv[1:] if args is None else args)[0]
        super().__init__(
            TrainableModule,
            QADataModule,
            subclass_mode_model=True,
            parser_class=Parser,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            trainer_defaults=dict(TRAINER),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # Describing the options of those that are not given would take twice as long again.
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        said = "Version of the configuration file."
        parser.add_argument("--schema", type=int, default=SCHEMA, help=said)
        said = "Of a fit in a folder that holds a run: auto goes on with it, never refuses it."
        parser.add_argument("--resume", type=Literal["auto", "never"], default="never", help=said)
        said = "At the end of a fit: where the seconds of a step went, and which key to change."
        parser.add_argument("--profile", action="store_true", help=said)
        parser.add_lightning_class_args(RunFiles, "run")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        command = self.config["subcommand"]
        config = self.config[command]
        check_schema(config["schema"])
        if config["model"] is not None:  # Not given, which is said when it is to be made.
            module = pkgutil.resolve_name(config["model"].class_path)
            kinds = get_type_hints(module.__init__)
            for option, value in vars(config["model"].init_args).items():
                # The parser lets it pass, and then cannot build the model.
                if value is None and is_dataclass(kinds.get(option)):
                    raise UserError(f"model.{option}: expected a group of options; got null")
            asked = config["data"].task
            if asked not in (None, module.task):
                raise UserError(f"data.task: {module.__name__} works on {module.task}; got {asked}")
            # Set here and not when the objects are made, so that a run folder says it.
            config["data"].task = module.task
        if config["ckpt_path"] is not None:
            found = find_checkpoint(Path(os.path.expanduser(config["ckpt_path"])), "--ckpt_path")
            config["ckpt_path"] = str(found)
        # Whatever is asked and the environment says: what is no number is code of others.
        config["weights_only"] = True
        config["run"].folder = os.path.expanduser(config["run"].folder)
        folder, resumes = Path(config["run"].folder), command == "fit" and config["resume"] == "auto"
        if resumes and config["ckpt_path"] is None and newest(folder):
            config["ckpt_path"] = go_on(folder, config["data"].steps)
        goes_on = config["ckpt_path"] if command == "fit" else None
        refuse_existing_run(folder, goes_on, anew=resumes)

    def _parse_ckpt_path(self) -> None:
        """Checkpoints hold no options, and reading a large one twice takes time."""

    def before_fit(self) -> None:
        """What goes on must be the run that was begun; said before a file is written."""
        if path := self.config["fit"]["ckpt_path"]:
            state = position(Path(path), to_train=True)
            if done := finished(Path(path), state, self.datamodule.steps):
                raise UserError(f"--ckpt_path: {done}")
            self.datamodule.go_on_from(state)
            config = self._parser("fit").dump(self.config["fit"], skip_none=False)
            if rounded := refuse_another_run(Path(path), yaml.safe_load(config)):
                say(rounded)
        if getattr(self.model, "validation_search", None) and not self.trainer.limit_val_batches:
            said = "trainer.limit_val_batches: 0 leaves model.validation_search nothing to answer"
            raise UserError(f"{said}; set it to 1.0, and trainer.val_check_interval to steps between validations")
        check_gradients(self.model.model, str(self.trainer.precision))
        say_slow(self.model.specs(), str(self.trainer.precision))

    def before_validate(self) -> None:
        self._before_measuring("limit_val_batches")

    def before_test(self) -> None:
        self._before_measuring("limit_test_batches")

    def _before_measuring(self, limit: str) -> None:
        # Lightning ends in silence when it has no batch to look at.
        if not getattr(self.trainer, limit):
            raise UserError(f"trainer.{limit}: 0 leaves nothing to measure; set it to 1.0 for all")
        if path := self.config[self.subcommand]["ckpt_path"]:
            position(Path(path))  # Of a copy there are no checksums, and Lightning takes any schema.
        say_slow(self.model.specs(), str(self.trainer.precision))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        command = self.config_init["subcommand"]
        config = self.config_init[command]
        asked = config["trainer"]
        folder = str(config["run"].folder)
        check_precision(asked.get("precision"))
        for name, (kept, instead) in ELSEWHERE.items():
            if (given := asked.get(name)) not in (None, kept):
                raise UserError(f"trainer.{name}: leave it at {kept}; got {given}; set {instead}")
        # With Lightning's own strategy ranks would wait for each other in each backward pass.
        if several_devices(asked):
            if (strategy := asked.get("strategy")) not in (None, "auto", "ddp"):
                change = "on several cards use ddp or auto (the same)"
                raise UserError(f"trainer.strategy: {strategy} is not possible here; {change}")
            kwargs["strategy"] = Ranks()
        if asked.get("logger") in (None, True):
            # A test has no curves: what it measures stands in results.json.
            kwargs["logger"] = False if command == "test" else Curves(folder)
        # Lightning's bar counts batches of an epoch; here an epoch is the whole run.
        if asked.get("enable_progress_bar") in (None, True):
            self.trainer_defaults["callbacks"] = StepProgress()
        try:
            trainer: L.Trainer = super().instantiate_trainer(default_root_dir=folder, **kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"trainer: {error}") from error
        except RuntimeError as error:
            if "stateful callback" not in str(error):
                raise
            raise UserError(f"trainer.callbacks: one stands there twice: {error}") from error
        # Last, so that it sees that another one stops the run, such as that of max_time.
        found: Any = trainer
        found.callbacks.sort(key=lambda callback: isinstance(callback, RunFiles))
        # It saves what the run's files then tell of.
        found.callbacks[-1:-1] = [SignsOfLife(found.callbacks[-1]), Ending(found.callbacks[-1])]
        if config["profile"]:
            self._profile(found, command)
        return trainer

    def _profile(self, trainer: Any, command: str) -> None:
        """Has a fit timed, before the module hands its phases on to those who tell them."""
        if command != "fit":
            raise UserError(f"--profile: it times the steps of a fit; leave it out of {command}")
        if self.config_init[command]["trainer"].get("profiler"):
            raise UserError("--profile: it takes the place of trainer.profiler; leave one of them out")
        self.model.phases = TimedPhases()
        # Before the ending, whose last line says what comes next.
        trainer.callbacks[-2:-2] = [Profile(trainer.callbacks[-1], self.model)]
        trainer.profiler = Hooks(trainer.callbacks[-3])


def go_on(folder: Path, steps: int) -> str:
    """The checkpoint that a run goes on from. Ends the command if the run has done its steps."""
    file = find_checkpoint(folder, "run.folder")
    state = position(file)
    if done := finished(file, state, steps):
        say(f"{folder}: {done}")
        raise SystemExit(0)
    say(f"{folder}: goes on after {state['batches']} of {steps} steps, from {file}")
    return str(file)


def several_devices(trainer: Any) -> bool:
    """Whether the trainer's options, or what started this process, mean more than one device."""
    started = [os.environ.get(name, "1") for name in ("WORLD_SIZE", "SLURM_NTASKS")]
    if trainer.get("num_nodes", 1) > 1 or any(n.isdigit() and int(n) > 1 for n in started):
        return True
    devices = trainer.get("devices")
    if isinstance(devices, list):
        return len(devices) > 1
    if devices in (None, "auto", -1, "-1"):
        on_cards = trainer.get("accelerator") in (None, "auto", "gpu", "cuda")
        return on_cards and torch.cuda.device_count() > 1
    if isinstance(devices, str) and not devices.isdigit():
        return "," in devices
    return int(devices) > 1


def run(args: Sequence[str] | None) -> None:
    """Runs fit, validate or test, the first of the arguments; None takes sys.argv."""
    quiet()
    ZeroSearchCLI(None if args is None else list(args))


def quiet() -> None:
    """Keeps notices of Lightning and the parser, which a user cannot act on, off the terminal.
    Those of the libraries of models are silenced where models are loaded."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning|torch.utils|jsonargparse")
    # Of models that are not loaded, such as those of estimate.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
    # A step without anything to learn from takes no optimiser step; the schedule goes on.
    message = r"Detected call of `lr_scheduler\.step\(\)` before"
    warnings.filterwarnings("ignore", message=message)
