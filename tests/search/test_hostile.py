"""Servers that mean ill, or are broken in a way that no list of faults names; and the file that keeps their answers."""

import gzip
import json
import logging
import sqlite3
import threading
import time
from dataclasses import dataclass

import pytest

from support.faultserver import Reply, request, search, zipped
from support.providers import CANARY, answering, good, is_good, serper
from zs_lightning.search import RetrieveSearch, SerperSearch, remote
from zs_lightning.search.cache import TABLE, Cache
from zs_lightning.search.http import Call, HttpSpec, Secret, document, titled, unmarked
from zs_lightning.types import Document

GOOD = json.dumps({"result": [[{"document": {"contents": "T\nbody"}, "score": 1.0}]]}).encode()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.01)


# ------------------------------------------------------------------------------ one answer ends no run


@dataclass(eq=False, repr=False)
class Snippets(RetrieveSearch):
    """An engine of one's own, which reads HTML, and depends on a language."""

    lang: str = "en"

    def call(self, query):
        return Call(
            {"lang": self.lang},
            json={"queries": [query]},
            headers={"X-Key": self.key, **({"X-Paid": self.key} if self.key else {})},
        )

    def parse(self, answer):
        return titled(answer["result"][0], "snippet", unmarked)


def snippets(asked):
    query = asked.body["queries"][0]
    text = f"&#{'1' * 5000};" if query == "digits" else f"{query} in {asked.params['lang']}"
    return {"result": [[{"snippet": text}]]} if query != "nothing" else {"result": []}


def test_what_a_parser_stumbles_over_is_a_failed_search(serve, engines):
    endless = b'{"result": [[{"document": {"contents": "a"}, "score": 1' + b"0" * 400 + b"}]]}"
    results = search(engines(serve(answering({"score": Reply(endless)})).url()), "score", "b")
    assert "the answer cannot be read (OverflowError" in results["score"].failure
    assert is_good(results["b"])
    engine = Snippets(serve(snippets).url())
    results = search(engine, "digits", "nothing", "b")
    engine.close()
    assert "the answer cannot be read (ValueError" in results["digits"].failure
    assert "the answer cannot be read (IndexError" in results["nothing"].failure
    assert results["b"].documents == (Document(text="b in en"),)


def test_what_is_sent_counts_and_not_only_what_it_unpacks_to(serve, engines):
    packed = gzip.compress(GOOD)
    header = {"Content-Encoding": "gzip"}
    flood = (b"\0" * 65536 for _ in range(1000))
    replies = {
        "flood": Reply(headers=header, pieces=(piece for piece in [packed, *flood])),
        "blocks": Reply(headers=header, pieces=iter([packed[:10], b"\0\0\0\xff\xff" * 400_000])),
        "tail": Reply(packed + b"x", headers=header),
        "second": Reply(packed + packed, headers=header),
        "no trailer": Reply(packed[:-8], headers=header),
        "busy": Reply(b"", headers=header, status=503),
        "whole": zipped(GOOD),
    }
    server = serve(answering(replies))
    results = search(engines(server.url()), *replies)
    assert "larger than 1000000 bytes" in results["blocks"].failure
    for name in ("flood", "tail", "second"):
        assert "more follows its end" in results[name].failure
    assert "its end is missing" in results["no trailer"].failure
    assert "the server answers 503" in results["busy"].failure
    assert results["whole"].documents


def test_a_server_cannot_mark_its_client(serve, engines):
    server = serve(lambda asked: Reply(GOOD, headers={"Set-Cookie": "seen=1; Path=/"}))
    search(engines(server.url()), "a", "b")
    assert len(server.asked) == 3
    assert not any("cookie" in asked.headers for asked in server.asked)


