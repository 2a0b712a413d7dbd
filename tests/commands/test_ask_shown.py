"""What comes from documents, questions and models stays text, in the terminal and on the page."""

import html as plain
import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from zs_lightning.commands.ask.stream import Stream, html
from zs_lightning.text.shown import visible
from zs_lightning.types import ActionKind, Document, QAExample, Status, Trajectory, Turn

HOSTILE = (
    "\x1b[2J\x1b]0;title\x07[bold red]x[/bold red] :smile: \u202eevil\r\x9b31m <script>alert(1)</script> {{ 7 * 7 }} </answer>"
)


def bare(shown):
    """Without our colours, and without what draws the unfinished turn again: no other sign can act."""
    return re.sub(r"\x1b\[(?:[0-9;]*m|\?25[lh]|1A|2K)", "", re.sub(r"\r(?=\x1b\[(?:2K|1A))", "\n", shown))


def hostile(kind=ActionKind.SEARCH, status=Status.ANSWERED):
    example = QAExample(id="1", question=HOSTILE, golden_answers=(), source="t")
    text = f"<think> {HOSTILE} </think><search> {HOSTILE}</search>"
    found = (Document(text=HOSTILE, title=HOSTILE), Document(text="日本 " * 40))
    turns = [Turn(text=text, kind=kind, content=HOSTILE, span=(0, 1), observation_span=(1, 2), documents=found)]
    turns.append(Turn(text=f"<answer> {HOSTILE}", kind=ActionKind.ANSWER, content=HOSTILE, span=(2, 3)))
    return Trajectory(example=example, sample=0, prompt_ids=[1], turns=turns, status=status, failure=HOSTILE)


@pytest.mark.parametrize("kind", [ActionKind.SEARCH, ActionKind.INVALID])
@pytest.mark.parametrize("status", [Status.ANSWERED, Status.FAILED])
def test_untrusted_text_does_not_act_in_the_terminal(kind, status):
    screen = Console(file=io.StringIO(), width=70, force_terminal=True, color_system="truecolor", highlight=False)
    with Stream(screen, lambda ids: f"<think> {HOSTILE}"[: ids[0]]) as stream:
        for i in range(0, len(HOSTILE)):
            stream(Trajectory(example=hostile().example, sample=0, prompt_ids=[1]), [i])
    with Stream(screen, str) as stream:
        stream(hostile(kind, status), [])
        stream.end(hostile(kind, status))
    shown = screen.file.getvalue()
    # The colours are ours: nothing else is left of control characters, and markup and emoji codes are letters.
    assert not set(bare(shown)) & set("\x1b\x07\x9b\r\u202e")
    for text in ("[bold red]x[/bold red]", ":smile:", "␛[2J␛]0;title␇"):
        assert "".join(text.split()) in "".join(bare(shown).split())
    assert all(sum(2 if c in "日本" else 1 for c in line) <= 70 for line in bare(shown).splitlines())


@pytest.mark.parametrize(
    ("status", "said"),
    [(Status.TURN_LIMIT, "out of turns"), (Status.LENGTH_LIMIT, "out of context"), (Status.FAILED, "failed")],
)
def test_the_reason_of_no_answer_is_shown(status, said):
    screen = Console(file=io.StringIO(), width=300)
    trajectory = hostile(status=status)
    trajectory.failure = "the server is away" if status is Status.FAILED else None
    Stream(screen, str).end(trajectory)
    assert said in screen.file.getvalue()
    assert said in html([trajectory], "runs/a", "bm25")
    assert ("the server is away" in screen.file.getvalue()) == (status is Status.FAILED)


def test_a_search_of_the_environment_is_shown():
    turn = Turn(text="", kind=ActionKind.SEARCH, content="red harbor", span=(0, 0), observation_span=(0, 1))
    screen, trajectory = Console(file=io.StringIO(), width=80), hostile(status=Status.TURN_LIMIT)
    trajectory.turns = [turn]
    Stream(screen, str)(trajectory, [])
    assert screen.file.getvalue().split() == ["searches", "red", "harbor", "nothing", "found"]
    assert re.search(r"searches</b><span>red harbor</span>.*nothing found", html([trajectory], "r", "e"), re.DOTALL)


# ---------------------------------------------------------------------- the page


def test_the_page_is_escaped_and_needs_nothing_from_elsewhere():
    page = html([hostile(), hostile(ActionKind.INVALID)], HOSTILE, "bm25")
    assert "<script" not in page
    assert "49" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not set(page) & set("\x1b\x07\x9b\r\u202e")
    assert not re.search(r"src=|href=|url\(|@import", page)
    # In the title, in each question, thought, search, document's title and text, answer and its turn, and the policy's name.
    assert page.count(plain.escape(visible("<script>alert(1)</script>"))) == 2 + 1 + 2 * 7 - 2
    assert 'content="width=device-width' in page
    assert "prefers-color-scheme: dark" in page
    assert html([hostile()], "a", "b") == html([hostile()], "a", "b")


def test_a_long_question_stands_once_on_the_page_in_smaller_letters():
    long, short = (hostile(), hostile())
    long.example = replace(long.example, question="why " * 60)
    short.example = replace(short.example, question="why?")
    page = html([long, short], "runs/a", "bm25")
    assert page.count("why " * 60) == 1
    assert re.findall("<h1.*>", page) == ['<h1 class="long">' + "why " * 60 + "</h1>", "<h1>why?</h1>"]
    (title,) = re.findall("<title>(.*)</title>", page)
    assert title.startswith("why why")
    assert title.endswith("…")
    assert len(title) <= 120
    assert "<title>why?</title>" in html([short], "runs/a", "bm25")
