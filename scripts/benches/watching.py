"""A training with all that shows what it is doing, against the same training without: curves, alarms, trajectories, signs of
life.

Two runs of the same work may differ by more than what is sought here, whatever they do. So they train at the same moment, and
the seconds inside of what watches are counted as well, within one run.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector

from benches import fits
from benches.harness import Row
from zs_lightning.callbacks.alarms import Alarms
from zs_lightning.callbacks.board import Board
from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.callbacks.signs_of_life import SignsOfLife
from zs_lightning.modules.phases import Phases

REQUIRED = 0.97
SILENT = [
    "--trainer.logger=false",
    "--trainer.callbacks=[{class_path: NoiseAnnealing, init_args: {start: 0.0, end: 0.5}}]",
    "--run.keep_trajectories=0",
]
NAMES = ("model/model.safetensors",)
WATCHES: tuple[tuple[type, str], ...] = (
    (Alarms, "on_train_batch_start"),
    (Alarms, "on_train_batch_end"),
    (Board, "on_train_batch_end"),
    (_LoggerConnector, "log_metrics"),
    (RunFiles, "_write_trajectories"),
    (SignsOfLife, "on_train_batch_end"),
    (SignsOfLife, "on_after_backward"),
    (Phases, "__call__"),
)
"""What a step calls that watches; the rest of it has threads of its own."""


class Inside:
    """CPU seconds of the main thread inside of what watches, from the second step on."""

    def __init__(self) -> None:
        self.seconds, self.deep = 0.0, False

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.deep or not fits.Clock.runs or threading.current_thread() is not threading.main_thread():
                return function(*args, **options)
            self.deep, begun = True, time.thread_time()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.thread_time() - begun
                self.deep = False

        return call

    def __enter__(self) -> None:
        self.patches = ExitStack()
        for place, name in WATCHES:
            self.patches.enter_context(patch.object(place, name, self.timed(getattr(place, name))))

    def __exit__(self, *_: object) -> None:
        self.patches.close()


def counted() -> Row:
    """One run, against itself less what the main thread spent inside of what watches and less all other threads, which are
    the watch's and TensorBoard's."""
    inside = Inside()
    with tempfile.TemporaryDirectory() as scratch:
        fits.trained(Path(scratch) / "counted", fits.Side([], inside), NAMES)
    whole, _, main = fits.Clock.found.sum(axis=1)
    return Row(
        case=f"{fits.STEPS - 1} steps and a save, CPU seconds",
        peer="this run, less what it spends in watching",
        ours=float(whole),
        theirs=float(main - inside.seconds),
        required=REQUIRED,
        equal="one run",
        details={"inside of hooks": inside.seconds, "in other threads": float(whole - main)},
    )


def run() -> Iterator[Row]:
    # The pairs first, whose processes are forked from this one before it has trained anything.
    silent = fits.Side(SILENT, patch.object(SignsOfLife, "on_train_start", lambda *_: None))
    yield from fits.compare(fits.Side([], nullcontext()), silent, "the same unwatched", REQUIRED, NAMES, "weights identical")
    yield counted()
