"""A training with what keeps it from being lost, hung or fooled, against the same training without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from benches.fits import Side, compare
from benches.harness import Row
from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.callbacks.signs_of_life import SignsOfLife
from zs_lightning.modules import phases, update
from zs_lightning.rl import rewards
from zs_lightning.runs import folder as files
from zs_lightning.text import protocol

REQUIRED = 0.98


def saved_plainly(run_files: RunFiles, state: dict[str, Any]) -> None:
    torch.save(state, run_files.folder / files.CHECKPOINT)
    run_files.saved = state["step"]


class Unguarded:
    """No copy of a step's state, checksum, fsync or second checkpoint; no thread that watches and nothing told to it; no
    look for numbers that are not finite, forged results, or tags in documents (this engine's have none)."""

    def __enter__(self) -> None:
        nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
        self.without = ExitStack()
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
            self.without.enter_context(patch.object(place, name, instead))

    def __exit__(self, *_: object) -> None:
        self.without.close()


def run() -> Iterator[Row]:
    names = ("model/model.safetensors", "trajectories/train.jsonl")
    # With seed 0 the policy may forge a search result, which earns nothing on our side alone.
    seed = ["--seed_everything=1"]
    sides = (Side(seed, nullcontext()), Side(seed, Unguarded()))
    yield from compare(*sides, "the same without guards", REQUIRED, names, "weights and trajectories identical")
