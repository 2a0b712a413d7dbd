"""Run folders of `test`, as they are read back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zs_lightning.errors import UserError
from zs_lightning.runs.outcomes import scores

SCHEMA = 1
GREEDY, SAMPLED = "greedy", "sampled"
_COLUMNS = (
    "id decoding question golden_answers answer subset em cover_em f1 searches turns sampled_tokens truncated invalid "
    "invalid_actions forged source fruitless repeated reworded other_query first_fruitless first_repeated first_reworded "
    "first_other_query"
).split()
"""Of every line. `empty_searches` and `em_folded` came later: tests of before then are compared without the one, and their
answers are scored again for the other."""


@dataclass(frozen=True)
class Run:
    """One `test` run: what a policy did with one engine."""

    name: str
    label: str
    """Of the engine, as the user wrote it after the @; empty in the main comparison."""
    folder: Path
    engine: str
    seed: int
    lines: list[dict[str, Any]]
    """Of questions.jsonl, in the order of the file."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of config.yaml, empty where the folder has none."""

    def rows(self, decoding: str) -> list[dict[str, Any]]:
        """The outcomes with this decoding, sorted by question; empty if the test did not use it."""
        return sorted((row for row in self.lines if row["decoding"] == decoding), key=lambda row: str(row["id"]))


def read_json(path: Path) -> dict[str, Any]:
    """The results.json of a run. Raises UserError naming the file if it is not there or not one of ours."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {path.name}; expected the run folder of a finished `test`")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; run the test again") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f'{path}: expected results with "schema": {SCHEMA}; run the test again with this version')
    return content


def read_run(name: str, label: str, folder: Path) -> Run:
    """A run folder of `test` with PolicyRL.

    Raises:
        UserError: a file is missing, empty or damaged, or a question occurs twice.
    """
    results, path = read_json(folder / "results.json"), folder / "questions.jsonl"
    if "policies" in results or "runs" in results:
        raise UserError(f"{folder} holds what compare wrote; name the run folders of the tests that it compared")
    if "engine" not in results:
        raise UserError(f"{folder} is not a test of a policy; a test of the simulator goes to --simulator")
    if not path.is_file() or not path.stat().st_size:
        raise UserError(f"{path} is missing or empty; run the test again")
    lines, seen = [], set()
    # Not splitlines, which also splits at separators that JSON leaves as they are.
    for number, line in enumerate(path.read_text("utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON: {error}; run the test again") from error
        missing = [column for column in _COLUMNS if column not in row]
        if missing:
            raise UserError(f"{path} line {number} has no {missing[0]}; run the test again with this version")
        if "em_folded" not in row:  # Of a version before it, whose f1 knew the punctuation of ASCII only.
            row |= scores(row["answer"], row["golden_answers"])
        if (row["decoding"], row["id"]) in seen:
            raise UserError(f"{path} holds the {row['decoding']} outcome of question {row['id']} twice; run the test again")
        seen.add((row["decoding"], row["id"]))
        lines.append(row)
    return Run(name, label, folder, str(results["engine"]), int(results["seed"]), lines, read_config(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """The run's config.yaml; empty if there is none, which is no reason not to compare its results."""
    path = folder / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML; run the test again") from error
    return content if isinstance(content, dict) else {}
