"""Compares tests of policies, each with the first one, question by question.

With --out it writes results.json, report.md and report.html, in which trajectories can be read.
With --training and without tests, report.html alone.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from zs_lightning.commands.compare.curves import charts, read_curves
from zs_lightning.commands.compare.examples import choose_examples
from zs_lightning.commands.compare.reader import read_alarms, read_trajectories
from zs_lightning.commands.compare.report import Report, Training
from zs_lightning.commands.compare.results import compare
from zs_lightning.configuration.arguments import CommandParser, at_home
from zs_lightning.errors import UserError
from zs_lightning.runs.checkpoints import write_whole
from zs_lightning.runs.folder import CONFIG, QUESTIONS, RESULTS, TRAJECTORIES, Run, read_run, read_test_results
from zs_lightning.runs.outcomes import fits
from zs_lightning.runs.pages import PAGE, write_report

RUNS = (
    "run folder of a test. The headline is about the first two. Tests with another search engine, "
    "such as base@poor=a trained@poor=b, are compared among themselves"
)


def parse(args: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("compare", __doc__, "")
    add = parser.add_argument
    add("runs", nargs="*", metavar="[NAME[@ENGINE]=]FOLDER", help=RUNS)
    add("--out", type=at_home, help="folder for the three files")
    add("--simulator", type=at_home, help="run folder of a test of SimulatorSFT")
    add("--training", type=at_home, help="run folder of the policy's fit, also of one that goes on")
    stage = "how long a stage took"
    add("--seconds", action="append", default=[], metavar="STAGE=SECONDS", help=stage)
    return parser.parse_intermixed_args(args)


def named_runs(arguments: Sequence[str]) -> list[Run]:
    """Runs from FOLDER, NAME=FOLDER and NAME@ENGINE=FOLDER; without a name it is the folder's."""
    folders: dict[tuple[str, str], Path] = {}
    bare = Counter(_name(argument) for argument in arguments if "=" not in argument)
    for argument in arguments:
        key, equals, folder = argument.partition("=")
        name, at, label = (part.strip() for part in key.partition("@"))
        if not equals:
            # Two folders may have one name: then they go by their paths.
            name, label, folder = _name(key), "", key
            name = name if bare[name] == 1 else key
        # One word, since names are heads of columns.
        elif not folder or not re.fullmatch(r"[\w.+-]+", name) or bool(at) != bool(label):
            said = "expected FOLDER, NAME=FOLDER or NAME@ENGINE=FOLDER, with a name of one word"
            raise UserError(f"compare: {said}; got {argument}")
        if (name, label) in folders:
            raise UserError(f"compare: {key} is given twice")
        folders[name, label] = at_home(folder)
    return [read_run(name, label, folder) for (name, label), folder in folders.items()]


def _name(folder: str) -> str:
    # Of "." and "..", too.
    return at_home(folder).name or at_home(folder).resolve().name


def stage_seconds(arguments: Sequence[str]) -> dict[str, float]:
    """Seconds by stage, from STAGE=SECONDS."""
    seconds: dict[str, float] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        try:
            seconds[name] = round(float(value), 4)
        except ValueError:
            # Refused below, as a NaN of the user is.
            seconds[name] = math.nan
        if not name or not 0 <= seconds[name] < math.inf:
            said = "expected STAGE=SECONDS, of 0 or more, such as test=12.5"
            raise UserError(f"--seconds: {said}; got {argument}")
    return seconds


def simulator_recall(folder: Path) -> dict[str, Any]:
    """What a test of SimulatorSFT measured."""
    recall: Any = read_test_results(folder).get("simulator")
    shares = [recall.get(f"{kind}_recall") for kind in ("useful", "noisy")] if isinstance(recall, dict) else []
    for share in shares or [None]:
        numbers = list(share.values()) if isinstance(share, dict) and "mean" in share else [None]
        if not all(fits(number, float) for number in numbers):
            said = "expected the run folder of a test of SimulatorSFT"
            raise UserError(f"--simulator: {folder} holds no recall; {said}")
    return dict(recall)


def refuse_folder(out: Path) -> None:
    """Raises UserError if the folder holds a run, whose results the comparison would replace."""
    path = out / RESULTS
    try:
        content = json.loads(path.read_text("utf-8"))
        ours = isinstance(content, dict) and {"decoding", "runs"} <= content.keys()
    except FileNotFoundError:
        ours = not any((out / name).exists() for name in (CONFIG, QUESTIONS))
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        said = "holds files of a run, or another results.json than that of a comparison"
        raise UserError(f"--out: {out} {said}; choose another folder")


def main(args: Sequence[str]) -> None:
    """Runs the command; `args` is what stands after its name."""
    options = parse(args)
    # Before the work, and before a file is written.
    if options.out:
        refuse_folder(options.out)
    if not options.runs:
        if not options.out or not options.training:
            alone = "or none, for a training alone, and then --training and --out"
            raise UserError(f"compare needs two runs or more; {alone}")
        folder = options.training
        page = read_training(folder).html(folder, read_trajectories([], folder))
        options.out.mkdir(parents=True, exist_ok=True)
        write_whole(options.out / PAGE, page)
        print(f"Written: {options.out / PAGE}")
        return
    runs = named_runs(options.runs)
    recall = simulator_recall(options.simulator) if options.simulator else {}
    results = compare(runs, recall, stage_seconds(options.seconds))
    report, out = Report(results), options.out
    if out:
        # They are on the page alone, and take seconds to read.
        training = read_training(options.training) if options.training else Training()
        examples = choose_examples(*[run for run in runs if run.label == runs[0].label][:2])
        page = report.html(training, examples, read_trajectories(runs, options.training))
        write_report(out, results, report.markdown(), page)
    # After the files: a terminal may end before the table does, or not know its characters.
    report.show(Console(highlight=False))
    if out:
        print(f"Written: {out / RESULTS}, report.md, {PAGE}")


def read_training(folder: Path) -> Training:
    """What a page shows of a fit. Raises UserError if it has neither curves nor trajectories."""
    try:
        found = charts(read_curves(folder))
    except UserError:
        # Another logger than that of TensorBoard leaves no curves here.
        if not (folder / TRAJECTORIES / "train.jsonl").is_file():
            raise
        found = []
    return Training(found, read_alarms(folder))
