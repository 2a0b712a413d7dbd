"""What lies in a run folder: names of its files, its configuration, checkpoint and outcomes."""

import fcntl
import itertools
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from zs_lightning.errors import UserError
from zs_lightning.runs.older import modernised
from zs_lightning.runs.outcomes import Outcome, fits

SCHEMA = 1
"""Version of a test's results.json."""
CONFIG = "config.yaml"
CHECKPOINT = "last.ckpt"
PREVIOUS = "previous.ckpt"
"""The checkpoint before the last one."""
CHECKSUMS = "checkpoints.json"
"""Size, checksum and step of both."""
MODEL = "model"
"""The folder that an adapter or all weights are saved to when a `fit` ends."""
BEST = "best"
"""The same as it was at the best validation, where a module names what it is measured by."""
BEST_NOTE = "best.json"
BEST_CHECKPOINT = "best.ckpt"
"""Its weights as a checkpoint, for test, ask and export; a fit cannot go on from it."""
TRAJECTORIES = "trajectories"
"""The folder of train.jsonl, validation.jsonl, real.jsonl (both of a fit's validations) and
test.jsonl."""
BAD_STEPS = "bad_steps"
"""The folder of step-N.jsonl, the rows of a training step that was skipped."""
ALARMS = "alarms.jsonl"
"""What callbacks/alarms.py said."""
PROFILE = "profile.json"
"""What callbacks/profile.py measured."""
FIT = "fit.json"
RESULTS = "results.json"
QUESTIONS = "questions.jsonl"
SEARCH = "search.json"


class Best(NamedTuple):
    """Which validation the model in BEST is of, as its BEST_NOTE says."""

    step: int
    metric: str
    value: float

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.3g} after step {self.step}"


def read_best(folder: Path) -> Best | None:
    """Of a run that has kept one."""
    path = folder / BEST_NOTE
    return Best(**json.loads(path.read_text())) if path.is_file() else None


@dataclass(frozen=True)
class Run:
    """A `test` of a policy: what it did with one engine."""

    name: str
    label: str
    """The user's name of another engine, after the @; empty in the main comparison."""
    folder: Path
    engine: str
    seed: int
    outcomes: list[Outcome]
    """In the order of questions.jsonl, which is that of trajectories/test.jsonl."""
    config: dict[str, Any] = field(default_factory=dict)

    def decoded(self, decoding: str) -> list[Outcome]:
        """The outcomes with this decoding by question; empty if the test did not use it."""
        found = [outcome for outcome in self.outcomes if outcome.decoding == decoding]
        return sorted(found, key=lambda outcome: outcome.id)


def read_test_results(folder: Path) -> dict[str, Any]:
    """The results.json of a `test`. Raises UserError if it is not there, damaged, of another
    version, or a comparison's."""
    path = folder / RESULTS
    if not path.is_file():
        raise UserError(f"{folder} holds no {RESULTS}; expected the folder of a finished `test`")
    try:
        content = json.loads(path.read_text("utf-8"), parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; run the test again") from error
    # A comparison has a file of this name, too.
    if isinstance(content, dict) and content.keys() & {"policies", "runs"}:
        raise UserError(f"{folder} holds what compare wrote; name the folders that it compared")
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f'{path}: expected results with "schema": {SCHEMA}; run the test again')
    return content


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def read_run(name: str, label: str, folder: Path) -> Run:
    """The run folder of a `test` with PolicyRL. Raises UserError if a file is missing, empty or
    damaged, or a question occurs twice."""
    results = read_test_results(folder)
    if "engine" not in results:
        raise UserError(f"{folder} is no test of a policy; a simulator's goes to --simulator")
    if not fits(results["engine"], str) or not fits(results.get("seed"), int):
        raise UserError(f"{folder / RESULTS}: expected a name of an engine and a seed; run the test again")
    outcomes, config = read_outcomes(folder / QUESTIONS), read_config(folder)
    return Run(name, label, folder, results["engine"], int(results["seed"]), outcomes, config)


