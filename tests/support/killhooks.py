"""Callbacks inside of a run that is to be killed or stopped."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import lightning as L
import torch

from zs_lightning.rollout import Rollouter
from zs_lightning.runs.stopping import STOPPING


class Done(L.Callback):
    """Notes the steps that were done, beside the run folder."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with open("done", "a") as file:
            file.write(f"{batch_idx + 1}\n")


def around(holder, name, before, after=lambda *args: None):
    """Has a function called with `before` and `after` it."""
    inner = getattr(holder, name)

    def call(*args, **options):
        before(*args)
        result = inner(*args, **options)
        after(*args)
        return result

    setattr(holder, name, call)


class KillInSave(L.Callback):
    """kill -9 at the moment of this number among all those at which the run folder changes: between any two calls that
    change it, and with a file half written. The number is KILL_AT; `moments` then has how many there were."""

    def __init__(self):
        self.at, self.now = int(os.environ["KILL_AT"]), 0
        for holder, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree")):
            around(holder, name, self.moment)
        around(torch, "save", self.moment, lambda state, path: self.torn(path))
        around(Path, "write_bytes", self.moment, lambda path, content: self.torn(path))

    def moment(self, *_):
        self.now += 1
        if self.now == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def torn(self, path):
        if self.now + 1 == self.at:
            os.truncate(path, Path(path).stat().st_size // 2)
        self.moment()

    def teardown(self, trainer, pl_module, stage):
        Path("moments").write_text(str(self.now))


class SlowDisk(L.Callback):
    """A disk that takes its time once the run is stopped."""

    def __init__(self, seconds: float):
        around(os, "fsync", lambda *_: time.sleep(seconds if STOPPING.first else 0))


class Rolling(L.Callback):
    """Leaves a file `rolling` when a rollout begins, and `end` when a stopped command does: the time, and threads left."""

    def __init__(self):
        around(Rollouter, "run", lambda *_: Path("rolling").touch())
        around(STOPPING, "finish", lambda: None, self.end)

    def end(self):
        threads = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
        left = [thread.name for thread in threads if not thread.daemon or "search" in thread.name]
        Path("end").write_text(json.dumps({"at": time.monotonic(), "left": left}))
