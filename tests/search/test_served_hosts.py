"""Several servers of a simulator: the least busy one is asked, and what one of them does not answer the next one does."""

import threading
import time
from http.server import ThreadingHTTPServer

import pytest

from support.faultserver import Reply
from support.modelserver import clients, completion, found, searches, well_at_first, wrong
from zs_lightning.search import http
from zs_lightning.types import QAExample, SearchRequest


@pytest.fixture
def served(monkeypatch):
    with clients(monkeypatch) as make:
        yield make


def requests(count):
    example = QAExample(id="1", question="Who?", golden_answers=("Foo Bar",), source="test")
    return [SearchRequest(key=str(i), query=f"query {i}", example=example, turn=1, seed=i) for i in range(count)]


def seed_of(asked):
    return completion(f" Doc 1: {asked.body['seed']}.")


words = well_at_first(seed_of)


def answered(engine, count):
    """All searches are answered, each with its own document."""
    results = found(engine, requests(count))
    for request in requests(count):
        seed = engine.call(engine._asked(request)).json["seed"]
        assert results[request.key].failure is None
        assert [document.text for document in results[request.key].documents] == [f"{seed}."]


def breaking(reply):
    """A server that does as told once the event is set."""
    broken = threading.Event()
    return broken, well_at_first(lambda asked: reply(asked) if broken.is_set() else seed_of(asked))


# ---------------------------------------------------------------------------------------------- spreading


def test_the_least_busy_server_is_asked(serve, served):
    fast_has_answered = threading.Event()

    def at_leisure(asked):
        assert fast_has_answered.wait(15)
        return seed_of(asked)

    def quick(asked):
        if len(searches(fast)) > 50:
            fast_has_answered.set()
        return seed_of(asked)

    fast, slow = serve(well_at_first(quick)), serve(well_at_first(at_leisure))
    answered(served(fast, slow, concurrency=6, timeout=60.0), 60)
    assert fast_has_answered.is_set()
    assert 3 <= len(searches(slow)) <= 9


def test_all_searches_are_under_way_at_the_same_time(serve, served, monkeypatch):
    """More than the 100 connections that an HTTP client has by default."""
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 256)
    enough = threading.Event()

    def together(asked):
        if len(searches(server)) == 130:
            enough.set()
        assert enough.wait(15)
        return seed_of(asked)

    server = serve(well_at_first(together))
    answered(served(server, concurrency=256, timeout=60.0), 130)
    assert server.most_open == 130


# ---------------------------------------------------------------------------------------------- faults

