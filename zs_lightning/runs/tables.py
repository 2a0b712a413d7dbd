"""Tables of shares with their intervals, in per cent, for the terminal and as Markdown."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group, JustifyMethod
from rich.table import Table as Shown
from rich.text import Text

from zs_lightning.text.shown import visible

GAP = 2
"""Characters between two columns in a terminal."""
FOLDED = 16
"""Most characters of a first column that others leave no more room."""


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
    """A column with its head."""

    name: str
    cells: list[Cell]
    narrow: str | None = ""
    """The name in lines of few characters for a terminal; None leaves the column out there."""
    brief: bool = False
    """Whether a terminal leaves out what stands below the values."""
    colour: int | None = None

    def header(self) -> Text:
        return Text(visible(self.narrow or self.name))

    def texts(self) -> list[Text]:
        """The cells in a terminal."""
        found = []
        for cell in self.cells:
            below = "" if self.brief or not cell.below else "\n" + visible(cell.below)
            found.append(Text.assemble(visible(cell.value), (below, "dim")))
        return found

    def width(self) -> int:
        """Characters of the widest line in a terminal."""
        lines = "\n".join(text.plain for text in [self.header(), *self.texts()])
        return max(map(cell_len, lines.split("\n")))


@dataclass(frozen=True)
class Table:
    """What all media show; the first cell of a row names it."""

    title: str
    columns: list[Column]
    notes: list[str]

    def rows(self) -> list[tuple[Cell, ...]]:
        return list(zip(*(column.cells for column in self.columns), strict=True))

    def in_terminal(self, width: int) -> Group:
        """The table for a console of rich, in parts one below the other if it is wider."""
        first, *others = [column for column in self.columns if column.narrow is not None]
        parts: list[list[Column]] = []
        room = 0
        for column in others:
            room -= GAP + column.width()
            if room < 0 or not parts:
                room = width - min(FOLDED, first.width()) - GAP - column.width()
                parts.append([first])
            parts[-1].append(column)
        shown = [_shown(part) for part in parts]
        shown[0].title = Text(visible(self.title))
        return Group(*shown)

    def in_markdown(self) -> str:
        """The table with its title and notes."""
        names = [column.name for column in self.columns]
        table = markdown_table(names, [list(map(inline, row)) for row in self.rows()])
        notes = "".join(f"\n{markdown_cell(note)}\n" for note in self.notes)
        return f"\n## {markdown_cell(self.title)}\n\n{table}{notes}"


def show(console: Console, headline: str, tables: Sequence[Table]) -> None:
    """Prints a headline, tables, and below them the notes of all."""
    console.print(Text(visible(headline), "bold"))
    for table in tables:
        console.print(table.in_terminal(console.width))
    notes = [note for table in tables for note in table.notes]
    console.print(Text(visible(" ".join(notes)), "dim"))


def _shown(columns: Sequence[Column]) -> Shown:
    shown = Shown(title_justify="left", box=SIMPLE_HEAD)
    # Without air at the edges, so that eight columns have room in 80 characters.
    shown.collapse_padding, shown.pad_edge, shown.show_edge = True, False, False
    for number, column in enumerate(columns):
        justify: JustifyMethod = "right" if number else "left"
        shown.add_column(column.header(), justify=justify, no_wrap=number > 0, overflow="fold")
    for row in zip(*(column.texts() for column in columns), strict=True):
        shown.add_row(*row)
    return shown


def percent(value: float) -> str:
    """Three characters more or less: 9.5, 35.5, 100."""
    # Without its tenth, which would make every column wider.
    return f"{100 * value:.1f}".replace("100.0", "100")


def scored(interval: Mapping[str, float] | None, mark: str = "", colour: int | None = None) -> Cell:
    """The cell of a share with its interval, if it has one; a dash for no share."""
    if not interval:
        return Cell("–")
    ends = "–".join(percent(interval[end]) for end in ("low", "high") if end in interval)
    return Cell(percent(interval["mean"]) + mark, ends, interval, colour)


def changed(interval: Mapping[str, float]) -> Cell:
    """The cell of a difference of shares, in percentage points."""
    shown = {name: f"{100 * value:+.1f}".replace("-", "−") for name, value in interval.items()}
    return Cell(shown["mean"], " to ".join(shown[end] for end in ("low", "high") if end in shown))


def inline(cell: Cell) -> str:
    return f"{cell.value} ({cell.below})" if cell.below else cell.value


def markdown_cell(text: str) -> str:
    """Untrusted text that stays inside its cell and stays text."""
    text = " ".join(visible(text).split())
    # As references to characters, which no renderer takes for markup, or for an address. But a
    # site looks for @name in the finished page: there a joiner without width is between.
    marks = r"[\\`*{}\[\]<>#|!&~$@]|:(?=//)|(?<=www)\."
    return re.sub(marks, lambda m: "@&#8288;" if m[0] == "@" else f"&#{ord(m[0])};", text, flags=re.I)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[markdown_cell(cell) for cell in line] for line in (headers, *rows)]
    lines.insert(1, ["---", *["---:"] * (len(headers) - 1)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
