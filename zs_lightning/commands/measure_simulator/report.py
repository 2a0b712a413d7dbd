"""A measurement in words and in a table, of which terminal, Markdown, page and JSON are made."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from zs_lightning.commands.measure_simulator.verdict import BARS, TITLES, Finding, findings, title, verdict
from zs_lightning.runs.intervals import Interval
from zs_lightning.runs.pages import COLOURS, render
from zs_lightning.runs.tables import Cell, Column, Table, changed, markdown_cell, scored, show
from zs_lightning.types import Document, SearchRecord

Example = tuple[SearchRecord, Mapping[str, Mapping[str, Sequence[Document]]]]
"""A query, and the documents of it by the simulator's name, then by label."""
SCHEMA = 1
NUMBERS = {"form/words", "near/cosine", "cost/tokens", "cost/seconds"}
"""Measures that are no shares."""
MANY = 4
"""Columns of numbers from which on a terminal has no room for tenths."""
MARKS = {True: "", False: " ✗", None: " ?"}
LEGEND = (
    "Shares in %, differences in points, with 95 % intervals over queries. ✗ fails its bar, ? may fail it: more rows. "
    "Answer: a document holds the record's evidence. Useful − a kind: what the curriculum can control. As named: by "
    "the facts of the world. Withheld: the guard takes good queries for poor ones. Leaks: a golden answer in useful "
    "results for empty queries, for queries of other questions, and for these once more after what they found; "
    "unguarded is search.guard: paper. Alike: words of content that both results have, of all in either. Repeated: "
    "three words in a row that the result has before. Sentences in corpus: exact in the miniature, else all words of "
    "content in one passage."
)


@dataclass(frozen=True)
class Measured:
    """A simulator, or the real engine, with its measures by their keys."""

    name: str
    engine: str
    place: str
    """The configuration or run folder."""
    measures: dict[str, Interval]
    is_real: bool = False


@dataclass(frozen=True)
class Report:
    """The measurement of one or more simulators over the same records."""

    measured: list[Measured]
    about: dict[str, Any]
    """What results.json says of the measurement itself."""

    @property
    def simulators(self) -> list[Measured]:
        return [one for one in self.measured if not one.is_real]

    def findings(self, one: Measured) -> list[Finding]:
        return [] if one.is_real else list(findings(one.measures, self.about["rows"]))

    def verdict(self, one: Measured) -> str:
        return verdict(one.measures, self.about["rows"])

    def named(self, said: Sequence[str]) -> list[str]:
        """What is said of each simulator, with its name if there are several."""
        if len(said) == 1:
            return list(said)
        return [f"{one.name}: {text}" for one, text in zip(self.simulators, said, strict=True)]

    def verdicts(self) -> list[str]:
        return self.named([self.verdict(one) for one in self.simulators])

    def headline(self) -> str:
        """The first words of each verdict."""
        return ", ".join(self.named([re.split("[:,]", self.verdict(one))[0] for one in self.simulators]))

    def keys(self) -> list[str]:
        order = list(TITLES)
        every = dict.fromkeys(key for one in self.measured for key in one.measures)
        return sorted(every, key=lambda key: order.index(key if key in TITLES else key.partition("/")[0]))

    def table(self) -> Table:
        """Measures as rows, simulators as columns."""
        keys = self.keys()
        columns = [Column("Measure", [Cell(title(key)) for key in keys])]
        for number, one in enumerate(self.measured):
            marks = {finding.key: MARKS[finding.met] for finding in self.findings(one)}
            cells = [cell(key, one.measures.get(key), marks.get(key, ""), (number + 1) % COLOURS) for key in keys]
            columns.append(Column(one.name, cells, colour=(number + 1) % COLOURS))
        return Table(f"{self.about['rows']} queries", columns, [LEGEND, bars()])

    def show(self, console: Console) -> None:
        """Prints the measurement, each interval beside its value."""
        table = self.table()
        shorten = short if len(self.measured) < MANY else shorter
        for column in table.columns[1:]:
            column.cells[:] = [Cell(shorten(cell)) for cell in column.cells]
        show(console, "\n\n".join(self.verdicts()) + "\n", [table])

    def results(self) -> dict[str, Any]:
        """What results.json holds."""
        engines = []
        for one in self.measured:
            found: dict[str, Any] = {"name": one.name, "engine": one.engine, "place": one.place, "real": one.is_real}
            if not one.is_real:
                found |= {"verdict": self.verdict(one), "bars": [finding.row() for finding in self.findings(one)]}
            engines.append(found | {"measures": {key: interval.rounded() for key, interval in one.measures.items()}})
        return {"schema": SCHEMA, **self.about, "engines": engines}

    def markdown(self) -> str:
        verdicts = "".join(f"{markdown_cell(said)}\n\n" for said in self.verdicts())
        return f"# Simulated search engines\n\n{verdicts}{self.table().in_markdown()}"

    def html(self, examples: Sequence[Example]) -> str:
        values = {"report": self, "table": self.table(), "examples": examples}
        return render("page.html", values, "commands/measure_simulator")


def cell(key: str, interval: Interval | None, mark: str, colour: int) -> Cell:
    if interval is None:
        return Cell("–")
    found = interval.rounded()
    if key.startswith("gap/"):
        return changed(found)
    if key not in NUMBERS:
        return scored(found, mark, colour)
    below = f"{interval.low:.3g}–{interval.high:.3g}" if interval.low < interval.high else ""
    return Cell(f"{interval.mean:.3g}", below)


def short(cell: Cell) -> str:
    """Value and interval in one line, the interval of a share in whole per cent."""
    below = _whole(cell.below) if cell.interval or " to " in cell.below else cell.below
    return f"{cell.value} ({below})" if below else cell.value


def shorter(cell: Cell) -> str:
    """The same for many columns: shares in whole per cent, other numbers without their interval."""
    is_share = cell.interval or " to " in cell.below
    return f"{_whole(cell.value)} {_whole(cell.below)}" if is_share else cell.value


def _whole(percents: str) -> str:
    return re.sub(r"\d+\.\d", lambda match: f"{float(match[0]):.0f}", percents).replace(" to ", "…")


def bars() -> str:
    said = []
    for bar in BARS:
        name = title(bar.key if "/" in bar.key else f"{bar.key}/any")
        said.append(f"{name} {'≥' if bar.least else '≤'} {100 * bar.limit:.0f} %")
    return f"Bars: {'; '.join(said)}."
