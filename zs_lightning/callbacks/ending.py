"""What a fit says at its end: what was learnt, where everything is, and what comes next."""

from statistics import mean
from typing import Any

import lightning as L

from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.runs import folder as files
from zs_lightning.text.shown import visible

WINDOW = 10
"""Steps whose mean is the beginning and the end of a curve."""


class Ending(L.Callback):
    """Says what became of a fit, whose run folder `files` keeps. Always on."""

    def __init__(self, files: RunFiles) -> None:
        self.files = files
        self.first: list[float] = []
        self.last: list[float] = []
        self.steps = 0
        self.said: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"first": list(self.first), "last": list(self.last), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first, self.last = list(state_dict["first"]), list(state_dict["last"])
        self.steps = state_dict["steps"]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *others: Any) -> None:
        # Of a step that was skipped there is none but that of the one before.
        if not pl_module.skipped.in_a_row:
            self.note(float(trainer.callback_metrics[pl_module.headline]))

    def note(self, value: float) -> None:
        self.first = [*self.first, value][:WINDOW]
        self.last = [*self.last, value][-WINDOW:]
        self.steps += 1

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and not trainer.interrupted and self.files.done:
            self.said = self.lines(pl_module)

    def lines(self, module: Any) -> list[str]:
        """What became of the fit."""
        folder, found = self.files.folder, []
        if self.steps > 1:
            count = min(WINDOW, (self.steps + 1) // 2)
            before, after = mean(self.first[:count]), mean(self.last[-count:])
            steps = f"{count} steps" if count > 1 else "step"
            curve = f"{before:.3g} in the first {steps}, {after:.3g} in the last"
            found.append(f"{module.headline}: {curve}")
        if best := files.read_best(folder):
            found.append(f"best: {best}, in {folder / files.BEST}")
        found.append(f"trained: {folder / files.MODEL}; curves: tensorboard --logdir {folder}")
        if (folder / files.TRAJECTORIES).is_dir():
            page = f"compare --training {folder} --out {folder / 'report'}"
            found.append(f"to read what it did: python -m zs_lightning {page}")
        return [*found, f"next: python -m zs_lightning {module.sequel.format(folder)}"]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Here, where the bar has come to its end.
        for line in self.said:
            print(visible(line))
        self.said = []
