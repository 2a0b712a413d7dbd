"""What a run keeps: its best model beside the last one, the last finished step, and what it says where it cannot."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from zs_lightning.callbacks import run_files
from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.errors import RunError, UserError
from zs_lightning.runs.folder import hold, set_aside

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


def fit(folder, metric="gap", steps=-1, resume=None, module=None, every=1, others=()):
    module = module or Measured()
    module.best_metric = metric
    trainer = L.Trainer(
        max_epochs=1, max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=1,
        callbacks=[*others, RunFiles(str(folder), save_every=every)], default_root_dir=str(folder),
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


# ---------------------------------------------------------------------------------------------------- stopped inside a step


class Learning(Measured):
    """Its weight is minus the number of its steps; in the step after `stop`, where the weight is another one, in that step's
    validation, or `between` the two, the run is stopped."""

    def __init__(self, stop=99, where="training"):
        super().__init__()
        self.stop, self.where, self.answers = stop, where, []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, batch, batch_idx):
        if batch_idx == self.stop and self.where == "training":
            self.weight.data += 100  # As after the first of two updates.
            asking = threading.Thread(target=lambda: self.answers.extend(self.files().save_kept() for _ in range(2)))
            asking.start()
            asking.join()
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == self.stop and self.where == "between":
            raise KeyboardInterrupt

    def validation_step(self, batch, batch_idx):
        if self.where == "validation" and self.steps == self.stop + 1:
            raise KeyboardInterrupt
        super().validation_step(batch, batch_idx)

    def files(self):
        return self.trainer.callbacks[-1]


def last(folder):
    found = torch.load(folder / "last.ckpt", weights_only=True)
    return found["step"], found["state_dict"]["weight"].item()


@pytest.fixture
def every_step_is_copied(monkeypatch):
    """A copy on a busy machine takes longer than a hundredth of these steps."""
    monkeypatch.setattr(run_files, "PATIENCE", 0)


@pytest.mark.usefixtures("every_step_is_copied")
@pytest.mark.parametrize("where", ["training", "between", "validation"])
def test_a_run_that_is_stopped_inside_a_step_keeps_the_one_before(where, tmp_path):
    """Also before its numbers are logged, and inside of its validation: a resumed run measures it, the best one here."""
    module = Learning(stop=4, where=where)
    with pytest.raises(SystemExit):
        fit(tmp_path, module=module, every=100)
    assert where != "training" or module.answers == [tmp_path / "last.ckpt"] * 2
    assert last(tmp_path) == (4, -4.0)
    assert not list(tmp_path.glob("previous*"))
    fit(tmp_path, resume=tmp_path / "last.ckpt", module=Learning())
    assert last(tmp_path) == (6, -6.0)
    assert (saved(tmp_path, "best"), saved(tmp_path, "model")) == ("5", "6")


@pytest.mark.usefixtures("every_step_is_copied")
def test_what_callbacks_count_in_a_validation_is_kept(tmp_path):
    stop = {"monitor": "gap", "mode": "max", "patience": 9, "check_on_train_epoch_end": False}
    early = L.pytorch.callbacks.EarlyStopping(**stop)
    with pytest.raises(SystemExit):
        fit(tmp_path, module=Learning(stop=4), every=100, others=[early])
    assert early.wait_count == 2  # Values of steps 3 and 4 are no better than that of step 2.
    (state,) = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"].values()
    assert state["wait_count"] == 2


def test_copies_take_a_hundredth_of_the_time(tmp_path, monkeypatch):
    copies, copied, now = [], run_files.copied, [0.0]

    def slow(state):
        if isinstance(state, dict) and "loops" in state:
            copies.append(state["step"])
            now[0] += 1.0
        return copied(state)

    monkeypatch.setattr(run_files, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(run_files, "copied", slow)
    fit(tmp_path, every=100)
    assert copies == [1]
    monkeypatch.setattr(run_files, "PATIENCE", 0)
    fit(tmp_path / "second", every=4)
    assert copies == [1, 1, 2, 3, 5]
    monkeypatch.setattr(run_files, "MEMORY", 0.0)
    fit(tmp_path / "third", every=100)
    assert len(copies) == 5


# --------------------------------------------------------------------------------------------------------- no room, no right


class NoPlace(L.Callback):
    """From its step on, nothing can be written where checkpoints are made."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx + 1 == self.step:
            (trainer.callbacks[-1].folder / "last.ckpt.part").mkdir()


