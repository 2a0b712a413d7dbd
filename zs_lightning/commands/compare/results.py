"""What compare measures: each run against the first with the same engine, question by question."""

from collections.abc import Sequence
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.runs.folder import Run
from zs_lightning.runs.intervals import paired_difference
from zs_lightning.runs.outcomes import GREEDY, NORMALISATION, SAMPLED, SCORES, Outcome, by_decoding, column
from zs_lightning.runs.settings import policy_name, settings

SCHEMA = 2
"""Version of a comparison's results.json. In version 1 base and trained had a form of their own."""


def compare(runs: Sequence[Run], simulator: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """What results.json holds: a function of the arguments alone, without a date. Raises UserError
    for fewer than two runs of the first one's label, no decoding that all have, or a run that
    shares no question with the one that it is compared with.

    Args:
        runs: those without a label are the main comparison, those of one label another.
        simulator: the recall of a test of SimulatorSFT; empty if there is none.
        seconds: time by stage.
    """
    if sum(run.label == runs[0].label for run in runs) < 2:
        said = "compare needs two runs or more, without an @ENGINE or with the same"
        raise UserError(f"{said}; got {', '.join(run.name for run in runs)}")
    decodings = [name for name in (GREEDY, SAMPLED) if all(run.decoded(name) for run in runs)]
    if not decodings:
        said = "run the tests with `decodings: [greedy]` or `[greedy, sampled]`"
        raise UserError(f"compare: the runs share no decoding; {said}")
    firsts: dict[str, Run] = {}
    found = []
    for run, setting in zip(runs, settings(runs), strict=True):
        # With another engine the questions may be others: its runs have a first of their own.
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
                # Sorted: a resampled interval depends on the order.
                "decodings": by_decoding([*run.decoded(GREEDY), *run.decoded(SAMPLED)]),
                "difference": None if run is first else paired(first, run),
            }
        )
    return {
        "schema": SCHEMA,
        "normalisation": NORMALISATION,
        "decoding": decodings[0],
        "runs": found,
        "simulator": simulator,
        "seconds": seconds,
    }


def paired(first: Run, run: Run) -> dict[str, dict[str, Any]]:
    """For each decoding of both the paired differences, run - first, over the questions that both
    answered; the others are counted. Raises UserError if there is no such question."""
    found: dict[str, dict[str, Any]] = {}
    # Whatever the table's first column is, the headline's sentence has both.
    for decoding in (GREEDY, SAMPLED):
        before = {question(row): row for row in first.decoded(decoding)}
        after = {question(row): row for row in run.decoded(decoding)}
        common = sorted(before.keys() & after.keys())
        if before and after and not common:
            raise UserError(
                f"{first.folder} and {run.folder} have no question in common: the first asks for "
                f"example {min(before)}, the other {min(after)}; test both with the same data"
            )
        if common:
            pairs: dict[str, Any] = {
                "questions": len(common),
                "only_here": len(after) - len(common),
                "only_in_first": len(before) - len(common),
            }
            for score in SCORES:
                left = column([before[key] for key in common], score)
                right = column([after[key] for key in common], score)
                pairs[score] = paired_difference(left, right).told(len(common))
            found[decoding] = pairs
    return found


def question(row: Outcome) -> tuple[str, ...]:
    """What makes two outcomes a pair."""
    # An id alone may stand for another question in another version of the data.
    return row.id, row.question, *row.golden_answers
