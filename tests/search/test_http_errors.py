"""Errors of a search server that pass, or do not: repetitions, the breaker, and waiting as long as the server asks."""

import random
import time
from email.utils import formatdate

import pytest

from support.faultserver import Reply, search
from support.providers import answering, good, is_good
from zs_lightning.search import http as layer


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_errors_that_pass_are_repeated_and_counted(serve, engines, share):
    draws, failed = random.Random(share), {}

    def answer(asked):
        query = asked.body["queries"][0]
        if query.startswith("query") and failed.get(query, 0) < 3 and draws.random() < share:
            failed[query] = failed.get(query, 0) + 1
            return Reply({"error": "x"}, status=draws.choice([429, 500, 502, 503, 504]))
        return good(asked)

    server = serve(answer)
    engine = engines(server.url(), concurrency=1)
    assert all(map(is_good, search(engine, *(f"query {i}" for i in range(40))).values()))
    counters = engine.counters
    assert sum(failed.values()) > 40 * share / 4
    assert (counters.calls, counters.retries, counters.failures) == (len(server.asked), sum(failed.values()), 0)
    assert counters.calls == 1 + 40 + counters.retries


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_always_fails_is_left_alone_after_five_calls(serve, engines, status):
    server = serve(lambda asked: good(asked) if asked.body["queries"] == ["Paris"] else Reply({"error": "x"}, status=status))
    engine = engines(server.url(), concurrency=1)
    results = search(engine, *(f"query {i}" for i in range(20)))
    assert len(server.asked) == 1 + 5
    assert engine.counters.failures == 20
    assert engine.counters.calls == 6
    assert f"the server answers {status}" in results["query 0"].failure
    assert f'5 calls in a row failed, the last one with: the server answers {status}: "{{"error": "x"}}"' in (
        results["query 19"].failure
    )


def test_calls_under_way_when_the_server_breaks_are_all_that_go_beyond_five(serve, engines):
    server = serve(lambda asked: good(asked) if asked.body["queries"] == ["Paris"] else Reply({}, status=500, delay=0.05))
    search(engines(server.url(), concurrency=4), *(f"query {i}" for i in range(20)))
    assert 5 <= len(server.asked) - 1 <= 5 + 3


def test_one_call_alone_tries_whether_the_server_is_back(serve, engines, monkeypatch):
    monkeypatch.setattr(layer, "COOL_DOWN", 0.5)
    server = serve(lambda asked: good(asked) if asked.body["queries"] == ["Paris"] else Reply({}, status=500, delay=0.05))
    engine = engines(server.url(), concurrency=4)
    search(engine, *(f"query {i}" for i in range(20)))
    before = len(server.asked)
    time.sleep(0.55)
    search(engine, *(f"query {i}" for i in range(20)))
    assert len(server.asked) == before + 1


def test_a_server_that_stops_answering_is_left_alone_too(serve, engines):
    server = serve(lambda asked: good(asked) if asked.body["queries"] == ["Paris"] else Reply({}, delay=30))
    results = search(engines(server.url(), concurrency=1, timeout=0.2), *(f"query {i}" for i in range(20)))
    assert len(server.asked) == 1 + 5
    assert "5 calls in a row failed, the last one with: no answer within 0.2 s" in results["query 19"].failure


def test_a_refusal_is_not_repeated(serve, engines):
    server = serve(answering({"no": Reply({"error": "bad query"}, status=400), "who": Reply({}, status=401)}))
    results = search(engines(server.url()), "no", "who", "yes")
    assert results["no"].failure == 'retrieve: the server answers 400: "{"error": "bad query"}"'
    assert "refuses with 401" in results["who"].failure
    assert is_good(results["yes"])
    assert len(server.asked) == 4


def test_everybody_waits_as_long_as_the_server_asks(serve, engines):
    told = []

    def answer(asked):
        if asked.body["queries"] != ["Paris"] and not told:
            told.append(time.monotonic())
            return Reply({}, status=429, headers={"Retry-After": "1"})
        return good(asked)

    server = serve(answer)
    engine = engines(server.url(), concurrency=1)
    assert all(map(is_good, search(engine, "a", "b", "c").values()))
    assert engine.counters.retries == 1
    assert all(asked.at - told[0] >= 0.99 for asked in server.asked[2:])
    assert max(asked.at - told[0] for asked in server.asked) < 4


def test_a_wait_beyond_the_deadline_is_a_failure_at_once(serve, engines):
    reply = Reply({}, status=503, headers={"Retry-After": "30"})
    begun = time.monotonic()
    results = search(engines(serve(answering({"a": reply})).url(), concurrency=1), "a", "b")
    assert all("asks to wait" in result.failure for result in results.values())
    assert time.monotonic() - begun < 5


def test_how_long_to_wait_is_read_from_seconds_and_dates():
    assert layer.wait_asked("7") == 7
    assert 3 < layer.wait_asked(formatdate(time.time() + 5, usegmt=True)) <= 5
    for header in ("", "-3", "nan", "1e9", "soon", "٣", formatdate(0), "Mon, 99 Foo 20 99:99:99 GMT", "²"):
        assert layer.wait_asked(header) == 0
    assert layer.wait_asked("9" * 39) == 86400