FAULTS = {
    "refused": Reply(b"nothing", hang_up=0),
    "500": Reply({}, status=500),
    "502": Reply(b"<html>", status=502),
    "429": Reply({}, status=429, headers={"Retry-After": "20"}),
    "not found": Reply({}, status=404),
    "key": Reply({}, status=401),
    "nonsense": Reply(b"<html>"),
    "another API": {"hello": "world"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_leaves_its_searches_to_the_others(serve, served, fault):
    broken, answer = breaking(lambda asked: FAULTS[fault])
    well, ill = serve(words), serve(answer)
    engine = served(well, ill, model="tiny", concurrency=4)
    engine.setup()
    broken.set()
    answered(engine, 40)
    assert 1 <= len(searches(ill)) <= 4, "asked again only after a while"
    assert engine.counted()["failures"] == 0
    assert engine.counted()["retries"] == len(searches(ill))


def test_a_repetition_goes_to_the_other_server_even_if_the_first_one_is_well_again(serve, served, monkeypatch):
    monkeypatch.setattr(http, "COOL_DOWN", 0.0)
    broken, answer = breaking(lambda asked: Reply({}, status=500))
    ill, well = serve(answer), serve(words)
    engine = served(ill, well, concurrency=1)
    engine.setup()
    broken.set()
    answered(engine, 6)
    assert len(searches(ill)) <= 6
    assert len(searches(well)) == 6


def test_a_repetition_does_not_go_to_a_broken_server(serve, served):
    seen = set()

    def at_the_second_time(asked):
        if asked.body["prompt"] in seen:
            return seed_of(asked)
        seen.add(asked.body["prompt"])
        return Reply({}, status=503)

    ill, well = serve(words), serve(well_at_first(at_the_second_time))
    engine = served(ill, well, concurrency=1)
    engine.setup()
    for _ in range(http.MOST_FAILURES):
        engine.breakers[0].failed("broken before")
    answered(engine, 4)
    assert (len(searches(ill)), len(searches(well))) == (0, 8)


def test_a_server_that_hangs_has_half_of_the_time_and_the_next_one_the_rest(serve, served):
    broken, answer = breaking(lambda asked: Reply({}, delay=30))
    well, ill = serve(words), serve(answer)
    engine = served(well, ill, timeout=3.0, concurrency=4)
    engine.setup()
    broken.set()
    begun = time.monotonic()
    answered(engine, 12)
    assert 1.4 < time.monotonic() - begun < 2.9
    assert 1 <= len(searches(ill)) <= 2


def test_when_all_servers_hang_searches_end_at_their_deadline_and_name_one(serve, served):
    broken, answer = breaking(lambda asked: Reply({}, delay=30))
    servers = [serve(answer), serve(answer)]
    engine = served(*servers, timeout=0.8)
    engine.setup()
    broken.set()
    begun = time.monotonic()
    failures = [result.failure for result in found(engine, requests(2)).values()]
    assert 0.7 < time.monotonic() - begun < 2.5
    for failure in failures:
        assert failure.startswith("served_simulator: http://127.0.0.1:")
        assert failure.endswith("no answer within 0.8 s (search.http.timeout)")
    assert [breaker.failures for breaker in engine.breakers] == [2, 2]


def test_when_all_servers_fail_the_failure_names_one_and_nothing_is_made_up(serve, served):
    broken, answer = breaking(lambda asked: Reply({}, status=500))
    servers = [serve(answer) for _ in range(2)]
    engine = served(*servers, concurrency=1)
    engine.setup()
    broken.set()
    results = found(engine, requests(12))
    assert all(result.failure for result in results.values())
    assert f"served_simulator: {servers[0].url('/v1')}: " in " ".join(result.failure for result in results.values())
    assert all(len(searches(server)) <= http.MOST_FAILURES for server in servers)
    assert engine.counted()["failures"] == 12


def test_a_broken_server_stays_out_when_the_engine_is_closed_between_steps_and_is_tried_again_later(serve, served, monkeypatch):
    monkeypatch.setattr(http, "COOL_DOWN", 60.0)
    broken, answer = breaking(lambda asked: Reply({}, status=500))
    well, ill = serve(words), serve(answer)
    engine = served(well, ill, concurrency=2)
    engine.setup()
    broken.set()
    answered(engine, 4)
    failed = len(searches(ill))
    assert failed >= 1
    engine.close()
    answered(engine, 8)
    assert len(searches(ill)) == failed
    broken.clear()
    for breaker in engine.breakers:
        breaker.closed_again = time.monotonic()
    answered(engine, 8)
    assert len(searches(ill)) > failed
    assert engine.breakers[1].failures == 0


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_a_server_does_not_take_fails_alone(serve, served, status):
    """It is not asked again, nor elsewhere, and many of them do not make a server count as broken."""
    refused = {str(i) for i in range(10)}

    def answer(asked):
        number = asked.body["prompt"].partition("query ")[2].partition("<")[0]
        return wrong(status, "the prompt is too long") if number in refused else seed_of(asked)

    servers = [serve(well_at_first(answer)) for _ in range(2)]
    engine = served(*servers, concurrency=1)
    results = found(engine, requests(14))
    assert {key for key, result in results.items() if result.failure} == refused
    assert "the prompt is too long" in results["3"].failure
    assert sum(len(searches(server)) for server in servers) == 14
    assert [breaker.failures for breaker in engine.breakers] == [0, 0]
