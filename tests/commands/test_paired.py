"""compare with any runs: each against the first one, question by question."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from markdown import markdown as render_markdown
from rich.console import Console

from support.runfolders import CONTROLS, HOSTILE, Page, policy, trajectory, write_run
from zs_lightning.commands.compare import command as compare
from zs_lightning.commands.compare import overview
from zs_lightning.runs import paired

YES, NO = "yes", "no"


def run_compare(folder, *runs):
    compare.main([*map(str, runs), "--out", str(folder / "out")])
    return json.loads((folder / "out" / "results.json").read_text())


def configured(folder, engine, answers, checkpoint="runs/grpo/last.ckpt", **arguments):
    """A run of ten questions with the config that a test leaves."""
    write_run(folder, policy(*answers), engine=engine)
    config = {"ckpt_path": checkpoint, "model": {"class_path": "zs_lightning.modules.PolicyRL", "init_args": arguments}}
    (folder / "config.yaml").write_text("# command: test\n" + yaml.safe_dump(config))
    return folder


def search(**options):
    return {"class_path": "zs_lightning.search.X", "init_args": options}


def test_from_simulator_to_real_engines_in_one_view(tmp_path, capsys):
    """The same checkpoint under three levels of noise, BM25 good and poor, a web engine, and without a search."""
    right = [8, 6, 4, 7, 5, 9, 1]
    kinds = [("simulator", {"noise_prob": p, "search": search(count=3)}) for p in (0.0, 0.5, 1.0)]
    kinds += [("bm25", {"noise_prob": 0.0, "search": search(count=3, drop=drop, api_key="secret")}) for drop in (0.0, 0.5)]
    kinds += [("serper", {"noise_prob": 0.0, "search": search(count=3)})]
    kinds += [("bm25", {"rollout": {"max_turns": 0, "retrieve_first": False}, "search": search(count=3, drop=0.0)})]
    folders = [
        configured(tmp_path / f"run{i}", engine, [YES] * right[i] + [NO] * (10 - right[i]), **arguments)
        for i, (engine, arguments) in enumerate(kinds)
    ]
    results = run_compare(tmp_path, *folders)
    assert list(results) == ["schema", "normalisation", "decoding", "first", "runs"]
    assert [(run["name"], run["policy"], run["setting"]) for run in results["runs"]] == [
        ("run0", "grpo", "simulator, noise 0"),
        ("run1", "grpo", "simulator, noise 0.5"),
        ("run2", "grpo", "simulator, noise 1"),
        ("run3", "grpo", "bm25, drop 0"),
        ("run4", "grpo", "bm25, drop 0.5"),
        ("run5", "grpo", "serper"),
        ("run6", "grpo", "no search"),
    ]
    assert [run["em"]["mean"] for run in results["runs"]] == [n / 10 for n in right]
    assert results["runs"][0]["difference"] is None
    assert [run["difference"]["em"]["mean"] for run in results["runs"][1:]] == [-0.2, -0.4, -0.1, -0.3, 0.1, -0.7]
    assert all(run["difference"]["questions"] == 10 for run in results["runs"][1:])
    shown = capsys.readouterr().out
    for part in ("grpo: bm25,", "drop 0.5"):
        assert part in shown
    assert "secret" not in shown + "".join(path.read_text() for path in (tmp_path / "out").iterdir())


def test_one_shot_retrieval_and_labels_of_the_user(tmp_path):
    rollout = {"max_turns": 0, "retrieve_first": True}
    configured(tmp_path / "a", "bm25", [YES, NO], None, rollout=rollout)
    configured(tmp_path / "b", "bm25", [YES, YES], None, rollout={**rollout, "max_turns": 4})
    results = run_compare(tmp_path, f"x={tmp_path / 'a'}", f"y@my engine={tmp_path / 'b'}", f"z={tmp_path / 'b'}")
    assert [(run["name"], run["policy"], run["setting"]) for run in results["runs"]] == [
        ("x", "untrained", "bm25, question searched first, no other search"),
        ("y", "untrained", "my engine"),
        ("z", "untrained", "bm25, question searched first"),
    ]


def test_differences_are_of_the_common_questions_and_the_others_are_counted(tmp_path, capsys):
    """The first is right on 0 and 1 of 0..5. The second has 2..7 and gains 2, 3 and 4 of the common 2..5."""
    questions = policy(YES, YES, NO, NO, NO, NO)
    others = [trajectory(i, YES if i in (2, 3, 4, 6) else NO) for i in range(2, 8)]
    write_run(tmp_path / "a", questions)
    write_run(tmp_path / "b", others)
    results = run_compare(tmp_path, tmp_path / "a", tmp_path / "b")
    pairs = results["runs"][1]["difference"]
    assert (pairs["questions"], pairs["only_here"], pairs["only_in_first"]) == (4, 2, 2)
    assert pairs["em"]["mean"] == pairs["em_folded"]["mean"] == pairs["f1"]["mean"] == pairs["cover_em"]["mean"] == 0.75
    assert results["runs"][1]["questions"] == 6  # Its own EM is over all of its questions.
    assert results["runs"][1]["em"]["mean"] == 0.66666667
    said = "the difference is over the 4 questions that both answered; 2 only of b and 2 only of a are left out."
    assert said in " ".join(capsys.readouterr().out.split())
    for name in ("report.md", "report.html"):
        assert said in (tmp_path / "out" / name).read_text()


def test_scores_over_other_questions_are_marked(tmp_path, capsys):
    """Of the first run's subsets a (0 to 3) and b (4, 5), the second has half of a and all of b, the third both."""
    rows = [trajectory(i, YES, subset="a" if i < 4 else "b") for i in range(6)]
    for name, kept in (("first", rows), ("second", rows[2:]), ("third", rows)):
        write_run(tmp_path / name, kept)
    results = run_compare(tmp_path, *(tmp_path / name for name in ("first", "second", "third")))
    found = {run["name"]: run["other_questions"] for run in results["runs"]}
    same = {"subsets": [], "sources": []}
    assert found == {"first": same, "second": {"subsets": ["a"], "sources": ["toy"]}, "third": same}
    marks = {name: [part["mark"] for part in parts] for name, parts in overview.parts(results)[1]}
    assert marks == {"a": ["", "*", ""], "b": ["", "", ""]}
    assert [overview.questions(run) for run in results["runs"]] == ["6", "4*", "6"]
    said = "* Over other questions than those of first: do not compare it with the other scores."
    assert said in " ".join(capsys.readouterr().out.split())
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert page.count("100*<") == 1
    assert "<td>4*</td>" in page
    assert said in page
    assert text.count("100&#42; (") == 1
    assert run_compare(tmp_path, tmp_path / "first", tmp_path / "third")["runs"][1]["other_questions"] == same
    assert "Over other questions" not in (tmp_path / "out" / "report.html").read_text()


