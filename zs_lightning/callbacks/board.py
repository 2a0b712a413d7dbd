"""What TensorBoard shows of a policy run: charts by theme ("custom scalars"), trajectories ("text")
and options ("hparams")."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from zs_lightning.callbacks.noise_annealing import NoiseCallback
from zs_lightning.callbacks.trajectory_text import best_and_worst, trajectory_text, wrong_and_right
from zs_lightning.errors import UserError
from zs_lightning.types import Trajectory

SCORES = ("reward", "val/em", "real/em")
"""Metrics that stand beside the options."""

LAYOUT: dict[str, dict[str, list[str]]] = {
    "Reward": {
        "reward and exact match": ["reward", "reward/em"],
        "validation": ["val/em", "val/f1"],
        "simulator against the real engine: exact match": ["val/em", "real/em"],
        "gap: exact match, simulator minus real engine": ["real/gap"],
        "answered": ["reward/answered"],
        "spread in groups; groups without signal": ["reward_std", "frac_reward_zero_std"],
        "groups of the pool: known, drawn, trained on": ["groups/pool", "groups/drawn", "groups/refilled"],
    },
    "Search": {
        "searches per question": ["search/per_question"],
        "searches in a validation": ["val/searches", "real/searches"],
        "searches after a useful and after a noisy result": ["search/more_after_useful", "search/more_after_noise"],
        "after a fruitless result: same words, other words": [
            "search/repeated_after_fruitless",
            "search/reworded_after_fruitless",
        ],
        "failed and empty": ["search/failed", "search/empty"],
        "failed with the real engine": ["real/failed"],
        "answers withheld from the simulator": ["search/withheld"],
        "found in the cache": ["search/cache_hits"],
    },
    "Curriculum": {
        "noise: planned, realised, and as it was read": ["noise/planned", "noise/realised", "noise/read"],
        "drawn by kind": ["noise/drawn_.+"],
    },
    "Health": {
        "alarms that are on": ["health/alarms"],
        "entropy": ["entropy"],
        "log-likelihood of correct answers": ["policy/correct_logprob"],
        "KL to the policy before training": ["kl"],
        "norm of the gradient": ["grad_norm"],
        "sampling gap": ["policy/sampling_gap"],
        "clipped tokens": ["clip_ratio"],
        "cut off and invalid": ["completions/clipped_ratio", "rollout/invalid_actions"],
        "loss": ["loss"],
        "critic: value and return": ["critic/value", "critic/return"],
        "critic: explained variance": ["critic/explained_variance"],
        "critic: loss": ["critic/loss"],
        "skipped steps": ["policy/skipped_steps"],
    },
    "Speed": {
        "seconds of a step": ["seconds/rollout", "seconds/update"],
        "seconds of a validation": ["seconds/validation"],
        "tokens of a rollout: sampled, and in all": ["completions/mean_length", "rollout/context_tokens"],
    },
    "Memory": {
        "most on the card so far, MiB": ["memory/card_peak"],
        "the process, MiB": ["memory/resident"],
        "tokens of a micro-batch": ["policy/micro_batch_tokens"],
    },
}
"""Tab, chart, tags of modules/step_metrics.py and of validations, as regular expressions."""


class Curves(TensorBoardLogger):
    """The logger of a run folder: what the modules log and nothing else."""

    def __init__(self, folder: str) -> None:
        super().__init__(save_dir=folder, name="", version="")
        self.begun = False

    def go_on_after(self, steps: int) -> None:
        """Hides what a run wrote after the checkpoint of so many steps: they are done once more."""
        # Read when the file is opened, which is later.
        self._kwargs["purge_step"] = steps

    @property
    def experiment(self) -> Any:
        # Lightning asks for it before anything is checked, and a run that stops there is to leave
        # no file.
        if not self.begun:
            raise AttributeError("the run has not begun")
        if self._experiment is None:
            self._wait_for_a_name()
        return super().experiment

    def _wait_for_a_name(self) -> None:
        """Waits out the second in which a former life of the run has opened its file: TensorBoard
        reads files by name, where the process stands behind the second, and 10000 before 9999."""
        while list(Path(self.save_dir).glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.02)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.begun = True
        # Without Lightning's own `epoch`: a run is one epoch, whatever its steps.
        super().log_metrics({k: value for k, value in metrics.items() if k != "epoch"}, step)

    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Writes the options that TensorBoard lists beside the metrics' last values.

        Lightning's own would begin each metric's curve with a value that nobody measured, and
        torch's a folder with a run of its own.
        """
        from torch.utils.tensorboard.summary import hparams

        described, begun, _ = hparams(dict(params), dict.fromkeys(metrics or [], 0.0))
        for summary in (described, begun):
            self.experiment.file_writer.add_summary(summary)

    def save(self) -> None:
        # Without Lightning's hparams.yaml, which would be empty: config.yaml has the options.
        self.experiment.flush()


