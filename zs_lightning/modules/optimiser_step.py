"""One step of an optimiser on the gradients that are there, which may not be finite."""

from __future__ import annotations

import math
from typing import Any

import torch

from zs_lightning.errors import RunError

SKIPPED_STEPS = 3
"""Steps in a row with gradients that are not finite before the run is stopped."""


class OptimiserStep:
    """Clips gradients and steps.

    Args:
        max_grad_norm: most norm of each group's gradient; 0 does not clip.
    """

    def __init__(self, max_grad_norm: float) -> None:
        self.most = max_grad_norm or math.inf
        self.skipped = 0
        self.had_gradients = False

    def __call__(self, optimizer: Any) -> list[float]:
        """Returns the norm of each group's gradient before it is clipped.

        A gradient that is not finite is dropped with its step: clipping would make every weight NaN.

        Raises:
            RunError: that happened in several steps in a row.
        """
        norms = []
        for group in optimizer.param_groups:
            norms.append(float(torch.nn.utils.clip_grad_norm_(group["params"], self.most)))
        if all(map(math.isfinite, norms)):
            self.skipped = 0
            self.had_gradients = self.had_gradients or norms[0] > 0
            optimizer.step()
        else:
            self.skipped += 1
            if self.skipped >= SKIPPED_STEPS:
                raise RunError(f"gradients were not finite {self.skipped} steps in a row; lower the learning rate")
        optimizer.zero_grad()
        return norms
