"""The curriculum: makes the simulated engine noisier as training goes on."""

import math
from statistics import fmean
from typing import Any

import lightning as L

from zs_lightning.errors import UserError, check_least, check_shares
from zs_lightning.rl.curriculum import Schedule, noise_after, noise_probability
from zs_lightning.types import Status


class NoiseCallback(L.Callback):
    """Sets `noise_prob` on the module while a fit lasts, within bounds."""

    start: float
    end: float

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        # PolicySFT has noise too, but for tests alone.
        if not pl_module.learns_from_rollouts:
            own, name = type(self).__name__, type(pl_module).__name__
            raise UserError(f"{own}: {name} has no noise to anneal; use it with PolicyRL")
        setters = [type(c).__name__ for c in trainer.callbacks if isinstance(c, NoiseCallback)]  # type: ignore[attr-defined]
        if len(setters) > 1:
            raise UserError(f"trainer.callbacks: {' and '.join(setters)} would all set the noise; keep one")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.before = pl_module.noise_prob

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """A test of the same module has the noise of its option."""
        pl_module.noise_prob = self.before


class NoiseAnnealing(NoiseCallback):
    """Sets the probability of noise before each rollout step, by default as in the paper's equation
    1.

    With start above end the curriculum is reversed; with start equal to end the noise is constant.

    Args:
        start: probability of noisy documents at the first step.
        end: at the last.
        base: of `exponential`: how late the noise rises; 4 in the paper, 1 is linear.
        total_steps: over how many rollout steps; null takes the length of the run, as it was begun.
            Afterwards it stays at the end.
        schedule: exponential (the paper), linear, cosine (slow at both ends), or steps (equally
            long stages, the first at start, the last at end).
        stages: how many, of `steps`; 2 or more.
    """

    # It holds no state: the noise is a function of the step, so a resumed run goes on where it was.

    def __init__(
        self,
        start: float = 0.0,
        end: float = 0.5,
        base: float = 4.0,
        total_steps: int | None = None,
        schedule: Schedule = "exponential",
        stages: int = 5,
    ) -> None:
        # Bad values should stop the run before anything is loaded.
        noise_probability(0, total_steps or 1, start, end, base, schedule, stages)
        self.start, self.end, self.base, self.total_steps = start, end, base, total_steps
        self.schedule, self.stages = schedule, stages

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        total = self.total_steps or pl_module.planned_steps()
        # The paper counts steps from 1 to m, so that the last one has the full noise.
        step: int = pl_module.rollout_step + 1
        pl_module.noise_prob = noise_probability(step, total, self.start, self.end, self.base, self.schedule, self.stages)


class NoiseBySuccess(NoiseCallback):
    """Makes the engine noisier whenever the policy succeeds.

    The noise begins at `start`. It rises when the mean reward of the last `window` rollout steps is
    at `threshold` or above. Whenever it has changed, the window begins anew.

    Args:
        threshold: mean reward from which the noise rises.
        start: probability of noisy documents at the first step, and the least.
        end: the highest.
        window: rollout steps of which the mean reward is taken. A step without a usable rollout
            does not count.
        rise: by how much the probability rises.
        fall: by how much it falls when the mean reward of a full window is too low; 0 never falls.
        lower: mean reward below which it falls; less than `threshold`.
    """

    def __init__(
        self,
        threshold: float = 0.5,
        start: float = 0.0,
        end: float = 0.5,
        window: int = 10,
        rise: float = 0.05,
        fall: float = 0.0,
        lower: float = 0.0,
    ) -> None:
        name = type(self).__name__
        check_shares(name, start=start, end=end, rise=rise, fall=fall)
        check_least(name, window=(window, 1), end=(end, start))
        if not rise > 0:
            raise UserError(f"{name}.rise: expected a number above 0; got {rise:g}")
        if not math.isfinite(threshold):
            raise UserError(f"{name}.threshold: expected a finite number; got {threshold:g}")
        if fall and not lower < threshold:
            raise UserError(f"{name}.lower: expected less than threshold, {threshold:g}; got {lower:g}")
        self.start, self.end, self.window = start, end, window
        self.rule = dict(threshold=threshold, rise=rise, fall=fall, lower=lower)
        self.noise = start
        self.rewards: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"noise": self.noise, "rewards": self.rewards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.noise, self.rewards = state_dict["noise"], list(state_dict["rewards"])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.noise_prob = self.noise

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Of all ranks, so each comes to the same noise.
        usable = [t.reward for t in pl_module.trajectories if t.status is not Status.FAILED]
        if not usable:
            return
        self.rewards = [*self.rewards, fmean(usable)][-self.window :]
        if len(self.rewards) < self.window:
            return
        before = self.noise
        self.noise = noise_after(self.rewards, before, self.start, self.end, **self.rule)
        if self.noise != before:
            self.rewards = []
