"""Searches of a rollout: each answer finds its question, whatever the engine does."""

import random

import pytest

from support.stage import GREEDY, Recorder, Stage, check_bookkeeping, example, parts_of
from zs_lightning.rollout import RolloutSpec
from zs_lightning.text.prompts import MINIATURE
from zs_lightning.types import Document, SearchResult, Status


@pytest.fixture(scope="module")
def stage(tokenizers):
    return Stage(tokenizers["raw"])


def random_script(rng, i):
    """Turns, and what each must lead to: a query to be sent, or None."""
    turns, queries = [], []
    for n in range(6):
        kind = rng.choice(["search", "search", "search", "invalid", "forged", "answer"])
        if n == 5 or kind == "answer":
            turns.append("<answer> done</answer>")
            break
        query = f"{i} {n}"
        turns.append({"search": f"<search> {query}</search>", "invalid": "hm<eos>", "forged": "<information>"}[kind])
        queries += [query] if kind == "search" else []
    return turns, queries


def test_thousands_of_searches_keep_question_query_and_answer_together(miniature):
    """Rows that answer, fail or forge leave gaps in the batch; every request must still carry its own example."""
    stage, rng, seen = Stage(miniature[1], MINIATURE), random.Random(0), 0
    while seen < 3_000:
        scripts = [(example(i), random_script(rng, i)) for i in range(seen, seen + 1000)]
        search = Recorder(seed=seen)
        limits = {"max_turns": 5, "slots": 800, "max_length": 160}
        trajectories = stage.run([(e, turns) for e, (turns, _) in scripts], search, **limits)
        asked = {}
        for request in search.requests:
            assert request.query.split()[0] == request.example.id
            assert request.example.golden_answers == (f"gold {request.example.id}",)
            asked.setdefault(request.example.id, []).append(request.query)
        for (e, (turns, queries)), trajectory in zip(scripts, trajectories, strict=True):
            assert trajectory.example is e
            assert asked.get(e.id, []) == queries
            assert [turn.text for turn in trajectory.turns] == turns
            for turn in trajectory.searches:
                assert turn.documents == (Document(text=f"{turn.content} is found"),)
                shown = stage.encoder.decode(trajectory.token_ids[slice(*turn.observation_span)])
                assert shown == f"<information> Doc 1: {turn.content} is found</information>"
            assert trajectory.status is Status.ANSWERED
        seen += len(search.requests)


def test_more_rows_than_slots_wait_for_searches_of_parked_rows(stage):
    """All slots may be held by rows whose search is under way while others have not begun."""
    scripts = [(example(i), [f"<search> {i} </search>"] * 2 + [f"<answer> {i} </answer>"]) for i in range(11)]
    for slots in (1, 2, 5):
        trajectories = stage.run(scripts, slots=slots)
        assert [t.answer for t in trajectories] == [str(i) for i in range(11)]
        for trajectory in trajectories:
            check_bookkeeping(trajectory, len(stage.tokenizer))


def test_a_failed_search_ends_its_trajectory_only(stage):
    def answer(request):
        failed = request.query == "b"
        return SearchResult(key=request.key, failure="out of order") if failed else SearchResult(key=request.key)

    search = Recorder(answer)
    scripts = [(example(i), [f"<search> {q} </search>", "<answer> x </answer>"]) for i, q in enumerate("abab")]
    trajectories = stage.run(scripts, search, slots=2)
    assert [t.status for t in trajectories] == [Status.ANSWERED, Status.FAILED] * 2
    assert [t.failure for t in trajectories] == [None, "out of order"] * 2
    assert trajectories[1].answer is None
    assert not trajectories[1].searches
    assert len(trajectories[1].turns) == 1
    assert stage.encoder.decode(parts_of(trajectories[0])[1][1]) == "\n\n<information></information>\n\n"


def test_a_search_engine_that_loses_or_invents_results_stops_the_run(stage):
    scripts = [(example(i), ["<search> a </search>", "<answer> x </answer>"]) for i in range(3)]
    lost = Recorder()
    lost.submit = lambda requests: lost.pending.extend(requests[:1])
    rollout = stage.rollout(scripts, lost)
    with pytest.raises(RuntimeError, match="recorder lost 2 requests"):
        rollout.run([e for e, _ in scripts], 1, 0, GREEDY)
    # What the error left in the engine does not reach the next run.
    rollout.search = Recorder()
    again = rollout.run([e for e, _ in scripts], 1, 0, GREEDY)
    assert [t.token_ids for t in again] == [t.token_ids for t in stage.run(scripts)]
    assert [len(t.turns) for t in again] == [2] * 3
    with pytest.raises(RuntimeError, match="answered nobody"):
        stage.run(scripts, Recorder(lambda r: SearchResult(key="nobody")))


def test_draws_by_call_and_by_query(stage):
    queries = ["red harbor", "red harbor", "Harbor, the red", "blue harbor", "red harbor"]
    turns = [f"<search> {query} </search>" for query in queries]

    def seeds(noise_draw, number):
        search = Recorder()
        trajectory = stage.run(
            [(example(number), [*turns, "<answer> x </answer>"])], search, noise_draw=noise_draw, max_turns=5
        )[0]
        assert len(trajectory.searches) == 5
        return trajectory, [r.query for r in search.requests], [r.seed for r in search.requests]

    _, sent, by_call = seeds("call", 1)
    assert sent == queries
    assert len(set(by_call)) == 5
    trajectory, sent, by_query = seeds("query", 1)
    assert sent == ["red harbor", "blue harbor"], "the same words again, in any order, are answered from memory"
    assert [turn.repeated for turn in trajectory.searches] == [False, True, True, False, True]
    assert trajectory.turns[1].documents == trajectory.turns[4].documents == trajectory.turns[0].documents
    assert trajectory.turns[2].documents == trajectory.turns[0].documents
    assert by_query[1] != by_query[0]
    assert not set(by_query) & set(seeds("query", 2)[2]), "another trajectory draws its own"


def test_requests_carry_turn_and_noise(stage):
    search = Recorder()
    rollout = stage.rollout([(example(1), ["hm<|endoftext|>", "<search> a </search>", "<answer> x </answer>"])], search)
    rollout.noise_prob = 0.25
    rollout.run([example(1)], 1, 0, GREEDY)
    assert [(r.turn, r.noise_prob, r.key) for r in search.requests] == [(2, 0.25, "test/1#0")]


@pytest.mark.parametrize("wrong", [{"max_turns": -1}, {"max_new_tokens": 0}, {"max_length": 0}, {"slots": 0}])
def test_impossible_limits_are_refused(wrong):
    with pytest.raises(ValueError, match="rollout: expected"):
        RolloutSpec(**wrong)