class Board(L.Callback):
    """Arranges the charts of a PolicyRL run, lists its options, and writes down the best and the
    worst rollout of a step and four of a validation. Loggers but TensorBoard get the options only.

    Args:
        every: training steps between trajectories.
    """

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise UserError(f"Board: every must be >= 1; got {every}")
        self.every = every

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not hasattr(pl_module, "trajectories"):
            name = type(pl_module).__name__
            raise UserError(f"Board: {name} has no trajectories to show; use it with PolicyRL")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        missing = absent(trainer, pl_module)
        for writer in _writers(trainer):
            writer.add_custom_scalars(layout(missing))
        scores = [tag for tag in SCORES if not tag.startswith(missing)]
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.log_hyperparams(options(trainer, pl_module), *([scores] if isinstance(logger, Curves) else []))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.every == 0 and pl_module.trajectories:
            _write_texts(trainer, pl_module, "trajectories/training", best_and_worst(pl_module.trajectories), batch_idx)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            return
        for tag, rows in (("validation", pl_module.validated), ("validation_real", pl_module.with_real)):
            if shown := wrong_and_right(rows):
                # Where Lightning shows the validation's numbers: at the step before it.
                _write_texts(trainer, pl_module, f"trajectories/{tag}", shown, pl_module.rollout_step - 1)


def absent(trainer: L.Trainer, module: Any) -> tuple[str, ...]:
    """What the tags begin with that a run does not log."""
    validates = bool(trainer.limit_val_batches)
    has_real = validates and module.validation_search is not None
    simulates = getattr(module.search, "orders", None) is not None
    on_card = module.device.type == "cuda"
    logged = {
        "val/": validates,
        "real/": has_real,
        "seconds/validation": has_real,
        "groups/": module.pool is not None,
        "noise/": simulates,
        "search/more_after": simulates,
        "search/withheld": simulates,
        "search/cache_hits": module.search.hit_rate() is not None,
        "kl": module.loss.kl_coef > 0,
        "clip_ratio": module.updates_per_rollout > 1,
        "critic/": module.critic is not None,
        "health/": not module.health.speaks,
        "memory/card": on_card,
        "memory/resident": not on_card,
    }
    return tuple(tag for tag, is_logged in logged.items() if not is_logged)


def layout(missing: tuple[str, ...]) -> dict[str, dict[str, list[Any]]]:
    """LAYOUT for TensorBoard, without charts of tags that begin as one of the missing."""
    tabs: dict[str, dict[str, list[Any]]] = {}
    for tab, charts in LAYOUT.items():
        for name, tags in charts.items():
            if not any(tag.startswith(missing) for tag in tags):
                # A tag there is a pattern, of which the beginning suffices.
                tabs.setdefault(tab, {})[name] = ["Multiline", [f"{tag}$" for tag in tags]]
    return tabs


def options(trainer: L.Trainer, module: Any) -> dict[str, Any]:
    """The options that people vary."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    noise = [module.noise_prob] * 2
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, NoiseCallback):
            noise = [callback.start, callback.end]
    return {
        "model": module.model.path,
        "trained": f"LoRA {module.lora.r}" if module.lora else "all weights",
        "estimator": module.estimator,
        "lr": trainer.optimizers[0].defaults.get("lr"),
        "kl_coef": module.loss.kl_coef,
        "updates_per_rollout": module.updates_per_rollout,
        "batch_size": data.batch_size,
        "group_size": module.group_size,
        "steps": data.steps,
        "search": module.search.name,
        "noise_start": noise[0],
        "noise_end": noise[1],
        "seed": module.seed,
    }


def _writers(trainer: L.Trainer) -> list[Any]:
    # Those of the first process; the others would write the same again.
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def _write_texts(trainer: L.Trainer, module: Any, tag: str, shown: Sequence[Trajectory], step: int) -> None:
    text = "\n\n---\n\n".join(trajectory_text(t, module.actor.encoder.decode) for t in shown)
    for writer in _writers(trainer):
        writer.add_text(tag, text, step)
