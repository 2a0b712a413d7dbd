"""measure-simulator in this process, on the miniature's base: what it shows, writes and refuses."""

import json
from pathlib import Path

import pytest

from support.commandline import CONFIGS, failure
from support.faultserver import FaultServer
from support.modelserver import searches, writing
from zs_lightning.cli import main
from zs_lightning.commands.measure_simulator import engines
from zs_lightning.errors import UserError
from zs_lightning.search import ServedSimulatorSearch, remote
from zs_lightning.search.http import HttpSpec

POLICY, SIMULATOR = CONFIGS / "policy.yaml", CONFIGS / "simulator.yaml"
OF_BASE = ["--search=SimulatorSearch", "--search.prompts=miniature", "--search.count=3", "--search.max_new_tokens=64"]
OF_BASE += ["--search.max_length=160", "--search.sampling.temperature=1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of one measurement of two simulators."""
    out = tmp_path_factory.mktemp("report")
    more = ["--rows=6", "--kinds=noisy,empty", f"--out={out}", "--real=BM25Search"]
    main(["measure-simulator", f"base={SIMULATOR}", *OF_BASE, "--search.guard=paper", *more])
    return out


def test_two_simulators_side_by_side(measured):
    results = json.loads((measured / "results.json").read_text())
    assert (results["schema"], results["rows"], results["split"], results["seed"]) == (1, 6, "test", 0)
    base, search, real = results["engines"]
    assert [engine["name"] for engine in results["engines"]] == ["base", "search", "bm25"]
    assert (base["engine"], search["place"], real["real"]) == ("simulator", "--search", True)
    for engine in (base, search):
        assert engine["verdict"].startswith(("Not yet: ", "Cannot tell"))
        assert {bar["measure"] for bar in engine["bars"]} >= {"recall/useful", "recall/noisy", "leak/unrelated"}
        assert engine["measures"]["recall/empty"]["mean"] == engine["measures"]["cost/failed"]["mean"] == 0.0
        assert engine["measures"]["named/empty"]["mean"] == engine["measures"]["consistent/same"]["mean"] == 1.0
        assert all(row["low"] <= row["mean"] <= row["high"] for row in engine["measures"].values())
    # The same weights and draws, but the second is guarded by nothing.
    assert base["measures"]["recall/useful"] == search["measures"]["recall/useful"]
    assert base["measures"]["leak/empty"]["mean"] == 0.0
    assert base["measures"]["unguarded/empty"] == search["measures"]["leak/empty"]
    assert real["measures"]["form/supported"]["mean"] == 1.0


def test_the_report_as_markdown_and_page(measured):
    results = json.loads((measured / "results.json").read_text())
    page, markdown = (measured / "report.html").read_text(), (measured / "report.md").read_text()
    assert "| Measure | base | search | bm25 |" in markdown
    assert "| answer in noisy | " in markdown
    for engine in results["engines"][:2]:
        assert f"{engine['name']}: {engine['verdict'][:20]}" in page.replace("&#39;", "'")
    assert "http" not in page.replace("http-equiv", "")


def test_the_table_fits_a_terminal(measured, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["measure-simulator", str(SIMULATOR), "--rows=3", "--seed=4"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "useful − noisy" in said
    assert "alike the real engine" in said


def refused(capsys, *words):
    code, said = failure(capsys, "measure-simulator", *words)
    assert code == 2
    return said


def test_what_is_refused(capsys, tmp_path):
    def said(*words):
        return refused(capsys, *words)

    assert "nothing to measure; give a run folder, a configuration, or --search CLASS" in said()
    assert "there is no file or folder nope" in said("a=nope")
    assert "a is given twice" in said(f"a={SIMULATOR}", f"a={SIMULATOR}")
    assert "with a name of one word; got a b=" in said(f"a b={SIMULATOR}")
    assert "--rows: expected 1 or more; got 0" in said(SIMULATOR, "--rows=0")
    assert "know no kind silly; expected all or noisy, off_topic" in said(SIMULATOR, "--kinds=silly")
    assert "bm25 simulates no search engine" in said("--search=BM25Search")
    assert "--search says nothing of queries to ask; give --records FILE" in said(*OF_BASE)
    assert "--records: there is no file or folder nope" in said(SIMULATOR, "--records=nope")
    assert "policy has no weights of its own" in said("--search=SimulatorSearch", "--search.model.path=policy")
    assert f"there is no file {tmp_path}/config.yaml" in said(tmp_path)
    (tmp_path / "config.yaml").write_text(SIMULATOR.read_text())
    assert f"{tmp_path} holds no trained simulator (model is missing)" in said(tmp_path)
    (tmp_path / "last.ckpt").touch()
    stopped = f"(model is missing); `export --ckpt {tmp_path} --out {tmp_path}/model` makes it of the checkpoint"
    assert stopped in said(tmp_path)
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    assert "describes no simulator; expected `model:`" in said(tmp_path)
    # The adapter that the shipped policy needs is not there.
    assert "there is no adapter in runs/simulator/model" in said(POLICY)


def test_records_without_evidence(capsys, tmp_path):
    row = {"question": "Who?", "golden_answers": ["Ada"], "query": "who", "documents": ["Nobody."], "label": "noisy"}
    Path(tmp_path / "r.jsonl").write_text(json.dumps(row))
    said = refused(capsys, SIMULATOR, f"--records={tmp_path}/r.jsonl")
    assert "of 1 records none has evidence; expected useful ones" in said


def test_questions_that_are_no_records(capsys, tmp_path):
    Path(tmp_path / "q.jsonl").write_text(json.dumps({"question": "Who?", "golden_answers": ["Ada"]}))
    source = f"data: {{source: {{class_path: FileSource, init_args: {{path: {tmp_path}/q.jsonl}}}}}}\n"
    own = "model: {class_path: SimulatorSFT, init_args: {model: {path: miniature}, prompts: miniature}}\n"
    Path(tmp_path / "own.yaml").write_text(own + source)
    said = refused(capsys, tmp_path / "own.yaml")
    assert "has no column query" in said
    assert said.endswith("; --records FILE names others")


@pytest.fixture
def own(tmp_path):
    """A configuration of SimulatorSFT with records of three labels that nothing parts."""
    rows = []
    for number in range(12):
        row = {"question": f"Who is {number}?", "golden_answers": ["Ada"], "query": f"q{number}", "documents": ["Ada"]}
        rows += [row | {"label": label, "evidence": ["Ada"]} for label in ("useful", "partial", "off_topic")]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = "model: {class_path: SimulatorSFT, init_args: {model: {path: miniature}, prompts: miniature, max_new_tokens: 8}}\n"
    source = f"data: {{source: {{class_path: FileSource, init_args: {{path: {tmp_path}/r.jsonl}}}}}}\n"
    (tmp_path / "own.yaml").write_text(model + source)
    return tmp_path / "own.yaml"


def test_what_was_measured_is_kept_when_the_next_simulator_fails(own, tmp_path, capsys, monkeypatch):
    """And the kinds that a fine-tuned one is taught are measured; of records that nothing parts it is said."""
    monkeypatch.setattr(remote, "BACKOFF", 0.001)
    served = ["--search=ServedSimulatorSearch", "--search.hosts=http://127.0.0.1:9", "--search.prompts=miniature"]
    with pytest.raises(SystemExit):
        main(["measure-simulator", str(own), *served, "--rows=2", f"--out={tmp_path}/out"])
    said = capsys.readouterr()
    assert "served_simulator cannot be used" in said.err
    assert f"Queries are of all rows of {tmp_path}/r.jsonl, whatever was trained on." in " ".join(said.out.split())
    assert "words per document" in said.out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [engine["name"] for engine in results["engines"]] == ["own", "records"]
    assert {key for key in results["engines"][0]["measures"] if key.startswith("gap")} == {"gap/partial", "gap/off_topic"}
    assert results["split"] is None
    assert "Seed 0, all records." in (tmp_path / "out/report.html").read_text()


def test_questions_that_a_run_trained_on_are_counted(own, tmp_path):
    source = engines.source_of(None, engines.read_place(own))
    records, _ = engines.read_records(source, "test", 99)
    own.write_text(own.read_text().replace("r.jsonl}", "r.jsonl, splits: {train: 0.5, test: 0.5}}"))
    config = engines.read_place(own)
    trained = {record.example.question for record in engines.source_of(None, config).search_records("train", 99)}
    said = engines.said_of_all(source, records, {"a": config, "b": engines.read_place(SIMULATOR)})
    assert 0 < len(trained) < 12
    assert said.endswith(f"whatever was trained on; {len(trained)} of 12 questions are in the training split of a.")
    assert not engines.source_of(None, config).is_whole()


def test_a_simulator_that_shares_the_policys_weights(tmp_path):
    text = POLICY.read_text().replace("{path: miniature, adapter: runs/simulator/model}", "{path: policy}")
    Path(tmp_path / "shared.yaml").write_text(text)
    main(["measure-simulator", str(tmp_path / "shared.yaml"), "--rows=2", f"--out={tmp_path}/out"])
    assert json.loads((tmp_path / "out/results.json").read_text())["engines"][0]["name"] == "shared"


def test_each_query_of_a_question_is_asked_once(tmp_path):
    rows = []
    for answer, query, label in [("Ada", "q", "useful"), ("Ada", "q", "noisy"), ("Ada", "r", "useful"), ("Bob", "q", "useful")]:
        row = {"question": f"Who is {answer}?", "golden_answers": [answer], "query": query, "label": label}
        rows.append(row | {"documents": [answer], "evidence": [answer]})
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = engines.source_of(tmp_path / "r.jsonl", None)
    records, _ = engines.read_records(source, "test", 10)
    assert sorted((r.example.golden_answers[0], r.query) for r in records) == [("Ada", "q"), ("Ada", "r"), ("Bob", "q")]
    assert len(engines.read_records(source, "test", 2)[0]) == 2


def test_as_many_queries_are_measured_as_are_asked_for(tmp_path):
    """However many rows a built file has of each."""
    rows = []
    for number in range(30):
        row = {"question": f"Who is {number // 3}?", "golden_answers": ["Ada"], "query": f"q{number}"}
        rows += [row | {"label": "useful", "documents": ["Ada"]}]
        rows += [row | {"label": "noisy", "documents": [f"{twin}"], "evidence": ["Ada"]} for twin in range(40)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, _ = engines.read_records(engines.source_of(tmp_path / "r.jsonl", None), "test", 20)
    assert len({record.query for record in records}) == 20


def test_a_run_stands_for_what_it_trained(tmp_path):
    (tmp_path / "config.yaml").write_text(SIMULATOR.read_text())
    for place, folder in [(tmp_path, "model"), (tmp_path / "best", "best"), (tmp_path / "model", "model")]:
        (tmp_path / folder).mkdir(exist_ok=True)
        config = engines.read_place(place)
        with pytest.raises(UserError, match=f"no adapter in {tmp_path / folder} "):
            engines.configured(place, config)


def test_a_cache_of_the_users_own_is_kept(tmp_path):
    for cache, kept in [(None, str(tmp_path / engines.PAID)), ("own.sqlite", "own.sqlite")]:
        engine = ServedSimulatorSearch(prompts="miniature", http=HttpSpec(cache=cache))
        engines.keep_paid(engine, None)
        assert engine.http.cache == cache
        engines.keep_paid(engine, tmp_path)
        assert engine.http.cache == kept


def one_record(folder):
    row = {"question": "Who wrote Emma?", "query": "author of Emma", "golden_answers": ["Ada"]}
    row |= {"documents": ["Ada."], "label": "useful"}
    Path(folder / "r.jsonl").write_text(json.dumps(row))
    return f"--records={folder}/r.jsonl"


def test_a_server_that_is_down(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.001)
    served = ["--search=ServedSimulatorSearch", "--search.hosts=http://127.0.0.1:9", "--search.prompts=miniature"]
    assert "served_simulator cannot be used" in refused(capsys, *served, one_record(tmp_path))


def test_what_a_server_wrote_is_kept_beside_the_report(tmp_path, capsys):
    server = FaultServer(writing("Doc 1: Ada."))
    try:
        words = ["--search=ServedSimulatorSearch", f"--search.hosts={server.url('')}", "--search.prompts=miniature"]
        words += ["--search.count=1", one_record(tmp_path), f"--out={tmp_path}/out"]
        asked = []
        for _ in range(2):
            main(["measure-simulator", *words])
            asked.append(len(searches(server)))
            kept = f"search: 1 of 1 results were there before, in {tmp_path}/out/served.sqlite"
            assert (kept in " ".join(capsys.readouterr().out.split())) == (len(asked) == 2)
        assert asked[0] == asked[1] > 3
        engine = json.loads((tmp_path / "out/results.json").read_text())["engines"][0]
        assert engine["measures"]["recall/useful"]["mean"] == engine["measures"]["form/ordered"]["mean"] == 1.0
        # Nothing was written this time, so that nothing is known of its time.
        assert "cost/seconds" not in engine["measures"]
    finally:
        server.close()
