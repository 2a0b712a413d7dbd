"""The same short training in two ways, by turns, in one process: seconds of each, and what they left."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import Callback

from benches.harness import Row, UnequalResultsError
from zs_lightning.cli import main

CONFIG = Path(__file__).parents[2] / "configs" / "miniature" / "policy.yaml"
STEPS = 10
"""As many as the shipped configuration has between two saves."""
ROUNDS = 4


class Clock(Callback):
    """CPU seconds of all of the process's threads, and of the clock, from the second step to the end: files and model
    included."""

    found: tuple[float, float]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.begun = (time.process_time(), time.monotonic())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        Clock.found = (time.process_time() - self.begun[0], time.monotonic() - self.begun[1])


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
    """Rows of CPU seconds, which must reach the ratio, and of the clock's.

    Args:
        names: files of a run folder that must be the same.

    Raises:
        UnequalResultsError: they are not.
    """
    sides = {"ours": ours, "theirs": theirs}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(ROUNDS):
            left = {}
            # In turn first: a processor that slows down does so for both.
            for name in sorted(sides, reverse=bool(number % 2)):
                left[name] = trained(Path(scratch) / f"{name}-{number}", sides[name], names)
                cpu[name].append(Clock.found[0])
                wall[name].append(Clock.found[1])
            if left["ours"] != left["theirs"]:
                raise UnequalResultsError(f"the runs left other {' or '.join(names)}")
    for unit, seconds in (("CPU seconds", cpu), ("seconds of the clock", wall)):
        yield Row(
            case=f"{STEPS - 1} steps and a save, {unit}",
            peer=peer,
            ours=median(seconds["ours"]),
            theirs=median(seconds["theirs"]),
            required=required if seconds is cpu else None,
            equal=equal,
        )
