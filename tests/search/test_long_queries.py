"""Queries and golden answers that have no room: what is cut, and that no search fails because of what a policy writes."""

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.faultserver import request
from support.modelserver import clients, completion, found, searches, well_at_first, wrong
from zs_lightning.generation import Sampling
from zs_lightning.search import BM25Search, ServedSimulatorSearch, SimulatorSearch
from zs_lightning.search.base import beginning
from zs_lightning.search.http import HttpSpec
from zs_lightning.search.orders import Part
from zs_lightning.search.served import ROOMS, _fits
from zs_lightning.search.simulator import fitted
from zs_lightning.types import QAExample

LONG = "red harbor " * 300
ALIASES = tuple(f"red harbor {i}" for i in range(60))


@pytest.fixture
def served(monkeypatch):
    with clients(monkeypatch) as make:
        yield make


def asked(query, answers=("Foo Bar", "F. Bar")):
    example = QAExample(id="1", question="Who wrote The Red Harbor?", golden_answers=tuple(answers), source="test")
    return replace(request(query), example=example)


def simulator(tokenizer_and_model, **options):
    engine = SimulatorSearch(prompts="miniature", count=3, slots=8, **{"max_new_tokens": 40, "max_length": 160, **options})
    engine.attach(*tokenizer_and_model)
    return engine


def prompt(engine, *args):
    return engine.encoder.decode(engine._fitting_ids(asked(*args), Part("useful", 3, 0), False))


@given(st.text("ab \n", max_size=60), st.integers(0, 40))
def test_the_beginning_is_the_longest_that_fits_in_whole_words(text, most):
    cut = beginning(text, lambda part: len(part) <= most)
    if len(text) <= most:
        assert cut == text
        return
    whole = " ".join(text.split())
    assert whole.startswith(cut)
    assert len(cut) <= most
    first = whole.split(" ")[0]
    if len(first) > most:
        assert cut == first[:most]
    elif whole:
        rest = whole[len(cut) :]
        assert not rest or rest.startswith(" ")
        assert not rest or len(cut) + 1 + len(rest.split()[0]) > most


def test_a_query_too_long_for_the_simulator_is_cut_between_words(miniature):
    engine = simulator(miniature)
    whole, cut = prompt(engine, "red harbor"), prompt(engine, LONG)
    assert "<answer> Foo Bar, F. Bar</answer><search> red harbor</search>" in whole
    query = cut.partition("<search>")[2].partition("</search>")[0].strip()
    assert LONG.startswith(query + " ")
    assert len(query.split()) > 20
    assert "<answer> Foo Bar</answer>" in cut
    ids = engine._fitting_ids(asked(LONG), Part("useful", 3, 0), False)
    assert 120 - 4 <= len(ids) <= 120


def test_as_many_golden_answers_as_fit_beside_the_query_stay(miniature):
    engine = simulator(miniature)
    text = prompt(engine, "the red harbor", ALIASES)
    kept = text.partition("<answer>")[2].partition("</answer>")[0].strip().split(", ")
    assert 3 < len(kept) < 60
    assert kept == list(ALIASES[: len(kept)])
    assert "<search> the red harbor</search>" in text
    more = replace(asked("").example, golden_answers=ALIASES[: len(kept) + 1])
    assert len(engine.prompt_ids(replace(asked("the red harbor"), example=more), "useful")) > 120


@pytest.mark.parametrize("query", [LONG, "x" * 5000, "\U0001f600" * 900, "\x00\x07 \ud800", "<eos>" * 400, " \n" * 900])
def test_no_query_makes_a_simulated_search_fail(miniature, query):
    engine = simulator(miniature, sampling=Sampling(temperature=0.0), max_new_tokens=8, max_length=128)
    requests = [replace(asked(query, ALIASES), key="long", noise_prob=0.5), replace(asked("red harbor"), key="short")]
    results = found(engine, requests)
    assert [result.failure for result in results.values()] == [None, None]


