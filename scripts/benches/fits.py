"""The same short training in two ways, by turns, in one process: seconds of each, and what they left."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from benches.harness import Row, UnequalResultsError
from zs_lightning.cli import main

CONFIG = Path(__file__).parents[2] / "configs" / "miniature" / "policy.yaml"
STEPS = 10
"""As many as the shipped configuration has between two saves."""
ROUNDS = 4


class Clock(Callback):
    """Seconds of each step from the second on, files and model with the last: CPU seconds of all of the process's threads,
    those of the clock, and CPU seconds of this thread. Shape (3, STEPS - 1)."""

    found: NDArray[np.float64]
    runs = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.read, Clock.runs = [], True
        if batch_idx:
            self.look()

    def look(self) -> None:
        self.read.append((time.process_time(), time.monotonic(), time.thread_time()))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.look()
        Clock.runs = False
        Clock.found = np.diff(np.array(self.read), axis=0).T


class Side(NamedTuple):
    """One way of training.

    Args:
        options: of the command line.
        around: what the training happens within.
    """

    options: list[str]
    around: AbstractContextManager[Any]


def trained(folder: Path, side: Side, names: tuple[str, ...]) -> dict[str, bytes]:
    """What a run leaves of its training under these names."""
    options = [f"--config={CONFIG}", f"--run.folder={folder}", f"--data.steps={STEPS}", "--model.search=BM25Search"]
    options += [*side.options, "--trainer.callbacks+=benches.fits.Clock", "--trainer.enable_progress_bar=false"]
    with side.around:
        main(["fit", *options])
    return {name: (folder / name).read_bytes() for name in names}


def compare(ours: Side, theirs: Side, peer: str, required: float, names: tuple[str, ...], equal: str) -> Iterator[Row]:
    """Rows of CPU seconds, which must reach the ratio, and of the clock's: the sum of each step's least.

    A step does the same work in every round, and what other programs take of the machine only adds to it, by more than what is
    sought here.

    Args:
        names: files of a run folder that must be the same.

    Raises:
        UnequalResultsError: they are not.
    """
    sides = {"ours": ours, "theirs": theirs}
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(ROUNDS):
            left = {}
            # In turn first: a processor that slows down does so for both.
            for name in sorted(sides, reverse=bool(number % 2)):
                left[name] = trained(Path(scratch) / f"{name}-{number}", sides[name], names)
                found[name].append(Clock.found)
            if left["ours"] != left["theirs"]:
                raise UnequalResultsError(f"the runs left other {' or '.join(names)}")
    least = {name: np.min(found[name], axis=0).sum(axis=1) for name in sides}
    for row, unit in enumerate(("CPU seconds", "seconds of the clock")):
        yield Row(
            case=f"{STEPS - 1} steps and a save, {unit}",
            peer=peer,
            ours=float(least["ours"][row]),
            theirs=float(least["theirs"][row]),
            required=None if row else required,
            equal=equal,
        )