def read_outcomes(path: Path) -> list[Outcome]:
    """The lines of a questions.jsonl. Raises UserError as `read_run` does."""
    if not path.is_file() or not path.stat().st_size:
        raise UserError(f"{path} is missing or empty; run the test again")
    outcomes: dict[tuple[str, str], Outcome] = {}
    # Not splitlines, which also splits at separators that JSON leaves as they are.
    for number, line in enumerate(path.read_bytes().rstrip(b"\n").split(b"\n"), 1):
        try:
            outcome = Outcome.read(json.loads(line.decode("utf-8")))
        except (ValueError, KeyError, RecursionError) as error:
            wrong = "has no" if isinstance(error, KeyError) else "is"
            wrong = "is not JSON:" if isinstance(error, json.JSONDecodeError) else wrong
            # A decoder's first argument is the name of the encoding.
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.args[0]
            said = f"line {number} {wrong} {reason}"
            raise UserError(f"{path} {said}; run the test again") from error
        if (outcome.decoding, outcome.id) in outcomes:
            said = f"holds the {outcome.decoding} outcome of question {outcome.id} twice"
            raise UserError(f"{path} {said}; run the test again")
        outcomes[outcome.decoding, outcome.id] = outcome
    return list(outcomes.values())


def read_config(place: Path) -> dict[str, Any]:
    """The configuration in a run folder, or in a file, with its options where they are today; empty
    if there is none. Raises UserError if it is not valid YAML."""
    path = place / CONFIG if place.is_dir() else place
    if not path.is_file():
        # A copied folder may be without, which is no reason not to compare its results.
        return {}
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return modernised(content) if isinstance(content, dict) else {}


def part_of(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The group of options at the end of a path of keys; empty if there is none."""
    for key in keys:
        inner = config.get(key)
        config = inner if isinstance(inner, dict) else {}
    return config


def read_head(place: Path) -> dict[str, str]:
    """The `# name: value` at the head of a run's configuration: versions, the tested checkpoint."""
    path = place / CONFIG if place.is_dir() else place
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    pairs = (line[2:].partition(": ") for line in lines if line.startswith("# "))
    return {name: value for name, _, value in pairs if value}


def refuse_existing_run(folder: Path, ckpt_path: str | None, anew: bool = False) -> None:
    """Makes the folder of a new run. Only going on from a checkpoint in it may write there again,
    and what begins `anew`, where there is none. Raises UserError if the folder holds a run, or
    cannot be made."""
    # A run that goes on.
    if ckpt_path is not None and folder.resolve() in Path(ckpt_path).resolve().parents:
        return
    other = "choose another with --run.folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"{folder} cannot be made: {error.strerror}"
        raise UserError(f"run.folder: {said}; {other}") from error
    present = {name for name in (CONFIG, CHECKPOINT, PREVIOUS, RESULTS) if (folder / name).exists()}
    if anew and present == {CONFIG}:
        return
    if found := newest(folder):
        other += f", or go on with it by fit --ckpt_path {found}"
    elif RESULTS not in present:
        other += "; if nothing runs there any more, you can delete it: "
        other += "it has neither a checkpoint nor results"
    if present:
        raise UserError(f"run.folder: {folder} already holds a run; {other}")


def newest(folder: Path) -> Path | None:
    """The last checkpoint of a folder, or the one before it where a kill left that alone."""
    paths = (folder / name for name in (CHECKPOINT, PREVIOUS))
    return next((path for path in paths if path.is_file()), None)


def hold(folder: Path) -> int:
    """Takes a run folder for this process alone, until the number, a file descriptor, is closed or
    the process ends. Raises UserError if another one has it."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some file systems of networks have no locks, which is another error.
        if isinstance(error, BlockingIOError):
            os.close(number)
            other = "wait for its end, or choose another with --run.folder"
            said = f"another process trains in {folder}; {other}"
            raise UserError(f"run.folder: {said}") from error
    return number


def set_aside(folder: Path) -> Path | None:
    """Moves what a run without a checkpoint wrote into a new folder inside of its own; None if it
    wrote nothing."""
    if not (folder / CONFIG).is_file():
        return None
    places = (folder / f"unsaved-{number}" for number in itertools.count(1))
    aside = next(place for place in places if not place.exists())
    # Inside of the folder: nothing is lost, and the same command can begin anew.
    aside.mkdir()
    # The configuration last: a kill in between leaves it, and the next life moves the rest.
    for pattern in (f"{BEST}*", TRAJECTORIES, BAD_STEPS, ALARMS, PROFILE, "*tfevents*", CONFIG):
        for path in folder.glob(pattern):
            path.rename(aside / path.name)
    return aside


def drop_later_lines(path: Path, step: int) -> None:
    """Cuts off what was written after the checkpoint of `step`: it is done once more."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        keep = 0
        for line in file:
            found = re.match(rb'\{"schema": 1, "step": (\d+),', line)
            # A kill may have left half a line.
            if not found or int(found[1]) > step or not line.endswith(b"\n"):
                break
            keep += len(line)
        file.truncate(keep)
