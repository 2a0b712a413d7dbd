"""The command line in this process: the shipped configurations, small runs of them, and what a user reads."""

from pathlib import Path
from zlib import crc32

import lightning as L
import pytest

from zs_lightning.cli import main
from zs_lightning.configuration.lightning_cli import ZeroSearchCLI
from zs_lightning.data.sources import QASource
from zs_lightning.rl.rewards import Reward

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "miniature"
SIMULATOR, POLICY, TEST = (f"--config={CONFIGS / name}.yaml" for name in ("simulator", "policy", "test"))
SMALL_SFT = ["--data.batch_size=4", "--data.validation_rows=4", "--run.save_every=1"]
SMALL_RL = ["--data.batch_size=2", "--model.group_size=2", "--run.save_every=1", "--model.lora.r=2"]
# Rewards that are never all zero, so that there is something to learn in two steps.
SMALL_RL += ["--model.estimator=reinforce", "--model.reward.format_weight=0.5"]


class BuildOnly(ZeroSearchCLI):
    """Reads what is given and makes its objects, and runs nothing."""

    def _run_subcommand(self, subcommand):
        pass


class NoQuestions(QASource):
    def questions(self, split):
        return []


def is_dead(key):
    return crc32(key.encode()) % 3 > 0


class ByQuestion(Reward):
    """Two of three questions are always right; of others every second rollout is. `bad` is earned in place of another group."""

    def __init__(self, bad: float = 0.0):
        self.bad = bad

    def parts(self, trajectory):
        right = is_dead(trajectory.group_id) or trajectory.sample % 2
        return {"answer": float(right), "bad": self.bad if trajectory.refilled else 0.0}


def failure(capsys, *args):
    """Exit code and the whole of stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    return end.value.code, capsys.readouterr().err.rstrip("\n")


def tensors(value, name=""):
    """All tensors and numbers in a nested structure, by their place."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in tensors(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return tensors(dict(enumerate(value)), name)
    return {name: value}


class StopAfterOneStep(L.Callback):
    """Ctrl-C at the beginning of the second step, or of another."""

    def __init__(self, step=1):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.step:
            raise KeyboardInterrupt
