"""The report: words, pages that stay pages whatever a run holds, and examples."""

import io
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown import markdown as render_markdown
from rich.console import Console

from support.runfolders import CONTROLS, HOSTILE, LABEL, Page, eight_questions, policy, run_compare, trajectory, write_run
from zs_lightning.commands.compare.examples import EXAMPLES, choose_examples, marked
from zs_lightning.commands.compare.report import Report
from zs_lightning.runs import pages
from zs_lightning.runs.folder import read_run


@pytest.fixture
def runs(tmp_path):
    return eight_questions(tmp_path)


# ---------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("count", "low", "high", "said"),
    [
        *[
            (32, 0.01, 0.2, "rose"),
            (32, -0.2, -0.01, "fell"),
            (32, -0.1, 0.2, "No clear change"),
            (32, 0, 0.2, "No clear change"),
        ],
        (31, 0.01, 0.2, "Too few questions (31) to claim a change"),
    ],
)
def test_headline_says_no_more_than_the_interval(count, low, high, said):
    pairs = {"em": {"mean": 0.1, "low": low, "high": high}, "questions": count, "only_here": 0, "only_in_first": 0}
    first = {"name": "base", "label": "", "decodings": {"greedy": {"em": {"mean": 0.3}}}, "difference": None}
    second = first | {"decodings": {"greedy": {"em": {"mean": 0.4}}}, "difference": {"greedy": pairs}}
    report = Report({"decoding": "greedy", "runs": [first, second]})
    assert said in report.headline()
    assert "30.0 % to 40.0 %" in report.headline()


def hostile_run(folder, answer):
    text = HOSTILE + CONTROLS
    example = {"question": text, "golden_answers": ("yes", text), "subset": f"a|b\n{text}"}
    return write_run(folder, [trajectory(i, answer, text=text, **example) for i in range(3)])


@pytest.fixture
def hostile(tmp_path):
    hostile_run(tmp_path / "base", HOSTILE + CONTROLS + "\ud800")
    hostile_run(tmp_path / "trained", None)
    hostile_run(tmp_path / "poor", "no")
    return tmp_path