def test_the_mean_over_data_sets_is_marked_if_one_of_them_has_other_questions(tmp_path):
    write_run(tmp_path / "a", mixed({"nq": 8, "bamboogle": 2}, {"nq": 4, "bamboogle": 0}))
    write_run(tmp_path / "b", mixed({"nq": 8, "bamboogle": 1}, {"nq": 4, "bamboogle": 0}))
    _, rows = overview.parts(run_compare(tmp_path, tmp_path / "a", tmp_path / "b"))
    marks = {name: [part["mark"] for part in parts] for name, parts in rows}
    assert marks == {"nq": ["", ""], "bamboogle": ["", "*"], "mean of data sets": ["", "*"]}


def test_an_interval_stands_below_its_difference_and_words_wrap(tmp_path):
    """In a cell of its own line each, a table of several runs fits into the page."""
    for name in ("a", "b"):
        write_run(tmp_path / name, policy(YES, NO))
    run_compare(tmp_path, tmp_path / "a", f"b@{'many words ' * 20}={tmp_path / 'b'}")
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<span class="value">+0.0</span><span class="spread">−57.3 to +57.3</span>' in page
    assert f'<span class="about">{("many words " * 20).strip()}</span>' in page
    assert re.search(r"\.about \{(?!.*nowrap)", page)


def test_one_id_with_two_questions_is_no_pair(tmp_path):
    write_run(tmp_path / "a", policy(YES, NO, question="Old?"))
    write_run(tmp_path / "b", [*policy(YES, question="New?"), *policy(NO, YES, question="Old?")[1:]])
    pairs = run_compare(tmp_path, tmp_path / "a", tmp_path / "b")["runs"][1]["difference"]
    assert (pairs["questions"], pairs["em"]["mean"]) == (1, 1.0)


def mixed(sizes, right):
    """Questions of several data sets; the first ones of each are answered rightly."""
    rows = []
    for name, size in sizes.items():
        for i in range(size):
            made = trajectory(i, YES if i < right[name] else NO, subset=name)
            made.example = replace(made.example, source=f"{name}/file")
            rows.append(made)
    return rows


def test_data_sets_stand_side_by_side_with_their_mean(tmp_path, capsys):
    write_run(tmp_path / "a", mixed({"nq": 8, "bamboogle": 2}, {"nq": 4, "bamboogle": 0}))
    write_run(tmp_path / "b", mixed({"nq": 8}, {"nq": 6}))
    results = run_compare(tmp_path, tmp_path / "a", tmp_path / "b")
    assert results["runs"][0]["em"]["mean"] == 0.4
    assert results["runs"][0]["mean_of_sources"]["em"]["mean"] == 0.25
    heading, rows = overview.parts(results)
    assert heading == "EM by data set"
    means = [(name, [None if part is None else part["mean"] for part in parts]) for name, parts in rows]
    # The second run's one data set goes by its whole source.
    assert means == [
        ("bamboogle", [0.0, None]),
        ("nq", [0.5, None]),
        ("nq/file", [None, 0.75]),
        ("mean of data sets", [0.25, None]),
    ]
    assert "EM by data set" in capsys.readouterr().out


