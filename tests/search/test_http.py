"""Search over HTTP against a real server on loopback that fails in every way: late, refused, broken, huge, rate-limited."""

import asyncio
import random
import signal
import socket
import threading
import time
from dataclasses import replace

import pytest

from support.faultserver import Reply, request, search, searching
from support.providers import answering, good, is_good
from zs_lightning.errors import RunError
from zs_lightning.search import RetrieveSearch, remote
from zs_lightning.search import http as layer
from zs_lightning.search.http import HttpSpec


def test_every_query_gets_its_own_documents_within_the_limit_of_open_calls(serve, engines):
    server = serve(lambda asked: Reply(good(asked), delay=random.Random(asked.body["queries"][0]).random() / 20))
    engine = engines(server.url())
    results = search(engine, *(f"query {i}" for i in range(30)))
    assert all(map(is_good, results.values()))
    assert 2 <= server.most_open <= 4
    assert list(results) != [f"query {i}" for i in range(30)]
    assert (engine.counters["searches"], engine.counters["calls"], engine.counters["failures"]) == (30, 31, 0)
    assert server.asked[-1].body.keys() == {"queries", "topk", "return_scores"}
    assert server.asked[-1].headers["user-agent"].startswith("zs_lightning/")


def test_results_can_be_taken_while_others_are_under_way(serve, engines):
    taken = threading.Event()

    def answer(asked):
        if asked.body["queries"] == ["slow"]:
            assert taken.wait(15)
        return good(asked)

    engine = engines(serve(answer).url(), timeout=20.0)
    engine.submit([request(q) for q in ("slow", "fast")])
    assert [result.key for result in engine.poll()] == ["fast"]
    assert engine.ready() == []
    taken.set()
    assert [result.key for result in engine.poll()] == ["slow"]


# ------------------------------------------------------------------------------ no server, slow server


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000/retrieve",
        "localhost",
        "",
        "ftp://h/x",
        "http://",
        "http:///x",
        "http://h:99999/",
        "http://a b/",
        "//h/x",
    ],
)
def test_an_address_that_is_none_is_refused_at_once(url):
    with pytest.raises(ValueError, match=r"search\.endpoint: expected an address such as http://"):
        RetrieveSearch(url)


@pytest.mark.parametrize("url", ["http://a..b/", "http://xn--/", f"http://{'a' * 70}.example/", "http://[::1/"])
def test_a_host_that_cannot_be_is_one_sentence(engines, url):
    with pytest.raises(ValueError, match=r"search\.endpoint"):
        engines(url).setup()


def test_passwords_do_not_belong_into_addresses():
    for url in ("http://me:canary@h/x", "http://h/x?key=canary", "http://h/x#canary"):
        with pytest.raises(ValueError, match="without a user, a password") as error:
            RetrieveSearch(url)
        assert "canary" not in str(error.value)


@pytest.mark.parametrize("fault", ["refused", "silent", "html", "not found", "moved", "busy"])
def test_a_server_that_cannot_be_used_is_named_at_the_start(serve, engines, fault):
    replies = {
        "refused": {},
        "silent": Reply({}, delay=30),
        "html": Reply(b"<html>Hello</html>"),
        "not found": Reply({"detail": "Not Found"}, status=404),
        "moved": Reply({}, status=301, headers={"Location": "https://elsewhere.example/"}),
        "busy": Reply({}, status=503),
    }
    server = serve(lambda asked: replies[fault])
    if fault == "refused":
        server.close()
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"retrieve cannot be used: .*set search\.endpoint") as error:
        engines(server.url(), timeout=0.5 if fault == "silent" else 20.0).setup()
    assert time.monotonic() - begun < 8
    assert server.url() in str(error.value)
    said = {"refused": "no connection", "silent": "no answer within 0.5 s", "html": "no JSON", "not found": "404"}
    assert (said | {"moved": "sends on to https://elsewhere.example/", "busy": "answers 503"})[fault] in str(error.value)
    assert len(server.asked) == {"refused": 0, "busy": remote.ATTEMPTS}.get(fault, 1)


def test_a_server_that_takes_no_calls_is_reported_soon(engines, monkeypatch):
    monkeypatch.setattr(layer, "CONNECT_SECONDS", 0.3)
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):  # They fill its queue, so that the next one gets no answer at all.
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        begun = time.monotonic()
        with pytest.raises(ValueError, match=r"no connection \(ConnectTimeout"):
            engines(f"http://127.0.0.1:{full.getsockname()[1]}/", timeout=30).setup()
        assert time.monotonic() - begun < 5


