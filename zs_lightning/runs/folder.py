"""What lies in a run folder: its files' names, its configuration, its checkpoint and the outcomes of a `test`."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from zs_lightning.errors import UserError
from zs_lightning.runs.older import modernised
from zs_lightning.runs.outcomes import Outcome

if TYPE_CHECKING:  # Torch takes seconds to import, and compare and the check of a command line do without it.
    from torch import Tensor

SCHEMA = 1
"""Version of results.json."""
CONFIG = "config.yaml"
CHECKPOINT = "last.ckpt"
MODEL = "model"
"""The folder that an adapter or all weights are saved to when a `fit` ends."""
TRAJECTORIES = "trajectories"
"""The folder of train.jsonl and test.jsonl."""
FIT = "fit.json"
RESULTS = "results.json"
QUESTIONS = "questions.jsonl"
SEARCH = "search.json"


@dataclass(frozen=True)
class Run:
    """A `test` of a policy: what it did with one engine."""

    name: str
    label: str
    """The user's name of another engine, as it stands after the @; empty in the main comparison."""
    folder: Path
    engine: str
    seed: int
    outcomes: list[Outcome]
    """In the order of questions.jsonl, which is that of trajectories/test.jsonl."""
    config: dict[str, Any] = field(default_factory=dict)

    def decoded(self, decoding: str) -> list[Outcome]:
        """The outcomes with this decoding, sorted by question; empty if the test did not use it."""
        return sorted((row for row in self.outcomes if row.decoding == decoding), key=lambda row: row.id)


def read_test_results(folder: Path) -> dict[str, Any]:
    """The results.json of a `test`.

    Raises:
        UserError: it is not there, damaged, of another version, or a comparison's.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise UserError(f"{folder} holds no {RESULTS}; expected the run folder of a finished `test`")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; run the test again") from error
    if isinstance(content, dict) and content.keys() & {"policies", "runs"}:
        raise UserError(f"{folder} holds what compare wrote; name the run folders of the tests that it compared")
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f'{path}: expected results with "schema": {SCHEMA}; run the test again with this version')
    return content


def read_run(name: str, label: str, folder: Path) -> Run:
    """The run folder of a `test` with PolicyRL.

    Raises:
        UserError: a file is missing, empty or damaged, or a question occurs twice.
    """
    results = read_test_results(folder)
    if "engine" not in results:
        raise UserError(f"{folder} is not a test of a policy; a test of the simulator goes to --simulator")
    outcomes = read_outcomes(folder / QUESTIONS)
    return Run(name, label, folder, str(results["engine"]), int(results["seed"]), outcomes, read_config(folder))


def read_outcomes(path: Path) -> list[Outcome]:
    """The lines of a questions.jsonl. Raises UserError as `read_run` does."""
    if not path.is_file() or not path.stat().st_size:
        raise UserError(f"{path} is missing or empty; run the test again")
    outcomes: dict[tuple[str, str], Outcome] = {}
    # Not splitlines, which also splits at separators that JSON leaves as they are.
    for number, line in enumerate(path.read_text("utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = Outcome.read(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON: {error}; run the test again") from error
        except KeyError as error:
            raise UserError(f"{path} line {number} has no {error.args[0]}; run the test again with this version") from error
        if (row.decoding, row.id) in outcomes:
            raise UserError(f"{path} holds the {row.decoding} outcome of question {row.id} twice; run the test again")
        outcomes[row.decoding, row.id] = row
    return list(outcomes.values())


def read_config(place: Path) -> dict[str, Any]:
    """What stands in the configuration of a run, its options where they are today; empty if there is none.

    Args:
        place: the run folder, or the file itself.

    Raises:
        UserError: the file is not valid YAML.
    """
    path = place / CONFIG if place.is_dir() else place
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return modernised(content) if isinstance(content, dict) else {}


def read_head(place: Path) -> dict[str, str]:
    """The lines at the head of a run's configuration, `# name: value`: the command, versions, the tested checkpoint."""
    path = place / CONFIG if place.is_dir() else place
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    pairs = (line[2:].partition(": ") for line in lines if line.startswith("# "))
    return {name: value for name, _, value in pairs if value}


def config_beside(checkpoint: Path, option: str) -> Path:
    """The configuration of the run that left the checkpoint.

    Raises:
        UserError: it is not there; the message names the option.
    """
    file = checkpoint.parent / CONFIG
    if not file.is_file():
        raise UserError(f"{option}: there is no {CONFIG} beside {checkpoint}; leave a checkpoint in the folder of its run")
    return file


def find_checkpoint(run: Path, option: str) -> Path:
    """The checkpoint that lies in a run folder, or that `run` itself is.

    Args:
        option: the option of the command line, for messages.

    Raises:
        UserError: there is none.
    """
    file = run / CHECKPOINT if run.is_dir() else run
    if not file.is_file():
        inside = " or ".join(str(found.parent) for found in sorted(run.glob(f"*/{CHECKPOINT}")))
        said = f"did you mean {inside}?" if inside else "expected the run folder of a `fit`, or the checkpoint in it"
        raise UserError(f"{option}: there is no file {file}; {said}")
    # torch would read other archives as well, but only this kind has the checksums that tell checkpoints apart.
    if not zipfile.is_zipfile(file):
        raise UserError(f"{option}: {file} is damaged or no checkpoint; expected the {CHECKPOINT} of a `fit`")
    return file


def identity(checkpoint: Path) -> str:
    """16 hex digits that say which weights these are: the same for a copy, others after one more training step."""
    # Reading gigabytes would take minutes; a checkpoint is a zip archive, which holds a checksum of each tensor.
    with zipfile.ZipFile(checkpoint) as archive:
        parts = [(part.filename, part.file_size, part.CRC) for part in archive.infolist()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def load_checkpoint(file: Path, option: str) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU. Its weights stand under `state_dict`, trainable ones only.

    Raises:
        UserError: the file is damaged, or no checkpoint of a `fit`.
    """
    import torch

    try:
        # Mapped, so that a reader of a part of it does not take memory for the optimiser's state.
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["state_dict"]
    except (RuntimeError, KeyError, TypeError, EOFError, ValueError) as error:
        raise UserError(f"{option}: {file} cannot be read: {str(error).splitlines()[0]}") from error
    return checkpoint


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises UserError if the weights of a checkpoint have other names or shapes than those of the model."""
    wrong = sorted(found.keys() ^ expected.keys()) or [n for n in expected if found[n].shape != expected[n].shape]
    if wrong:
        raise UserError(
            f"checkpoint: its weights do not fit model and lora of this config ({len(wrong)} differ, first {wrong[0]}); "
            "use the config that the checkpoint was trained with"
        )
