"""Any runs of `test` on the same questions: each against the first one, pair by pair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.runs.folder import GREEDY, SAMPLED, SCHEMA, Run
from zs_lightning.runs.outcomes import (
    NORMALISATION,
    SCORES,
    by_source,
    by_subset,
    paired_difference,
    source_groups,
    subset_groups,
    summarise,
)

Rows = Sequence[dict[str, Any]]


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """What results.json holds: a function of the runs alone, without a date.

    Raises:
        UserError: fewer than two runs, no decoding that all have, or a run that shares no question with the first.
    """
    if len(runs) < 2:
        raise UserError(f"compare needs two runs or more; got {', '.join(run.name for run in runs)}")
    decoding = next((name for name in (GREEDY, SAMPLED) if all(run.rows(name) for run in runs)), None)
    if decoding is None:
        raise UserError("compare: the runs share no decoding; run the tests with `decodings: [greedy]` or `[greedy, sampled]`")
    found = []
    for run, setting in zip(runs, settings(runs), strict=True):
        rows = run.rows(decoding)
        found.append(
            {
                "name": run.name,
                "folder": str(run.folder),
                "policy": policy_name(run),
                "setting": setting,
                "engine": run.engine,
                "seed": run.seed,
                **summarise(rows),
                **by_source(rows),
                "subsets": by_subset(rows),
                "other_questions": other_questions(runs[0].rows(decoding), rows),
                "difference": None if run is runs[0] else difference(runs[0], run, decoding),
            }
        )
    return {"schema": SCHEMA, "normalisation": NORMALISATION, "decoding": decoding, "first": runs[0].name, "runs": found}


def difference(first: Run, run: Run, decoding: str) -> dict[str, Any]:
    """Paired differences, run - first, over the questions that both answered; the others are counted.

    Raises:
        UserError: there is no such question.
    """
    left, right = ({_identity(row): row for row in r.rows(decoding)} for r in (first, run))
    common = sorted(set(left) & set(right))
    if not common:
        raise UserError(
            f"{first.folder} and {run.folder} have no question in common: the first asks for example {min(left)}, the other "
            f"{min(right)}; test both with the same data"
        )
    return {
        "questions": len(common),
        "only_here": len(right) - len(common),
        "only_in_first": len(left) - len(common),
        **{s: paired_difference([left[i][s] for i in common], [right[i][s] for i in common]).rounded() for s in SCORES},
    }


def other_questions(first: Rows, rows: Rows) -> dict[str, list[str]]:
    """Of subsets and of sources, the names under which the rows do not have the questions that the first run's rows have
    there: its scores say nothing beside those of the first."""
    differing = {}
    for key, groups_of in {"subsets": subset_groups, "sources": source_groups}.items():
        left, right = ({name: {*map(_identity, part)} for name, part in groups_of(r).items()} for r in (first, rows))
        differing[key] = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    return differing


def _identity(row: dict[str, Any]) -> str:
    """An id alone may stand for another question in another version of the data."""
    return json.dumps([row["id"], row["question"], row["golden_answers"]], ensure_ascii=False)


def policy_name(run: Run) -> str:
    """The folder of the tested checkpoint; empty where the run does not say."""
    if "ckpt_path" not in run.config:
        return ""
    path = run.config["ckpt_path"]
    return Path(str(path)).parent.name if path else "untrained"


def settings(runs: Sequence[Run]) -> list[str]:
    """What each run searched with: the label that the user gave, or the engine, a simulator's noise, and the numbers among
    the engine's options in which runs with the same engine differ."""
    options = [_numbers(run) for run in runs]
    named = []
    for run, own in zip(runs, options, strict=True):
        others = [other for it, other in zip(runs, options, strict=True) if it.engine == run.engine]
        differing = [f"{key} {value:g}" for key, value in own.items() if any(other.get(key) != value for other in others)]
        arguments = _part(run.config, "model", "init_args")
        noise = arguments.get("noise_prob")
        parts = [run.engine, *([f"noise {noise:g}"] if run.engine == "simulator" and noise is not None else []), *differing]
        limits = _part(arguments, "rollout")
        if limits.get("retrieve_first"):
            parts.append("question searched first")
        if limits.get("max_turns") == 0:
            parts = ["no search"] if not limits.get("retrieve_first") else [*parts, "no other search"]
        named.append(run.label or ", ".join(parts))
    return named


def _numbers(run: Run) -> dict[str, float]:
    """Numeric options of the engine."""
    options = _part(run.config, "model", "init_args", "search", "init_args")
    return {key: value for key, value in options.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def _part(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    for key in keys:
        inner = config.get(key)
        config = inner if isinstance(inner, dict) else {}
    return config