def test_a_server_that_goes_away_makes_failures_and_comes_back(serve, engines):
    down = threading.Event()
    server = serve(lambda asked: Reply(b"nothing", hang_up=0) if down.is_set() else good(asked))
    engine = engines(server.url(), concurrency=1)
    assert all(map(is_good, search(engine, "a", "b").values()))
    down.set()
    results = search(engine, *(f"query {i}" for i in range(remote.MOST_FAILURES - 1)))
    assert all("no connection" in result.failure for result in results.values())
    assert len(server.asked) == 3 + remote.ATTEMPTS * (remote.MOST_FAILURES - 1)
    down.clear()
    assert all(map(is_good, search(engine, "c", "d", "e").values()))
    assert engine.failed_in_a_row == 0


GONE = {"500": Reply({}, status=500), "404": Reply({}, status=404, delay=0.05), "hangs": Reply({}, delay=30)}


@pytest.mark.parametrize("fault", GONE)
def test_a_server_that_is_gone_for_good_ends_the_run_with_a_sentence(serve, engines, fault):
    before = searching()
    server = serve(lambda asked: good(asked) if asked.body["queries"] == ["Paris"] else GONE[fault])
    engine = engines(server.url(), concurrency=4)
    engine.setup()
    engine.http = replace(engine.http, timeout=0.3)
    said = "search: retrieve: 10 searches in a row failed, the last one with: "
    with pytest.raises(RunError, match=rf"^{said}.*--ckpt_path") as error:
        search(engine, *(f"query {i}" for i in range(100)))
    assert "\n" not in str(error.value)
    engine.close()
    assert not searching() - before, "nothing is asked any more"
    server.close()
    assert len(server.asked) <= 1 + 16 * remote.ATTEMPTS


def test_slow_searches_end_at_their_deadline_and_hold_nobody_up(serve, engines):
    """Each of them would take 15 seconds or more."""
    slow = {
        "late": Reply({}, delay=30),
        "head byte by byte": Reply({}, drip=0.15),
        "body byte by byte": Reply(pieces=(time.sleep(0.15) or b" " for _ in range(200))),
    }
    engine = engines(serve(answering(slow)).url(), timeout=2.0)
    engine.setup()
    begun, ends = time.monotonic(), {}
    queries = [*slow, *(f"query {i}" for i in range(12))]
    engine.submit([request(q) for q in queries])
    while found := engine.poll():
        for result in found:
            ends[result.key] = time.monotonic() - begun
            assert result.failure == ("retrieve: no answer within 2 s (search.http.timeout)" if result.key in slow else None)
    assert all(1.9 < ends[name] < 10 for name in slow)
    assert (len(ends), set(list(ends)[-3:])) == (15, set(slow))


def test_the_deadline_counts_from_the_start_of_a_search_not_of_its_queue(serve, engines):
    engine = engines(serve(lambda asked: Reply(good(asked), delay=0.1)).url(), concurrency=1, timeout=1.5)
    assert all(map(is_good, search(engine, *(f"query {i}" for i in range(16))).values()))


def test_a_server_on_this_machine_is_asked_without_the_proxy(serve, engines, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert is_good(search(engines(serve(good).url()), "a")["a"])


# ------------------------------------------------------------------------------ threads and interruptions


def test_close_ends_the_thread_and_the_next_search_begins_anew(serve, engines):
    before, engine = searching(), engines(serve(answering({"slow": Reply({}, delay=30)})).url(), timeout=30)
    engine.submit([request("slow")])
    time.sleep(0.05)
    begun = time.monotonic()
    engine.close()
    assert time.monotonic() - begun < 5
    assert engine.thread is None
    assert not searching() - before
    assert engine.poll() == engine.ready() == []
    assert all(map(is_good, search(engine, "a", "b").values()))
    engine.close()
    engine.close()


def test_ctrl_c_ends_a_wait_and_the_thread(serve, engines):
    before, engine = searching(), engines(serve(answering({"slow": Reply({}, delay=30)})).url(), timeout=30)
    engine.submit([request("slow")])
    begun = time.monotonic()

    def wait():
        threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
        engine.poll()

    with pytest.raises(KeyboardInterrupt):
        wait()
    engine.close()
    assert time.monotonic() - begun < 5
    assert engine.thread is None
    assert not searching() - before


def test_an_error_of_the_program_itself_is_raised_and_not_counted_as_a_failed_search(serve, engines, monkeypatch):
    engine = engines(serve(good).url())
    engine.setup()
    monkeypatch.setattr(RetrieveSearch, "parse", staticmethod(lambda answer: 1 / 0))
    engine.submit([request("a")])
    with pytest.raises(ZeroDivisionError):
        engine.poll()
    assert engine.counters["failures"] == 0


def test_the_engine_works_inside_of_a_running_event_loop(serve, engines):
    async def notebook():
        return search(engines(serve(good).url()), "a")

    assert is_good(asyncio.run(notebook())["a"])


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"timeout": float("nan")}, {"concurrency": 0}, {"mode": "replay"}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"search\.http: "):
        HttpSpec(**wrong)


@pytest.mark.parametrize("count", [0, -1, 101])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ValueError, match=r"search\.count: retrieve returns 1 to 100 documents; got"):
        RetrieveSearch(count=count)
