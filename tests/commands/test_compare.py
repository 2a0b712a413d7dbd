"""compare with a base and a trained policy: what stands in results.json, and what is refused."""

import json
import subprocess
import sys

import pytest

from support.runfolders import eight_questions, policy, reverse_lines, run_compare, write_run
from zs_lightning.commands.compare import command as compare


@pytest.fixture
def runs(tmp_path):
    return eight_questions(tmp_path)


# ---------------------------------------------------------------------- results.json


def test_results_by_hand(runs):
    recall = {name: {"mean": 0.5, "low": 0.4, "high": 0.6} for name in ("useful_recall", "noisy_recall")}
    (runs / "simulator").mkdir()
    (runs / "simulator" / "results.json").write_text(json.dumps({"schema": 1, "seed": 7, "simulator": recall}))
    more = [f"no_search={runs / 'none'}", f"--simulator={runs / 'simulator'}", "--seconds=install=12.34567", "--seconds=test=3"]
    results = run_compare(runs, *more)
    keys = "schema normalisation seed questions engine policies difference simulator seconds other_engines".split()
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
    # Every question changed from 0 to 1, but eight are few: Wilson's intervals are 0.324 wide, and √2 · 0.324 is 0.459.
    assert results["difference"]["em_sampled"] == {"mean": 1.0, "low": 0.54121842, "high": 1.0}


def test_a_share_is_rounded_once(tmp_path, capsys):
    """748 of 827 is 90.447 %: with four digits it would be 0.9045, and then 90.5 %."""
    for name in ("base", "trained"):
        write_run(tmp_path / name, policy(*["yes"] * 748, *["no"] * 79))
    results = run_compare(tmp_path)
    assert round(results["policies"]["base"]["em"]["mean"], 6) == 0.904474
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
    assert 0.0 < straight["difference"]["em"]["high"] < 0.1
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
    assert results["other_engines"][label]["trained"]["em"]["mean"] == 0.33333333
    assert list(results["other_engines"]) == [label]
    assert list(results["other_engines"][label]) == ["trained", "base"]
    assert set(results["policies"]) == {"base", "trained"}
    shown = capsys.readouterr().out
    assert f"{label}, 3 questions" in shown
    assert "33.3" in shown


def edit(path, change):
    path.write_text(change(path.read_text()))


def test_a_test_of_a_version_that_did_not_count_empty_searches(runs):
    """It can be compared, with the like and with a new one; what was not counted is null."""
    edit(runs / "base/questions.jsonl", lambda text: text.replace('"empty_searches": 0, ', ""))
    assert "empty_searches" not in (runs / "base/questions.jsonl").read_text()
    policies = run_compare(runs)["policies"]
    assert [policies[name]["empty_searches"] for name in ("base", "trained")] == [None, 0.0]
    compare.main([f"old={runs / 'base'}", f"new={runs / 'trained'}", f"--out={runs / 'pairs'}"])
    results = json.loads((runs / "pairs/results.json").read_text())
    assert [run["empty_searches"] for run in results["runs"]] == [None, 0.0]


def test_a_test_of_a_version_without_folded_scores_is_scored_again(tmp_path):
    for name in ("base", "trained"):
        write_run(tmp_path / name, policy("yes", "‘yes’"))
    edit(tmp_path / "base/questions.jsonl", lambda text: text.replace('"em_folded": 1.0, ', "").replace('"f1": 1', '"f1": 0'))
    assert "em_folded" not in (tmp_path / "base/questions.jsonl").read_text()
    results = run_compare(tmp_path)
    for scores in results["policies"].values():
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
    "a comparison": (lambda f: run_compare(f), ["x={f}/out"], "out holds what compare wrote"),
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


def test_base_and_trained_are_needed(runs):
    with pytest.raises(ValueError, match="got base"):
        compare.main([f"base={runs / 'base'}", "--out", str(runs / "out")])


def test_compare_needs_neither_lightning_nor_transformers():
    code = "import sys, zs_lightning.commands.compare.command; print(sorted({'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
