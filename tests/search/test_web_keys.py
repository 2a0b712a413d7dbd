"""Keys of search providers: found, asked for by name, and never shown; and a whole run with such an engine."""

import json
import logging
from pathlib import Path

import pytest

from support.faultserver import Reply, search
from support.providers import CANARY, ENGINES, KEYED, serper
from zs_lightning.cli import main
from zs_lightning.search import remote
from zs_lightning.search.http import HttpSpec


@pytest.fixture(autouse=True)
def _keys(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    for name in KEYED:
        monkeypatch.setenv(name, CANARY)


@pytest.mark.parametrize("name", KEYED)
def test_a_missing_key_is_named(monkeypatch, name):
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=f"the environment variable {name} is not set"):
        KEYED[name]().setup()
    for value in ("short", "two words of it", "schlüssel-lang", "line\nbreak-key"):
        monkeypatch.setenv("OTHER", value)
        with pytest.raises(ValueError, match="the environment variable OTHER does not hold a key") as error:
            KEYED[name](api_key_env="OTHER").setup()
        assert value not in str(error.value)
    with pytest.raises(ValueError, match="the NAME of an environment variable") as error:
        KEYED[name](api_key_env=CANARY)
    assert CANARY not in str(error.value)


@pytest.mark.parametrize("engine_class", KEYED.values(), ids=lambda c: c.__name__)
def test_a_key_is_never_shown(serve, engine_class, caplog, tmp_path, monkeypatch):
    """The server repeats all it was sent, in every kind of answer."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(remote, "MOST_FAILURES", 1000)
    faults = [200, 400, 401, 429, 500, 301, "html", "header"]

    def answer(asked):
        said = str([asked.params, asked.headers, asked.body, "canary-4f9a0c77%2Fkey%2Bx"])
        query = asked.params.get("q") or asked.body.get("q") or asked.body.get("query")
        if query == "Paris" or query == "200":
            return json.loads(json.dumps(ENGINES[engine_class](asked)).replace("a ", f"{CANARY} canary-4f9a0c77%2Fkey%2Bx "))
        if query == "header":
            return Reply({}, headers={"Content-Encoding": said.replace("\n", "")[:2000]})
        return Reply(
            said.encode(), status=int(query) if query.isdigit() else 200, headers={"Location": f"http://h/?k={CANARY}"}
        )

    server = serve(answer)
    spec = HttpSpec(cache=str(tmp_path / "cache"), concurrency=1)
    engine = engine_class(server.url("/search"), http=spec)
    results = search(engine, *map(str, faults))
    assert results["200"].documents[0].text.startswith("[key] [key] ")
    assert all(results[str(fault)].failure for fault in faults[1:])
    shown = repr(results) + caplog.text + repr(engine.call("x")) + repr(vars(engine)["counters"])
    shown += (tmp_path / "cache").read_bytes().decode("latin-1")
    with pytest.raises(ValueError, match="check the key in") as error:
        engine_class(serve(lambda asked: Reply(str(asked).encode(), status=403)).url()).setup()
    assert "canary-4f9a0c77" not in shown + str(error.value)


# ------------------------------------------------------------------------------ the command


def test_a_recorded_test_is_repeated_offline_and_leaves_no_key(serve, tmp_path, monkeypatch):
    server, kept = serve(serper), []
    options = ["--config=configs/miniature/test.yaml", "--data.test_rows=16", "--model.decodings=[sampled]"]
    options += ["--model.search=SerperSearch", f"--model.search.endpoint={server.url()}"]
    for mode in ("record", "replay"):
        folder = tmp_path / mode
        http = [f"--model.search.http.cache={tmp_path / 'answers'}", f"--model.search.http.mode={mode}"]
        main(["test", *options, *http, f"--run.folder={folder}"])
        kept.append(json.loads((folder / "results.json").read_text()) | {"seconds": 0})
        kept.append((folder / "questions.jsonl").read_bytes())
        counted = json.loads((folder / "search.json").read_text())
        assert (counted["calls"] > 0, counted["cached"] > 0) == (mode == "record", mode == "replay")
        server.close()
        monkeypatch.delenv("SERPER_API_KEY", raising=False)
    assert kept[:2] == kept[2:]
    assert kept[0]["engine"] == "serper"
    queries = {asked.body["q"] for asked in server.asked} - {"Paris"}
    turns = [t for line in (folder / "trajectories" / "test.jsonl").read_text().splitlines() for t in json.loads(line)["turns"]]
    found = {document["title"] for turn in turns for document in turn["documents"]}
    assert found == {f"About {query}" for query in queries}
    assert found
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        assert CANARY.encode() not in path.read_bytes(), path


def test_a_wrong_address_on_the_command_line_is_one_sentence(capsys, tmp_path):
    options = ["--config=configs/miniature/test.yaml", f"--run.folder={tmp_path / 'run'}", "--model.search=SearXNGSearch"]
    with pytest.raises(SystemExit) as end:
        main(["test", *options, "--model.search.endpoint=127.0.0.1:8080"])
    assert end.value.code == 2
    assert "search.endpoint: expected an address such as" in capsys.readouterr().err
