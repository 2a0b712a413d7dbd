"""Tables of values with their intervals, for the terminal and as Markdown. Shares are shown in per cent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table as Shown
from rich.text import Text

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


@dataclass(frozen=True)
class Cell:
    """A value, and in small what stands below it."""

    value: str
    below: str = ""
    interval: Mapping[str, float] | None = None
    """A share and its interval, which a page draws as a bar."""
    colour: int | None = None
    """The run's colour on a page."""


@dataclass(frozen=True)
class Column:
    """The head of a column."""

    name: str
    narrow: str | None = ""
    """The name in lines of few characters for a terminal; None leaves the column out there."""
    brief: bool = False
    """Whether a terminal leaves out what stands below the values."""
    colour: int | None = None


@dataclass(frozen=True)
class Table:
    """What all media show; the first cell of a row names it."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str]


def visible(text: str) -> str:
    """Untrusted text with its control, direction and half characters made visible: they could reorder or end a page."""

    def picture(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 32 else "\N{REPLACEMENT CHARACTER}"

    return _UNPRINTABLE.sub(picture, text)


def percent(value: float) -> str:
    """Three characters more or less: 9.5, 35.5, 100."""
    return f"{100 * value:.1f}".replace("100.0", "100")


def spread(interval: Mapping[str, float]) -> str:
    return f"{percent(interval['low'])}–{percent(interval['high'])}"


def scored(interval: Mapping[str, float] | None, mark: str = "", colour: int | None = None) -> Cell:
    """The cell of a share with its interval; a dash for none."""
    if interval is None:
        return Cell("–")
    return Cell(percent(interval["mean"]) + mark, spread(interval), interval, colour)


def changed(interval: Mapping[str, float]) -> Cell:
    """The cell of a difference of shares, in percentage points."""
    mean, low, high = (f"{100 * interval[name]:+.1f}".replace("-", "−") for name in ("mean", "low", "high"))
    return Cell(mean, f"{low} to {high}")


def inline(cell: Cell) -> str:
    return f"{cell.value} ({cell.below})" if cell.below else cell.value


def to_terminal(table: Table) -> Shown:
    """The table for a console of rich."""
    # Without air at the edges, so that eight columns have room in 80 characters.
    shown = Shown(title=Text(visible(table.title)), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    shown.collapse_padding = True
    kept = [number for number, column in enumerate(table.columns) if column.narrow is not None]
    for number in kept:
        header = visible(table.columns[number].narrow or table.columns[number].name)
        shown.add_column(Text(header), justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in table.rows:
        cells = []
        for number in kept:
            below = "" if table.columns[number].brief else row[number].below
            cells.append(Text.assemble(visible(row[number].value), ("\n" + visible(below) if below else "", "dim")))
        shown.add_row(*cells)
    return shown


def markdown_cell(text: str) -> str:
    """Untrusted text that stays inside its cell and stays text."""
    text = " ".join(visible(text).split())
    return re.sub(r"[\\`*{}\[\]<>#|!&~$]", lambda match: f"&#{ord(match[0])};", text)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[markdown_cell(cell) for cell in line] for line in (headers, *rows)]
    lines.insert(1, ["---", *["---:"] * (len(headers) - 1)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_markdown(headline: str, lead: str, tables: Sequence[Table]) -> str:
    """A page of tables with their notes."""
    parts = [f"# {markdown_cell(headline)}\n" if headline else "", f"{markdown_cell(lead)}\n"]
    for table in tables:
        rows = [[inline(cell) for cell in row] for row in table.rows]
        parts.append(f"## {markdown_cell(table.title)}\n")
        parts.append(markdown_table([column.name for column in table.columns], rows))
        parts += [f"{markdown_cell(note)}\n" for note in table.notes]
    return "\n".join(parts)