def test_nothing_in_a_run_becomes_markup(hostile, capsys):
    run_compare(hostile, f"trained@{LABEL}={hostile / 'poor'}", f"--seconds={HOSTILE.split('=')[0]}=1")
    page = (hostile / "out" / "report.html").read_bytes().decode("utf-8")
    parsed = Page(page)
    allowed = (
        "a article b body circle div em figcaption figure footer h1 h2 h3 h4 head header html i li line main mark meta ol p"
    )
    allowed += " polyline section small span style svg table tbody td text th thead title tr"
    # The reader's, see test_reader.py.
    allowed += " form input label option script select"
    assert set(parsed.tags) <= set(allowed.split())
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href", "srcset")]
    assert parsed.text.count(HOSTILE) >= 6  # Shown as it is: in questions, thoughts, queries, documents, answers.
    assert "{{ 7 * 7 }}" in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2028\ufeff]", page)
    assert "␀␛[31m␇" in parsed.text
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_page_forbids_everything_but_its_own_style(runs):
    run_compare(runs)
    page = (runs / "out" / "report.html").read_text()
    (said,) = [value for name, value in Page(page).attributes if name == "content" and "default-src" in value]
    assert re.sub("script-src 'sha256-[^ ;]+'; ", "", said) == (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    assert page.index("Content-Security-Policy") < page.index("<style>")
    assert page.startswith("<!doctype html>")
    assert "url(" not in page
    assert "@import" not in page


def test_markdown_cells_stay_in_their_tables(hostile):
    run_compare(hostile, f"trained@{LABEL}={hostile / 'poor'}")
    text = (hostile / "out" / "report.md").read_text()
    rendered = render_markdown(text, extensions=["tables"])
    parsed = Page(rendered)
    assert set(parsed.tags) <= {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td"}
    rows = re.findall(r"<tr>(.*?)</tr>", rendered, re.DOTALL)
    assert {len(re.findall("<t[hd]", row)) for row in rows} == {9, 4}
    # Markdown cuts what is too much in a row, so count in the source as well.
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {10, 5}
    assert all(line.startswith(("|", "## ")) for line in text.splitlines() if "alert" in line)
    assert "{{ 7 * 7 }}" in parsed.text


def test_terminal_table_fits_into_80_columns(tmp_path):
    runs = eight_questions(tmp_path, 5)
    (runs / "none").rename(runs / "a_policy_with_a_long_name")
    results = run_compare(runs, runs / "a_policy_with_a_long_name")
    file = io.StringIO()
    Report(results).show(Console(file=file, width=80, highlight=False))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("trained − base in EM points, on the same 40 questions: greedy +50.0 (")
    assert any(line.split() == ["trained", "75.0", "+50.0", "100", "75.0", "2.00", "0.0", "0.0"] for line in lines)
    assert "…" not in file.getvalue()


def test_few_questions_have_no_interval(runs):
    run_compare(runs)
    for name in ("report.md", "report.html"):
        said = (runs / "out" / name).read_text()
        assert "questions: greedy +50.0, sampled +100.0; no interval of fewer than 32." in said
        assert "whisker" not in said.partition("</style>")[2]
        assert not re.search(r"\d–\d", said.partition("</style>")[2])


def test_runs_that_have_no_room_beside_each_other_go_on_below(tmp_path):
    names = [f"policy_{number}" for number in range(9)]
    for number, name in enumerate(names):
        write_run(tmp_path / name, [trajectory(i, "yes" if i < number else "no", subset="known/one_hop") for i in range(8)])
    report, file = Report(run_compare(tmp_path, names=names)), io.StringIO()
    report.show(Console(file=file, width=80, highlight=False))
    parts = file.getvalue().partition("EM by subset")[2].splitlines()
    assert max(map(len, parts)) <= 80
    rows = [line.split() for line in parts if line.startswith("known/one_hop")]
    shares = [f"{100 * number / 8:.1f}" for number in range(8)] + ["100"]
    assert [row[0] for row in rows] == ["known/one_hop"] * len(rows)
    assert [share for row in rows for share in row[1:]] == ["8", *shares]
    assert len(rows) > 1


def test_an_interval_stands_below_its_difference_and_words_wrap(tmp_path):
    """In a cell of its own line each, a table of several runs fits into the page."""
    runs = eight_questions(tmp_path, 5)
    config = {"ckpt_path": f"{'many words ' * 20}/last.ckpt"}
    (runs / "trained" / "config.yaml").write_text(yaml.safe_dump(config))
    run_compare(runs, names=("trained", "none"))
    page = (runs / "out" / "report.html").read_text()
    assert re.search(r'<span class="value">−75.0</span>\s*<span class="spread">−\d\d.\d to −\d\d.\d</span>', page)
    assert f'<span class="about">{"many words " * 20}: bm25</span>' in page
    assert "tbody th { font-weight: 600; overflow-wrap: anywhere;" in page


@pytest.mark.parametrize("subsets", [("known/one_hop", "new/two_hop"), ("known/one_hop", "new")])
def test_the_miniatures_subsets_are_explained_and_nobody_elses(subsets, tmp_path, capsys):
    for name in ("base", "trained"):
        write_run(tmp_path / name, [trajectory(i, "yes", subset=subset) for i, subset in enumerate(subsets)])
    run_compare(tmp_path)
    said = [capsys.readouterr().out, *((tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))]
    for text in said:
        assert ("New: only the search corpus names them" in " ".join(text.split())) == (subsets[1] == "new/two_hop")


def test_seconds_have_their_unit(runs):
    run_compare(runs, "--seconds=policy_rl=12.5", "--seconds=test=3")
    page, text = ((runs / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert "Time: policy rl 12 s, test 3 s. Each is the wall-clock time" in " ".join(Page(page).text.split())
    assert "Time: policy_rl 12.5 s, test 3 s. Each is the wall-clock time" in text


# ---------------------------------------------------------------------- examples


def test_a_search_that_was_made_for_the_policy_is_shown(tmp_path):
    """One-shot RAG: the question is searched before the policy writes anything."""
    for name in ("base", "trained"):
        rows = policy("yes", "no")
        for row in rows:
            row.turns[0].text, row.turns[0].content = "", f"the query of {row.example.id}"
        write_run(tmp_path / name, rows)
    run_compare(tmp_path)
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    assert [text.count(f"searchesthe query of {i}") for i in (0, 1)] == [2, 2]


def test_examples_are_of_every_outcome_and_of_both_policies(tmp_path):
    pairs = [("no", "yes")] * 9 + [("yes", "yes")] * 9 + [("yes", "no")] * 9 + [("no", "no")] * 9
    for number, name in enumerate(("base", "trained")):
        write_run(tmp_path / name, policy(*(p[number] for p in pairs)), policy(*["other"] * 36))
    chosen = choose_examples(*(read_run(name, "", tmp_path / name) for name in ("base", "trained")))
    outcomes = [(base["em"], trained["em"]) for base, trained in chosen]
    assert {outcome: outcomes.count(outcome) for outcome in outcomes} == EXAMPLES
    for example in chosen:
        assert len({trajectory["id"] for trajectory in example}) == 1
        assert [t["turns"][-1]["content"] == "yes" for t in example] == [t["em"] == 1 for t in example]
    assert [base["id"] for base, _ in chosen[:4]] != [f"toy/{i}" for i in range(4)]  # Drawn, not the first of the file.


def test_few_questions_are_all_shown_and_a_page_without_examples_is_written(runs):
    run_compare(runs)
    assert (runs / "out" / "report.html").read_text().count("<article") == 8
    (runs / "base" / "trajectories" / "test.jsonl").unlink()
    run_compare(runs)
    assert "<article" not in (runs / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think> a b</think><search> q</search>", [("think", "a b"), ("search", "q")]),
        ("so <answer>x</answer> bye", [("text", "so"), ("answer", "x"), ("text", "bye")]),
        ("<think>never closed", [("think", "never closed")]),
        ("<search>a<answer>b</answer>", [("search", "a<answer>b</answer>")]),
        ("<information>x", [("information", "x")]),
        ("  ", []),
    ],
)
def test_pieces_of_a_turn(text, expected):
    assert list(pages.pieces(text)) == expected


@pytest.mark.parametrize(
    ("text", "answers", "hits"),
    [
        ("Foo author Bar Baz.", ["Bar Baz", "Bar"], ["Bar Baz"]),
        ("no one knew. No!", ["no"], ["no", "No"]),
        ("a.b axb", ["a.b"], ["a.b"]),
        ("anything", ["", " "], []),
    ],
)
def test_golden_answers_are_marked_as_whole_words(text, answers, hits):
    assert [part for part, hit in marked(text, answers) if hit] == hits


@given(st.text(alphabet="ab. (", max_size=30), st.lists(st.text(alphabet="ab.(", max_size=3), max_size=3))
def test_marking_loses_no_text(text, answers):
    parts = marked(text, answers)
    assert "".join(part for part, _ in parts) == text
    assert all(part.lower() in [a.lower() for a in answers] for part, hit in parts if hit)
