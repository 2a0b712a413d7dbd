"""Runs that are killed or stopped at any moment and begun again, and what must be equal when they have come to their end."""

import hashlib
import json
import random
import re
import shutil
import signal
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zs_lightning.runs.checkpoints import find_checkpoint
from zs_lightning.runs.folder import CHECKPOINT, PREVIOUS

STEPS, SAVE_EVERY = 3, 2
TRIES = 20
"""Most often that a command is begun which ends before its moment comes, with an earlier one each time."""

RUN = {
    "schema": 1,
    "seed_everything": 0,
    "resume": "auto",
    "run": {"save_every": SAVE_EVERY, "folder": "run"},
    "data": {"batch_size": 2, "steps": STEPS, "validation_rows": 2},
    "trainer": {
        "precision": "32-true",
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "support.killhooks.Done"}],
    },
}
FILES = (
    r"(config(-\d+)?\.yaml|(last|previous|best)\.ckpt|(checkpoints|fit|search|best|build)\.json|model|best|trajectories|unsaved-\d+"
    r"|events\.out\.tfevents\..*|(work|alarms)\.jsonl|records\.jsonl|card\.md)$"
)
LORA = {"r": 2, "dropout": 0.1}
SFT = {"model": {"path": "miniature"}, "prompts": "miniature", "lora": LORA, "count": 3, "max_new_tokens": 16, "decay": True}
SHORT = {"max_turns": 1, "max_new_tokens": 12, "max_observation_tokens": 32, "max_length": 640}
"""Enough for half of what the miniature wants to write, and for a search: what is begun this often is to end soon."""
RL = {
    "model": {"path": "miniature"},
    "prompts": "miniature",
    "lora": LORA,
    "estimator": "grpo",
    "group_size": 2,
    "updates_per_rollout": 2,
    # Rewards that are never all zero, so that there is something to learn.
    "reward": {"class_path": "AnswerReward", "init_args": {"format_weight": 0.5}},
    "rollout": SHORT,
    "search": {"class_path": "BM25Search"},
}
PPO = {"estimator": "ppo", "critic": {"lr": 1e-3, "warmup_steps": 0}}
BUILD = {
    "schema": 1,
    "folder": "run",
    "model": {"path": "miniature"},
    "prompts": "miniature",
    "rollout": {**SHORT, "max_new_tokens": 24},
    "search": {"class_path": "BM25Search"},
    "source": {"class_path": "MiniatureSource"},
    "pairs": 16,
    "group_size": 2,
    "batch_size": 3,
    "kinds": ["off_topic", "partial"],
}


def simulator(**options):
    """The policy's own base model as the engine."""
    own = {"model": {"path": "policy"}, "prompts": "miniature", "count": 2, "max_new_tokens": 8, "max_length": 160, **options}
    return {"class_path": "SimulatorSearch", "init_args": own}


def server(url, **http):
    return {"class_path": "RetrieveSearch", "init_args": {"endpoint": url, "http": http}}


def answered(asked):
    """A retrieval server's answer, which is the same for the same query."""
    (query,) = asked.body["queries"]
    return {"result": [[{"document": {"contents": f'"About {query}"\nIt is {query[::-1]}.'}, "score": 1.0}]]}


def fit(module, *callbacks, **options):
    """The configuration of a run."""
    trainer = {**RUN["trainer"], "callbacks": [*RUN["trainer"]["callbacks"], *callbacks]}
    own = {"SimulatorSFT": SFT, "PolicyRL": RL}[module]
    return {**RUN, "trainer": trainer, "model": {"class_path": module, "init_args": {**own, **options}}}


