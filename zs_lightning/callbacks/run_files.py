"""What a run leaves in its folder: config with versions, trajectories, checkpoint, model, results."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L

from zs_lightning.callbacks.board import Curves
from zs_lightning.errors import UserError
from zs_lightning.runs.outcomes import NORMALISATION, by_decoding
from zs_lightning.types import Trajectory

_log = logging.getLogger(__name__)

ENCODING: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
"""Half a character, as JSON of others can hold, is written as the escape that JSON has for it."""
RUN_MARKS = ("config.yaml", "last.ckpt", "results.json")


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
        self.folder, self.save_every, self.keep_trajectories = Path(folder), save_every, keep_trajectories
        self.begun, self.first, self.done, self.saved = 0.0, 0, 0, 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.begun = time.monotonic()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
        for logger in trainer.loggers:
            if isinstance(logger, Curves):
                logger.begun = True  # What is asked of it after this hook comes when the module has loaded its weights.

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before Lightning reads it: the end of a run that goes on for more steps is not the end any more, and max_time is
        that of one command."""
        if trainer.state.fn != "fit":
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["is_last_batch"] = False
        checkpoint["callbacks"].pop("Timer", None)
        for logger in trainer.loggers:
            if isinstance(logger, Curves):
                logger.go_on_after(progress["current"]["ready"])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.done:
            self.first = batch_idx
            if trainer.is_global_zero:
                drop_later_lines(self.folder / "trajectories" / "train.jsonl", batch_idx)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.done = done = batch_idx + 1
        trajectories: list[Trajectory] = getattr(pl_module, "trajectories", [])
        if trainer.is_global_zero and trajectories:
            self._write_trajectories("train", trajectories[: self.keep_trajectories], pl_module, done)
        ends = trainer.should_stop or done == trainer.num_training_batches
        if ends:
            self._save_model(trainer, pl_module)
        if ends or done % self.save_every == 0:
            self._save_checkpoint(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Here a callback such as EarlyStopping ends the run."""
        if trainer.state.fn == "fit" and trainer.should_stop:
            self._save_model(trainer, pl_module)
            if self.saved != self.done:
                self._save_checkpoint(trainer)

    def _save_model(self, trainer: L.Trainer, module: Any) -> None:
        """Before the last checkpoint, so that no finished run is without; under its name when it is whole."""
        if trainer.is_global_zero:
            part, final = self.folder / "model.part", self.folder / "model"
            for old in (part, final):
                shutil.rmtree(old, ignore_errors=True)
            module.save_model(part)
            part.rename(final)

    def _save_checkpoint(self, trainer: L.Trainer) -> None:
        """Written beside the old one and moved over it: a kill leaves one or the other, never half of one."""
        self.saved = self.done
        written, final = self.folder / "last.ckpt.part", self.folder / "last.ckpt"
        trainer.save_checkpoint(written)
        if trainer.is_global_zero:
            os.replace(written, final)

    def _write_trajectories(self, split: str, trajectories: list[Trajectory], module: Any, step: int) -> None:
        path = self.folder / "trajectories" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a", **ENCODING) as file:
            for trajectory in trajectories:
                line = {"schema": 1, "step": step, "noise_prob": module.noise_prob, **trajectory_line(trajectory)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and not trainer.interrupted:
            if 0 < self.done < (planned := trainer.num_training_batches):
                last = self.folder / "last.ckpt"
                _log.warning("stopped after %d of %d steps; fit goes on with --ckpt_path %s", self.done, planned, last)
            made: dict[str, float] = {"seconds": round(time.monotonic() - self.begun, 1), "steps": self.done}
            if self.first:
                made["resumed_after"] = self.first  # The seconds are those of the steps since then.
            (self.folder / "fit.json").write_text(json.dumps(made, indent=2) + "\n")
            if hasattr(pl_module, "search"):
                self._write_counted(pl_module.search.counted())

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Notes at the error what a fit leaves. Without a checkpoint, what it wrote makes room for the next run."""
        if trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        last = self.folder / "last.ckpt"
        if last.is_file():
            finished = self.done == trainer.num_training_batches
            exception.add_note(f"all steps were done: see {last}" if finished else f"fit goes on with --ckpt_path {last}")
            return
        for logger in trainer.loggers:
            logger.finalize("failed")  # Afterwards it would write its file anew.
        aside = set_aside(self.folder)
        written = f"; what was written is now in {aside}" if aside else ""
        exception.add_note(
            f"no checkpoint was saved, the first is due at step {self.save_every} (run.save_every); the same command begins "
            f"anew{written}"
        )

    def _write_counted(self, counted: dict[str, float]) -> None:
        """Of an engine that counted nothing there is no file."""
        if counted:
            (self.folder / "search.json").write_text(json.dumps(counted, indent=2) + "\n")

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        results: dict[str, Any] = {"schema": 1, "seed": pl_module.seed}
        if hasattr(pl_module, "results"):
            results |= {"simulator": pl_module.results()}
        else:
            results |= {"normalisation": NORMALISATION, "decodings": by_decoding(pl_module.outcomes)}
            results["engine"] = pl_module.search.name
            self._write_counted(pl_module.search.counted())
            with (self.folder / "questions.jsonl").open("w", **ENCODING) as file:
                file.writelines(json.dumps(row.line(), ensure_ascii=False) + "\n" for row in pl_module.outcomes)
            self._write_trajectories("test", pl_module.trajectories, pl_module, 0)
        results["seconds"] = round(time.monotonic() - self.begun, 1)
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def set_aside(folder: Path) -> Path | None:
    """Moves what a run without a checkpoint wrote into a folder inside of its own; None if it wrote nothing."""
    if not (folder / "config.yaml").is_file():
        return None
    aside = next(path for number in itertools.count(1) if not (path := folder / f"unsaved-{number}").exists())
    aside.mkdir()
    for pattern in ("config.yaml", "trajectories", "last.ckpt.part", "*tfevents*"):
        for path in folder.glob(pattern):
            path.rename(aside / path.name)
    return aside


def refuse_existing_run(folder: Path, ckpt_path: str | None) -> None:
    """Two runs never share a folder; only going on from a checkpoint in the folder may write there again.

    Raises:
        UserError: the folder holds a run, or cannot be made.
    """
    if ckpt_path is not None and folder.resolve() in Path(ckpt_path).resolve().parents:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.folder: {folder} cannot be made: {error.strerror}; choose another with --run.folder") from error
    if any((folder / name).exists() for name in RUN_MARKS):
        last = folder / "last.ckpt"
        go_on = f", or go on with it by fit --ckpt_path {last}" if last.is_file() else ""
        if not go_on and not (folder / "results.json").is_file():
            go_on = "; if nothing runs there any more, you can delete it: it has neither a checkpoint nor results"
        raise UserError(f"run.folder: {folder} already holds a run; choose another with --run.folder{go_on}")


def drop_later_lines(path: Path, step: int) -> None:
    """Cuts off what was written after the checkpoint of `step`: these steps are done and written once more."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        keep = 0
        for line in file:
            found = re.match(rb'\{"schema": 1, "step": (\d+),', line)
            if not found or int(found[1]) > step or not line.endswith(b"\n"):
                break
            keep += len(line)
        file.truncate(keep)


def trajectory_line(trajectory: Trajectory) -> dict[str, Any]:
    """Everything about one trajectory, as JSON."""
    return {
        "id": trajectory.example.key,
        "sample": trajectory.sample,
        "question": trajectory.example.question,
        "golden_answers": list(trajectory.example.golden_answers),
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
        "old_logprobs": [round(value, 5) for value in trajectory.old_logprobs],
    }
