"""Callbacks that take the disk from their own run, when a step begins and the one before it has not been saved yet: these
runs are too short to be met from outside."""

import os
import resource
import shutil
from pathlib import Path

import lightning as L


class FullDisk(L.Callback):
    """No file may have more than so many bytes from the beginning of a step on; they are counted from 0."""

    def __init__(self, step: int, most: int):
        self.step, self.most = step, most

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.most, self.most))


def permission(run):
    run.chmod(0o555)
    if not os.geteuid():
        os.seteuid(65534)  # The superuser may write all the same.


def folder(run):
    run.rename(run.with_name("aside"))


def replaced(run):
    folder(run)
    run.write_text("")


def name(run):
    (run / "last.ckpt.part").mkdir()


def sums(run):
    (run / "checkpoints.json").rename(run / "sums")
    (run / "checkpoints.json" / "inside").mkdir(parents=True)


WAYS = {way.__name__: way for way in (permission, folder, replaced, name, sums)}


class LostFolder(L.Callback):
    """The run folder cannot be written any more, when three steps are done."""

    def __init__(self, way: str):
        self.way = way

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:  # And two are saved.
            WAYS[self.way](Path("run"))


def mended(run, way):
    """Undoes it, from outside."""
    if way == "permission":
        run.chmod(0o755)
    if way == "replaced":
        run.unlink()
    if way in ("folder", "replaced"):
        run.with_name("aside").rename(run)
    if way == "name":
        (run / "last.ckpt.part").rmdir()
    if way == "sums":
        shutil.rmtree(run / "checkpoints.json")
        (run / "sums").rename(run / "checkpoints.json")
