"""The comparison in words and tables: in the terminal, as Markdown and as a page, all from the same rows."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from zs_lightning.commands.compare.curves import CHARTS_LEGEND, Chart
from zs_lightning.commands.compare.examples import Pair, marked
from zs_lightning.runs.outcomes import GREEDY, NORMALISATION, SAMPLED
from zs_lightning.runs.pages import COLOURS, render
from zs_lightning.runs.tables import Cell, Column, Table, changed, percent, scored, to_markdown, to_terminal, visible

Run = dict[str, Any]
"""One of a comparison's `runs`, see results.py, with `first`, the run that it is compared with, and `colour`."""

FEW = 20
"""Questions, below which no change is claimed."""
MARK = "*"
MARKED = f"{MARK} Over other questions than those of the first: not to be compared with its score."
NAME_WIDTH = 12
"""Characters of a run's column in a terminal."""
MOST_INTERVALS = 5
"""Runs whose intervals have room beside each other in a terminal."""
LEGEND = (
    "EM: exact match, %. Difference: in EM points from the first run with the same engine, on the questions that both "
    "answered. F1: shared words, %. Cover EM: a golden answer occurs in the answer, %. Searches: per question. Truncated: "
    "ended by a limit, %. Invalid: ended by a failed search, %. Forged: the policy wrote search results itself, %. Sampled "
    "is at temperature 1; columns that do not say so are {decoding}. Ranges are 95 % intervals over questions. "
    f"In results.json, {NORMALISATION}"
)
SUBSETS = (
    "Known entities: named in what the base model was made from. New: only the search corpus names them, neither that text, "
    "nor the simulator's training, nor any training question. One hop: one fact is asked for; two hop: a fact about what "
    "another fact names."
)
"""Explains the subsets of the miniature's questions."""
RECALL = "Share of the simulator's results that hold the asked fact. The curriculum needs the two to differ."
SECONDS = "Each is the wall-clock time of a stage's commands in seconds, added up where commands ran side by side."


