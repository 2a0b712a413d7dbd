"""compare: what stands in results.json, each run against the first, and what is refused."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from support.runfolders import eight_questions, policy, reverse_lines, run_compare, trajectory, write_run
from zs_lightning.cli import main
from zs_lightning.commands.compare import command as compare
from zs_lightning.commands.compare.report import Report
from zs_lightning.errors import UserError


@pytest.fixture
def runs(tmp_path):
    return eight_questions(tmp_path)


def test_out_replaces_nothing_but_a_comparison(runs):
    """Twice into one folder is fine; into a run's, or beside other results, nothing is written."""
    run_compare(runs)
    run_compare(runs)
    pair = [f"{name}={runs / name}" for name in ("base", "trained")]
    (runs / "fit").mkdir()
    (runs / "fit" / "config.yaml").write_text("seed_everything: 0")
    (runs / "odd").mkdir()
    (runs / "odd" / "results.json").write_text("[1]")
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    for name in ("base", "fit", "odd"):
        with pytest.raises(UserError, match=r"^--out: .* holds files of a run, or another results.json than that of a"):
            compare.main([*pair, "--out", str(runs / name)])
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_lacks_a_sign_gets_the_rest(encoding, runs, monkeypatch):
    """A minus sign and lines of a table, which no ASCII terminal has; the files have all of it."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    main(["compare", f"a={runs / 'trained'}", f"b={runs / 'base'}", "--out", str(runs / "out")])
    said = terminal.buffer.getvalue().decode(encoding)
    assert "?50.0" in said
    assert "−50.0" in (runs / "out" / "report.md").read_text("utf-8")


def test_this_folder_has_its_name(runs, monkeypatch):
    monkeypatch.chdir(runs / "trained")
    assert [run.name for run in compare.named_runs([".", str(runs / "base")])] == ["trained", "base"]


BAD_VALUES = {
    "em": [None, "x", [1], float("nan"), float("inf"), 10**400, True],
    "subset": [None],
    "id": [["a"]],
    "golden_answers": ["yes", [1]],
    "searches": ["1"],
    "empty_searches": ["0"],
    "answer": [1],
}


@pytest.mark.parametrize("name", [*BAD_VALUES, "line", "bytes", "deep", "old", "seed", "engine", "config", "results"])
def test_values_that_cannot_be_results_are_one_sentence(runs, name):
    questions, results = runs / "trained" / "questions.jsonl", runs / "trained" / "results.json"
    first, *rest = questions.read_text().splitlines(True)
    stored = json.loads(results.read_text())
    odd = {"line": ["5\n"], "deep": ["[" * 100_000 + "\n"], "bytes": ["\xff\n"]}
    odd |= {key: [json.dumps(json.loads(first) | {key: value}) + "\n" for value in BAD_VALUES[key]] for key in BAD_VALUES}
    old = {key: value for key, value in json.loads(first).items() if key != "em_folded"}
    odd["old"] = [json.dumps(old | {"golden_answers": 3}) + "\n"]
    for line in odd.get(name, [""]):
        if line:
            questions.write_bytes((line + "".join(rest)).encode("latin-1" if name == "bytes" else "utf-8"))
        elif name == "config":
            (runs / "trained" / "config.yaml").write_bytes(b"path: l\xe4ufe")
        else:
            changed = {"seed": {"seed": None}, "engine": {"engine": 5}, "results": {"decodings": float("nan")}}[name]
            results.write_text(json.dumps(stored | changed))
        with pytest.raises(UserError, match=r"trained.*(questions\.jsonl line 1 (is|has)|results\.json|config\.yaml)"):
            run_compare(runs)


def test_a_simulators_recall_must_be_shares(runs):
    (runs / "simulator").mkdir()
    for recall in ([1], {"useful_recall": None, "noisy_recall": {}}, {"useful_recall": {"mean": "x"}, "noisy_recall": 1}):
        (runs / "simulator" / "results.json").write_text(json.dumps({"schema": 1, "seed": 7, "simulator": recall}))
        with pytest.raises(UserError, match=r"^--simulator: .* holds no recall"):
            run_compare(runs, f"--simulator={runs / 'simulator'}")


# ---------------------------------------------------------------------- results.json


def named(results, key=None):
    """The runs by name, or one of their entries."""
    return {run["name"]: run[key] if key else run for run in results["runs"]}


def greedy(results):
    return {name: decodings["greedy"] for name, decodings in named(results, "decodings").items()}


def test_results_by_hand(runs):
    recall = {name: {"mean": 0.5, "low": 0.4, "high": 0.6} for name in ("useful_recall", "noisy_recall")}
    (runs / "simulator").mkdir()
    (runs / "simulator" / "results.json").write_text(json.dumps({"schema": 1, "seed": 7, "simulator": recall}))
    more = [f"no_search={runs / 'none'}", f"--simulator={runs / 'simulator'}", "--seconds=install=12.34567", "--seconds=test=3"]
    results = run_compare(runs, *more)
    assert list(results) == ["schema", "normalisation", "decoding", "runs", "simulator", "seconds"]
    scalars = [results[key] for key in ("schema", "decoding", "simulator", "seconds")]
    assert scalars == [2, "greedy", recall, {"install": 12.3457, "test": 3.0}]
    for run, name in zip(results["runs"], ("base", "trained", "none"), strict=True):
        head = [run[key] for key in ("label", "folder", "policy", "setting", "engine", "seed")]
        assert head == ["", str(runs / name), "", "bm25", "bm25", 7]
    assert list(named(results)) == ["base", "trained", "no_search"]
    base, trained, none = greedy(results).values()
    assert [p["em"]["mean"] for p in (base, trained, none)] == [0.25, 0.75, 0.0]
    assert [run["sampled"]["em"]["mean"] for run in named(results, "decodings").values()] == [0.0, 1.0, 0.0]
    assert [p["searches_per_question"] for p in (base, trained, none)] == [1.0, 2.0, 0.0]
    assert [p["truncated"] for p in (base, trained, none)] == [0.125, 0.0, 0.0]
    assert (base["f1"]["mean"], base["cover_em"]["mean"], base["invalid"]) == (0.25, 0.25, 0.0)
    assert trained["subsets"]["one_hop"]["mean"] == 0.75
    assert named(results)["trained"]["decodings"]["sampled"]["subsets"]["known"]["questions"] == 8
    assert set(base["after_fruitless"]) == {"repeated", "reworded", "other_query"}
    assert base == json.loads((runs / "base/results.json").read_text())["decodings"]["greedy"]
    difference = named(results, "difference")
    assert difference["base"] is None
    assert difference["trained"]["greedy"]["em"]["mean"] == 0.5
    # Every sampled answer changed from 0 to 1, but eight questions are too few for an interval.
    assert difference["trained"]["sampled"]["em"] == {"mean": 1.0}


def test_a_share_is_rounded_once(tmp_path, capsys):
    """748 of 827 is 90.447 %: with four digits it would be 0.9045, and then 90.5 %."""
    for name in ("base", "trained"):
        write_run(tmp_path / name, policy(*["yes"] * 748, *["no"] * 79))
    results = run_compare(tmp_path)
    assert round(greedy(results)["base"]["em"]["mean"], 6) == 0.904474
    said = [capsys.readouterr().out, *((tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))]
    for text in said:
        assert "90.4" in text
        assert "90.5" not in text


def test_questions_are_paired_by_id_whatever_their_order(tmp_path):
    """Base is right on the first half; trained on the same and one more. Paired by position the difference would vary."""
    write_run(tmp_path / "base", policy(*["yes"] * 20, *["no"] * 20))
    write_run(tmp_path / "trained", policy(*["yes"] * 20, *["no"] * 19, "yes"))
    straight = run_compare(tmp_path)
    page = (tmp_path / "out" / "report.html").read_text()
    assert 0.0 < named(straight, "difference")["trained"]["greedy"]["em"]["high"] < 0.1
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
    assert [list(found) for found in named(results, "decodings").values()] == [["greedy"]] * 2
    assert list(named(results, "difference")["trained"]) == ["greedy"]
    assert "sampled" not in capsys.readouterr().out.partition("EM: exact match")[0]


def test_sampled_runs_are_compared_if_none_is_greedy(tmp_path, capsys):
    write_run(tmp_path / "base", [], policy("yes", "no"))
    write_run(tmp_path / "trained", [], policy("yes", "yes"))
    results = run_compare(tmp_path)
    assert results["decoding"] == "sampled"
    assert named(results, "difference")["trained"]["sampled"]["em"]["mean"] == 0.5
    assert "greedy" not in capsys.readouterr().out


def test_other_engines_have_questions_of_their_own(runs, capsys):
    """With one label the runs are compared among themselves, whatever else is tested."""
    label = "simulator, noise 0.5"
    write_run(runs / "base_poor", policy("no", "no", "no"), engine="simulator")
    write_run(runs / "poor", policy("yes", "no", "no"), engine="simulator")
    results = run_compare(runs, f"base@{label}={runs / 'base_poor'}", f"trained@{label}={runs / 'poor'}")
    assert [(run["name"], run["label"]) for run in results["runs"]] == [
        ("base", ""),
        ("trained", ""),
        ("base", label),
        ("trained", label),
    ]
    first, second = results["runs"][2:]
    assert second["decodings"]["greedy"]["em"]["mean"] == 0.33333333
    assert (first["difference"], second["difference"]["greedy"]["questions"]) == (None, 3)
    assert second["difference"]["greedy"]["em"]["mean"] == 0.33333333
    shown = capsys.readouterr().out
    assert f"{label}, 3 questions" in shown
    assert "+33.3" in shown


# ---------------------------------------------------------------------- pairs


def test_differences_are_of_the_common_questions_and_the_others_are_counted(tmp_path, capsys):
    """The first is right on 0 and 1 of 0..5. The second has 2..7 and gains 2, 3 and 4 of the common 2..5."""
    write_run(tmp_path / "base", policy(*["yes"] * 2, *["no"] * 4))
    write_run(tmp_path / "trained", [trajectory(i, "yes" if i in (2, 3, 4, 6) else "no") for i in range(2, 8)])
    results = run_compare(tmp_path)
    pairs = named(results, "difference")["trained"]["greedy"]
    assert (pairs["questions"], pairs["only_here"], pairs["only_in_first"]) == (4, 2, 2)
    assert pairs["em"]["mean"] == pairs["em_folded"]["mean"] == pairs["f1"]["mean"] == pairs["cover_em"]["mean"] == 0.75
    trained = greedy(results)["trained"]
    assert (trained["questions"], trained["em"]["mean"]) == (6, 0.66666667)  # Its own EM is over all of its questions.
    said = "the difference is over the 4 questions that both answered; 2 only of trained and 2 only of base are left out."
    assert said in " ".join(capsys.readouterr().out.split())
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert said in text
        assert "Too few questions (4) to claim a change in exact match: by +75.0 points." in text


def test_one_id_with_two_questions_is_no_pair(tmp_path):
    write_run(tmp_path / "base", policy("yes", "no", question="Old?"))
    write_run(tmp_path / "trained", [*policy("yes", question="New?"), *policy("no", "yes", question="Old?")[1:]])
    pairs = named(run_compare(tmp_path), "difference")["trained"]["greedy"]
    assert (pairs["questions"], pairs["em"]["mean"]) == (1, 1.0)


def test_scores_over_other_questions_are_marked(tmp_path, capsys):
    """The first run has the questions 0 to 5, the second 2 to 5, the third all."""
    rows = [trajectory(i, "yes", subset="a" if i < 4 else "b") for i in range(6)]
    for name, kept in (("first", rows), ("second", rows[2:]), ("third", rows)):
        write_run(tmp_path / name, kept)
    scores, parts = Report(run_compare(tmp_path, names=("first", "second", "third"))).tables()
    assert [row[1].value for row in scores.rows()] == ["100", "100*", "100"]
    for number, name in enumerate("ab"):
        assert [cell.value for cell in parts.rows()[number]] == [name, "42"[number], "100", "100*", "100"]
    said = "* Not over the questions of the first: not to be compared with its score."
    assert said in " ".join(capsys.readouterr().out.split())
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert page.count(">100*<") == 3
    assert said in page
    assert text.count("100&#42;") == 3
    run_compare(tmp_path, names=("first", "third"))
    assert "Not over the questions" not in (tmp_path / "out" / "report.html").read_text()


def mixed(sizes, right):
    """Questions of several data sets; the first ones of each are answered rightly."""
    rows = []
    for name, size in sizes.items():
        for i in range(size):
            made = trajectory(i, "yes" if i < right[name] else "no", subset=name)
            made.example = replace(made.example, source=f"{name}/file")
            rows.append(made)
    return rows


def test_data_sets_stand_side_by_side_with_their_mean(tmp_path, capsys):
    write_run(tmp_path / "a", mixed({"nq": 8, "bamboogle": 2}, {"nq": 4, "bamboogle": 0}))
    write_run(tmp_path / "b", mixed({"nq": 8}, {"nq": 6}))
    results = run_compare(tmp_path, names=("a", "b"))
    assert greedy(results)["a"]["em"]["mean"] == 0.4
    assert greedy(results)["a"]["mean_of_sources"]["em"]["mean"] == 0.25
    table = Report(results).tables()[1]
    assert table.title == "EM by data set, greedy"
    # The second run's one data set goes by its whole source.
    assert [[cell.value for cell in row] for row in table.rows()] == [
        ["bamboogle", "2", "0.0", "–"],
        ["nq", "8", "50.0", "–"],
        ["nq/file", "8", "–", "75.0*"],
        ["mean of data sets", "", "25.0", "–"],
    ]
    assert "EM by data set" in capsys.readouterr().out


# ---------------------------------------------------------------------- names and settings


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
    for i, (engine, arguments) in enumerate(kinds):
        configured(tmp_path / f"run{i}", engine, ["yes"] * right[i] + ["no"] * (10 - right[i]), **arguments)
    results = run_compare(tmp_path, names=[f"run{i}" for i in range(7)])
    assert [(run["name"], run["policy"], run["setting"]) for run in results["runs"]] == [
        ("run0", "grpo", "simulator, noise 0"),
        ("run1", "grpo", "simulator, noise 0.5"),
        ("run2", "grpo", "simulator, noise 1"),
        ("run3", "grpo", "bm25, drop 0"),
        ("run4", "grpo", "bm25, drop 0.5"),
        ("run5", "grpo", "serper"),
        ("run6", "grpo", "no search"),
    ]
    assert [metrics["em"]["mean"] for metrics in greedy(results).values()] == [n / 10 for n in right]
    pairs = [difference["greedy"] for difference in named(results, "difference").values() if difference]
    assert [(p["em"]["mean"], p["questions"]) for p in pairs] == [(d, 10) for d in (-0.2, -0.4, -0.1, -0.3, 0.1, -0.7)]
    shown = capsys.readouterr().out
    for part in ("grpo: bm25,", "drop 0.5", "simulator, bm25, serper, 10 questions"):
        assert part in shown
    assert "secret" not in shown + "".join(path.read_text() for path in (tmp_path / "out").iterdir())


def test_one_shot_retrieval_and_labels_of_the_user(tmp_path):
    rollout = {"max_turns": 0, "retrieve_first": True}
    configured(tmp_path / "a", "bm25", ["yes", "no"], None, rollout=rollout)
    configured(tmp_path / "b", "bm25", ["yes", "yes"], None, rollout={**rollout, "max_turns": 4})
    runs = [f"x={tmp_path / 'a'}", f"y@my engine={tmp_path / 'b'}", f"z={tmp_path / 'b'}"]
    results = run_compare(tmp_path, *runs, names=())
    assert [(run["name"], run["policy"], run["setting"]) for run in results["runs"]] == [
        ("x", "untrained", "bm25, question searched first, no other search"),
        ("y", "untrained", "my engine"),
        ("z", "untrained", "bm25, question searched first"),
    ]


def test_folders_of_one_name_go_by_their_path(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name / "test", policy("yes", "no"))
    results = run_compare(tmp_path, tmp_path / "a" / "test", tmp_path / "b" / "test", names=())
    assert list(named(results)) == [str(tmp_path / name / "test") for name in ("a", "b")]


def test_without_out_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(tmp_path / name, policy("yes", "no"))
    compare.main(["a", "b"])
    assert "b − a in EM points" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# ---------------------------------------------------------------------- old and damaged runs


def edit(path, change):
    path.write_text(change(path.read_text()))


def test_a_test_of_a_version_that_did_not_count_empty_searches(runs):
    """It can be compared, with the like and with a new one; what was not counted is null."""
    edit(runs / "base/questions.jsonl", lambda text: text.replace('"empty_searches": 0, ', ""))
    assert "empty_searches" not in (runs / "base/questions.jsonl").read_text()
    assert [found["empty_searches"] for found in greedy(run_compare(runs)).values()] == [None, 0.0]


def test_a_test_of_a_version_without_folded_scores_is_scored_again(tmp_path):
    for name in ("base", "trained"):
        write_run(tmp_path / name, policy("yes", "‘yes’"))
    edit(tmp_path / "base/questions.jsonl", lambda text: text.replace('"em_folded": 1.0, ', "").replace('"f1": 1', '"f1": 0'))
    assert "em_folded" not in (tmp_path / "base/questions.jsonl").read_text()
    results = run_compare(tmp_path)
    for scores in greedy(results).values():
        assert {name: scores[name]["mean"] for name in ("em", "em_folded", "f1")} == {"em": 0.5, "em_folded": 1.0, "f1": 1.0}
    said = results["normalisation"]
    assert json.loads((tmp_path / "base/results.json").read_text())["normalisation"] == said
    for page in ("report.md", "report.html"):
        assert said in (tmp_path / "out" / page).read_text()


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
        lambda f: [write_run(f / "sampled", [], policy("yes")), write_run(f / "greedy", policy("yes"))],
        ["x={f}/sampled", "y={f}/greedy"],
        "the runs share no decoding",
    ),
    "half a line": (lambda f: edit(f / "base/questions.jsonl", lambda t: t[:-20]), [], "line 16 is not JSON"),
    "no column": (lambda f: edit(f / "base/questions.jsonl", lambda t: t.replace('"em"', '"m"')), [], "line 1 has no em"),
    "one twice": (lambda f: edit(f / "base/questions.jsonl", double_first_line), [], "greedy outcome of question toy/0 twice"),
    "other questions": (
        lambda f: write_run(f / "other", policy("yes", question="Something else?")),
        ["x={f}/other"],
        "base and .*other have no question in common",
    ),
    "a simulator": (
        lambda f: edit(f / "base/results.json", lambda t: '{"schema": 1, "seed": 0, "simulator": {}}'),
        [],
        "goes to --simulator",
    ),
    "a comparison": (lambda f: run_compare(f), ["x={f}/out"], "out holds what compare wrote"),
    "no simulator": (lambda f: None, ["--simulator={f}/base"], "holds no recall"),
    "no curves": (lambda f: None, ["--training={f}/base"], "holds no curves"),
    "a label's questions": (
        lambda f: [write_run(f / name, policy("no", question=f"Is it {name}?")) for name in ("a", "b")],
        ["base@poor={f}/a", "trained@poor={f}/b"],
        "no question in common",
    ),
    "half a trajectory": (
        lambda f: (p := f / "base/trajectories/test.jsonl").write_bytes(b"".join(p.read_bytes().splitlines(True)[:8])[:-9]),
        [],
        "base/trajectories/test.jsonl line 8 is no trajectory, or half of one; run the test again",
    ),
    "a number for a trajectory": (
        lambda f: (f / "trained/trajectories/test.jsonl").write_text("5\n" * 16),
        [],
        "trained/trajectories/test.jsonl line 1 is no trajectory",
    ),
    "trajectories of others": (
        lambda f: reverse_lines(f / "base/trajectories/test.jsonl"),
        [],
        "does not go with questions.jsonl",
    ),
    "twice": (lambda f: None, ["base={f}/none"], "base is given twice"),
    "no name": (lambda f: None, ["={f}/none"], "expected FOLDER, NAME=FOLDER"),
    "no equals": (lambda f: None, ["none"], "none holds no results.json"),
    "no label": (lambda f: None, ["base@={f}/none"], "expected FOLDER, NAME=FOLDER"),
    "blank in a name": (lambda f: None, ["no search={f}/none"], "expected FOLDER, NAME=FOLDER"),
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
    assert name == "a comparison" or not (runs / "out").exists()


def test_two_runs_are_needed(runs):
    for more in ([], [f"base@poor={runs / 'none'}"]):
        with pytest.raises(ValueError, match="needs two runs or more, without an @ENGINE or with the same; got base"):
            compare.main([f"base={runs / 'base'}", *more])


def test_compare_loads_no_heavy_library():
    heavy = "{'lightning', 'transformers', 'peft', 'tensorboard', 'torch'}"
    code = f"import sys, zs_lightning.commands.compare.command; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