def test_a_question_without_room_is_a_failure_that_names_the_option(miniature):
    engine = simulator(miniature)
    request = asked("red harbor")
    request = replace(request, example=replace(request.example, question=LONG))
    failure = found(engine, [request])[request.key].failure
    assert "tokens without the query, more than max_length - max_new_tokens = 120; raise search.max_length" in failure


def test_a_template_without_room_is_said_before_the_model_is_loaded(miniature, monkeypatch):
    engine = SimulatorSearch(prompts="zerosearch", max_new_tokens=40, max_length=100)
    with pytest.raises(ValueError, match=r"prompt has \d+ tokens without question and query, .* = 60; raise search.max_length"):
        engine.setup()
    assert engine.model is None


# ---------------------------------------------------------------------------------------------- on a server


def small(room):
    """A server whose context has room for so many characters of a prompt."""
    return well_at_first(
        lambda asked: completion(" Doc 1: a.") if len(asked.body["prompt"]) <= room else wrong(400, "too many tokens")
    )


@pytest.mark.parametrize(("room", "calls"), [(2500, 1), (700, 2), (300, 3)])
def test_a_server_that_rejects_a_prompt_gets_a_shorter_one(serve, served, room, calls, tmp_path):
    server = serve(small(room))
    engine = served(server, cache=str(tmp_path / "a.sqlite"))
    result = found(engine, [asked(LONG)])[LONG]
    assert [d.text for d in result.documents] == ["a."]
    assert len(searches(server)) == calls
    sent = searches(server)[-1].body["prompt"].partition("<search>")[2].partition("</search>")[0].strip()
    assert LONG.startswith(sent + " ")
    assert "<answer> Foo Bar</answer>" in searches(server)[-1].body["prompt"]
    assert (engine.counted()["cut"], engine.counted()["failures"]) == (1, 0)
    again = served(server, cache=str(tmp_path / "a.sqlite"), mode="replay")
    assert found(again, [asked(LONG)]) == {LONG: result}


def test_many_golden_answers_are_cut_for_a_server_too():
    many = [f"a rather long other name of the red harbor, number {i}" for i in range(500)]
    kept = fitted(asked("red harbor", many), partial(_fits, ROOMS[0])).example.golden_answers
    assert 20 < len(kept) < 50
    assert list(kept) == many[: len(kept)]


def test_a_server_without_room_for_the_shortest_names_the_option(serve, served):
    server = serve(small(0))
    results = found(served(server), [asked("red harbor"), asked(LONG)])
    assert "too many tokens" in results[LONG].failure
    assert "lower search.max_new_tokens or give the server a longer context" in results[LONG].failure
    assert len(searches(server)) == 1 + 3


# ---------------------------------------------------------------------------------------------- other engines


def test_a_query_of_control_characters_finds_nothing_and_is_not_sent(serve, engines):
    server = serve(lambda asked: {"result": [[{"contents": asked.body["queries"][0]}]]})
    engine = engines(server.url())
    queries = ["\x00\x07", "red\x00 har\x1bbor"]
    engine.submit([request(query) for query in queries])
    results = {}
    while ready := engine.poll():
        results |= {result.key: [d.text for d in result.documents] for result in ready}
    assert results == {queries[0]: [], queries[1]: ["red harbor"]}
    assert [asked.body["queries"] for asked in server.asked] == [["Paris"], ["red harbor"]]


@pytest.mark.parametrize("query", [LONG, "x" * 100_000, "\x00\x07", "\ud800", "", " "])
def test_no_query_makes_bm25_fail(query):
    engine = BM25Search(count=2)
    engine.submit([request(query, "k")])
    (result,) = engine.poll()
    assert result.failure is None


def test_replay_still_says_what_it_lacks(tmp_path, serve, served):
    server = serve(small(2500))
    file = str(tmp_path / "a.sqlite")
    found(served(server, cache=file), [asked("red harbor")])
    engine = ServedSimulatorSearch(prompts="miniature", http=HttpSpec(cache=file, mode="replay"))
    try:
        assert "holds no answer" in found(engine, [asked("another")])["another"].failure
    finally:
        engine.close()
