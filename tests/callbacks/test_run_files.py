"""The best model of a run is kept beside the last one, also over an interruption."""

import json

import lightning as L
import pytest
import torch

from zs_lightning.callbacks.run_files import RunFiles

VALUES = [0.1, 0.5, 0.4, 0.5, 0.7, 0.2]


class Measured(L.LightningModule):
    """Its validations give the values in their order; its model is the step it was saved at."""

    best_metric = "gap"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps = batch_idx + 1
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.log("gap", VALUES[self.steps - 1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def save_model(self, folder):
        folder.mkdir()
        (folder / "step").write_text(str(self.steps))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(len(VALUES)))

    def val_dataloader(self):
        return torch.utils.data.DataLoader([0])


def fit(folder, metric="gap", steps=-1, resume=None):
    module = Measured()
    module.best_metric = metric
    trainer = L.Trainer(
        max_epochs=1, max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=1,
        callbacks=[RunFiles(str(folder), save_every=1)], default_root_dir=str(folder),
    )  # fmt: skip
    trainer.fit(module, ckpt_path=resume)
    return folder


def saved(folder, name):
    return (folder / name / "step").read_text()


def test_the_model_of_the_best_validation_is_kept(tmp_path):
    folder = fit(tmp_path)
    assert (saved(folder, "best"), saved(folder, "model")) == ("5", "6")


@pytest.mark.parametrize("metric", ["", "another"])
def test_without_a_metric_there_is_no_best(tmp_path, metric):
    assert not (fit(tmp_path, metric) / "best").exists()


def test_a_run_that_goes_on_knows_what_was_best(tmp_path):
    folder = fit(tmp_path, steps=5)
    assert json.loads((folder / "best.json").read_text()) == {"step": 5, "metric": "gap", "value": pytest.approx(0.7)}
    fit(folder, resume=folder / "last.ckpt")
    assert (saved(folder, "best"), saved(folder, "model")) == ("5", "6")
