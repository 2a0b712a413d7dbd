"""What TensorBoard shows of a policy run: charts by theme ("custom scalars") and trajectories
("text")."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from zs_lightning.errors import UserError
from zs_lightning.text.shown import visible
from zs_lightning.types import ActionKind, Status, Trajectory

LAYOUT: dict[str, dict[str, list[str]]] = {
    "Reward": {
        "reward and exact match": ["reward", "reward/em"],
        "answered": ["reward/answered"],
        "spread of rewards in groups, and groups without any": ["reward_std", "frac_reward_zero_std"],
        "validation": ["val/em", "val/f1"],
    },
    "Search": {
        "searches per question": ["search/per_question"],
        "after a fruitless result": [
            "search/repeated_after_fruitless",
            "search/reworded_after_fruitless",
        ],
        "failed": ["search/failed"],
    },
    "Noise": {"planned and realised": ["noise/planned", "noise/realised"]},
    "Policy health": {
        "entropy": ["entropy"],
        "gradient norm": ["grad_norm"],
        "sampling gap and KL": ["policy/sampling_gap", "kl"],
        "clipped": ["clip_ratio"],
        "truncated and invalid": ["completions/clipped_ratio", "rollout/invalid_actions"],
        "tokens": ["completions/mean_length", "rollout/context_tokens"],
    },
    "Speed": {"seconds of a step": ["seconds/rollout", "seconds/update"]},
}
"""Tab, chart, tags of modules/step_metrics.py."""


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

    def save(self) -> None:
        # Without Lightning's hparams.yaml, which would be empty: config.yaml has the options.
        self.experiment.flush()


class Board(L.Callback):
    """Arranges the charts of a PolicyRL run and writes down the best and the worst rollout of a
    step. Without a TensorBoard logger there is nothing to do.

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

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for writer in _writers(trainer):
            writer.add_custom_scalars(layout(bool(trainer.limit_val_batches)))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.every or not pl_module.trajectories:
            return
        decode = pl_module.actor.encoder.decode
        shown = [trajectory_list(t, decode) for t in best_and_worst(pl_module.trajectories)]
        for writer in _writers(trainer):
            writer.add_text("trajectories", "\n\n".join(shown), batch_idx)


def layout(validates: bool) -> dict[str, dict[str, list[Any]]]:
    """LAYOUT for TensorBoard, without an empty chart for what is not measured."""
    tabs: dict[str, dict[str, list[Any]]] = {tab: {} for tab in LAYOUT}
    for tab, charts in LAYOUT.items():
        for name, tags in charts.items():
            # A tag there is a pattern, of which the beginning suffices.
            tabs[tab][name] = ["Multiline", [f"{tag}$" for tag in tags]]
    if not validates:
        del tabs["Reward"]["validation"]
    return tabs


def _writers(trainer: L.Trainer) -> list[Any]:
    # Those of the first process; the others would write the same again.
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def best_and_worst(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The first with the highest and the first with the lowest reward, two different ones."""
    best = max(trajectories, key=lambda t: t.reward)
    rest = [t for t in trajectories if t is not best]
    return [best, *([min(rest, key=lambda t: t.reward)] if rest else [])]


def trajectory_list(trajectory: Trajectory, decode: Callable[[list[int]], str]) -> str:
    """A trajectory as a Markdown list of the tokens that the policy wrote and read, turn by turn;
    `decode` makes text of ids."""
    # Not as a table: TensorBoard breaks the words of narrow columns.
    example, usable = trajectory.example, trajectory.status is not Status.FAILED
    golds = escape(" / ".join(example.golden_answers))
    reason = f": {trajectory.failure}" if trajectory.failure else ""
    lines = [
        f"**{escape(example.question)}** golden answer: {golds}; "
        f"reward {trajectory.reward:.2f}, advantage {trajectory.advantage:+.2f}, "
        f"{escape(f'{trajectory.status}{reason}')}",
        "",
    ]
    for number, turn in enumerate(trajectory.turns, 1):
        answered = "engine" if turn.kind is ActionKind.SEARCH else "notice"
        for who, span in (("policy", turn.span), (answered, turn.observation_span)):
            if span is not None:
                trained = usable and all(trajectory.loss_mask[slice(*span)])
                kind = "trained on" if trained else "not trained on"
                text = escape(decode(trajectory.token_ids[slice(*span)]))
                lines.append(f"- **{number} {who}** ({kind}): {text}")
    return "\n".join(lines)


def escape(text: str) -> str:
    """Untrusted text for one line: no markup, no end of a line."""
    line = visible(" ⏎ ".join(text.splitlines()))
    return "".join(c if c.isalnum() or c in " .,:;?'" else f"&#{ord(c)};" for c in line)
