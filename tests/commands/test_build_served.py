"""build-simulator-data with a model behind OpenAI's API: what it searches, and what is paid for once only."""

import json
from collections import Counter
from pathlib import Path

import pytest

from support.commandline import ROOT, failure
from support.faultserver import Reply
from support.modelserver import ModelServer, chat
from zs_lightning.cli import main
from zs_lightning.commands.build_simulator_data.served import closed
from zs_lightning.search import remote

pytestmark = pytest.mark.usefixtures("environment")

CONFIG = f"--config={ROOT / 'configs' / 'miniature' / 'build_simulator_data.yaml'}"
SMALL = ["build-simulator-data", CONFIG, "--batch_size=6", "--group_size=1", "--kinds=[]", "--rollout.max_turns=2"]


def served(server, folder, *options, api="chat"):
    address = [f"--served.hosts={server.url('')}", f"--served.api={api}", "--served.model=tiny"]
    return [*SMALL, *address, f"--folder={folder}", *options]


def numbers(folder):
    return json.loads(Path(folder, "build.json").read_text())


def searching(asked):
    """A model that searches for the question, then answers; asked to judge, it says useful."""
    said = asked.body["messages"]
    if "Verdict:" in said[-1]["content"]:
        return chat("Useful") | {"usage": {"completion_tokens": 2}}
    question = said[0]["content"].split("<question>")[-1].split("?")[0].replace("the ", "", 1).split(" ", 2)[-1]
    text = f"<search> {question} " if len(said) == 1 else "<answer> Nobody "
    return chat(text) | {"usage": {"completion_tokens": 7}}


def test_a_served_model_searches_and_judges_and_is_paid_once(serve):
    server = serve(searching)
    options = ["--judge=both", "--pairs=4", "--served.http.cache=paid.sqlite"]
    main(served(server, "first", *options))
    first = numbers("first")
    counts = first["counts"]
    assert counts["searches"] == counts["questions"] == counts["answered"]
    assert counts["tokens"] == 14 * counts["questions"]
    assert counts["judge_tokens"] == 2 * counts["questions"]
    assert first["records"]["useful"] == 2
    # Our prompt, the model's own words with the end that the server cut off, and what was found.
    talk = max((asked.body["messages"] for asked in server.asked), key=len)
    assert [message["role"] for message in talk] == ["user", "assistant", "user"]
    assert talk[1]["content"].endswith(" </search>")
    assert talk[2]["content"].startswith("<information> Doc 1: ")
    before = len(server.asked)
    main(served(server, "second", *options))
    # Setup asks once whether there is a server; all else was paid for already.
    assert len(server.asked) == before + 1
    assert Path("second/records.jsonl").read_bytes() == Path("first/records.jsonl").read_bytes()


def test_the_tiny_model_behind_a_server_works_like_one_here(serve, miniature):
    main(served(serve(ModelServer(*miniature)), "data", "--pairs=10", api="completions"))
    counts = Counter(numbers("data")["counts"])
    assert counts["searches"] > 10
    assert counts["failed"] == 0
    assert counts["answered"] > 5


def test_a_server_that_goes_away_loses_nothing(serve, capsys, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    server = serve(lambda asked: Reply(status=500) if len(server.asked) > 14 else searching(asked))
    code, said = failure(capsys, *served(server, "data", "--pairs=100"))
    assert code == 1
    assert "pairs are kept, and the same command goes on" in said
    kept = Path("data/work.jsonl").read_bytes()
    assert len(kept.splitlines()) == 2
    # The same command, with the server back.
    server.answer = searching
    main(served(server, "data", "--pairs=4"))
    assert Path("data/work.jsonl").read_bytes().startswith(kept)


def test_a_batch_that_a_kill_cut_off_is_not_paid_for_again(serve, capsys, monkeypatch):
    """Without a cache of one's own, what was written is kept in the folder."""
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    server = serve(lambda asked: Reply(status=500) if len(server.asked) > 5 else searching(asked))
    options = ["--pairs=4", "--batch_size=24", "--served.http.concurrency=1"]
    code, said = failure(capsys, *served(server, "data", *options))
    assert code == 1
    assert said.endswith("repair the server; 0 pairs are kept, and the same command goes on")
    assert len(Path("data/work.jsonl").read_bytes().splitlines()) == 1
    paid = [json.dumps(asked.body) for asked in server.asked[1:5]]
    server.answer, server.asked = searching, []
    main(served(server, "data", *options))
    assert not set(paid) & {json.dumps(asked.body) for asked in server.asked[1:]}


def test_a_build_goes_on_with_the_model_at_another_address(serve, capsys, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "0123456789")
    main(served(serve(searching), "data", "--pairs=4"))
    kept = Path("data/work.jsonl").read_bytes()
    other = ["--served.http.timeout=60", "--served.http.cache=other.sqlite", "--served.api_key_env=OTHER_KEY"]
    main(served(serve(searching), "data", "--pairs=12", *other))
    assert Path("data/work.jsonl").read_bytes().startswith(kept)
    code, said = failure(capsys, *served(serve(searching), "data", "--served.options={min_p: 0}"))
    assert code == 2
    assert "data holds a build with another `served`" in said


@pytest.mark.parametrize(
    ("written", "whole"),
    [
        ("<search> a", "<search> a</search>"),
        ("<search> a</search>", "<search> a</search>"),
        ("<think> <search> b </search> </think><answer> c", "<think> <search> b </search> </think><answer> c</answer>"),
        ("nothing", "nothing"),
    ],
)
def test_the_end_that_a_server_cuts_off_is_put_back(written, whole):
    assert closed(written) == whole
