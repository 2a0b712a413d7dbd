"""Watches a run from a thread of its own: what the step is doing, and whether it still does it."""

import faulthandler
import logging
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import lightning as L

from zs_lightning.callbacks.progress import StepProgress
from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.runs.stopping import STOPPING

_log = logging.getLogger(__name__)

STACKS = "stacks.txt"
EVERY = 1.0
"""Seconds between two looks."""
LINE_EVERY = 60.0
"""Seconds between two lines where there is no terminal."""
UNUSUAL, WORTH_NAMING = 10, 30.0
"""A phase is named that takes so many times its usual time, and so many seconds at least."""
HUNG, HUNG_SECONDS = 20, 1800.0
"""A run is ended whose phase has not moved for so many times its usual time, and so many seconds at
least."""


class SignsOfLife(L.Callback):
    """Shows a step's phase, names one that takes unusually long, and ends a run that hangs, which
    `files` saves. Always on."""

    def __init__(self, files: RunFiles) -> None:
        self.files = files
        self.ended: threading.Event | None = None
        self.named: set[str] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Lightning has set handlers of its own, one of which waits for other ranks.
        STOPPING.install()
        if trainer.state.fn == "fit":
            STOPPING.save = self.files.save_kept
        launcher: Any = getattr(trainer.strategy, "launcher", None)
        if launcher is not None:
            STOPPING.end_others = lambda: launcher.kill(signal.SIGKILL)
        if self.ended is None:
            self.ended = threading.Event()
            watch = (trainer, pl_module, self.ended)
            threading.Thread(target=self._watch, args=watch, daemon=True, name="signs of life").start()

    on_validation_start = on_test_start = on_train_start

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.phases.done += 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *others: Any) -> None:
        pl_module.phases.end()

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *others: Any) -> None:
        pl_module.phases.end(usual=False)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: Any, *others: Any) -> None:
        pl_module.phases.end(usual=False)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            # Lightning ignores Ctrl-C from here on.
            STOPPING.install()
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self.ended is not None:
            self.ended.set()
            self.ended = None

    def _watch(self, trainer: L.Trainer, module: Any, ended: threading.Event) -> None:
        moved, where, told = time.monotonic(), None, time.monotonic()
        bar = trainer.progress_bar_callback
        while not ended.wait(EVERY):
            phases, now = module.phases, time.monotonic()
            here = (phases.name, phases.since, phases.done, phases.tokens)
            if here != where or not phases.name:
                where, moved = here, now
            elif now - moved > max(HUNG_SECONDS, HUNG * (phases.usually() or 0.0)):
                self._end(phases.name, now - moved)
            if trainer.training:
                self._name(phases)
            if not isinstance(bar, StepProgress) or not trainer.is_global_zero:
                continue
            if sys.stdout.isatty():
                bar.refresh()
            elif phases.name and now - told >= LINE_EVERY:
                told = now
                with suppress(OSError):  # A full disk must not end the watch.
                    print(f"step {trainer.fit_loop.epoch_loop.batch_idx + 1}: {phases.line()}", flush=True)

    def _name(self, phases: Any) -> None:
        """Says once of each phase that it takes ten times as long as usual."""
        name, seconds, usual = phases.name, phases.seconds(), phases.usually()
        if usual is None or name in self.named or seconds < max(WORTH_NAMING, UNUSUAL * usual):
            return
        self.named.add(name)
        _log.warning("%s has taken %.0f seconds so far, where %.1f are usual", name, seconds, usual)

    def _end(self, phase: str, seconds: float) -> None:
        path = self.files.folder / STACKS
        said = f"{phase} has not moved for {seconds / 60:.0f} minutes"
        with suppress(OSError), path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            said += f"; where all threads are stands in {path}"
        STOPPING.leave(1, said)
