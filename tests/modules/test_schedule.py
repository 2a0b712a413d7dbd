"""The learning rate of each step, as a real Trainer sets it."""

import lightning as L
import pytest
import torch

from zs_lightning.modules.trainable import TrainableModule


class OneWeight(TrainableModule):
    """Notes the learning rate of each step."""

    def __init__(self, warmup_steps, decay):
        super().__init__(lambda p: torch.optim.SGD(p, lr=0.1), warmup_steps, decay, 1.0, 0, False, 1)
        self.weight, self.rates = torch.nn.Parameter(torch.ones(1)), []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        self.manual_backward(self.weight.sum())
        self.optimise()
        self.step_scheduler()


HALF, EIGHTH = 0.5**0.5, (2 + 2**0.5) ** 0.5 / 2
"""cos(pi / 4) and cos(pi / 8)."""
COSINE = [1.0, EIGHTH, HALF, (2 - 2**0.5) ** 0.5 / 2, 0.0]
COSINE = [(1 + c) / 2 for c in [*COSINE, *(-c for c in COSINE[3:0:-1])]]


@pytest.mark.parametrize(
    ("warmup_steps", "decay", "expected"),
    [
        (0, False, [1.0] * 8),
        (3, False, [1 / 3, 2 / 3, *[1.0] * 6]),
        (0, True, COSINE),
        (3, True, [COSINE[0] / 3, COSINE[1] * 2 / 3, *COSINE[2:]]),
    ],
)
def test_the_rate_of_each_step(warmup_steps, decay, expected):
    """After the last step half a cosine would be down; it is never below a fiftieth."""
    module = OneWeight(warmup_steps, decay)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", max_epochs=1, **silent).fit(module, torch.utils.data.DataLoader(range(8)))
    assert module.rates == pytest.approx([0.1 * max(0.02, part) if decay else 0.1 * part for part in expected])
