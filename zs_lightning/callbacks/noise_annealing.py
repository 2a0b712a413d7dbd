"""The curriculum: makes the simulated engine noisier as training goes on."""

from __future__ import annotations

from typing import Any

import lightning as L

from zs_lightning.errors import UserError
from zs_lightning.rl.curriculum import noise_probability


class NoiseAnnealing(L.Callback):
    """Sets `noise_prob` on the module before each rollout step (paper equation 1).

    Args:
        start: probability of noisy documents at the first step.
        end: at the last.
        base: how late the noise rises; 4 in the paper, 1 is linear.
        total_steps: over how many rollout steps; null takes the length of the run, as it was begun.
            Afterwards it stays at the end.
    """

    # It holds no state: the noise is a function of the step, so a resumed run goes on where it was.

    def __init__(self, start: float = 0.0, end: float = 0.5, base: float = 4.0, total_steps: int | None = None) -> None:
        # Bad values should stop the run before anything is loaded.
        noise_probability(0, 1, start, end, base)
        self.start, self.end, self.base, self.total_steps = start, end, base, total_steps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not hasattr(pl_module, "noise_prob"):
            name = type(pl_module).__name__
            raise UserError(f"NoiseAnnealing: {name} has no noise to anneal; use it with PolicyRL")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.before = pl_module.noise_prob

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """A test of the same module has the noise of its option."""
        pl_module.noise_prob = self.before

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        total = self.total_steps or pl_module.planned_steps()
        # The paper counts steps from 1 to m, so that the last one has the full noise.
        step: int = pl_module.rollout_step + 1
        pl_module.noise_prob = noise_probability(step, total, self.start, self.end, self.base)
