"""A training with all that shows what it is doing, against the same training without: curves, alarms, trajectories, signs of
life."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from unittest.mock import patch

from benches.fits import Side, compare
from benches.harness import Row
from zs_lightning.callbacks.signs_of_life import SignsOfLife

REQUIRED = 0.97
SILENT = [
    "--trainer.logger=false",
    "--trainer.callbacks=[{class_path: NoiseAnnealing, init_args: {start: 0.0, end: 0.5}}]",
    "--run.keep_trajectories=0",
]


def run() -> Iterator[Row]:
    silent = Side(SILENT, patch.object(SignsOfLife, "on_train_start", lambda *_: None))
    names = ("model/model.safetensors",)
    yield from compare(Side([], nullcontext()), silent, "the same unwatched", REQUIRED, names, "weights identical")
