"""compare, its report and the TensorBoard page, on run folders that RunFiles wrote."""

import io
import json
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from markdown import markdown as render_markdown
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from zs_lightning.callbacks.board import LAYOUT, Board, best_and_worst, trajectory_table
from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.evaluation import compare, report, tables
from zs_lightning.evaluation.metrics import record
from zs_lightning.modules.metrics import step_metrics
from zs_lightning.types import ActionKind, Document, QAExample, Status, Trajectory, Turn

HOSTILE = '</style><script>alert(1)</script><img src=x onerror="alert(2)">\' " & {{ 7 * 7 }} {% raw %}'
CONTROLS = "\x00\x1b[31m\x07\u202e\u2028\ufeff"
LABEL = (HOSTILE + CONTROLS).replace("=", "-")


def trajectory(number: int, answer: str | None, searches: int = 1, text: str = "Doc of Foo.", **example) -> Trajectory:
    """Searches, each with one document, and then an answer, or none for lack of turns."""
    example = {"question": f"Question {number}?", "golden_answers": ("yes",), "subset": "known/one_hop", **example}
    turns = [
        Turn(
            text=f"<think> {text}</think><search> {text}</search>",
            kind=ActionKind.SEARCH,
            content=text,
            span=(0, 1),
            observation_span=(1, 2),
            documents=(Document(text=text, title=text),),
        )
        for _ in range(searches)
    ]
    if answer is not None:
        turns.append(Turn(text=f"<answer>{answer}</answer>", kind=ActionKind.ANSWER, content=answer, span=(2, 3)))
    return Trajectory(
        example=QAExample(id=str(number), source="toy", **example),
        sample=0,
        prompt_ids=[1],
        token_ids=[2, 3, 4],
        loss_mask=[True, False, True],
        old_logprobs=[-1.0, 0.0, -1.0],
        turns=turns,
        status=Status.TURN_LIMIT if answer is None else Status.ANSWERED,
    )


def write_run(folder, greedy, sampled=(), engine="bm25", seed=7):
    """A run folder as `test` leaves it."""
    files = RunFiles(str(folder))
    files.setup(SimpleNamespace(is_global_zero=True), None, "test")
    module = SimpleNamespace(seed=seed, noise_prob=0.0, search=SimpleNamespace(name=engine))
    module.trajectories = [*greedy, *sampled]
    module.records = [record(t, "greedy") for t in greedy] + [record(t, "sampled") for t in sampled]
    files.on_test_end(SimpleNamespace(is_global_zero=True), module)
    return folder


def policy(*answers, searches=1, **example):
    return [trajectory(i, answer, searches, **example) for i, answer in enumerate(answers)]


@pytest.fixture
def runs(tmp_path):
    """Eight questions: base has 2 right, trained 6, and both answer as well when sampled."""
    yes, no = "yes", "no"
    write_run(tmp_path / "base", policy(yes, yes, no, no, no, no, no, None), policy(*[no] * 8))
    write_run(tmp_path / "trained", policy(yes, no, yes, yes, yes, yes, yes, no, searches=2), policy(*[yes] * 8, searches=0))
    write_run(tmp_path / "none", policy(*[no] * 8, searches=0), policy(*[no] * 8, searches=0))
    return tmp_path


def arguments(folder, *more):
    return [f"base={folder / 'base'}", f"trained={folder / 'trained'}", *more, "--out", str(folder / "out")]


def run_compare(folder, *more):
    compare.main(arguments(folder, *more))
    return json.loads((folder / "out" / "results.json").read_text())


# ---------------------------------------------------------------------- results.json