@dataclass
class Run:
    """A command that is given again and again in a folder of its own, where it leaves its files in `run`."""

    home: Path
    config: dict
    environment: dict = field(default_factory=dict)
    lost: int = 0
    """Steps, or batches of a build, that were done and had to be done once more; the most in one life."""

    def __post_init__(self):
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(parents=True)
        self.folder = self.home / "run"
        (self.home / "own.yaml").write_text(yaml.safe_dump(self.config))

    def begin(self, warm, *options, **environment):
        command = "fit" if "trainer" in self.config else "build-simulator-data"
        return warm.begin([command, "--config=own.yaml", *options], self.home, **{**self.environment, **environment})

    def live(self, warm, moment=None, **environment):
        """Begins it, or goes on with it; to its end, or for so many seconds, when it is killed.

        Returns:
            Exit code, stdout and stderr.
        """
        done, batches = self.done(), self.batches()
        command = self.begin(warm, **environment)
        if moment is not None:
            wait(command, moment)
            command.send(signal.SIGKILL)
        code, out, err = command.end()
        if found := re.search(r"(?:goes on after|already finished at) (\d+) of", out):
            self.lost = max(self.lost, done - int(found[1]))
        elif "it is now in run/unsaved" in err:
            self.lost = max(self.lost, done)
        self.lost += not self.batches().startswith(batches)
        return code, out, err

    def done(self):
        """Steps that were done when it was stopped."""
        file = self.home / "done"
        # It may have been made and not yet be written.
        return int((file.read_text().split() or ["0"])[-1]) if file.is_file() else 0

    def batches(self):
        """What of a build was written down to the end of a line."""
        work = self.folder / "work.jsonl"
        content = work.read_bytes() if work.is_file() else b""
        return content[: content.rfind(b"\n") + 1]

    def end(self, warm):
        """Runs it to its end, and returns what it left."""
        code, _, err = self.live(warm)
        assert code == 0, err[-3000:]
        return self.result()

    def checked(self):
        """Raises UserError if a checkpoint of it is not whole; returns how many it has."""
        found = [path for path in (self.folder / name for name in (CHECKPOINT, PREVIOUS)) if path.is_file()]
        for path in found:
            torch.load(find_checkpoint(path, "run.folder"), "cpu", weights_only=True)
        return len(found)

    def result(self):
        """All that must be equal, by its name."""
        if "trainer" not in self.config:
            return {"records": hashlib.sha256((self.folder / "records.jsonl").read_bytes()).hexdigest()}
        found = {}
        for kind, file in (("checkpoint", "last.ckpt"), ("best", "best.ckpt")):
            if (self.folder / file).is_file():
                state = torch.load(self.folder / file, "cpu", weights_only=True)
                del state["date"]  # A run that began before midnight has another.
                found |= {f"{kind} {name}": plain(value) for name, value in state.items()}
        for name in ("model", "best"):
            for path in (self.folder / name).glob("*"):
                found[f"{name}/{path.name}"] = path.read_bytes()
        for name in ("trajectories/train.jsonl", "alarms.jsonl", "best.json"):
            path = self.folder / name
            found[name] = path.read_bytes() if path.is_file() else b""
        for path in self.home.glob("*.sqlite"):
            with sqlite3.connect(path) as file:
                found[path.name] = sorted(file.execute("SELECT * FROM answers").fetchall())
        return found | {"curves": curves(self.folder)}

    def left(self):
        """Temporary files, of a run that has ended."""
        names = {path for path in self.home.rglob("*") if path.name.endswith((".part", ".old", "-journal"))}
        return names | {path for path in self.folder.iterdir() if not re.match(FILES, path.name)}


def wait(command, seconds):
    """Waits so long, or until a command has ended."""
    deadline = time.monotonic() + seconds
    while command.runs() and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.01))


def alive(session):
    """Processes of a command, which is the first of its session."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = place.read_text().rpartition(") ")[2].split()[:4]
        except OSError:
            continue
        found += [place] if int(of) == session and state != "Z" else []
    return found


def spread(life, count, seed):
    """Random moments of a life, one in each of so many parts of it, in random order."""
    rng = random.Random(seed)
    moments = [life * (i + rng.random()) / count for i in range(count)]
    rng.shuffle(moments)
    return moments


def curves(folder):
    """Numbers in TensorBoard, without those of time and of what was in a cache already."""
    board = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not re.search("second|memory|cache", tag)]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}


def plain(value):
    """A nested structure with bytes for tensors."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def judged(found, expected):
    """`equal`, `rounded`, or the names of what differs more: what was sampled may not, numbers may by a little."""
    names = ("checkpoint state_dict", "checkpoint optimizer_states", "trajectories/train.jsonl")
    if all(found[name] == expected[name] for name in names):
        return "equal"
    lines, others = ([json.loads(line) for line in result[names[2]].splitlines()] for result in (found, expected))
    fields = ("id", "token_ids", "reward", "noise_prob", "step")
    differs = [name for name in fields if [line[name] for line in lines] != [line[name] for line in others]]
    for name, content in expected[names[0]].items():
        one, other = (torch.frombuffer(bytearray(x), dtype=torch.float32) for x in (found[names[0]][name], content))
        differs += [] if torch.allclose(one, other, atol=1e-5, rtol=1e-4) else [name]
    return ", ".join(differs) or "rounded"


def differing(found, expected):
    """Names of what is not equal."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
