"""Writes the files of a run folder while a run goes on, see runs/folder.py."""

import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import SafetensorError

from zs_lightning.callbacks.board import Curves
from zs_lightning.errors import RunError, UserError
from zs_lightning.runs import checkpoints
from zs_lightning.runs import folder as files
from zs_lightning.runs.outcomes import NORMALISATION, by_decoding
from zs_lightning.types import Trajectory

_log = logging.getLogger(__name__)

MEMORY = 1 / 8
"""Share of this machine's memory that a copy of a step's state may take."""
PATIENCE = 100
"""Times as long as a copy takes pass before the next one: they cost a hundredth of a run."""


class RunFiles(L.Callback):
    """Keeps the run folder. Always on; its arguments stand under `run:`.

    Args:
        folder: where everything of this run goes. An existing run is never overwritten.
        save_every: training steps between checkpoints; the last step always saves.
        keep_trajectories: rollouts of each training step to write down, and as many of those of
            model.refill; 0 for none.
    """

    def __init__(self, folder: str = "runs/unnamed", save_every: int = 10, keep_trajectories: int = 8) -> None:
        if save_every < 1 or keep_trajectories < 0:
            raise UserError(f"run: save_every must be >= 1 and keep_trajectories >= 0; got {save_every}, {keep_trajectories}")
        if not folder.strip():
            raise UserError("run.folder: expected a folder; got an empty text")
        self.folder = Path(folder)
        self.save_every, self.keep_trajectories = save_every, keep_trajectories
        self.begun, self.first, self.done, self.saved = 0.0, 0, 0, 0
        self.ended: dict[str, Any] | None = None
        """State of the step that has just ended; its tensors are the module's own."""
        self.kept: dict[str, Any] | None = None
        """A copy of such a state, while the next steps change the tensors."""
        self.next_copy = 0.0
        self.lock = threading.RLock()
        self.trainer: L.Trainer | None = None
        self.held: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.begun, self.trainer = time.monotonic(), trainer
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            if hasattr(pl_module, "skipped"):
                pl_module.skipped.write = self._write_bad_step  # type: ignore[union-attr]
        if stage == "fit":
            self._begin(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, Curves):
                # What is asked of it after this hook comes when the module has loaded its weights.
                logger.begun = True

    def _begin(self, trainer: L.Trainer) -> None:
        """Takes the folder for this process and clears away what a killed one left."""
        if trainer.is_global_zero:
            self.held = files.hold(self.folder)
            checkpoints.sweep(self.folder)
            if not files.newest(self.folder) and (aside := files.set_aside(self.folder)):
                said = "a run that ended before its first save was in %s; it is now in %s"
                _log.warning(said, self.folder, aside)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises UserError if the folder has a checkpoint that the run does not go on from, or what
        a run saves does not fit onto the disk."""
        # Here and not in setup, where Lightning does not know yet that it goes on.
        goes_on = bool(trainer.ckpt_path)
        # Another process may have ended here since the command line was checked.
        if trainer.is_global_zero and not goes_on and (found := files.newest(self.folder)):
            raise UserError(f"run.folder: {found} was written meanwhile; begin this command anew")
        # Other machines find a checkpoint by themselves.
        if trainer.strategy.broadcast(goes_on) != goes_on:
            raise RunError(f"run.folder: not every machine sees the same {self.folder}; share it")
        trained = sum(p.nbytes for p in pl_module.parameters() if p.requires_grad)
        # The last checkpoint, the one before it and the next one, each with two numbers of AdamW
        # for each weight; two models, and the best one's checkpoint.
        needed = trained * (3 * 3 + 3)
        for name in (files.CHECKPOINT, files.PREVIOUS):
            path = self.folder / name
            needed -= path.stat().st_size if path.is_file() else 0
        if trainer.is_global_zero and (free := shutil.disk_usage(self.folder).free) < needed:
            raise UserError(
                f"run.folder: checkpoints and model take {needed:,} bytes, {free:,} are free in {self.folder}; "
                "make room, choose another disk with --run.folder, or train less with model.lora"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What a run goes on from is its last checkpoint, and the first that may not be lost."""
        former = self.folder / files.PREVIOUS
        goes_on = trainer.is_global_zero and trainer.ckpt_path
        if goes_on and Path(str(trainer.ckpt_path)).resolve() == former.resolve():
            os.replace(former, self.folder / files.CHECKPOINT)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"schema": checkpoints.SCHEMA, "step": self.done, "ranks": trainer.world_size}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Changes the loops' state before Lightning reads it."""
        if trainer.state.fn != "fit":
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        # The end of a run that goes on for more steps is not the end any more.
        progress["is_last_batch"] = False
        before = checkpoint.get("ranks", trainer.world_size)
        if before != trainer.world_size and trainer.is_global_zero:
            said = "the checkpoint is of %d ranks, this run has %d: sums are added up in another order, dropout is another"
            _log.warning(f"{said}; all else goes on as it was", before, trainer.world_size)
        # max_time is that of one command.
        checkpoint["callbacks"].pop("Timer", None)
        for logger in trainer.loggers:
            if isinstance(logger, Curves):
                logger.go_on_after(progress["current"]["ready"])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.done:
            self.first = batch_idx
            for path in self._lines_of_steps() if trainer.is_global_zero else []:
                files.drop_later_lines(path, batch_idx)
        # Not before: a step has ended when its validation has.
        self._finish()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.done = batch_idx + 1
        trajectories = getattr(module, "trajectories", [])
        if trainer.is_global_zero and trajectories:
            refilled: list[Trajectory] = getattr(module, "refilled", [])
            kept = [*trajectories[: self.keep_trajectories], *refilled[: self.keep_trajectories]]
            self._write_trajectories("train", kept, self.done)
        if trainer.is_global_zero:
            # Now, since later the loader has handed out the next batch.
            self.ended = trainer._checkpoint_connector.dump_checkpoint()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the best model, and what callbacks such as EarlyStopping have counted."""
        if trainer.state.fn != "fit":
            return
        self._keep_best(trainer, pl_module)
        if trainer.is_global_zero and self.keep_trajectories:
            for split, name in (("validation", "validated"), ("real", "with_real")):
                if trajectories := getattr(pl_module, name, []):
                    self._write_trajectories(split, trajectories, self.done)
        if self.ended is not None:
            states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
            self.ended["callbacks"] |= {key: state for key, state in states.items() if state}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.done:
            # Before the last checkpoint, so that no finished run is without them.
            self._save_model(trainer, pl_module, files.MODEL)
            if trainer.is_global_zero:
                self._write_totals(pl_module)
            self._finish(ends=True)

    def _write_totals(self, module: Any) -> None:
        # Seconds and counts are those of the steps since then.
        since = {"resumed_after": self.first} if self.first else {}
        self._write_json(files.FIT, {"seconds": self._seconds(), "steps": self.done, **since})
        if hasattr(module, "search"):
            counted = module.search.counted()
            others = {"validation_search": module.validation_search, "reward": module.reward}
            for name, other in others.items():
                if other is not None and (asked := other.counted()):
                    counted[name] = asked
            if counted:
                self._write_json(files.SEARCH, counted | since)

    def _finish(self, ends: bool = False) -> None:
        """Saves the step that has ended, if it is due; else keeps a copy of its state."""
        with self.lock:
            if self.ended is None:
                return
            if ends or self.done % self.save_every == 0:
                self._save(self.ended)
            else:
                self._copy(self.ended)
            self.ended = None

    def _copy(self, state: dict[str, Any]) -> None:
        begun = time.monotonic()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if begun < self.next_copy or checkpoints.size_of(state) > MEMORY * memory:
            return
        self.kept = None  # Never two of them.
        self.kept = copied(state)
        now = time.monotonic()
        self.next_copy = now + PATIENCE * (now - begun)

    def _save(self, state: dict[str, Any]) -> None:
        for path in self._lines_of_steps():
            with checkpoints.told(path, 0):
                checkpoints.sync(path)
        try:
            checkpoints.save(self.folder, state)
        except RunError:
            self.ended = self.kept = None  # It is not tried again.
            raise
        self.saved = state["step"]

    def save_kept(self) -> Path | None:
        """Has the last finished step on disk, of a run that is stopped inside of the next one.
        Returns the last checkpoint, None if there is none. Raises RunError if it cannot be written.

        Any thread may ask for it, and more than once. Where copies are dear the step may be an
        earlier one (see MEMORY and PATIENCE).
        """
        with self.lock:
            # A step is over when the next one begins. Before, its numbers may not be logged yet, its
            # validation not be over, and of the last step the model not be saved.
            is_over = self.trainer is not None and self.trainer.fit_loop.epoch_loop.batch_idx >= self.done
            state = (self.ended if is_over else None) or self.kept
            if state is not None and state["step"] > self.saved:
                self._save(state)
        return files.newest(self.folder)

    def _keep_best(self, trainer: L.Trainer, module: Any) -> None:
        measured = trainer.callback_metrics.get(getattr(module, "best_metric", ""))
        # From the file and not from a checkpoint, which is saved before the validation of its step.
        best = files.read_best(self.folder)
        if measured is not None and measured > (best.value if best else -math.inf):
            self._save_model(trainer, module, files.BEST)
            if trainer.is_global_zero and self.ended is not None:
                checkpoints.save_weights(self.folder / files.BEST_CHECKPOINT, self.ended)
                made = files.Best(self.done, module.best_metric, float(measured))
                self._write_json(files.BEST_NOTE, made._asdict())

    def _save_model(self, trainer: L.Trainer, module: Any, name: str) -> None:
        if trainer.is_global_zero:
            folder, part = self.folder / name, self.folder / f"{name}{checkpoints.PART}"
            try:
                with checkpoints.told(folder, checkpoints.size_of(module.state_dict()), SafetensorError):
                    module.save_model(part)
                    checkpoints.replace_folder(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.interrupted:
            return
        if 0 < self.done < (planned := trainer.num_training_batches):
            said = "stopped after %d of %d steps; fit goes on with --ckpt_path %s"
            _log.warning(said, self.done, planned, self.folder / files.CHECKPOINT)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Notes at the error what a fit leaves."""
        # Not of a folder that another process has: all there is is of that one.
        if self.held is None:
            return
        try:
            last = self.save_kept()
        except RunError as error:
            exception.add_note(str(error))
            last = self.save_kept()
        if last is not None:
            finished = self.saved == trainer.num_training_batches
            go_on = f"fit goes on with --ckpt_path {last}"
            exception.add_note(f"all steps were done: see {last}" if finished else go_on)
        else:
            for logger in trainer.loggers:
                with suppress(OSError):  # The disk may be full.
                    logger.finalize("failed")  # Afterwards it would write its file anew.
            # Without a checkpoint, what was written makes room for the next run.
            aside = None
            with suppress(OSError):  # What stopped the run is to be told, not this.
                checkpoints.sweep(self.folder)
                aside = files.set_aside(self.folder)
            if aside:
                said = f"the same command begins anew; what was written is now in {aside}"
                exception.add_note(f"no step was finished; {said}")
        self._release()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        if self.held is not None:
            os.close(self.held)
            self.held = None

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
            lines = checkpoints.json_lines(map(asdict, outcomes))
            checkpoints.write_whole(self.folder / files.QUESTIONS, lines)
            self._write_trajectories("test", pl_module.trajectories, 0)
        self._write_json(files.RESULTS, {**results, "seconds": self._seconds()})

    def _seconds(self) -> float:
        return round(time.monotonic() - self.begun, 1)

    def _lines_of_steps(self) -> list[Path]:
        """Files of a fit that grow with its steps."""
        folder = self.folder / files.TRAJECTORIES
        return [path for path in folder.glob("*.jsonl") if path.name != "test.jsonl"]

    def _write_trajectories(self, split: str, trajectories: Sequence[Trajectory], step: int) -> None:
        head = {"schema": 1, "step": step}
        lines = checkpoints.json_lines(head | trajectory_line(t) for t in trajectories)
        content = lines.encode("utf-8", "backslashreplace")
        path = self.folder / files.TRAJECTORIES / f"{split}.jsonl"
        with checkpoints.told(path, len(content)):
            path.parent.mkdir(exist_ok=True)
            with path.open("ab") as file:
                file.write(content)

    def _write_bad_step(self, step: int, reason: str, rows: Sequence[Any]) -> None:
        """Writes down what a step that was skipped was to learn from."""
        path = self.folder / files.BAD_STEPS / f"step-{step}.jsonl"
        head = {"schema": 1, "step": step, "reason": reason}
        lines = [head | (trajectory_line(row) if isinstance(row, Trajectory) else asdict(row)) for row in rows]
        # JSON has no NaN: texts stand in their places.
        lines = json.loads(json.dumps(lines), parse_constant=str)
        with checkpoints.told(path, 0):
            path.parent.mkdir(exist_ok=True)
        checkpoints.write_whole(path, checkpoints.json_lines(lines))

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        # An engine that counted nothing leaves no file.
        if content:
            checkpoints.write_whole(self.folder / name, json.dumps(content, indent=2) + "\n")


def copied(state: Any) -> Any:
    """A nested structure with copies of its tensors, in the machine's own memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: copied(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(copied, state))
    return state


def trajectory_line(trajectory: Trajectory) -> dict[str, Any]:
    """Everything about one trajectory, as JSON."""
    example = trajectory.example
    return {
        "noise_prob": trajectory.noise_prob,
        "refilled": trajectory.refilled,
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
