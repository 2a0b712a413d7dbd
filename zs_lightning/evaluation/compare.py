"""Compares policies on the same questions: a table for the terminal, results.json, report.md and report.html."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from zs_lightning.evaluation import report, tables
from zs_lightning.evaluation.metrics import by_subset, paired_difference, summarise

SCHEMA = 1
GREEDY, SAMPLED = "greedy", "sampled"
_COLUMNS = (
    "id decoding question golden_answers subset em cover_em f1 searches turns sampled_tokens truncated invalid invalid_actions "
    "fruitless repeated reworded other_query"
).split()


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

    def rows(self, decoding: str) -> list[dict[str, Any]]:
        """The outcomes with this decoding, sorted by question; empty if the test did not use it."""
        return sorted((row for row in self.lines if row["decoding"] == decoding), key=lambda row: str(row["id"]))


def read_json(path: Path) -> dict[str, Any]:
    """The results.json of a run. Raises ValueError naming the file if it is not there or not one of ours."""
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}; expected the run folder of a finished `test`")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; run the test again") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f'{path}: expected results with "schema": {SCHEMA}; run the test again with this version')
    return content


def read_run(name: str, label: str, folder: Path) -> Run:
    """A run folder of `test` with PolicyRL.

    Raises:
        ValueError: a file is missing, empty or damaged, or a question occurs twice.
    """
    results, path = read_json(folder / "results.json"), folder / "questions.jsonl"
    if "engine" not in results:
        raise ValueError(f"{folder} is not a test of a policy; a test of the simulator goes to --simulator")
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"{path} is missing or empty; run the test again")
    lines, seen = [], set()
    # Not splitlines, which also splits at separators that JSON leaves as they are.
    for number, line in enumerate(path.read_text("utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}; run the test again") from error
        missing = [column for column in _COLUMNS if column not in row]
        if missing:
            raise ValueError(f"{path} line {number} has no {missing[0]}; run the test again with this version")
        if (row["decoding"], row["id"]) in seen:
            raise ValueError(f"{path} holds the {row['decoding']} outcome of question {row['id']} twice; run the test again")
        seen.add((row["decoding"], row["id"]))
        lines.append(row)
    run = Run(name, label, folder, str(results["engine"]), int(results["seed"]), lines)
    if not run.rows(GREEDY):
        raise ValueError(f"{path} holds no greedy outcome; run the test with `decodings: [greedy]` or `[greedy, sampled]`")
    return run


def check_same_questions(runs: Sequence[Run]) -> None:
    """Raises ValueError if the runs did not answer the same questions: a difference would be one of questions."""
    first = runs[0]
    for run in runs[1:]:
        for decoding in (GREEDY, SAMPLED):
            left, right = (
                {json.dumps([row[name] for name in ("id", "question", "golden_answers", "subset")]) for row in r.rows(decoding)}
                for r in (first, run)
            )
            if left != right and (decoding == GREEDY or (left and right)):
                example = min(left ^ right)
                raise ValueError(
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
        ValueError: there is no base or no trained, or runs that are compared differ in questions or engine.
    """
    main, others = [run for run in runs if not run.label], [run for run in runs if run.label]
    by_name = {run.name: run for run in main}
    if not {"base", "trained"} <= set(by_name):
        raise ValueError(f"compare needs base=FOLDER and trained=FOLDER; got {', '.join(by_name) or 'neither'}")
    for run in main:
        if run.engine != main[0].engine:
            raise ValueError(
                f"{run.folder} was tested with engine {run.engine} and {main[0].folder} with {main[0].engine}; "
                f"name it {run.name}@{run.engine}={run.folder}"
            )
    labels = list(dict.fromkeys(run.label for run in others))
    for label in ("", *labels):
        check_same_questions([run for run in runs if run.label == label])
    base, trained = by_name["base"], by_name["trained"]
    return {
        "schema": SCHEMA,
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
        raise ValueError(f"compare: {message}; see python -m zs_lightning compare --help")


def parse(args: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m zs_lightning compare", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="NAME[@ENGINE]=FOLDER",
        help="run folder of a test; base and trained are needed, such as base=runs/a trained=runs/b trained@poor=runs/c",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, report.md and report.html")
    parser.add_argument("--simulator", type=Path, help="run folder of a test of SimulatorSFT")
    parser.add_argument("--training", type=Path, help="run folder of the policy's fit, for its curves")
    parser.add_argument("--seconds", action="append", default=[], metavar="STAGE=SECONDS", help="how long a stage took")
    return parser.parse_intermixed_args(args)


def named_runs(arguments: Sequence[str]) -> list[Run]:
    """Runs from NAME=FOLDER and NAME@ENGINE=FOLDER."""
    folders: dict[tuple[str, str], Path] = {}
    for argument in arguments:
        key, equals, folder = argument.partition("=")
        name, at, label = (part.strip() for part in key.partition("@"))
        if not equals or not folder or not re.fullmatch(r"[\w.+-]+", name) or bool(at) != bool(label):
            raise ValueError(f"compare: expected NAME=FOLDER or NAME@ENGINE=FOLDER, with a name of one word; got {argument}")
        if (name, label) in folders:
            raise ValueError(f"compare: {key} is given twice")
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
            raise ValueError(f"--seconds: expected STAGE=SECONDS, such as test=12.5; got {argument}") from error
        if not name or not 0 <= seconds[name] < math.inf:
            raise ValueError(f"--seconds: expected a stage and a time of 0 or more; got {argument}")
    return seconds


def simulator_recall(folder: Path | None) -> dict[str, Any]:
    """What a test of SimulatorSFT measured; empty without a folder."""
    if folder is None:
        return {}
    recall: dict[str, Any] = read_json(folder / "results.json").get("simulator") or {}
    if not {"useful_recall", "noisy_recall"} <= set(recall):
        raise ValueError(f"--simulator: {folder} holds no recall; expected the run folder of a test of SimulatorSFT")
    return recall


def main(args: Sequence[str]) -> None:
    """Runs the command; `args` is what stands after its name."""
    options = parse(args)
    runs, seconds = named_runs(options.runs), stage_seconds(options.seconds)
    results = compare(runs, simulator_recall(options.simulator), seconds)
    curves = report.read_curves(options.training) if options.training else {}
    by_name = {run.name: run for run in runs if not run.label}
    examples = report.choose_examples(*((by_name[n].folder, by_name[n].lines) for n in ("base", "trained")))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "report.md").write_text(tables.markdown(results), "utf-8")
    (options.out / "report.html").write_text(report.html(results, curves, examples), "utf-8")
    tables.show(results)
    print(f"Written: {options.out / 'results.json'}, report.md, report.html")
