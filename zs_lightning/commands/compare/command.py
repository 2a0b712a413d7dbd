"""Compares policies on the same questions: a table for the terminal, results.json, report.md and report.html."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from zs_lightning.commands.compare import overview, report
from zs_lightning.errors import UserError
from zs_lightning.runs import paired, tables
from zs_lightning.runs.folder import GREEDY, SAMPLED, SCHEMA, Run, read_json, read_run
from zs_lightning.runs.outcomes import NORMALISATION, by_subset, paired_difference, summarise


def check_same_questions(runs: Sequence[Run]) -> None:
    """Raises UserError if the runs did not answer the same questions: a difference would be one of questions."""
    first = runs[0]
    for run in runs[1:]:
        for decoding in (GREEDY, SAMPLED):
            left, right = (
                {json.dumps([row[name] for name in ("id", "question", "golden_answers", "subset")]) for row in r.rows(decoding)}
                for r in (first, run)
            )
            if left != right and (decoding == GREEDY or (left and right)):
                example = min(left ^ right)
                raise UserError(
                    f"{first.folder} and {run.folder} answered different questions ({len(left - right)} only in the first, "
                    f"{len(right - left)} only in the second, such as {example}); test both with the same data and test_rows"
                )


def policy_metrics(run: Run) -> dict[str, Any]:
    """Everything about one policy: greedy unless named; None for what the test did not sample."""
    greedy, sampled = summarise(run.rows(GREEDY)), summarise(run.rows(SAMPLED)) if run.rows(SAMPLED) else None
    return {
        "em": greedy["em"],
        "em_sampled": sampled["em"] if sampled else None,
        **{name: value for name, value in greedy.items() if name not in ("em", "questions")},
        "questions": greedy["questions"],
        "subsets": {GREEDY: by_subset(run.rows(GREEDY)), SAMPLED: by_subset(run.rows(SAMPLED))},
        "sampled": sampled,
    }


def difference(before: Run, after: Run, decoding: str) -> dict[str, float] | None:
    """Paired difference in EM, after - before; None where one of them did not decode so."""
    left, right = ([row["em"] for row in run.rows(decoding)] for run in (before, after))
    return paired_difference(left, right).rounded() if left and right else None


def compare(runs: Sequence[Run], simulator: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """What results.json holds: a function of the runs alone, without a date.

    Raises:
        UserError: runs that are compared differ in questions or engine, or one has no greedy outcome.
    """
    main, others = [run for run in runs if not run.label], [run for run in runs if run.label]
    by_name = {run.name: run for run in main}
    for run in runs:
        if not run.rows(GREEDY):
            raise UserError(
                f"{run.folder} holds no greedy outcome; run the test with `decodings: [greedy]` or `[greedy, sampled]`"
            )
    for run in main:
        if run.engine != main[0].engine:
            raise UserError(
                f"{run.folder} was tested with engine {run.engine} and {main[0].folder} with {main[0].engine}; "
                f"name it {run.name}@{run.engine}={run.folder}"
            )
    labels = list(dict.fromkeys(run.label for run in others))
    for label in ("", *labels):
        check_same_questions([run for run in runs if run.label == label])
    base, trained = by_name["base"], by_name["trained"]
    return {
        "schema": SCHEMA,
        "normalisation": NORMALISATION,
        "seed": trained.seed,
        "questions": len(base.rows(GREEDY)),
        "engine": base.engine,
        "policies": {run.name: policy_metrics(run) for run in main},
        "difference": {"em": difference(base, trained, GREEDY), "em_sampled": difference(base, trained, SAMPLED)},
        "simulator": simulator,
        "seconds": seconds,
        "other_engines": {label: {run.name: policy_metrics(run) for run in others if run.label == label} for label in labels},
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"compare: {message}; see python -m zs_lightning compare --help")


def parse(args: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m zs_lightning compare", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME[@ENGINE]=]FOLDER",
        help="run folder of a test. Each is compared with the first one, question by question. With the names base and trained "
        "the report tells of a training, and others may stand beside it, such as trained@poor=runs/c",
    )
    parser.add_argument("--out", type=Path, help="folder for results.json, report.md and report.html")
    story = parser.add_argument_group("with base=FOLDER and trained=FOLDER")
    story.add_argument("--simulator", type=Path, help="run folder of a test of SimulatorSFT")
    story.add_argument("--training", type=Path, help="run folder of the policy's fit, for its curves")
    story.add_argument("--seconds", action="append", default=[], metavar="STAGE=SECONDS", help="how long a stage took")
    return parser.parse_intermixed_args(args)


def named_runs(arguments: Sequence[str]) -> list[Run]:
    """Runs from FOLDER, NAME=FOLDER and NAME@ENGINE=FOLDER; without a name it is the folder's."""
    folders: dict[tuple[str, str], Path] = {}
    bare = Counter(Path(argument).name for argument in arguments if "=" not in argument)
    for argument in arguments:
        key, equals, folder = argument.partition("=")
        name, at, label = (part.strip() for part in key.partition("@"))
        if not equals:
            name, at, label, folder = Path(key).name if bare[Path(key).name] == 1 else key, "", "", key
        elif not folder or not re.fullmatch(r"[\w.+-]+", name) or bool(at) != bool(label):
            raise UserError(
                f"compare: expected FOLDER, NAME=FOLDER or NAME@ENGINE=FOLDER, with a name of one word; got {argument}"
            )
        if (name, label) in folders:
            raise UserError(f"compare: {key} is given twice")
        folders[name, label] = Path(folder)
    return [read_run(name, label, folder) for (name, label), folder in folders.items()]


