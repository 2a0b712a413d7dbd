"""Rows of files read as one table, and what came of it: how many rows, which were skipped and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from zs_lightning.data.columns import BadRow, Columns, remarks, spelling
from zs_lightning.data.parts import Part
from zs_lightning.data.sources import MissingSplit
from zs_lightning.errors import UserError
from zs_lightning.streams import uniform
from zs_lightning.types import QAExample, SearchRecord

Item = TypeVar("Item", QAExample, SearchRecord)

SHOWN = 5
"""Row numbers shown of each reason."""


class Reading:
    """Counts of one reading.

    Args:
        place: what was read, as its user wrote it.
    """

    def __init__(self, place: str) -> None:
        self.place, self.rows, self.used = place, 0, 0
        self.skipped: dict[str, list[str]] = {}
        self.noted: dict[str, list[str]] = {}
        """Rows that are used, but that their user should know about."""

    def skip(self, reason: str, row: str) -> None:
        self.skipped.setdefault(reason, []).append(row)

    def note(self, reason: str, row: str) -> None:
        self.noted.setdefault(reason, []).append(row)

    def bad(self) -> list[str]:
        """`3 skipped: the question is empty (rows 4, 9, 12)`, one for each reason."""
        return [f"{len(rows)} skipped: {reason} ({_numbers(rows)})" for reason, rows in self.skipped.items()]

    def summary(self) -> str:
        """A line of totals and one for each reason."""
        notes = [f"{len(rows)} used, but {reason} ({_numbers(rows)})" for reason, rows in self.noted.items()]
        return "\n  ".join([f"data: {self.place}: {self.rows} rows read, {self.used} used", *self.bad(), *notes])


def _numbers(rows: Sequence[str]) -> str:
    more = ", ..." if len(rows) > SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(rows[:SHOWN])}{more}"


@rank_zero_only
def say(text: str) -> None:
    """To the terminal, from one process only."""
    print(text, flush=True)


def report_overlap(place: str, train: Sequence[QAExample], questions: Callable[[str], list[QAExample]]) -> None:
    """Says how many held-out questions are in training, up to case, punctuation and articles. They stay in it: published
    sets are compared as they are.

    Args:
        questions: of a split.
    """
    known = {spelling(row.question) for row in train}
    for split in ("validation", "test"):
        try:
            held = questions(split)
        except MissingSplit:
            continue
        except ValueError as error:  # Published test sets may be without answers; training does not need them.
            say(f"data: {place}: {split} questions were not looked for in train: {error}")
            continue
        shared = sum(spelling(row.question) in known for row in held)
        if shared:
            same = "; set data.source.splits, such as {train: 0.9, test: 0.1}" if shared == len(held) == len(train) else ""
            say(f"data: {place}: {shared} of {len(held)} {split} questions are also in train{same}")


@dataclass(frozen=True)
class Table(Generic[Item]):
    """The usable rows of some parts; of each row its question's place in [0, 1) and the value of its split column."""

    rows: list[Item]
    places: list[float]
    """Repetitions of a question, in any spelling, have one place, so that shares never part them."""
    splits: list[str | None]


def example_in(row: QAExample | SearchRecord) -> QAExample:
    return row.example if isinstance(row, SearchRecord) else row


def read_parts(
    path: str,
    parts: Sequence[Part],
    columns: Columns,
    task: str,
    convert: Callable[[Any, Columns, str], Item],
    bad_rows: str,
) -> Table[Item]:
    """Reads the parts as one table and prints what came of it.

    Raises:
        UserError: a part cannot be read, a column is missing, no row can be used, or a bad row with `bad_rows` error.
    """
    place = parts[0].place if len(parts) == 1 else f"{path} ({len(parts)} parts)"
    reading, table = Reading(place), Table[Item]([], [], [])
    known, asked = dict[str, int](), set[str]()
    for part in parts:
        rows = list(part.rows())
        readable = [row.values for row in rows if not row.problem]
        if readable:
            columns.check(readable, task, part.place)
        for row in rows:
            where = str(row.number) if len(parts) == 1 else f"{part.place}:{row.number}"
            reading.rows += 1
            try:
                if row.problem:
                    raise BadRow(row.problem)
                item = convert(row.values, columns, part.name)
            except BadRow as error:
                reading.skip(str(error), where)
                continue
            for remark in remarks(row.values, columns, example_in(item)):
                reading.note(remark, where)
            question = spelling(example_in(item).question)
            split = columns.get(row.values, "split")
            table.rows.append(_noted(item, question, known, asked, reading, where))
            table.places.append(uniform("split", question))
            table.splits.append(split if isinstance(split, str) else None)
    reading.used = len(table.rows)
    if not table.rows:
        raise UserError(f"data.source: no row of {place} can be used: {'; '.join(reading.bad()) or 'it has none'}")
    if bad_rows == "error" and reading.skipped:
        bad = "; ".join(reading.bad()).replace(" skipped: ", " bad: ")
        raise UserError(f"data.source: {place}: {bad}; correct them or set data.source.bad_rows: skip")
    say(reading.summary())
    return table


def _noted(item: Item, question: str, known: dict[str, int], asked: set[str], reading: Reading, where: str) -> Item:
    """The row, with an id that no earlier row has; repetitions are noted."""
    text = f"{example_in(item).source}/{question}"
    if isinstance(item, SearchRecord):
        text += f"/{item.query}/{item.noisy}/{item.documents}"
    repeated = text in asked
    asked.add(text)
    if repeated:
        reading.note(f"an earlier row has the same {'question' if isinstance(item, QAExample) else 'record'}", where)
    if isinstance(item, SearchRecord):
        return item
    unique = item
    while unique.key in known:
        known[item.key] += 1
        unique = replace(item, id=f"{item.id}#{known[item.key]}")
    if unique is not item and not repeated:
        reading.note("an earlier row has the same id, so it got another", where)
    known[unique.key] = 1
    return unique