def test_results_by_hand(runs):
    recall = {name: {"mean": 0.5, "low": 0.4, "high": 0.6} for name in ("useful_recall", "noisy_recall")}
    (runs / "simulator").mkdir()
    (runs / "simulator" / "results.json").write_text(json.dumps({"schema": 1, "seed": 7, "simulator": recall}))
    more = [f"no_search={runs / 'none'}", f"--simulator={runs / 'simulator'}", "--seconds=install=12.34567", "--seconds=test=3"]
    results = run_compare(runs, *more)
    keys = ["schema", "seed", "questions", "engine", "policies", "difference", "simulator", "seconds", "other_engines"]
    assert list(results) == keys
    scalars = [results[key] for key in ("schema", "seed", "questions", "engine", "simulator", "seconds", "other_engines")]
    assert scalars == [1, 7, 8, "bm25", recall, {"install": 12.3457, "test": 3.0}, {}]
    base, trained, none = (results["policies"][name] for name in ("base", "trained", "no_search"))
    assert [p["em"]["mean"] for p in (base, trained, none)] == [0.25, 0.75, 0.0]
    assert [p["em_sampled"]["mean"] for p in (base, trained, none)] == [0.0, 1.0, 0.0]
    assert [p["searches_per_question"] for p in (base, trained, none)] == [1.0, 2.0, 0.0]
    assert [p["truncated"] for p in (base, trained, none)] == [0.125, 0.0, 0.0]
    assert (base["f1"]["mean"], base["cover_em"]["mean"], base["invalid"]) == (0.25, 0.25, 0.0)
    assert trained["subsets"]["greedy"]["one_hop"]["mean"] == 0.75
    assert trained["subsets"]["sampled"]["known"]["questions"] == 8
    assert set(base["after_fruitless"]) == {"repeated", "reworded", "other_query"}
    # Six changes, five up and one down, of eight questions.
    assert results["difference"]["em"]["mean"] == 0.5
    assert results["difference"]["em"]["low"] >= -0.25
    assert results["difference"]["em"]["high"] <= 1.0
    # Every question changed from 0 to 1: paired, there is nothing uncertain about it.
    assert results["difference"]["em_sampled"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def reverse_lines(path):
    path.write_text("".join(reversed(path.read_text().splitlines(True))))


def test_questions_are_paired_by_id_whatever_their_order(tmp_path):
    """Base is right on the first half; trained on the same and one more. Paired by position the difference would vary."""
    write_run(tmp_path / "base", policy(*["yes"] * 20, *["no"] * 20))
    write_run(tmp_path / "trained", policy(*["yes"] * 20, *["no"] * 19, "yes"))
    straight = run_compare(tmp_path)
    page = (tmp_path / "out" / "report.html").read_text()
    assert straight["difference"]["em"]["low"] == 0.0  # No question got worse, so no resample can.
    for name in ("questions.jsonl", "trajectories/test.jsonl"):
        reverse_lines(tmp_path / "trained" / name)
    assert run_compare(tmp_path) == straight
    assert (tmp_path / "out" / "report.html").read_text() == page


def test_same_runs_give_the_same_bytes(runs):
    files = ["results.json", "report.md", "report.html"]
    written = []
    for _ in range(2):
        run_compare(runs)
        written.append([(runs / "out" / name).read_bytes() for name in files])
    assert written[0] == written[1]
    assert sorted(path.name for path in (runs / "out").iterdir()) == sorted(files)


def test_greedy_alone_is_enough(tmp_path, capsys):
    for name in ("base", "trained"):
        write_run(tmp_path / name, policy("yes", "no"))
    results = run_compare(tmp_path)
    assert results["difference"]["em_sampled"] is None
    assert results["policies"]["base"]["em_sampled"] is None
    assert results["policies"]["base"]["subsets"]["sampled"] == {}
    assert "sampled +" not in capsys.readouterr().out


def test_other_engines_have_questions_of_their_own(runs, capsys):
    few = policy("yes", "no", "no")
    write_run(runs / "poor", few, engine="simulator")
    write_run(runs / "base_poor", policy("no", "no", "no"), engine="simulator")
    label = "simulator, noise 0.5"
    results = run_compare(runs, f"trained@{label}={runs / 'poor'}", f"base@{label}={runs / 'base_poor'}")
    assert results["other_engines"][label]["trained"]["em"]["mean"] == 0.3333
    assert list(results["other_engines"]) == [label]
    assert list(results["other_engines"][label]) == ["trained", "base"]
    assert set(results["policies"]) == {"base", "trained"}
    shown = capsys.readouterr().out
    assert f"{label}, 3 questions" in shown
    assert "33.3" in shown


def edit(path, change):
    path.write_text(change(path.read_text()))


def drop_first_line(text):
    return text.partition("\n")[2]


def double_first_line(text):
    return text.partition("\n")[0] + "\n" + text


DAMAGE = {
    "no folder": (lambda f: None, ["base=nowhere"], "nowhere holds no results.json"),
    "no results": (lambda f: (f / "base/results.json").unlink(), [], "base holds no results.json"),
    "not JSON": (lambda f: edit(f / "base/results.json", lambda t: "{"), [], "is not JSON"),
    "not an object": (lambda f: edit(f / "base/results.json", lambda t: "[]"), [], 'expected results with "schema": 1'),
    "schema": (
        lambda f: edit(f / "base/results.json", lambda t: t.replace("1", "2", 1)),
        [],
        'expected results with "schema": 1',
    ),
    "no questions": (lambda f: (f / "base/questions.jsonl").unlink(), [], "questions.jsonl is missing or empty"),
    "empty questions": (lambda f: edit(f / "base/questions.jsonl", lambda t: ""), [], "questions.jsonl is missing or empty"),
    "sampled only": (
        lambda f: edit(f / "base/questions.jsonl", lambda t: "".join(t.splitlines(True)[8:])),
        [],
        "holds no greedy outcome",
    ),
    "half a line": (lambda f: edit(f / "base/questions.jsonl", lambda t: t[:-20]), [], "line 16 is not JSON"),
    "no column": (lambda f: edit(f / "base/questions.jsonl", lambda t: t.replace('"em"', '"m"')), [], "line 1 has no em"),
    "one twice": (lambda f: edit(f / "base/questions.jsonl", double_first_line), [], "greedy outcome of question toy/0 twice"),
    "one missing": (
        lambda f: edit(f / "base/questions.jsonl", drop_first_line),
        [],
        r"different questions \(0 only in the first, 1 only",
    ),
    "other subset": (
        lambda f: edit(f / "base/questions.jsonl", lambda t: t.replace("known", "new", 1)),
        [],
        "different questions",
    ),
    "one engine": (lambda f: write_run(f / "other", policy("no"), engine="http"), ["x={f}/other"], "name it x@http="),
    "a simulator": (
        lambda f: edit(f / "base/results.json", lambda t: '{"schema": 1, "seed": 0, "simulator": {}}'),
        [],
        "goes to --simulator",
    ),
    "no simulator": (lambda f: None, ["--simulator={f}/base"], "holds no recall"),
    "no curves": (lambda f: None, ["--training={f}/base"], "holds no curves"),
    "label sets differ": (
        lambda f: [write_run(f / name, policy(*["no"] * n)) for name, n in (("a", 2), ("b", 3))],
        ["base@poor={f}/a", "trained@poor={f}/b"],
        "different questions",
    ),
    "trajectories of others": (
        lambda f: reverse_lines(f / "base/trajectories/test.jsonl"),
        [],
        "does not go with questions.jsonl",
    ),
    "twice": (lambda f: None, ["base={f}/none"], "base is given twice"),
    "no name": (lambda f: None, ["={f}/none"], "expected NAME=FOLDER"),
    "no equals": (lambda f: None, ["none"], "expected NAME=FOLDER"),
    "no label": (lambda f: None, ["base@={f}/none"], "expected NAME=FOLDER"),
    "blank in a name": (lambda f: None, ["no search={f}/none"], "expected NAME=FOLDER"),
    "seconds": (lambda f: None, ["--seconds=test=soon"], "expected STAGE=SECONDS"),
    "seconds below 0": (lambda f: None, ["--seconds=test=-1"], "0 or more"),
    "seconds nan": (lambda f: None, ["--seconds=test=nan"], "0 or more"),
    "unknown option": (lambda f: None, ["--plot"], "unrecognized arguments: --plot"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_refused(runs, name):
    damage, more, message = DAMAGE[name]
    damage(runs)
    first = [] if name == "no folder" else [f"base={runs / 'base'}"]
    args = [*first, f"trained={runs / 'trained'}", *(m.format(f=runs) for m in more), f"--out={runs / 'out'}"]
    with pytest.raises(ValueError, match=message):
        compare.main(args)
    assert not (runs / "out").exists()


def test_base_and_trained_are_needed(runs):
    with pytest.raises(ValueError, match="got base"):
        compare.main([f"base={runs / 'base'}", "--out", str(runs / "out")])


def test_compare_needs_neither_lightning_nor_transformers():
    code = "import sys, zs_lightning.evaluation.compare as c; print(sorted({'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.2, "rose"), (-0.2, -0.01, "fell"), (-0.1, 0.2, "No clear change"), (0.0, 0.2, "No clear change")],
)
def test_headline_says_no_more_than_the_interval(low, high, said):
    results = {"policies": {"base": {"em": {"mean": 0.3}}, "trained": {"em": {"mean": 0.4}}}}
    results["difference"] = {"em": {"mean": 0.1, "low": low, "high": high}}
    assert said in tables.headline(results)
    assert "30.0 % to 40.0 %" in tables.headline(results)


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


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_nothing_in_a_run_becomes_markup(hostile, capsys):
    run_compare(hostile, f"trained@{LABEL}={hostile / 'poor'}", f"--seconds={HOSTILE.split('=')[0]}=1")
    page = (hostile / "out" / "report.html").read_bytes().decode("utf-8")
    parsed = Page(page)
    allowed = (
        "a article b body circle div em figcaption figure footer h1 h2 h3 h4 head header html i li line main mark meta ol p"
    )
    allowed += " polyline section small span style svg table tbody td text th thead title tr"
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
    policy_ = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert ("content", policy_) in Page(page).attributes
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
    assert {len(re.findall("<t[hd]", row)) for row in rows} == {8, 4}
    # Markdown cuts what is too much in a row, so count in the source as well.
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {9, 5}
    assert all(line.startswith(("|", "## ")) for line in text.splitlines() if "alert" in line)
    assert "{{ 7 * 7 }}" in parsed.text


def test_terminal_table_fits_into_80_columns(runs):
    results = run_compare(runs, f"no_search={runs / 'none'}")
    file = io.StringIO()
    tables.show(results, Console(file=file, width=80, highlight=False))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split() == ["trained", "75.0", "100", "75.0", "75.0", "2.00", "0.0", "0.0"] for line in lines)
    assert "…" not in file.getvalue()
    assert "greedy +50.0 (" in file.getvalue()


# ---------------------------------------------------------------------- examples


def test_examples_are_of_every_outcome_and_of_both_policies(tmp_path):
    pairs = [("no", "yes")] * 9 + [("yes", "yes")] * 9 + [("yes", "no")] * 9 + [("no", "no")] * 9
    for number, name in enumerate(("base", "trained")):
        write_run(tmp_path / name, policy(*(p[number] for p in pairs)), policy(*["other"] * 36))
    sides = [(run.folder, run.lines) for run in compare.named_runs([f"{n}={tmp_path / n}" for n in ("base", "trained")])]
    chosen = report.choose_examples(*sides)
    outcomes = [(example["base"]["em"], example["trained"]["em"]) for example in chosen]
    assert {outcome: outcomes.count(outcome) for outcome in outcomes} == report.EXAMPLES
    for example in chosen:
        assert example["base"]["id"] == example["trained"]["id"]
        assert [t["turns"][-1]["content"] == "yes" for t in example.values()] == [t["em"] == 1 for t in example.values()]
    assert [e["base"]["id"] for e in chosen[:4]] != [f"toy/{i}" for i in range(4)]  # Drawn, not the first of the file.


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
    assert list(report.pieces(text)) == expected


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
    assert [part for part, hit in report.marked(text, answers) if hit] == hits


@given(st.text(alphabet="ab. (", max_size=30), st.lists(st.text(alphabet="ab.(", max_size=3), max_size=3))
def test_marking_loses_no_text(text, answers):
    parts = report.marked(text, answers)
    assert "".join(part for part, _ in parts) == text
    assert all(part.lower() in [a.lower() for a in answers] for part, hit in parts if hit)


# ---------------------------------------------------------------------- curves


def write_events(folder, steps, suffix=""):
    writer = SummaryWriter(str(folder), filename_suffix=suffix)
    for step, value in steps:
        writer.add_scalar("reward/mean", value, step)
        writer.add_scalar("seconds/rollout", 1.0, step)
    writer.close()


def test_curves_of_a_resumed_run_take_the_later_value(tmp_path):
    write_events(tmp_path, [(0, 0.25), (1, 0.5), (2, 9.0)], ".1")
    write_events(tmp_path, [(2, 0.75), (3, float("nan")), (4, 1.0)], ".2")
    assert report.read_curves(tmp_path) == {"reward/mean": [(0, 0.25), (1, 0.5), (2, 0.75), (4, 1.0)]}


def test_chart_by_hand():
    (chart,) = report.charts({"reward/em": [(0, 0.0), (5, 1.0), (10, 0.5)], "reward/mean": [(0, 1.0)]})
    # x from 38 to 412, y from 166 (0) to 10 (1).
    assert chart.series[0].raw == "38.0,166.0 225.0,10.0 412.0,88.0"
    assert chart.y_ticks == [(166.0, "0"), (88.0, "0.5"), (10.0, "1")]
    assert chart.x_ticks == [(38.0, "1"), (225.0, "6"), (412.0, "11")]


def test_charts_of_all_zeros_and_of_negative_rewards_stay_inside():
    found = report.charts({"noise/planned": [(0, 0.0), (1, 0.0)], "reward/mean": [(0, -0.5), (1, -0.1), (2, 0.2)]})
    for chart in found:
        places = [tuple(map(float, point.split(","))) for s in chart.series for point in s.raw.split()]
        assert all(38 <= x <= 412 and 10 <= y <= 166 for x, y in places)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(1, 9))
