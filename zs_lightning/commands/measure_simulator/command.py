"""Measures how good simulated search engines are, on the same queries side by side.

Does a useful result hold the answer, and noise not? Does a query that asks for nothing get the
answer all the same? Does the same query get the same documents? With --out it writes results.json,
report.md and report.html.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from zs_lightning.configuration.arguments import CommandParser, at_home, split
from zs_lightning.errors import UserError
from zs_lightning.runs.folder import RESULTS

PLACES = (
    "what to measure: the run folder of a fit of SimulatorSFT is what it trained, its configuration "
    "file the untrained base; a configuration or run folder of PolicyRL is the simulator of its "
    "model.search"
)
ENDING = """one more simulator by options, and a real engine to compare with:
  --search CLASS            SimulatorSearch or ServedSimulatorSearch
  --search.OPTION VALUE     such as --search.guard paper; for all of them: --search.help CLASS
  --real CLASS              BM25Search, DenseSearch, … or the dotted path of a class of your own; if
                            not given, the documents of useful records are the real ones
  --real.OPTION VALUE       such as --real.corpus notes/

examples:
  python -m zs_lightning measure-simulator runs/simulator
  python -m zs_lightning measure-simulator base=configs/miniature/simulator.yaml trained=runs/simulator --real BM25Search
  python -m zs_lightning measure-simulator configs/own/policy.yaml --records records.jsonl --out report
  python -m zs_lightning measure-simulator --search SimulatorSearch --search.model.path Qwen/Qwen2.5-7B-Instruct \\
    --search.prompts zerosearch_prompted --records records.jsonl --real BM25Search --real.corpus notes/
"""


def parse(args: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """The command's own options, those of one more simulator and those of a real engine."""
    parser = CommandParser("measure-simulator", __doc__, ENDING)
    add = parser.add_argument
    add("places", nargs="*", metavar="[NAME=]PLACE", help=PLACES)
    said = "search records to ask for, of a file all; if not given, the split of the first place's data.source"
    add("--records", type=at_home, metavar="FILE", help=said)
    add("--split", default="test", help="of records that are parted: train, validation or test (default)")
    add("--rows", type=int, default=200, help="queries (default: 200); each is searched for a dozen times")
    said = "kinds of noise with commas between, or all; default: those of search.noise, or of the records that it was taught"
    add("--kinds", default="", help=said)
    add("--seed", type=int, default=0, help="of all draws")
    said = "encoder of the E5 family, to measure the distance of meaning to the real documents"
    add("--embedder", metavar="FOLDER", help=said)
    add("--out", type=at_home, metavar="FOLDER", help="folder for the three files")
    own, search = split(args)
    own, real = split(own, "real")
    options = parser.parse_intermixed_args(own)
    if not options.places and not search:
        raise UserError("measure-simulator: nothing to measure; give a run folder, a configuration, or --search CLASS")
    if options.rows < 1:
        raise UserError(f"--rows: expected 1 or more; got {options.rows}")
    return options, search, real


def named_places(words: Sequence[str]) -> dict[str, Path]:
    """Places by their names; one without a name is called like its file or folder."""
    places: dict[str, Path] = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals:
            name, place = Path(word).stem, word
        if not place or not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(f"measure-simulator: expected PLACE or NAME=PLACE, with a name of one word; got {word}")
        if name in places:
            raise UserError(f"measure-simulator: {name} is given twice; name them apart, such as first={place}")
        if not at_home(place).exists():
            raise UserError(f"measure-simulator: there is no file or folder {place}")
        places[name] = at_home(place)
    return places


def main(args: Sequence[str]) -> None:
    """Runs the command; `args` is what stands after its name."""
    options, search, real = parse(args)
    places = named_places(options.places)
    if options.records and not options.records.exists():
        raise UserError(f"--records: there is no file or folder {options.records}")
    from rich.console import Console

    from zs_lightning.commands.measure_simulator.measurement import measurement
    from zs_lightning.configuration.lightning_cli import quiet
    from zs_lightning.runs.pages import write_report

    quiet()
    console = Console(highlight=False)
    out = options.out
    report = None
    try:
        for report, examples in measurement(options, places, search, real, console):
            if out:
                write_report(out, report.results(), report.markdown(), report.html(examples))
    finally:
        # Also where a later simulator fails.
        if report:
            report.show(console)
            if out:
                print(f"Written: {out / RESULTS}, report.md, report.html")
