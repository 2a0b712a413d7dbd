"""The same short training in two ways at the same moment: seconds of each, and what they left."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from benches.harness import Row, UnequalResultsError
from zs_lightning.cli import main

CONFIG = Path(__file__).parents[2] / "configs" / "miniature" / "policy.yaml"
STEPS = 10
"""As many as the shipped configuration has between two saves."""
ROUNDS = 8
"""An even number: each side has each core as often."""
Found = tuple[NDArray[np.float64], dict[str, bytes]]
"""What Clock found, and the files that a training left."""


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


def pair(sides: dict[str, Side], folder: Path, names: tuple[str, ...], number: int) -> dict[str, Found]:
    """One round: both sides at the same moment, each in a process of its own on a core of its own, which they exchange
    from round to round. What other programs take of the machine, or its clock, then befalls both."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    waiting = {}
    for place, (name, side) in enumerate(sides.items()):
        mine, its = multiprocessing.Pipe(duplex=False)
        core = cores[(place + number) % len(cores)]
        work = (core, its, folder / f"{name}-{number}", side, names)
        process = multiprocessing.get_context("fork").Process(target=alone, args=work, daemon=True)
        process.start()
        its.close()
        waiting[name] = process, mine
    found = {}
    for name, (process, mine) in waiting.items():
        try:
            found[name] = mine.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"the training of {name} ended with {process.exitcode}") from None
    return found


def alone(core: int, answer: Connection, folder: Path, side: Side, names: tuple[str, ...]) -> None:
    """Trains on this core, and tells what was found."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    left = trained(folder, side, names)
    answer.send((Clock.found, left))


def compare(ours: Side, theirs: Side, peer: str, required: float, names: tuple[str, ...], equal: str) -> Iterator[Row]:
    """Rows of CPU seconds, which must reach the ratio, and of the clock's: the mean of all rounds.

    Args:
        names: files of a run folder that must be the same.

    Raises:
        UnequalResultsError: they are not.
    """
    sides = {"ours": ours, "theirs": theirs}
    rounds: list[dict[str, NDArray[np.float64]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(ROUNDS):
            found = pair(sides, Path(scratch), names, number)
            if found["ours"][1] != found["theirs"][1]:
                raise UnequalResultsError(f"the runs left other {' or '.join(names)}")
            rounds.append({name: steps.sum(axis=1) for name, (steps, _) in found.items()})
    for row, unit in enumerate(("CPU seconds", "seconds of the clock")):
        each = {f"ratio of round {i}": float(r["theirs"][row] / r["ours"][row]) for i, r in enumerate(rounds, 1)}
        yield Row(
            case=f"{STEPS - 1} steps and a save, {unit}",
            peer=peer,
            ours=float(np.mean([r["ours"][row] for r in rounds])),
            theirs=float(np.mean([r["theirs"][row] for r in rounds])),
            required=None if row else required,
            equal=equal,
            details=each,
        )
