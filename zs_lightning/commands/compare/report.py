"""The comparison in words and tables, of which terminal, Markdown and page are made."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from zs_lightning.commands.compare.curves import Chart
from zs_lightning.commands.compare.examples import Pair, marked
from zs_lightning.commands.compare.reader import Alarm, Reader
from zs_lightning.runs.folder import FIT
from zs_lightning.runs.intervals import FEW
from zs_lightning.runs.outcomes import GREEDY, NORMALISATION, SAMPLED
from zs_lightning.runs.pages import COLOURS, render
from zs_lightning.runs.tables import Cell, Column, Table, changed, inline, markdown_cell, percent, scored, show
from zs_lightning.text.shown import visible

Run = dict[str, Any]
"""One of a comparison's `runs`, with the name of the `first` one of its engine and a `colour`."""

MARK = "*"
MARKED = f"{MARK} Not over the questions of the first: not to be compared with its score."
NAME_WIDTH = 12
"""Characters of a run's column in a terminal."""
MOST_INTERVALS = 5
"""Runs whose intervals have room beside each other in a terminal."""
LEGEND = (
    "EM: exact match, %. Difference: in EM points from the first run of the table, on the "
    "questions that both answered. F1: shared words, %. Cover EM: a golden answer occurs in the "
    "answer, %. Searches: per question. Truncated: ended by a limit, %. Invalid: ended by a failed "
    "search, %. Forged: the policy wrote search results itself, %. Sampled is at temperature 1; "
    "columns that do not say so are {decoding}. Ranges are 95 % intervals over questions, "
    f"of which there must be {FEW} or more. "
    f"In results.json, {NORMALISATION}"
)
SUBSETS = (
    "Known entities: named in what the base model was made from. New: only the search corpus names "
    "them, neither that text, nor the simulator's training, nor any training question. One hop: a "
    "fact is asked for; two hop: a fact about what another fact names."
)
"""Explains the subsets of the miniature's questions."""
RECALL = "Share of its results that hold the asked fact. The curriculum needs the two to differ."
SECONDS = "Each is the wall-clock time of a stage in seconds, added up where commands ran side by side."


ROOM = "commands/compare"
"""Of the templates."""


@dataclass(frozen=True)
class Training:
    """What a page shows of a `fit`, beside its trajectories; nothing where there is none."""

    charts: Sequence[Chart] = ()
    alarms: Sequence[Alarm] = ()

    def headline(self) -> str:
        """The first curve in one sentence."""
        for chart in self.charts:
            smooth = chart.lines[0].smooth
            steps = chart.steps[1] - chart.steps[0] + 1
            return f"{chart.title} {smooth[0][1]:.2f} → {smooth[-1][1]:.2f} in {steps} steps."
        return "Too few steps for curves."

    def html(self, folder: Path, reading: Reader | None) -> str:
        """A page of a fit alone."""
        ended = (folder / FIT).is_file()
        goes_on = "The run has not ended: the same command shows more later."
        values = {
            "headline": self.headline(),
            "name": str(folder),
            "state": "The run has ended." if ended else goes_on,
            "charts": self.charts,
            "raised": self.alarms,
            "reading": reading,
        }
        return render("fit.html", values, ROOM)


