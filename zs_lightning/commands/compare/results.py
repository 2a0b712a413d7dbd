"""What compare measures: any number of runs, each against the first with the same engine, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.runs.folder import Run
from zs_lightning.runs.intervals import paired_difference
from zs_lightning.runs.outcomes import (
    GREEDY,
    NORMALISATION,
    SAMPLED,
    SCORES,
    Outcome,
    by_decoding,
    source_groups,
    subset_groups,
)
from zs_lightning.runs.settings import policy_name, settings

SCHEMA = 2
"""Version of a comparison's results.json. In version 1 base and trained policies had a form of their own."""

Question = tuple[str, str, tuple[str, ...]]


def compare(runs: Sequence[Run], simulator: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """What results.json holds: a function of the arguments alone, without a date.

    Args:
        runs: those without a label are the main comparison; those of one label are compared among themselves.
        simulator: the recall of a test of SimulatorSFT; empty if there is none.
        seconds: time by stage.

    Raises:
        UserError: fewer than two runs of the first one's label, no decoding that all have, or a run that shares no
            question with the one that it is compared with.
    """
    if sum(run.label == runs[0].label for run in runs) < 2:
        named = ", ".join(run.name for run in runs)
        raise UserError(f"compare needs two runs or more, without an @ENGINE or with the same; got {named}")
    decoding = next((name for name in (GREEDY, SAMPLED) if all(run.decoded(name) for run in runs)), None)
    if decoding is None:
        raise UserError("compare: the runs share no decoding; run the tests with `decodings: [greedy]` or `[greedy, sampled]`")
    firsts: dict[str, Run] = {}
    found = []
    for run, setting in zip(runs, settings(runs), strict=True):
        first = firsts.setdefault(run.label, run)
        found.append(
            {
                "name": run.name,
                "label": run.label,
                "folder": str(run.folder),
                "policy": policy_name(run),
                "setting": setting,
                "engine": run.engine,
                "seed": run.seed,
                "decodings": by_decoding([*run.decoded(GREEDY), *run.decoded(SAMPLED)]),
                "other_questions": other_questions(first.decoded(decoding), run.decoded(decoding)),
                "difference": None if run is first else differences(first, run),
            }
        )
    results = {"schema": SCHEMA, "normalisation": NORMALISATION, "decoding": decoding, "first": runs[0].name, "runs": found}
    return {**results, "simulator": dict(simulator), "seconds": dict(seconds)}


def differences(first: Run, run: Run) -> dict[str, dict[str, Any]]:
    """For each decoding of both the paired differences, run - first, over the questions that both answered; the others
    are counted.

    Raises:
        UserError: there is no such question.
    """
    found = {}
    for decoding in (GREEDY, SAMPLED):
        left = {question(row): row for row in first.decoded(decoding)}
        right = {question(row): row for row in run.decoded(decoding)}
        common = sorted(left.keys() & right.keys())
        if left and right and not common:
            raise UserError(
                f"{first.folder} and {run.folder} have no question in common: the first asks for example {min(left)}, the "
                f"other {min(right)}; test both with the same data"
            )
        if not common:
            continue
        counts = {"questions": len(common), "only_here": len(right.keys() - left), "only_in_first": len(left.keys() - right)}
        found[decoding] = counts | {score: _difference(score, left, right, common) for score in SCORES}
    return found


def _difference(
    score: str, left: Mapping[Question, Outcome], right: Mapping[Question, Outcome], common: Sequence[Question]
) -> dict[str, float]:
    before, after = ([getattr(rows[key], score) for key in common] for rows in (left, right))
    return paired_difference(before, after).rounded()


def question(row: Outcome) -> Question:
    """What makes two outcomes a pair. An id alone may stand for another question in another version of the data."""
    return row.id, row.question, tuple(row.golden_answers)


def other_questions(first: Sequence[Outcome], rows: Sequence[Outcome]) -> dict[str, list[str]]:
    """The names of subsets and of sources under which the rows do not have the questions that the first run's have there:
    their scores say nothing beside those of the first."""
    differing = {}
    for key, groups_of in {"subsets": subset_groups, "sources": source_groups}.items():
        left = {name: set(map(question, part)) for name, part in groups_of(first).items()}
        right = {name: set(map(question, part)) for name, part in groups_of(rows).items()}
        differing[key] = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    return differing