def test_running_mean_is_that_of_a_slow_reference(values, window):
    for i, mean in enumerate(report.running_mean(values, window)):
        reach = window // 2
        while i - reach < 0 or i + reach >= len(values):
            reach -= 1
        near = [value for j, value in enumerate(values) if abs(i - j) <= reach]
        assert mean == pytest.approx(sum(near) / len(near), abs=1e-9)


@given(st.floats(1e-6, 1e6))
def test_nice_maximum_holds_the_value_without_much_air(value):
    assert value * (1 - 1e-8) <= report.nice_maximum(value) <= 2.01 * value


def test_svg_of_the_page_is_well_formed(runs):
    rng = random.Random(0)
    writer = SummaryWriter(str(runs / "fit"))
    for _, _, series in report.CHARTS:
        for tag, _ in series:
            for step in range(20):
                writer.add_scalar(tag, rng.random(), step)
    writer.close()
    run_compare(runs, f"--training={runs / 'fit'}")
    drawings = re.findall("<svg.*?</svg>", (runs / "out" / "report.html").read_text(), re.DOTALL)
    lines = [ElementTree.fromstring(drawing).findall("polyline") for drawing in drawings]
    assert [len(found) for found in lines] == [2, 2, 2, 4]  # A raw and a smooth line for each series.
    assert all(len(line.get("points").split()) == 20 for found in lines for line in found)


