"""Writes the files of a run folder while a run goes on, see runs/folder.py."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L

from zs_lightning.callbacks.board import Curves
from zs_lightning.errors import UserError
from zs_lightning.runs import folder as files
from zs_lightning.runs.outcomes import NORMALISATION, by_decoding
from zs_lightning.types import Trajectory

_log = logging.getLogger(__name__)


class RunFiles(L.Callback):
    """Keeps the run folder. Always on; its arguments stand under `run:`.

    Args:
        folder: where everything of this run goes. An existing run is never overwritten.
        save_every: training steps between checkpoints; the last step always saves.
        keep_trajectories: rollouts of each training step to write down; 0 for none.
    """

    def __init__(self, folder: str = "runs/unnamed", save_every: int = 10, keep_trajectories: int = 8) -> None:
        if save_every < 1 or keep_trajectories < 0:
            raise UserError(f"run: save_every must be >= 1 and keep_trajectories >= 0; got {save_every}, {keep_trajectories}")
        if not folder.strip():
            raise UserError("run.folder: expected a folder; got an empty text")
        self.folder = Path(folder)
        self.save_every, self.keep_trajectories = save_every, keep_trajectories
        self.begun, self.first, self.done, self.saved = 0.0, 0, 0, 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.begun = time.monotonic()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            if hasattr(pl_module, "skipped"):
                pl_module.skipped.write = self._write_bad_step  # type: ignore[union-attr]
        for logger in trainer.loggers:
            if isinstance(logger, Curves):
                # What is asked of it after this hook comes when the module has loaded its weights.
                logger.begun = True

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Changes the loops' state before Lightning reads it."""
        if trainer.state.fn != "fit":
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        # The end of a run that goes on for more steps is not the end any more.
        progress["is_last_batch"] = False
        # max_time is that of one command.
        checkpoint["callbacks"].pop("Timer", None)
        for logger in trainer.loggers:
            if isinstance(logger, Curves):
                logger.go_on_after(progress["current"]["ready"])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.done:
            self.first = batch_idx
            if trainer.is_global_zero:
                files.drop_later_lines(self.folder / files.TRAJECTORIES / "train.jsonl", batch_idx)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.done = batch_idx + 1
        trajectories = getattr(module, "trajectories", [])
        if trainer.is_global_zero and trajectories:
            kept = trajectories[: self.keep_trajectories]
            self._write_trajectories("train", kept, self.done)
        ends = trainer.should_stop or self.done == trainer.num_training_batches
        if ends:
            self._save_model(trainer, module, files.MODEL)
        if ends or self.done % self.save_every == 0:
            self._save_checkpoint(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the best model; and here a callback such as EarlyStopping ends the run."""
        if trainer.state.fn != "fit":
            return
        self._keep_best(trainer, pl_module)
        if trainer.should_stop:
            self._save_model(trainer, pl_module, files.MODEL)
            if self.saved != self.done:
                self._save_checkpoint(trainer)

    def _keep_best(self, trainer: L.Trainer, module: Any) -> None:
        measured = trainer.callback_metrics.get(getattr(module, "best_metric", ""))
        noted = self.folder / f"{files.BEST}.json"
        # From the file and not from a checkpoint, which is saved before the validation of its step.
        best = json.loads(noted.read_text())["value"] if noted.is_file() else -math.inf
        if measured is not None and measured > best:
            self._save_model(trainer, module, files.BEST)
            if trainer.is_global_zero:
                made = {"step": self.done, "metric": module.best_metric, "value": float(measured)}
                self._write_json(noted.name, made)

    def _save_model(self, trainer: L.Trainer, module: Any, name: str) -> None:
        # Before the last checkpoint, so that no finished run is without it.
        if trainer.is_global_zero:
            part, final = self.folder / f"{name}.part", self.folder / name
            for old in (part, final):
                shutil.rmtree(old, ignore_errors=True)
            module.save_model(part)
            part.rename(final)

    def _save_checkpoint(self, trainer: L.Trainer) -> None:
        self.saved = self.done
        # Beside the old one and moved over it: a kill leaves one or the other, never half of one.
        part = self.folder / f"{files.CHECKPOINT}.part"
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            os.replace(part, self.folder / files.CHECKPOINT)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.interrupted:
            return
        if 0 < self.done < (planned := trainer.num_training_batches):
            said = "stopped after %d of %d steps; fit goes on with --ckpt_path %s"
            _log.warning(said, self.done, planned, self.folder / files.CHECKPOINT)
        made: dict[str, float] = {"seconds": self._seconds(), "steps": self.done}
        if self.first:
            made["resumed_after"] = self.first  # The seconds are those of the steps since then.
        self._write_json(files.FIT, made)
        if hasattr(pl_module, "search"):
            self._write_json(files.SEARCH, pl_module.search.counted())

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Notes at the error what a fit leaves."""
        if trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        last = self.folder / files.CHECKPOINT
        if last.is_file():
            finished = self.done == trainer.num_training_batches
            go_on = f"fit goes on with --ckpt_path {last}"
            exception.add_note(f"all steps were done: see {last}" if finished else go_on)
            return
        for logger in trainer.loggers:
            logger.finalize("failed")  # Afterwards it would write its file anew.
        # Without a checkpoint, what was written makes room for the next run.
        aside = files.set_aside(self.folder)
        written = f"; what was written is now in {aside}" if aside else ""
        exception.add_note(
            f"no checkpoint was saved, the first is due at step {self.save_every} (run.save_every); "
            f"the same command begins anew{written}"
        )

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        results: dict[str, Any] = {"schema": files.SCHEMA, "seed": pl_module.seed}
        if hasattr(pl_module, "results"):
            results["simulator"] = pl_module.results()
        else:
            outcomes = pl_module.outcomes
            results |= {"normalisation": NORMALISATION, "decodings": by_decoding(outcomes)}
            results["engine"] = pl_module.search.name
            self._write_json(files.SEARCH, pl_module.search.counted())
            self._write_lines(files.QUESTIONS, "w", list(map(asdict, outcomes)))
            self._write_trajectories("test", pl_module.trajectories, 0)
        self._write_json(files.RESULTS, {**results, "seconds": self._seconds()})

    def _seconds(self) -> float:
        return round(time.monotonic() - self.begun, 1)

    def _write_trajectories(self, split: str, trajectories: Sequence[Trajectory], step: int) -> None:
        (self.folder / files.TRAJECTORIES).mkdir(exist_ok=True)
        head = {"schema": 1, "step": step}
        lines = [{**head, **trajectory_line(trajectory)} for trajectory in trajectories]
        self._write_lines(f"{files.TRAJECTORIES}/{split}.jsonl", "a", lines)

    def _write_bad_step(self, step: int, reason: str, rows: Sequence[Any]) -> None:
        """Writes down what a step that was skipped was to learn from."""
        (self.folder / files.BAD_STEPS).mkdir(exist_ok=True)
        head = {"schema": 1, "step": step, "reason": reason}
        lines = [head | (trajectory_line(row) if isinstance(row, Trajectory) else asdict(row)) for row in rows]
        # JSON has no NaN: texts stand in their places.
        lines = json.loads(json.dumps(lines), parse_constant=str)
        self._write_lines(f"{files.BAD_STEPS}/step-{step}.jsonl", "w", lines)

    def _write_lines(self, name: str, mode: str, lines: Sequence[dict[str, Any]]) -> None:
        # Half a character, as JSON of others can hold, is written as the escape JSON has for it.
        with (self.folder / name).open(mode, encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        # An engine that counted nothing leaves no file.
        if content:
            (self.folder / name).write_text(json.dumps(content, indent=2) + "\n")


def trajectory_line(trajectory: Trajectory) -> dict[str, Any]:
    """Everything about one trajectory, as JSON."""
    example = trajectory.example
    return {
        "noise_prob": trajectory.noise_prob,
        "id": example.key,
        "sample": trajectory.sample,
        "question": example.question,
        "golden_answers": list(example.golden_answers),
        "answer": trajectory.answer,
        "status": str(trajectory.status),
        "failure": trajectory.failure,
        "reward": trajectory.reward,
        "reward_parts": trajectory.reward_parts,
        "advantage": trajectory.advantage,
        "turns": [asdict(turn) for turn in trajectory.turns],
        "prompt_ids": trajectory.prompt_ids,
        "token_ids": trajectory.token_ids,
        "loss_mask": [int(sampled) for sampled in trajectory.loss_mask],
        # Five digits: a difference of 1e-5 says nothing, and the files are large.
        "old_logprobs": [round(value, 5) for value in trajectory.old_logprobs],
    }