class Report:
    """Words and tables of what results.json holds. The headline is about its first two runs with
    one engine."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results, self.decoding = results, results["decoding"]
        self.groups: dict[str, list[Run]] = {}
        colours: dict[str, int] = {}
        for run in results["runs"]:
            group = self.groups.setdefault(run["label"], [])
            # A policy has one colour with every engine.
            colour = colours.setdefault(run["name"], len(colours) % COLOURS)
            group.append(run | {"first": group[0]["name"] if group else "", "colour": colour})
        self.main = next(iter(self.groups.values()))
        self.first, self.second = self.main[:2]

    def headline(self) -> str:
        """What happened between the first two runs, in one sentence that the interval carries."""
        pairs = self.second["difference"][self.decoding]
        before, after = self.both(self.decoding, exact)
        numbers = f"from {before} % to {after} %"
        if mark(self.second):
            # The two shares are of different questions, of which only the common ones tell.
            numbers = f"by {changed(pairs['em']).value} points"
        if pairs["questions"] < FEW:
            few = f"Too few questions ({pairs['questions']})"
            return f"{few} to claim a change in exact match: {numbers}."
        # The interval decides: a change that it does not carry is none.
        if pairs["em"]["low"] <= 0 <= pairs["em"]["high"]:
            return f"No clear change in exact match: {numbers}."
        return f"Exact match {'rose' if pairs['em']['low'] > 0 else 'fell'} {numbers}."

    def difference(self) -> str:
        """The paired differences of the first two runs, in one sentence."""
        differences = self.second["difference"].items()
        points = ", ".join(f"{decoding} {inline(changed(pairs['em']))}" for decoding, pairs in differences)
        count = self.second["difference"][self.decoding]["questions"]
        what = f"{self.second['name']} − {self.first['name']} in EM points"
        intervals = "95 % intervals, paired" if count >= FEW else f"no interval of fewer than {FEW}"
        return f"{what}, on the same {count} questions: {points}; {intervals}."

    def metrics(self, run: Run) -> dict[str, Any]:
        found: dict[str, Any] = run["decodings"][self.decoding]
        return found

    def tables(self) -> list[Table]:
        """What all media show, in order."""
        found = [self.scores(label, runs) for label, runs in self.groups.items()]
        # Once, below the last of the tables that it explains.
        found[-1].notes.append(LEGEND.format(decoding=self.decoding))
        return [*found, *self.parts(), *self.recall()]

    def scores(self, label: str, runs: Sequence[Run]) -> Table:
        """The runs with one engine."""

        def add(name: str, cell: Callable[[Run], Cell], narrow: str | None = "", brief: bool = False) -> None:
            columns.append(Column(name, list(map(cell, runs)), narrow, brief))

        columns: list[Column] = []
        add("Run", lambda run: Cell(run["name"], described(run), colour=run["colour"]))
        add(f"EM {self.decoding}", lambda run: self.em(run, self.decoding), f"EM\n{self.decoding}")
        add("Difference", self.change)
        other = SAMPLED if self.decoding == GREEDY else GREEDY
        if any(other in run["decodings"] for run in runs):
            add(f"EM {other}", lambda run: self.em(run, other), f"EM\n{other}")
        # A terminal of 80 characters has no room for all of them.
        add("F1", lambda run: scored(self.metrics(run)["f1"]), brief=True)
        add("Cover EM", lambda run: scored(self.metrics(run)["cover_em"]), None)
        add("Searches", lambda run: Cell(searches(self.metrics(run))), "Sear-\nches")
        add("Truncated", lambda run: Cell(percent(self.metrics(run)["truncated"])), "Trun-\ncated")
        add("Invalid", lambda run: Cell(percent(self.metrics(run)["invalid"])), "In-\nvalid")
        add("Forged", lambda run: Cell(percent(self.metrics(run)["forged"])), None)
        notes = [unpaired(run, self.decoding) for run in runs if mark(run)]
        engines = ", ".join(dict.fromkeys(run["engine"] for run in runs))
        title = f"{label or engines}, {self.metrics(runs[0])['questions']} questions"
        return Table(title, columns, [*notes, MARKED] if notes else [])

    def em(self, run: Run, decoding: str) -> Cell:
        return scored(run["decodings"].get(decoding, {}).get("em"), mark(run), run["colour"])

    def change(self, run: Run) -> Cell:
        return changed(run["difference"][self.decoding]["em"]) if run["first"] else Cell("first")

    def parts(self) -> Iterator[Table]:
        """EM of the main runs by data set, or by subset if there is one data set."""
        several = any("mean_of_sources" in self.metrics(run) for run in self.main)
        key, what = ("sources", "data set") if several else ("subsets", "subset")
        counts: dict[str, Cell] = {}
        for run in self.main:
            for name, part in self.metrics(run)[key].items():
                counts.setdefault(name, Cell(str(part["questions"])))
        known = {"known", "new", "one_hop", "two_hop"} <= counts.keys()
        # Parts of names before whole names: known, new, one_hop, two_hop, known/one_hop, …
        names = sorted(counts, key=lambda name: ("/" in name, name))
        if several:
            names.append("mean of data sets")
            counts[names[-1]] = Cell("")
        columns = [Column(what.capitalize(), list(map(Cell, names)))]
        columns.append(Column("Questions", list(map(counts.__getitem__, names)), "Ques-\ntions"))
        for run in self.main:
            narrow = textwrap.fill(visible(run["name"]), NAME_WIDTH)
            brief = len(self.main) > MOST_INTERVALS
            column = Column(run["name"], [], narrow, brief, run["colour"])
            columns.append(column)
            found = self.metrics(run)
            parts = found[key] | {"mean of data sets": found.get("mean_of_sources", {})}
            for name in names:
                part = parts.get(name, {})
                # EM of a subset stands beside its number of questions.
                column.cells.append(scored(part.get("em", part), mark(run), run["colour"]))
        if names:
            yield Table(f"EM by {what}, {self.decoding}", columns, [SUBSETS] if known else [])

    def recall(self) -> Iterator[Table]:
        """What the simulator writes when it is told to be useful, and when to be noisy."""
        if recall := self.results["simulator"]:
            kinds = Column("Documents", [Cell("useful"), Cell("noisy")])
            useful = scored(recall["useful_recall"], colour=3)
            noisy = scored(recall["noisy_recall"], colour=2)
            columns = [kinds, Column("Recall, %", [useful, noisy])]
            yield Table("The simulated engine", columns, [RECALL])

    def show(self, console: Console) -> None:
        """Prints the comparison."""
        show(console, f"{self.headline()}\n{self.difference()}\n", self.tables())

    def markdown(self) -> str:
        """The comparison as a Markdown page."""
        page = f"# {markdown_cell(self.headline())}\n\n{markdown_cell(self.difference())}\n"
        page += "".join(table.in_markdown() for table in self.tables())
        stages = self.results["seconds"].items()
        times = ", ".join(f"{markdown_cell(name)} {seconds:g} s" for name, seconds in stages)
        return page + (f"\nTime: {times}. {SECONDS}\n" if times else "")

    def html(self, training: Training, examples: Sequence[Pair], reading: Reader | None) -> str:
        """The comparison as a page, with a training, examples and trajectories."""
        values = {"report": self, "examples": examples, "marked": marked, "seconds_legend": SECONDS}
        values |= {"charts": training.charts, "raised": training.alarms, "reading": reading}
        return render("report.html", values, ROOM)

    def tiles(self) -> Iterator[tuple[list[str], str]]:
        """Values of the first two runs, and what they are."""
        for decoding in self.second["difference"]:
            yield self.both(decoding, exact), f"exact match, {decoding}, %"
        yield self.both(self.decoding, searches), "searches per question"
        truncated = self.both(self.decoding, lambda metrics: percent(metrics["truncated"]))
        yield truncated, "ended by a limit, %"

    def both(self, decoding: str, show: Callable[[dict[str, Any]], str]) -> list[str]:
        return [show(run["decodings"][decoding]) for run in (self.first, self.second)]


def exact(metrics: dict[str, Any]) -> str:
    return percent(metrics["em"]["mean"])


def searches(metrics: dict[str, Any]) -> str:
    return f"{metrics['searches_per_question']:.2f}"


def described(run: Run) -> str:
    """Policy and setting, as far as they are known; a label stands in the table's title."""
    return ": ".join(filter(None, [run["policy"], "" if run["label"] else run["setting"]]))


def mark(run: Run) -> str:
    """The MARK of a run that did not answer the questions of the one it is compared with."""
    pairs = list((run["difference"] or {}).values())
    return MARK if any(found["only_here"] or found["only_in_first"] for found in pairs) else ""


def unpaired(run: Run, decoding: str) -> str:
    """Which questions the run's difference is over."""
    pairs, name, first = run["difference"][decoding], run["name"], run["first"]
    left_out = f"{pairs['only_here']} only of {name} and {pairs['only_in_first']} only of {first}"
    return (
        f"{name} and {first}: the difference is over the {pairs['questions']} questions that both "
        f"answered; {left_out} are left out."
    )
