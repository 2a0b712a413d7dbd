"""Several servers of a simulator: they are asked in turn, and what one of them does not answer the next one does."""

import threading
import time
from dataclasses import replace

import pytest

from support.faultserver import Reply
from support.modelserver import clients, completion, found, searches, well_at_first, wrong
from zs_lightning.errors import RunError
from zs_lightning.search import remote
from zs_lightning.search.served import SEEDS
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
        seed = engine.orders.plan(request).parts[0].seed % SEEDS
        assert results[request.key].failure is None
        assert [document.text for document in results[request.key].documents] == [f"{seed}."]


def breaking(reply):
    """A server that does as told once the event is set."""
    broken = threading.Event()
    return broken, well_at_first(lambda asked: reply(asked) if broken.is_set() else seed_of(asked))


# ---------------------------------------------------------------------------------------------- spreading


def test_servers_are_asked_in_turn(serve, served):
    servers = [serve(words) for _ in range(3)]
    answered(served(*servers, concurrency=6), 30)
    assert [len(searches(server)) for server in servers] == [10] * 3


def test_all_searches_are_under_way_at_the_same_time(serve, served):
    """More than the 100 connections that an HTTP client has by default."""
    enough = threading.Event()

    def together(asked):
        if len(searches(server)) == 130:
            enough.set()
        assert enough.wait(50)
        return seed_of(asked)

    server = serve(well_at_first(together))
    answered(served(server, concurrency=256), 130)
    assert server.most_open == 130


# ---------------------------------------------------------------------------------------------- faults

FAULTS = {
    "refused": Reply(b"nothing", hang_up=0),
    "500": Reply({}, status=500),
    "502": Reply(b"<html>", status=502),
    "429": Reply({}, status=429, headers={"Retry-After": "1"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_leaves_its_searches_to_the_others(serve, served, fault):
    broken, answer = breaking(lambda asked: FAULTS[fault])
    well, ill = serve(words), serve(answer)
    engine = served(well, ill, model="tiny", concurrency=4)
    engine.setup()
    broken.set()
    answered(engine, 8)
    assert engine.counted()["failures"] == 0
    assert engine.counted()["retries"] == len(searches(ill)) == 4
    assert len(searches(well)) == 8


def test_when_all_servers_hang_searches_end_at_their_deadline(serve, served):
    broken, answer = breaking(lambda asked: Reply({}, delay=30))
    servers = [serve(answer), serve(answer)]
    engine = served(*servers)
    engine.setup()
    engine.http = replace(engine.http, timeout=0.8)
    broken.set()
    begun = time.monotonic()
    failures = [result.failure for result in found(engine, requests(2)).values()]
    # Not after the 30 seconds in which they would answer.
    assert 0.7 < time.monotonic() - begun < 15
    assert failures == ["served_simulator: no answer within 0.8 s (search.http.timeout)"] * 2


def test_when_all_servers_fail_nothing_is_made_up_and_the_run_ends(serve, served):
    broken, answer = breaking(lambda asked: Reply({}, status=500))
    servers = [serve(answer) for _ in range(2)]
    engine = served(*servers, concurrency=1)
    engine.setup()
    broken.set()
    results = found(engine, requests(remote.MOST_FAILURES - 1))
    assert all("the server answers 500" in result.failure for result in results.values())
    with pytest.raises(RunError, match="served_simulator: 10 searches in a row failed"):
        found(engine, requests(1))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_a_server_does_not_take_fails_alone(serve, served, status):
    """It is not asked again, nor elsewhere, and many of them do not end the run."""
    refused = {str(i) for i in range(12)}

    def answer(asked):
        number = asked.body["prompt"].partition("query ")[2].partition("<")[0]
        return wrong(status, "the prompt is too long") if number in refused else seed_of(asked)

    servers = [serve(well_at_first(answer)) for _ in range(2)]
    engine = served(*servers, concurrency=1)
    results = found(engine, requests(16))
    assert {key for key, result in results.items() if result.failure} == refused
    assert "the prompt is too long" in results["3"].failure
    assert sum(len(searches(server)) for server in servers) == 16
    assert engine.failed_in_a_row == 0