def test_who_pays_is_asked_for_a_lost_answer_once_more_only(serve, engines, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", CANARY)
    cut = lambda asked: Reply({}, hang_up=0) if "lost" in str(asked.body) else serper(asked)  # noqa: E731
    server = serve(cut)
    engine = SerperSearch(server.url())
    assert "no connection" in search(engine, "lost")["lost"].failure
    engine.close()
    assert len(server.asked) == 1 + 2
    server = serve(answering({"lost": Reply({}, hang_up=0)}))
    assert "no connection" in search(engines(server.url()), "lost")["lost"].failure
    assert len(server.asked) == 1 + 4


def test_only_a_server_that_is_busy_can_make_us_wait(serve, engines):
    server = serve(lambda asked: Reply(GOOD, headers={"Retry-After": "86400"}))
    assert all(result.documents for result in search(engines(server.url()), "a", "b").values())


# ------------------------------------------------------------------------------ keys

KEY = "abc/def+ghi&jkl<12345"
SPELLINGS = (
    KEY,
    KEY.replace("/", r"\/"),
    "".join(f"\\u{ord(c):04X}" for c in KEY),
    "abc%2Fdef%2bghi%26jkl%3c12345",
    "abc&#47;def&#x2B;ghi&amp;jkl&lt;12345",
)


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_a_key_is_found_however_it_is_spelled(spelled, serve, monkeypatch):
    """In a text of an answer, in what is shown of a failure, and where what is shown is cut."""
    assert Secret(KEY).hide({"a": [f"x{spelled}y", 1, None]}) == {"a": ["x[key]y", 1, None]}
    monkeypatch.setenv("SERPER_API_KEY", KEY)

    def answer(asked):
        query = asked.body["q"]
        if query == "echo":
            return Reply(f'{{"organic": [{{"title": "t", "snippet": "x {spelled} y"}}]}}'.encode())
        if query == "moved":
            return Reply({}, status=301, headers={"Location": f"http://h/{'x' * 180}{spelled}?k={spelled}"})
        if query == "16":
            return Reply(f'"{spelled}"'.encode("utf-16"), status=400)
        return Reply(("x" * int(query) + spelled).encode(), status=400) if query.isdigit() else serper_of(asked)

    def serper_of(asked):
        return {"organic": [{"title": "t", "snippet": "s"}]}

    engine = SerperSearch(serve(answer).url())
    shown = search(engine, "echo", "moved", "120", "150", "16")
    engine.close()
    # In JSON a backslash before a plus, or an ampersand of HTML, is what it is.
    assert shown["echo"].documents == (Document(title="t", text="x [key] y"),)
    said = "".join(str(result.failure).replace("\0", "") for result in shown.values())
    assert "def" not in said
    assert "12345" not in said


def test_an_address_with_a_key_is_not_shown():
    for url in ("ftp://h/x?api_key=canary", "h/x?api_key=canary", "me:canary@h/x", "h#canary"):
        with pytest.raises(ValueError, match="expected an address") as error:
            RetrieveSearch(url)
        assert "canary" not in str(error.value)


# ------------------------------------------------------------------------------ the file


def test_options_of_an_engine_of_ones_own_tell_its_answers_apart(serve, tmp_path, monkeypatch):
    server, path = serve(snippets), str(tmp_path / "cache")
    monkeypatch.setenv("OWN_KEY", CANARY)

    def found(lang, mode="cache", key="OWN_KEY"):
        engine = Snippets(server.url(), http=HttpSpec(cache=path, mode=mode), lang=lang)
        engine.api_key_env = key
        (result,) = search(engine, "b").values()
        engine.close()
        return [document.text for document in result.documents]

    assert [found("en"), found("de"), found("en")] == [["b in en"], ["b in de"], ["b in en"]]
    assert len(server.asked) == 3 + 2
    assert found("it", key="") == ["b in it"]
    server.close()
    for key in ("OWN_KEY", ""):
        replayed = [found(lang, "replay", key) for lang in ("de", "en", "it", "fr")]
        assert replayed == [["b in de"], ["b in en"], ["b in it"], []]
    assert CANARY.encode() not in (tmp_path / "cache").read_bytes()


def test_a_file_of_a_former_version_is_still_read(serve, tmp_path):
    old = Cache(str(tmp_path / "cache"))
    old.put(("retrieve", "http://127.0.0.1:8000/retrieve", "b", 3), (Document(text="old"),))
    old.close()
    engine = RetrieveSearch(http=HttpSpec(cache=str(tmp_path / "cache"), mode="replay"))
    assert search(engine, "b")["b"].documents == (Document(text="old"),)
    engine.close()


def test_a_file_is_made_in_one_step(tmp_path):
    """Opened while another run makes it, and after a kill between the table and its version."""
    path = str(tmp_path / "cache")
    file = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    file.execute("BEGIN IMMEDIATE")
    file.execute(f"CREATE TABLE answers ({TABLE})")

    def made():
        file.execute("PRAGMA user_version = 1")
        file.execute("COMMIT")

    other = threading.Timer(0.3, made)
    other.start()
    Cache(path).close()
    other.join()
    file.execute("PRAGMA user_version = 0")
    Cache(path).close()
    assert file.execute("PRAGMA user_version").fetchone() == (1,)
    file.execute("PRAGMA user_version = 7")
    with pytest.raises(ValueError, match="another version's file"):
        Cache(path)
    file.close()


@pytest.mark.parametrize("mode", ["cache", "record"])
def test_a_file_that_is_locked_holds_nobody_up(mode, serve, tmp_path, caplog, monkeypatch):
    """Searches that have been sent are answered meanwhile; then a run goes on without it, unless it records."""
    monkeypatch.setattr(sqlite3, "connect", lambda name, wait, _real=sqlite3.connect, **more: _real(name, 1.0, **more))
    path = tmp_path / "cache"
    engine = RetrieveSearch(serve(good).url(), http=HttpSpec(cache=str(path), mode=mode))
    engine.setup()
    file = sqlite3.connect(str(path), 1.0, isolation_level=None)
    file.execute("BEGIN EXCLUSIVE")
    begun = time.monotonic()
    caplog.set_level(logging.WARNING)
    if mode == "record":
        with pytest.raises(ValueError, match="cannot be used: database is locked"):
            search(engine, "a")
    else:
        results = search(engine, *map(str, range(30)))
        assert all(map(is_good, results.values()))
        # If each of the thirty had waited for the file, half a minute.
        assert time.monotonic() - begun < 15
        assert caplog.text.count("cannot be used: database is locked; the run goes on without it") == 1
    file.execute("ROLLBACK")
    engine.close()


def test_the_loop_goes_on_while_the_file_waits(serve, tmp_path, monkeypatch):
    engine = RetrieveSearch(serve(good).url(), http=HttpSpec(cache=str(tmp_path / "cache")))
    engine.setup()
    held = threading.Event()
    monkeypatch.setattr(engine.cache, "get", lambda *keys: held.wait(10) and None)
    engine.submit([request("a")])
    alive = threading.Event()
    engine.loop.call_soon_threadsafe(alive.set)
    assert alive.wait(5)
    held.set()
    assert is_good(engine.poll()[0])
    engine.close()


def test_nothing_is_lost_of_a_plain_text():
    assert document("a &#47; b") == Document(text="a &#47; b")
    assert Secret("").hide(["a", ""]) == ["a", ""]
