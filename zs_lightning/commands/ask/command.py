"""Asks a trained policy, or an untrained base model, and shows how it thinks, searches and answers.

Without a question it goes on asking for one.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from zs_lightning.configuration.arguments import CommandParser, at_home, search_options, split
from zs_lightning.errors import Stopped, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from zs_lightning.commands.ask.session import Session
    from zs_lightning.types import Trajectory

PROMPT = "question> "
SEARCH_HELP = """search engine:
  --search CLASS            BM25Search, MediaWikiSearch, … or the dotted path of a class of your
                            own; if not given, BM25Search over the run's world for the miniature,
                            else MediaWikiSearch
  --search.OPTION VALUE     such as --search.count 5; for all of them: --search.help CLASS

examples:
  python -m zs_lightning ask --ckpt runs/policy "What is the birthplace of the author of The Narrow Door?"
  python -m zs_lightning ask --ckpt runs/policy --search BM25Search --search.corpus notes/ --html answer.html
"""


def parse(args: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The command's own options, and those of the search engine."""
    parser = CommandParser("ask", __doc__, SEARCH_HELP)
    said = "if not given, asked for until Ctrl-D, or read from a pipe line by line"
    parser.add_argument("question", nargs="*", help=said)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--ckpt", type=at_home, metavar="RUN", help="run folder of a policy's fit, or its checkpoint")
    add("--config", type=at_home, metavar="FILE", help="a policy's, to ask its untrained base model")
    said = "also write everything into this page"
    parser.add_argument("--html", type=at_home, metavar="FILE", help=said)
    own, search = split(args)
    # Intermixed, since the words of a question may stand before and after options.
    options = parser.parse_intermixed_args(own)
    # Without quotes its words come one by one.
    options.question = " ".join(options.question) if options.question else None
    helps = any(word.startswith("--search.help") for word in search)
    if options.ckpt is None and options.config is None and not helps:
        who = "give --ckpt RUN, or --config FILE for its untrained base model"
        raise UserError(f"ask: nobody to ask; {who}")
    return options, search


def main(args: Sequence[str]) -> None:
    """Runs the command; `args` is what stands after its name."""
    options, search = parse(args)
    page = options.html
    # Before a model is loaded, which takes seconds or minutes.
    if options.question is not None and not options.question.strip():
        raise UserError("ask: the question is empty")
    if page is not None and (page.is_dir() or not page.resolve().parent.is_dir()):
        raise UserError(f"--html: {page} cannot be written; expected a file in a folder that exists")
    if page is not None and page.exists() and page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html: {page} is there and no page; expected a new file, or one that ends in .html")
    from rich.console import Console

    from zs_lightning.configuration.lightning_cli import quiet

    quiet()
    if options.ckpt is None and options.config is None:
        search_options(search, [])  # Prints the help of an engine, and ends.
    from zs_lightning.commands.ask.session import Session, policy_config
    from zs_lightning.runs.checkpoints import find_run

    given = options.config
    file, checkpoint = (given, None) if given else find_run(options.ckpt, "--ckpt")
    session = Session(policy_config(file), checkpoint, search)
    console = Console(highlight=False)
    policy = str(options.ckpt or f"untrained base of {options.config}")
    talk = Talk(session, console, policy, page)
    if options.question is not None:
        fine = talk.ask(options.question).failure is None
    elif sys.stdin.isatty():
        fine = talk.go_on()
    else:
        fine = talk.read(sys.stdin)
    if not fine:
        raise SystemExit(1)


@dataclass
class Talk:
    """Questions with their answers, in the terminal and on the page."""

    session: Session
    console: Console
    policy: str
    page: Path | None
    trajectories: list[Trajectory] = field(default_factory=list)

    def ask(self, question: str) -> Trajectory:
        from zs_lightning.commands.ask.stream import Stream, html

        with Stream(self.console, self.session.decode) as stream:
            trajectory = self.session.ask(question, stream)
            stream.end(trajectory)
        # After each answer, so that the page holds what was said when a later one is interrupted.
        self.trajectories.append(trajectory)
        if self.page is not None:
            from zs_lightning.runs.checkpoints import write_whole

            text = html(self.trajectories, self.policy, self.session.engine_name)
            write_whole(self.page, text)
        return trajectory

    def answer(self, question: str) -> bool:
        """Asks, and says what is wrong with the question; whether nothing was and no search
        failed."""
        try:
            return self.ask(question).failure is None
        except UserError as error:
            self._print(f"error: {error}", "red")
            return False

    def read(self, pipe: TextIO) -> bool:
        """Asks each line of a pipe; returns whether no question was wrong and no search failed.
        Raises UserError if nothing is asked."""
        if isinstance(pipe, TextIOWrapper):
            pipe.reconfigure(errors="surrogateescape")  # One bad line must not end the others.
        questions = [line.strip() for line in pipe if line.strip()]
        if not questions:
            raise UserError("ask: no question is given")
        fine = True
        for question in questions:
            self._print(PROMPT + question)
            # One wrong question must not end the others, and is told by the exit code.
            fine = self.answer(question) and fine
        return fine

    def go_on(self) -> bool:
        """Asks for questions until Ctrl-D or Ctrl-C, which during an answer ends that answer
        only."""
        with suppress(ImportError):  # Some systems have none.
            import readline  # noqa: F401 - gives `input` a line to edit

        self._print(f"{self.policy} · {self.session.engine_name} · Ctrl-D ends", "bright_black")
        while True:
            try:
                question = input(PROMPT)
            except Stopped:
                raise
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return True
            try:
                self.answer(question)
            except Stopped:
                raise
            except KeyboardInterrupt:
                # The second one, at the prompt, ends the conversation.
                self._print("interrupted", "red")

    def _print(self, text: str, style: str = "") -> None:
        from rich.text import Text

        from zs_lightning.text.shown import visible

        self.console.print(Text(visible(text), style), soft_wrap=True)