# ---------------------------------------------------------------------- board

WORDS = {
    2: "<search> a|b </search>",
    3: "\n<information>`x` *y* _z_ [l](http://e) &amp;</information>\n",
    4: "<answer>yes</answer>",
}


def test_trajectory_table_shows_what_was_written_and_read_and_what_was_trained():
    shown = trajectory(0, "yes", question="Is <b>it</b> | so?")
    html = render_markdown(trajectory_table(shown, lambda ids: "".join(WORDS[i] for i in ids)), extensions=["tables"])
    parsed = Page(html)
    assert set(parsed.tags) <= {"p", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert "Is <b>it</b> | so?" in parsed.text
    cells = [Page(cell).text for cell in re.findall("<td>(.*?)</td>", html, re.DOTALL)]
    first, read, last = ("".join(WORDS[i].strip().splitlines()) for i in (2, 3, 4))
    assert [cells[i : i + 4] for i in range(0, len(cells), 4)] == [
        ["1", "policy", first, "yes"],
        ["1", "engine", f"⏎ {read}", "no"],
        ["2", "policy", last, "yes"],
    ]
    shown.status, shown.failure = Status.FAILED, "no | answer"
    assert "| yes |" not in trajectory_table(shown, lambda ids: "")
    assert "no &#124; answer" in trajectory_table(shown, lambda ids: "")


def test_best_and_worst_are_two_different_rollouts():
    three = policy("a", "b", "c")
    three[1].reward, three[2].reward = 1.0, -1.0
    assert best_and_worst(three) == [three[1], three[2]]
    assert [t.example.id for t in best_and_worst(policy("a", "b"))] == ["0", "1"]
    assert len(best_and_worst(policy("a"))) == 1


def run_board(board, loggers, zero=True):
    trainer = SimpleNamespace(loggers=loggers, is_global_zero=zero)
    module = SimpleNamespace(trajectories=policy("yes", "no"), encoder=SimpleNamespace(decode=lambda ids: f"{len(ids)} tokens"))
    board.on_fit_start(trainer, module)
    for step in range(5):
        board.on_train_batch_end(trainer, module, None, None, step)


def test_board_writes_layout_and_text_where_tensorboard_finds_them(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    run_board(Board(every=2), [CSVLogger(str(tmp_path / "csv")), logger])
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    assert set(events.Tags()["tensors"]) == {"custom_scalars__config__", "trajectories/text_summary"}
    texts = events.Tensors("trajectories/text_summary")
    assert [event.step for event in texts] == [0, 2, 4]
    assert texts[0].tensor_proto.string_val[0].count(b"1 tokens") == 6


def test_board_is_quiet_on_other_ranks_and_without_tensorboard(tmp_path):
    run_board(Board(), [TensorBoardLogger(str(tmp_path), name="", version="")], zero=False)
    run_board(Board(), [])
    assert not list(tmp_path.glob("*tfevents*"))


def test_layout_names_tags_that_are_logged():
    rollouts = policy("yes", "no")
    for turn in rollouts[0].searches:
        turn.noisy = True
    logged = set(step_metrics(rollouts, {}, 0.5, {"rollout": 1.0, "update": 1.0})) | {"val/em", "val/f1"}
    shown = [tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags]
    assert set(shown) <= logged
    assert len(shown) == len(set(shown))
    assert {tag for _, _, series in report.CHARTS for tag, _ in series} <= logged


def test_board_refuses_a_rhythm_of_zero():
    with pytest.raises(ValueError, match="Board: every must be >= 1; got 0"):
        Board(every=0)
