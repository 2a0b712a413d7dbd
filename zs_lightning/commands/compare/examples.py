"""Questions with what two policies did, drawn and never picked for their looks."""

import json
import re
from collections.abc import Sequence
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.runs.folder import TRAJECTORIES, Run
from zs_lightning.runs.outcomes import GREEDY
from zs_lightning.streams import derive_seed

EXAMPLES = {(0.0, 1.0): 4, (1.0, 1.0): 1, (1.0, 0.0): 1, (0.0, 0.0): 2}
"""How many questions to show for each EM of both runs: gains, and never only gains."""

Pair = tuple[dict[str, Any], dict[str, Any]]
"""Trajectories of two runs on one question, with their scores."""


def choose_examples(first: Run, second: Run) -> list[Pair]:
    """Greedy trajectories on the same questions. Empty if a run kept none."""
    if not all((run.folder / TRAJECTORIES / "test.jsonl").is_file() for run in (first, second)):
        return []
    before, after = ({row.id: row.em for row in run.decoded(GREEDY)} for run in (first, second))
    # By a number made of the id, so that the order of a file chooses nothing.
    drawn = sorted(before.keys() & after.keys(), key=lambda name: derive_seed("examples", name))
    chosen: list[str] = []
    for kind, count in EXAMPLES.items():
        chosen += [name for name in drawn if (before[name], after[name]) == kind][:count]
    # Where there are few of a kind, others take their place.
    others = [name for name in drawn if name not in chosen]
    chosen += others[: sum(EXAMPLES.values()) - len(chosen)]
    left, right = (_trajectories(run, set(chosen)) for run in (first, second))
    return [(left[name], right[name]) for name in chosen if name in left and name in right]


def _trajectories(run: Run, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Greedy trajectories of the wanted questions. Raises UserError if the file has other lines
    than questions.jsonl, or one that is no trajectory."""
    found = {}
    path = run.folder / TRAJECTORIES / "test.jsonl"
    # Line by line: with its tokens the file is large, and few are wanted.
    with path.open("rb") as file:
        # Both files have a line for each outcome, in one order.
        for number, (row, line) in enumerate(zip(run.outcomes, file, strict=False), 1):
            if row.decoding != GREEDY or row.id not in wanted:
                continue
            try:
                trajectory = json.loads(line)
                key, turns = trajectory["id"], trajectory["turns"]
                for turn in turns:
                    # A file of before there were kinds says only whether a result was noise.
                    turn.setdefault("noise", turn.get("noisy"))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                said = f"line {number} is no trajectory, or half of one; run the test again"
                raise UserError(f"{path} {said}") from error
            if key != row.id:
                said = "does not go with questions.jsonl beside it; run the test again"
                raise UserError(f"{path} {said}")
            found[row.id] = trajectory | {"em": row.em, "f1": row.f1, "subset": row.subset}
    return found


def marked(text: str, answers: Sequence[str]) -> list[tuple[str, bool]]:
    """The text cut where a golden answer stands in it as whole words: (part, is an answer)."""
    known = sorted((answer for answer in answers if answer.strip()), key=len, reverse=True)
    if not known:
        return [(text, False)] if text else []
    # The longest first: of "Bar Baz" and "Bar" the longer one is marked.
    either = "|".join(map(re.escape, known))
    parts = re.split(rf"(?<!\w)({either})(?!\w)", text, flags=re.IGNORECASE)
    return [(part, number % 2 == 1) for number, part in enumerate(parts) if part]
