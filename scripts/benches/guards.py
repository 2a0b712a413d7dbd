"""A training with what keeps it from being lost, hung or fooled, against the same training without."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.callbacks import Callback

from benches.harness import Row, UnequalResultsError
from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.callbacks.signs_of_life import SignsOfLife
from zs_lightning.cli import main
from zs_lightning.modules import phases, update
from zs_lightning.rl import rewards
from zs_lightning.runs import folder as files
from zs_lightning.text import protocol

CONFIG = Path(__file__).parents[2] / "configs" / "miniature" / "policy.yaml"
STEPS = 10
"""As many as the shipped configuration has between two saves."""
ROUNDS = 4
REQUIRED = 0.98


class Clock(Callback):
    """CPU seconds of all of the process's threads, and of the clock, from the second step to the end: files and model
    included."""

    found: tuple[float, float]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.begun = (time.process_time(), time.monotonic())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        Clock.found = (time.process_time() - self.begun[0], time.monotonic() - self.begun[1])


def saved_plainly(run_files: RunFiles, state: dict[str, Any]) -> None:
    torch.save(state, run_files.folder / files.CHECKPOINT)
    run_files.saved = state["step"]


@contextmanager
def unguarded() -> Iterator[None]:
    """No copy of a step's state, checksum, fsync or second checkpoint; no thread that watches and nothing told to it; no
    look for numbers that are not finite, forged results, or tags in documents (this engine's have none)."""
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    with ExitStack() as without:
        for place, name, instead in (
            (RunFiles, "_save", saved_plainly),
            (RunFiles, "_copy", nothing),
            (SignsOfLife, "on_train_start", nothing),
            (phases.Phases, "__call__", nothing),
            (update.math, "isfinite", lambda _: True),
            (rewards, "forges", lambda _: False),
            (protocol, "sanitize", lambda text: text),
            (os, "fsync", nothing),
        ):
            without.enter_context(patch.object(place, name, instead))
        yield


def trained(folder: Path) -> dict[str, bytes]:
    """What a run leaves of its training."""
    options = [f"--config={CONFIG}", f"--run.folder={folder}", f"--data.steps={STEPS}", "--model.search=BM25Search"]
    main(["fit", *options, "--trainer.callbacks+=benches.guards.Clock", "--trainer.enable_progress_bar=false"])
    names = ("model/model.safetensors", "trajectories/train.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


def run() -> Iterator[Row]:
    cpu: dict[str, list[float]] = {"with": [], "without": []}
    wall: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(ROUNDS):
            left = {}
            # In turn first: a processor that slows down does so for both.
            for side in ("with", "without") if number % 2 else ("without", "with"):
                with unguarded() if side == "without" else ExitStack():
                    left[side] = trained(Path(scratch) / f"{side}-{number}")
                cpu[side].append(Clock.found[0])
                wall[side].append(Clock.found[1])
            if left["with"] != left["without"]:
                raise UnequalResultsError("the runs left other weights or trajectories")
    for unit, seconds in (("CPU seconds", cpu), ("seconds of the clock", wall)):
        yield Row(
            case=f"{STEPS - 1} steps and a save, {unit}",
            peer="the same without guards",
            ours=median(seconds["with"]),
            theirs=median(seconds["without"]),
            required=REQUIRED if seconds is cpu else None,
            equal="weights and trajectories identical",
        )
