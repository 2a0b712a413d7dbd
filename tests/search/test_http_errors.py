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
    assert (counters["calls"], counters["retries"], counters["failures"]) == (len(server.asked), sum(failed.values()), 0)
    assert counters["calls"] == 1 + 40 + counters["retries"]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_an_error_that_stays_is_repeated_three_times_and_is_a_failure(serve, engines, status):
    server = serve(answering({"a": Reply({"error": "x"}, status=status)}))
    engine = engines(server.url())
    results = search(engine, "a", "b")
    assert f'the server answers {status}: "{{"error": "x"}}"' in results["a"].failure
    assert is_good(results["b"])
    assert (engine.counters["calls"], engine.counters["retries"], engine.counters["failures"]) == (6, 3, 1)


def test_a_refusal_is_not_repeated(serve, engines):
    server = serve(answering({"no": Reply({"error": "bad query"}, status=400), "who": Reply({}, status=401)}))
    results = search(engines(server.url()), "no", "who", "yes")
    assert results["no"].failure == 'retrieve: the server answers 400: "{"error": "bad query"}"'
    assert "refuses with 401" in results["who"].failure
    assert is_good(results["yes"])
    assert len(server.asked) == 4


def test_a_repetition_waits_as_long_as_the_server_asks(serve, engines):
    told = []

    def answer(asked):
        if asked.body["queries"] != ["Paris"] and not told:
            told.append(time.monotonic())
            return Reply({}, status=429, headers={"Retry-After": "1"})
        return good(asked)

    server = serve(answer)
    engine = engines(server.url(), concurrency=1)
    assert all(map(is_good, search(engine, "a", "b", "c").values()))
    assert engine.counters["retries"] == 1
    assert all(asked.at - told[0] >= 0.99 for asked in server.asked[2:])
    assert max(asked.at - told[0] for asked in server.asked) < 4


def test_a_wait_beyond_the_deadline_is_a_failure_at_once(serve, engines):
    reply = Reply({}, status=503, headers={"Retry-After": "30"})
    engine = engines(serve(answering({"a": reply})).url(), concurrency=1)
    engine.setup()
    begun = time.monotonic()
    results = search(engine, "a", "b")
    assert results["a"].failure.endswith("asks to wait 30 s")
    assert is_good(results["b"])
    assert time.monotonic() - begun < 3


def test_how_long_to_wait_is_read_from_seconds_and_dates():
    assert layer.wait_asked("7") == 7
    assert 3 < layer.wait_asked(formatdate(time.time() + 5, usegmt=True)) <= 5
    for header in ("", "-3", "nan", "1e9", "soon", "٣", formatdate(0), "Mon, 99 Foo 20 99:99:99 GMT", "²"):
        assert layer.wait_asked(header) == 0
    assert layer.wait_asked("9" * 99) > 1e30
