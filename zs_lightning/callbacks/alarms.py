"""Says when a run is dying: the rules of rl/alarms.py, asked after each step."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch

from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.errors import UserError
from zs_lightning.rl.advantages import COMPARE
from zs_lightning.rl.alarms import RULES, Finding
from zs_lightning.rl.vitals import CURVES, FEW, History, Step, vitals
from zs_lightning.runs import checkpoints
from zs_lightning.runs import folder as files

_log = logging.getLogger(__name__)


class Alarms(L.Callback):
    """Watches a PolicyRL run: each alarm is said when it begins and when it is over, counted in the
    curve health/alarms and written to alarms.jsonl of the run folder.

    Args:
        stop: whether an alarm after which nothing is worth learning ends the run, with all saved.
            The same command goes on all the same.
    """

    def __init__(self, stop: bool = False) -> None:
        self.stop = stop
        self.history = History()
        self.on: dict[str, int] = {}
        """Alarms that have begun, with the steps for which their rules have been silent."""
        self.counts: Counter[str] = Counter()
        """How often each has begun."""
        self.path: Path | None = None
        self.begun = False
        self.before: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state(), "on": dict(self.on), "counts": dict(self.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = History(**state_dict["history"])
        self.on, self.counts = dict(state_dict["on"]), Counter(state_dict["counts"])

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.learns_from_rollouts:
            name = type(pl_module).__name__
            raise UserError(f"Alarms: {name} has no rollouts to watch; use it with PolicyRL")
        # What it says of a fit is said here.
        pl_module.health.speaks = False
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunFiles) and trainer.is_global_zero:
                self.path = callback.folder / files.ALARMS

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.begun and self.path is not None:
            files.drop_later_lines(self.path, batch_idx)
        self.begun = True
        self.before = some_weights(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.history.add(self._step(trainer, pl_module))
        # Every rank has the numbers of all, and comes to the same alarms.
        ends = False
        for rule in RULES:
            found = rule.find(self.history)
            if self._turn(rule.name, found, batch_idx + 1, trainer.is_global_zero):
                ends = ends or rule.is_fatal
        pl_module.log("health/alarms", float(len(self.on)), on_step=True, on_epoch=False)
        if ends and self.stop:
            trainer.should_stop = True
            if trainer.is_global_zero:
                _log.warning("the run ends here, as Alarms.stop says; %s", self._best())

    def _step(self, trainer: L.Trainer, module: Any) -> Step:
        """The vitals of the step that has just ended."""
        if module.skipped.in_a_row:
            # What it has not measured is still there from the one before.
            return {"skipped": 1.0}
        step = vitals(module.trajectories, module.noise_prob)
        measured = trainer.callback_metrics  # Made anew at each look.
        step |= {name: float(measured[name]) for name in CURVES}
        before, now = self.before, some_weights(trainer)
        step["moved"] = float(before is not None and not torch.equal(before, now))
        # What means something else, or nothing, in this run is not watched.
        if not module.rollout.max_turns:
            del step["queries"]
        if module.estimator not in COMPARE or module.group_size < 2:
            del step["frac_reward_zero_std"]
        if module.updates_per_rollout > 1:
            del step["policy/sampling_gap"]
        return step

    def _turn(self, name: str, found: Finding | None, step: int, speaks: bool) -> bool:
        """Turns an alarm on or off; returns whether it has begun. It is over when its rule has been
        silent for some steps, or one that wavers would be said again and again."""
        if found is not None:
            begins = name not in self.on
            self.on[name] = 0
            if begins:
                self.counts[name] += 1
                if speaks:
                    _log.warning("alarm at step %d, %s: %s; %s", step, name, *found)
                    self._write(step, name, "on", **found._asdict())
            return begins
        if name in self.on:
            self.on[name] += 1
            if self.on[name] == FEW:
                del self.on[name]
                if speaks:
                    _log.warning("alarm over at step %d, %s", step, name)
                    self._write(step, name, "over")
        return False

    def _write(self, step: int, name: str, state: str, **more: str) -> None:
        if self.path is not None:
            line = {"schema": 1, "step": step, "name": name, "is": state, **more}
            content = checkpoints.json_lines([line])
            with checkpoints.told(self.path, len(content)):
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(content)
                checkpoints.sync(self.path)

    def _best(self) -> str:
        """Which of the models that the run leaves to take."""
        if self.path is None:
            return "see its checkpoints"
        folder = self.path.parent
        if best := files.read_best(folder):
            return f"{folder / files.BEST} is its best model, with {best}"
        said = "none was validated, which trainer.val_check_interval and limit_val_batches do"
        return f"{folder / files.CHECKPOINT} is its last checkpoint; {said}"

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.health.speaks = True
        if self.counts and trainer.is_global_zero:
            states = {name: "on" if name in self.on else "over" for name in self.counts}
            said = ", ".join(f"{name} ({state})" for name, state in states.items())
            _log.warning("alarms of this run: %s; see %s", said, self.path or "above")


def some_weights(trainer: L.Trainer) -> torch.Tensor:
    """A few numbers of some of the policy's weights, which are its optimiser's first group."""
    weights = trainer.optimizers[0].param_groups[0]["params"]
    some = weights[:: max(1, len(weights) // 32)]
    return torch.cat([weight.detach().flatten()[:64].float() for weight in some])