class Report:
    """Words and tables of a comparison.

    Args:
        results: what results.json holds. The headline is about its first two runs with one engine.
    """

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
        before, after = (percent(self.metrics(run)["em"]["mean"]) for run in (self.first, self.second))
        # Where the questions are not the same, the two shares say nothing beside each other.
        numbers = f"by {changed(pairs['em']).value} points" if mark(self.second) else f"from {before} % to {after} %"
        if pairs["questions"] < FEW:
            return f"Too few questions ({pairs['questions']}) to claim a change in exact match: {numbers}."
        if pairs["em"]["low"] > 0:
            return f"Exact match rose {numbers}."
        return f"Exact match fell {numbers}." if pairs["em"]["high"] < 0 else f"No clear change in exact match: {numbers}."

    def difference(self) -> str:
        """The paired differences of the first two runs, in one sentence."""
        cells = {decoding: changed(pairs["em"]) for decoding, pairs in self.second["difference"].items()}
        said = ", ".join(f"{decoding} {cell.value} ({cell.below})" for decoding, cell in cells.items())
        count = self.second["difference"][self.decoding]["questions"]
        names = f"{self.second['name']} − {self.first['name']}"
        return f"{names} in EM points, on the same {count} questions: {said}; 95 % intervals, paired."

    def metrics(self, run: Run) -> dict[str, Any]:
        found: dict[str, Any] = run["decodings"][self.decoding]
        return found

    def tables(self) -> list[Table]:
        """What all media show, in order."""
        found = [self.scores(label, runs) for label, runs in self.groups.items()]
        found[-1].notes.append(LEGEND.format(decoding=self.decoding))
        return [*found, *self.parts(), *self.recall()]

    def scores(self, label: str, runs: Sequence[Run]) -> Table:
        """The runs with one engine."""
        # Cover EM, forged and the interval of F1 have no room in a terminal of 80 characters.
        columns = [Column("Run"), Column(f"EM {self.decoding}", f"EM\n{self.decoding}"), Column("Difference")]
        other = SAMPLED if self.decoding == GREEDY else GREEDY
        both = any(other in run["decodings"] for run in runs)
        columns += [Column(f"EM {other}", f"EM\n{other}")] if both else []
        columns += [Column("F1", brief=True), Column("Cover EM", None)]
        columns += [Column("Searches", "Sear-\nches"), Column("Truncated", "Trun-\ncated"), Column("Invalid", "In-\nvalid")]
        columns.append(Column("Forged", None))
        rows = []
        for run in runs:
            metrics = self.metrics(run)
            change = run["difference"] and run["difference"][self.decoding]["em"]
            cells = [Cell(run["name"], described(run), colour=run["colour"]), scored(metrics["em"], mark(run), run["colour"])]
            cells.append(changed(change) if change else Cell("first"))
            if both:
                cells.append(scored(run["decodings"].get(other, {}).get("em"), mark(run), run["colour"]))
            cells += [scored(metrics["f1"]), scored(metrics["cover_em"]), Cell(f"{metrics['searches_per_question']:.2f}")]
            rows.append(cells + [Cell(percent(metrics[name])) for name in ("truncated", "invalid", "forged")])
        engines = ", ".join(dict.fromkeys(run["engine"] for run in runs))
        notes = [unpaired(run, self.decoding) for run in runs if mark(run)]
        notes += [MARKED] if notes else []
        return Table(f"{label or engines}, {self.metrics(runs[0])['questions']} questions", columns, rows, notes)

    def parts(self) -> Iterator[Table]:
        """EM of the main runs by data set, or by subset if there is one data set."""
        several = any("mean_of_sources" in self.metrics(run) for run in self.main)
        key = "sources" if several else "subsets"
        counts: dict[str, int] = {}
        for run in self.main:
            for name, part in self.metrics(run)[key].items():
                counts.setdefault(name, part["questions"])
        columns = [Column("Data set" if several else "Subset"), Column("Questions", "Ques-\ntions")]
        rows = {name: [Cell(name), Cell(str(counts[name]))] for name in sorted(counts, key=lambda name: ("/" in name, name))}
        mean = [Cell("mean of data sets"), Cell("")]
        for run in self.main:
            narrow = textwrap.fill(visible(run["name"]), NAME_WIDTH)
            columns.append(Column(run["name"], narrow, len(self.main) > MOST_INTERVALS, run["colour"]))
            others = run["other_questions"][key]
            for name, cells in rows.items():
                part = self.metrics(run)[key].get(name, {})
                # Of a subset the scores' EM stands beside its number of questions.
                interval = part.get("em", part) or None
                cells.append(scored(interval, MARK if name in others else "", run["colour"]))
            average = self.metrics(run).get("mean_of_sources", {})
            mean.append(scored(average.get("em"), MARK if others else "", run["colour"]))
        notes = [SUBSETS] if {"known", "new", "one_hop", "two_hop"} <= counts.keys() else []
        if rows:
            every = [*rows.values(), mean] if several else list(rows.values())
            yield Table(f"EM by {'data set' if several else 'subset'}, {self.decoding}", columns, every, notes)

    def recall(self) -> Iterator[Table]:
        """What the simulator writes when it is told to be useful, and when to be noisy."""
        if recall := self.results["simulator"]:
            rows = [[Cell("useful"), scored(recall["useful_recall"], colour=3)]]
            rows.append([Cell("noisy"), scored(recall["noisy_recall"], colour=2)])
            yield Table("The simulated engine", [Column("Documents"), Column("Recall, %")], rows, [RECALL])

    def show(self, console: Console) -> None:
        """Prints the comparison."""
        console.print(Text(visible(f"{self.headline()}\n{self.difference()}\n"), "bold"))
        tables = self.tables()
        for table in tables:
            console.print(to_terminal(table))
        console.print(Text(visible(" ".join(note for table in tables for note in table.notes)), "dim"))

    def markdown(self) -> str:
        """The comparison as a Markdown page."""
        page = to_markdown(self.headline(), self.difference(), self.tables())
        times = ", ".join(f"{name} {seconds:g} s" for name, seconds in self.results["seconds"].items())
        return page + (to_markdown("", f"Time: {times}. {SECONDS}", []) if times else "")

    def html(self, charts: Sequence[Chart], examples: Sequence[Pair]) -> str:
        """The comparison as one page, with the curves of a training and with examples, if there are any."""
        values = {
            "report": self,
            "tiles": list(self.tiles()),
            "charts": charts,
            "charts_legend": CHARTS_LEGEND,
            "examples": examples,
            "marked": marked,
            "seconds_legend": SECONDS,
        }
        return render("report.html", values, "commands/compare")

    def tiles(self) -> Iterator[tuple[list[str], str]]:
        """Values of the first two runs, and what they are."""
        sides = [self.first["decodings"], self.second["decodings"]]
        for name in (GREEDY, SAMPLED):
            if all(name in side for side in sides):
                yield [percent(side[name]["em"]["mean"]) for side in sides], f"exact match, {name}, %"
        yield [f"{side[self.decoding]['searches_per_question']:.2f}" for side in sides], "searches per question"
        yield [percent(side[self.decoding]["truncated"]) for side in sides], f"ended by a limit, {self.decoding}, %"


def described(run: Run) -> str:
    """Policy and setting, as far as they are known; a label stands in the table's title."""
    return ": ".join(filter(None, [run["policy"], "" if run["label"] else run["setting"]]))


def mark(run: Run) -> str:
    """The MARK of a run that did not answer the questions of the one that it is compared with."""
    pairs = next(iter(run["difference"].values())) if run["difference"] else {"only_here": 0, "only_in_first": 0}
    return MARK if pairs["only_here"] or pairs["only_in_first"] else ""


def unpaired(run: Run, decoding: str) -> str:
    """Which questions the run's difference is over."""
    pairs, name, first = run["difference"][decoding], run["name"], run["first"]
    return (
        f"{name} and {first}: the difference is over the {pairs['questions']} questions that both answered; "
        f"{pairs['only_here']} only of {name} and {pairs['only_in_first']} only of {first} are left out."
    )
