"""A trajectory in the terminal while it grows, and on a page. No text in it is trusted to act."""

from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from zs_lightning.runs.pages import render
from zs_lightning.text.protocol import pieces
from zs_lightning.text.shown import visible
from zs_lightning.types import ActionKind, Status, Trajectory, Turn

SHOWN = 600
"""Characters of a document that are shown; the page of --html has all of it."""
PARTS = {
    "think": ("thinks", "italic bright_black"),
    "search": ("searches", "bold blue"),
    "answer": ("answers", "bold green"),
    "information": ("forges", "red"),
    "text": ("writes", ""),
}
"""Label and style of each part of a turn."""
ENDS = {Status.TURN_LIMIT: "out of turns, no answer", Status.LENGTH_LIMIT: "out of context, no answer"}


class Stream:
    """Shows the turn that is being written, and prints each finished one with what it found. One
    for each trajectory, as a context: it gives the terminal back whatever happens. `decode` makes
    text of ids."""

    def __init__(self, console: Console, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        # What is unfinished is drawn again for each token, and rubbed out at last. A file sees
        # finished turns only.
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.printed = 0

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, trajectory: Trajectory, sampled: list[int]) -> None:
        """Follows a rollout, as its Watch."""
        # Its documents are known once they stand in the context.
        for turn in trajectory.turns[self.printed :]:
            if turn.observation_span is not None:
                self._print(turn)
        # A turn that is left waits for its search.
        waiting = trajectory.turns[self.printed :]
        # The last word may become a tag, and its last character may lack some of its bytes.
        text = waiting[0].text if waiting else self.decode(sampled).rpartition(" ")[0]
        self.live.update(_written(text), refresh=True)

    def end(self, trajectory: Trajectory) -> None:
        """Prints what is left, and why there is no answer, if there is none."""
        for turn in trajectory.turns[self.printed :]:
            self._print(turn)
        if trajectory.status is Status.FAILED:
            self._say("failed", str(trajectory.failure))
        elif trajectory.status in ENDS:
            self._say("ends", ENDS[trajectory.status])

    def _print(self, turn: Turn) -> None:
        rows = _written(turn.text)
        if turn.kind is ActionKind.SEARCH:
            if not turn.text:  # The environment searched for the question.
                _add(rows, PARTS["search"][0], turn.content, PARTS["search"][1])
            if turn.observation_span is not None:
                _add_documents(rows, turn)
        elif turn.kind is ActionKind.INVALID:
            _add(rows, "invalid", turn.content.replace("_", " "), "red")
        # A turn may hold nothing, and an empty grid would be an empty line.
        if rows.row_count:
            self.live.console.print(rows)
        self.printed += 1

    def _say(self, label: str, content: str) -> None:
        rows = _written("")
        _add(rows, label, content, "red")
        self.live.console.print(rows)


def _written(text: str) -> Table:
    """A turn's text, one row for each of its parts."""
    # A grid wraps its texts beside the labels and folds words that are longer than a line.
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(width=9, style="bright_black")
    rows.add_column(overflow="fold")
    for kind, content in pieces(text):
        label, style = PARTS[kind]
        _add(rows, label, content, style)
    return rows


def _add(rows: Table, label: str, content: str, style: str) -> None:
    # A Text knows no markup, emoji codes or highlighting.
    rows.add_row(label, Text(visible(content), style))


def _add_documents(rows: Table, turn: Turn) -> None:
    for number, document in enumerate(turn.documents, 1):
        text = document.text[:SHOWN] + ("…" if len(document.text) > SHOWN else "")
        shown = Text(visible(" ".join(text.split())))
        if document.title:
            shown = Text.assemble((visible(document.title), "bold"), " ", shown)
        rows.add_row(f"{number:>9}", shown)
    if not turn.documents:
        _add(rows, "", "nothing found", "bright_black")


def html(trajectories: Sequence[Trajectory], policy: str, engine: str) -> str:
    """The page of what `policy`, such as a run folder, answered with the engine of this name."""
    values = {"trajectories": trajectories, "policy": policy, "engine": engine}
    return render("page.html", values, room="commands/ask")
