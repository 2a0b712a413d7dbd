"""Recorded answers: replayed without a server, asked first, and never wrong."""

import sqlite3
import threading

import pytest

from support.faultserver import Reply, request, search
from support.providers import CANARY, serper, zerosearch_wiki
from zs_lightning.errors import UserError
from zs_lightning.search import SerperSearch, ZeroSearchWikiSearch
from zs_lightning.search.cache import Cache
from zs_lightning.search.http import HttpSpec
from zs_lightning.types import Document


def spec(path, mode="cache", **options):
    return HttpSpec(cache=str(path), mode=mode, **options)


def test_a_recorded_run_is_replayed_without_server_and_key(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", CANARY)
    server, path = serve(serper), tmp_path / "deep" / "answers.sqlite"
    recorded = search(SerperSearch(server.url(), http=spec(path, "record")), "a", "b", "c", "half \ud800")
    server.close()
    monkeypatch.delenv("SERPER_API_KEY")
    engine = SerperSearch(server.url(), http=spec(path, "replay"))
    assert search(engine, "c", "half \ud800", "a", "b") == recorded
    assert (engine.counters["calls"], engine.counters["cached"]) == (0, 4)
    missing = search(engine, "a", "new")
    assert missing["a"] == recorded["a"]
    assert str(path) in missing["new"].failure
    assert "holds no answer to the query 'new'" in missing["new"].failure
    assert missing["new"].documents == ()
    other = SerperSearch(server.url(), count=4, http=spec(path, "replay"))
    assert search(other, "a")["a"].failure


def test_a_cache_is_asked_first_and_a_recording_asks_once(serve, tmp_path):
    server, path = serve(zerosearch_wiki), tmp_path / "answers.sqlite"
    asked = lambda: [request.body["query"] for request in server.asked if request.body["query"] != "Paris"]  # noqa: E731
    search(ZeroSearchWikiSearch(server.url(), http=spec(path)), "a", "b")
    engine = ZeroSearchWikiSearch(server.url(), http=spec(path))
    search(engine, "b", "c")
    assert sorted(asked()) == ["a", "b", "c"]
    assert engine.counters["cached"] == 1
    engine = ZeroSearchWikiSearch(server.url(), http=spec(path, "record"))
    search(engine, "a", "b")
    search(engine, "a", "b")
    assert sorted(asked()) == ["a", "a", "b", "b", "c"]
    assert engine.counters["cached"] == 2


def test_the_same_query_at_the_same_time_is_asked_once(serve):
    submitted = threading.Event()

    def answer(asked):
        assert asked.body["query"] == "Paris" or submitted.wait(15)
        return zerosearch_wiki(asked)

    server = serve(answer)
    engine = ZeroSearchWikiSearch(server.url())
    engine.submit([request("same", str(i)) for i in range(5)])
    submitted.set()
    results = []
    while found := engine.poll():
        results += found
    engine.close()
    assert len(server.asked) == 2
    assert {r.key for r in results} == set("01234")
    assert {r.documents for r in results} == {(Document(text="a < same > b"),) * 5}


def test_failures_are_not_kept(serve, tmp_path):
    path = tmp_path / "answers.sqlite"
    server = serve(lambda asked: Reply({}, status=400) if asked.body["query"] == "a" else zerosearch_wiki(asked))
    assert search(ZeroSearchWikiSearch(server.url(), http=spec(path)), "a")["a"].failure
    server.answer = zerosearch_wiki
    assert search(ZeroSearchWikiSearch(server.url(), http=spec(path)), "a")["a"].documents


def test_files_that_are_no_cache_are_named(serve, tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*missing.* to replay"):
        ZeroSearchWikiSearch(http=spec(tmp_path / "missing", "replay")).setup()
    (tmp_path / "text").write_text("no database" * 1000)
    sqlite3.connect(tmp_path / "other").execute("CREATE TABLE t (x)").connection.close()
    server = serve(zerosearch_wiki)
    for name in ("text", "other", "."):
        with pytest.raises(ValueError, match=r"search\.http\.cache: .* cannot be used"):
            ZeroSearchWikiSearch(server.url(), http=spec(tmp_path / name)).setup()
    search(ZeroSearchWikiSearch(server.url(), http=spec(tmp_path / "good")), "a")
    file = sqlite3.connect(tmp_path / "good", isolation_level=None)
    file.execute("UPDATE answers SET documents = '[[1'")
    file.close()
    engine = ZeroSearchWikiSearch(server.url(), http=spec(tmp_path / "good"))
    with pytest.raises(ValueError, match="good cannot be used"):
        search(engine, "a")


def test_a_file_may_be_named_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Cache("~/kept/a").close()
    assert (tmp_path / "kept" / "a").is_file()
    with pytest.raises(UserError, match=r"^search\.http\.cache: ~nouser/a is in the home of a user who is not known"):
        Cache("~nouser/a")
    for mode, said in (("replay", "there is no file"), ("record", "x cannot be used: ")):
        with pytest.raises(UserError, match=rf"^search\.http\.cache: .*{said}"):
            Cache("x" * 300, mode)
