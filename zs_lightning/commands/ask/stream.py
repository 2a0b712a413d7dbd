"""A trajectory in the terminal while it grows. No text in it is trusted: it is shown, and never acts."""

from __future__ import annotations

import re
from collections.abc import Callable

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from zs_lightning.runs.pages import pieces
from zs_lightning.runs.tables import visible
from zs_lightning.types import ActionKind, Status, Trajectory, Turn

INDENT = 11
"""Columns of the labels."""
SHOWN = 600
"""Characters of a document; the page of --html has all of it."""
LABELS = {"think": "thinks", "search": "searches", "answer": "answers", "information": "forges", "text": "writes"}
STYLES = {"think": "italic bright_black", "search": "bold blue", "answer": "bold green", "information": "red", "text": ""}
ENDS = {Status.TURN_LIMIT: "out of turns, no answer", Status.LENGTH_LIMIT: "out of context, no answer"}


class Stream:
    """Prints each turn as it is written, then what the search found. One for each trajectory.

    Args:
        decode: ids to text.
    """

    def __init__(self, console: Console, decode: Callable[[list[int]], str]) -> None:
        self.console, self.decode = console, decode
        self.turn = 0
        self._begin()

    def _begin(self) -> None:
        self.written = False
        self.parts: list[str] = []
        """What is printed of each part of the turn."""
        self.column, self.blank = 0, False

    def __call__(self, trajectory: Trajectory, sampled: list[int]) -> None:
        """To be called by Rollout: prints what is new."""
        while self.turn < len(trajectory.turns):
            turn = trajectory.turns[self.turn]
            if not self.written:
                self._finish(turn)
            if turn.observation_span is None:
                return
            if turn.kind is ActionKind.SEARCH:
                self._documents(turn)
            self.turn += 1
            self._begin()
        if sampled:
            self._write(self.decode(sampled), whole=False)

    def end(self, trajectory: Trajectory) -> None:
        """Says why there is no answer, if there is none."""
        if trajectory.status is Status.FAILED:
            self._line("failed", str(trajectory.failure), "red")
        elif trajectory.status in ENDS:
            self._line("ends", ENDS[trajectory.status], "red")

    def _finish(self, turn: Turn) -> None:
        self._write(turn.text, whole=True)
        if self.column:
            self._newline()
        if turn.kind is ActionKind.SEARCH and not turn.text:
            self._line(LABELS["search"], turn.content, STYLES["search"])
        elif turn.kind is ActionKind.INVALID:
            self._line("invalid", turn.content.replace("_", " "), "red")
        self.written = True

    def _write(self, text: str, whole: bool) -> None:
        """Prints what is new in the turn's text. A word is held back until it is complete: it may become a tag, and its last
        character may lack some of its bytes."""
        found = list(pieces(text))
        for i, (kind, content) in enumerate(found):
            if not whole and i == len(found) - 1:
                content = content[: max(content.rfind(" "), content.rfind("\n")) + 1]
            if i == len(self.parts):
                if not content:
                    return
                if self.column:
                    self._newline()
                self._label(LABELS[kind])
                self.parts.append("")
            self._flow(content[len(self.parts[i]) :], STYLES[kind])
            self.parts[i] = content

    def _documents(self, turn: Turn) -> None:
        for number, document in enumerate(turn.documents, 1):
            self._label(f"{number:>{INDENT - 2}}")
            if document.title:
                self._flow(document.title + " ", "bold")
            cut = document.text[:SHOWN] + ("…" if len(document.text) > SHOWN else "")
            self._flow(" ".join(cut.split()), "")
            self._newline()
        if not turn.documents:
            self._line("", "nothing found", "bright_black")

    def _line(self, label: str, content: str, style: str) -> None:
        self._label(label)
        self._flow(content, style)
        self._newline()

    def _label(self, label: str) -> None:
        self._print(f"{label:<{INDENT}}", "bright_black")
        self.column, self.blank = INDENT, False

    def _flow(self, text: str, style: str) -> None:
        """Words from the current column on, broken at the terminal's width."""
        for bit in re.split(r"(\s+)", visible(text)):
            if bit.isspace():
                if "\n" in bit:
                    self._newline()
                    self._print(" " * INDENT, "")
                    self.column = INDENT
                self.blank = self.column > INDENT
            elif bit:
                if self.column + self.blank + cell_len(bit) > self.console.width and self.column > INDENT:
                    self._newline()
                    self._print(" " * INDENT, "")
                    self.column = INDENT
                elif self.blank:
                    bit = " " + bit
                self._print(bit, style)
                self.column, self.blank = self.column + cell_len(bit), False

    def _newline(self) -> None:
        self.console.print()
        self.column, self.blank = 0, False

    def _print(self, text: str, style: str) -> None:
        # A Text knows no markup, emoji codes or highlighting.
        self.console.print(Text(text, style), end="", soft_wrap=True)