def test_a_save_that_fails_never_passes_as_one(tmp_path):
    said = r"last\.ckpt was not written: .*; it takes \d+ bytes, .* are free; what was there is kept"
    with pytest.raises(RunError, match=said) as end:
        fit(tmp_path, module=Learning(), others=[NoPlace(6)])
    assert end.value.__notes__ == [f"fit goes on with --ckpt_path {tmp_path / 'last.ckpt'}"]
    assert last(tmp_path) == (4, -4.0)  # Step 5 is saved after the callback's turn.
    with pytest.raises(SystemExit):
        fit(tmp_path / "second", module=Learning(stop=1), every=100, others=[NoPlace(2)])
    assert not (tmp_path / "second" / "last.ckpt").exists()


def test_a_model_that_the_disk_does_not_take_is_named_and_leaves_no_part(tmp_path, monkeypatch):
    def half(self, folder):
        folder.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Learning, "save_model", half)
    said = r"^.*/model was not written: No space left on device; it takes 4 bytes, .* are free"
    with pytest.raises(RunError, match=said):
        fit(tmp_path, module=Learning(), every=1, metric="")
    assert not (tmp_path / "model.part").exists()


def test_trajectories_that_the_disk_does_not_take_are_named(tmp_path):
    (tmp_path / "trajectories").write_text("in the way")
    with pytest.raises(RunError, match=r"/trajectories/train\.jsonl was not written: File exists; it takes 0 bytes"):
        RunFiles(str(tmp_path))._write_trajectories("train", [], 1)


def test_room_is_looked_for_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=47))
    with pytest.raises(UserError, match=r"^run.folder: checkpoints and model take 48 bytes, 47 are free in .*--run.folder"):
        fit(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_where_another_process_trains_is_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("seed_everything: 0")
    (tmp_path / "model.part").mkdir()
    held = hold(tmp_path)
    with pytest.raises(UserError, match="another process trains in") as error:
        fit(tmp_path)
    assert not hasattr(error.value, "__notes__")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "model.part"]
    os.close(held)
    fit(tmp_path)


class Fails(L.Callback):
    """A run that ends while it loads, with half of a checkpoint in its folder."""

    def on_fit_start(self, trainer, pl_module):
        (trainer.callbacks[-1].folder / "config.yaml").write_text("seed_everything: 0")
        (trainer.callbacks[-1].folder / "last.ckpt.part").write_text("half")
        raise RuntimeError("no")


def test_where_a_kill_left_the_one_before_the_last_nothing_is_set_aside(tmp_path):
    fit(tmp_path, steps=1)
    former = (tmp_path / "last.ckpt").rename(tmp_path / "previous.ckpt")
    with pytest.raises(RuntimeError) as end:
        fit(tmp_path, resume=former, others=[Fails()])
    assert end.value.__notes__ == [f"fit goes on with --ckpt_path {former}"]
    assert (tmp_path / "config.yaml").is_file()
    fit(tmp_path, resume=former)
    assert not list(tmp_path.glob("unsaved*"))


def test_half_a_checkpoint_is_not_kept(tmp_path):
    with pytest.raises(RuntimeError) as end:
        fit(tmp_path, others=[Fails()])
    assert "no step was finished" in end.value.__notes__[0]
    assert [path.name for path in tmp_path.rglob("*")] == ["unsaved-1", "config.yaml"]


def test_a_run_does_not_begin_where_another_one_has_saved_meanwhile(tmp_path):
    fit(tmp_path, steps=2)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(UserError, match=r"^run.folder: .*last.ckpt was written meanwhile"):
        fit(tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_another_number_of_ranks_is_said(tmp_path, caplog):
    fit(tmp_path, steps=2)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.save({**content, "ranks": 2}, tmp_path / "two.ckpt")
    fit(tmp_path, resume=tmp_path / "two.ckpt")
    assert "the checkpoint is of 2 ranks, this run has 1: sums are added up in another order" in caplog.text


@pytest.mark.parametrize("moved", range(3))
def test_a_kill_while_a_run_is_put_aside_leaves_nothing_of_it_behind(moved, tmp_path, monkeypatch):
    names, left, rename = ["best.json", "events.out.tfevents.1", "config.yaml"], [moved], Path.rename
    for name in names:
        (tmp_path / name).write_text(name)

    def killed(path, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        set_aside(tmp_path)
    monkeypatch.undo()
    set_aside(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    assert sorted(path.read_text() for path in tmp_path.rglob("*") if path.is_file()) == sorted(names)