def stage_seconds(arguments: Sequence[str]) -> dict[str, float]:
    """Seconds by stage, from STAGE=SECONDS."""
    seconds: dict[str, float] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        try:
            seconds[name] = round(float(value), 4)
        except ValueError as error:
            raise UserError(f"--seconds: expected STAGE=SECONDS, such as test=12.5; got {argument}") from error
        if not name or not 0 <= seconds[name] < math.inf:
            raise UserError(f"--seconds: expected a stage and a time of 0 or more; got {argument}")
    return seconds


def simulator_recall(folder: Path | None) -> dict[str, Any]:
    """What a test of SimulatorSFT measured; empty without a folder."""
    if folder is None:
        return {}
    recall: dict[str, Any] = read_json(folder / "results.json").get("simulator") or {}
    if not {"useful_recall", "noisy_recall"} <= set(recall):
        raise UserError(f"--simulator: {folder} holds no recall; expected the run folder of a test of SimulatorSFT")
    return recall


def main(args: Sequence[str]) -> None:
    """Runs the command; `args` is what stands after its name."""
    options = parse(args)
    runs, out = named_runs(options.runs), options.out
    if {"base", "trained"} <= {run.name for run in runs if not run.label}:
        results = compare(runs, simulator_recall(options.simulator), stage_seconds(options.seconds))
        curves = report.read_curves(options.training) if options.training else {}
        by_name = {run.name: run for run in runs if not run.label}
        examples = report.choose_examples(*((by_name[n].folder, by_name[n].lines) for n in ("base", "trained")))
        text, page, show = tables.markdown(results), report.html(results, curves, examples), tables.show
    else:
        if options.simulator or options.training or options.seconds:
            raise UserError("compare: --simulator, --training and --seconds go with base=FOLDER and trained=FOLDER")
        results = paired.compare(runs)
        text, page, show = overview.markdown(results), overview.html(results), overview.show
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (out / "report.md").write_text(text, "utf-8")
        (out / "report.html").write_text(page, "utf-8")
    show(results)  # After the files: a terminal may end before the table does, or not know its characters.
    if out is not None:
        print(f"Written: {out / 'results.json'}, report.md, report.html")
