"""Faults in the steps of a run, as a callback that a command line names; and what the process takes after each step."""

import ctypes
import gc
import json
import os
import random
import shutil
import sys
import threading
from types import SimpleNamespace

import lightning as L
import torch

from zs_lightning.modules.phases import Phases
from zs_lightning.rl.rewards import AnswerReward

SHARE = 0.05
"""Of each fault."""


SMALL_OBJECT = 512
"""Bytes of the largest object that Python keeps outside of malloc."""


class Malloc(ctypes.Structure):
    """glibc's `mallinfo2`, of all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


LIBC = ctypes.CDLL(None)
LIBC.mallinfo2.restype = Malloc


def bytes_in_use() -> int:
    """What cannot be freed: an upper bound, as small objects are counted, not weighed.

    Resident memory would not do: it goes up and down by 50 to 100 MB with what malloc and the system keep of what is
    free, ten times what a leak that matters adds in a thousand steps.
    """
    gc.collect()
    malloc = LIBC.mallinfo2()
    return malloc.uordblks + malloc.hblkhd + SMALL_OBJECT * sys.getallocatedblocks()


class OddReward(AnswerReward):
    """Not finite where the callback says so."""

    is_odd = False

    def parts(self, trajectory):
        return super().parts(trajectory) | ({"odd": float("inf")} if OddReward.is_odd else {})


class Faults(L.Callback):
    """Draws the faults of each step anew in each life of a run: what comes again in every life would never end.

    Args:
        notes: the file that gets a line for each step.
    """

    def __init__(self, notes: str) -> None:
        self.notes, self.life = notes, os.environ["SOAK_LIFE"]
        self.faults: list[str] = []
        self.full_in = ""
        self.disk_usage = shutil.disk_usage

    def on_train_start(self, trainer, pl_module):
        module = pl_module

        def fills(*_):
            # Once in the step, in the phase of that fault.
            if module.phases.name == self.full_in:
                self.full_in = ""
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        pl_module.policy.register_forward_pre_hook(fills)
        shutil.disk_usage = lambda path: SimpleNamespace(free=0) if "disk" in self.faults else self.disk_usage(path)

    def teardown(self, trainer, pl_module, stage):
        shutil.disk_usage = self.disk_usage

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rng = random.Random(f"{self.life} {batch_idx}")
        kinds = ["reward", "gradient", "generate", "update", "disk"]
        self.faults = [kind for kind in kinds if rng.random() < SHARE]
        OddReward.is_odd = "reward" in self.faults
        self.full_in = next((kind for kind in self.faults if kind in ("generate", "update")), "")

    def on_after_backward(self, trainer, pl_module):
        if "gradient" in self.faults:
            next(iter(pl_module.trainable().values())).grad.fill_(float("nan"))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert isinstance(pl_module.phases, Phases)
        taken = {"memory": bytes_in_use(), "threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd"))}
        line = {"life": self.life, "step": batch_idx + 1, "faults": self.faults, **taken}
        with open(self.notes, "a") as file:
            file.write(json.dumps(line) + "\n")