def test_sampled_runs_are_compared_if_none_is_greedy(tmp_path):
    write_run(tmp_path / "a", [], policy(YES, NO))
    write_run(tmp_path / "b", [], policy(YES, YES))
    results = run_compare(tmp_path, tmp_path / "a", tmp_path / "b")
    assert (results["decoding"], results["runs"][1]["difference"]["em"]["mean"]) == ("sampled", 0.5)


def test_folders_of_one_name_go_by_their_path(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name / "test", policy(YES, NO))
    results = run_compare(tmp_path, tmp_path / "a" / "test", tmp_path / "b" / "test")
    assert [run["name"] for run in results["runs"]] == [str(tmp_path / name / "test") for name in ("a", "b")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{f}/a"], "needs two runs or more; got a"),
        (["{f}/a", "{f}/nothing"], "nothing holds no results.json"),
        (["{f}/a", "{f}/fit"], "fit is not a test of a policy"),
        (["{f}/a", "{f}/other"], "a and .*other have no question in common"),
        (["{f}/a", "{f}/out"], "out holds what compare wrote; name the run folders of the tests that it compared"),
        (["{f}/a", "{f}/sampled"], "the runs share no decoding"),
        (["{f}/a", "{f}/a"], "a is given twice"),
        (["{f}/a", "{f}/b", "--training={f}/fit"], "go with base=FOLDER and trained=FOLDER"),
        (["{f}/a", "{f}/old"], "questions.jsonl line 1 has no forged; run the test again with this version"),
    ],
)
def test_what_is_refused(arguments, sentence, tmp_path):
    write_run(tmp_path / "a", policy(YES, NO))
    write_run(tmp_path / "b", policy(YES, NO))
    write_run(tmp_path / "other", policy(YES, NO, question="Something else?"))
    write_run(tmp_path / "sampled", [], policy(YES, NO))
    run_compare(tmp_path, tmp_path / "a", tmp_path / "b")
    lines = write_run(tmp_path / "old", policy(YES, NO)) / "questions.jsonl"
    lines.write_text(lines.read_text().replace('"forged"', '"forgotten"'))
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "results.json").write_text('{"schema": 1, "seed": 0, "simulator": {}}')
    with pytest.raises(ValueError, match=sentence):
        compare.main([argument.format(f=tmp_path) for argument in arguments])


def test_without_out_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(tmp_path / name, policy(YES, NO))
    compare.main(["a", "b"])
    assert "2 runs, greedy, each against a" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_terminal_table_fits_into_80_columns(tmp_path):
    for name, answers in (("untrained", [NO] * 9 + [YES]), ("trained_for_long", [YES] * 9 + [NO])):
        configured(tmp_path / name, "simulator", answers, noise_prob=0.25)
    results = run_compare(tmp_path, tmp_path / "untrained", tmp_path / "trained_for_long")
    file = io.StringIO()
    overview.show(results, Console(file=file, width=80, highlight=False))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in file.getvalue()
    row = next(line for line in lines if "90.0" in line)
    assert re.search(r"10 +90\.0 +\+80\.0 +90\.0 +1\.00 +0\.0 +0\.0", row)


def test_nothing_in_a_run_becomes_markup(tmp_path):
    text = HOSTILE + CONTROLS
    label = text.replace("=", "-")
    for name in ("a", "b"):
        write_run(tmp_path / name, policy(YES, NO, subset=f"a|b\n{text}"), engine=text)
    run_compare(tmp_path, tmp_path / "a", f"b@{label}={tmp_path / 'b'}")
    page = (tmp_path / "out" / "report.html").read_bytes().decode("utf-8")
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "img" not in parsed.tags
    assert ("http-equiv", "Content-Security-Policy") in parsed.attributes
    assert "{{ 7 * 7 }}" in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2028\ufeff]", page)
    rendered = render_markdown((tmp_path / "out" / "report.md").read_text(), extensions=["tables"])
    assert set(Page(rendered).tags) <= {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td"}


def test_settings_without_a_config_are_the_engines(tmp_path):
    runs = compare.named_runs([str(write_run(tmp_path / name, policy(YES), engine=name)) for name in ("bm25", "simulator")])
    assert paired.settings(runs) == ["bm25", "simulator"]
    assert [paired.policy_name(run) for run in runs] == ["", ""]


def test_compare_loads_no_heavy_library():
    code = (
        "import sys, zs_lightning.commands.compare.command; "
        "print(sorted({'lightning', 'transformers', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
