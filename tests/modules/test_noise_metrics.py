"""Realised noise follows the plan, also where a policy repeats what was fruitless."""

import math
import random

import pytest

from support.stage import GREEDY, Recorder, Stage, example
from zs_lightning.errors import UserError
from zs_lightning.modules.step_metrics import noise_metrics
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search.orders import draw_noisy
from zs_lightning.streams import derive_seed
from zs_lightning.types import ActionKind, Document, QAExample, SearchResult, Trajectory, Turn

EXAMPLE = QAExample(id="1", question="?", golden_answers=("x",), source="test")


@pytest.fixture
def stage(tokenizers):
    return Stage(tokenizers["raw"])


def search(label, noise, repeated=False, withheld=False):
    return Turn(
        text="q", kind=ActionKind.SEARCH, content="q", span=(0, 1), observation_span=(1, 2),
        label=label, noise=noise, repeated=repeated, withheld=withheld,
    )  # fmt: skip


def trajectory(turns, noise_prob=0.5):
    return Trajectory(example=EXAMPLE, sample=0, prompt_ids=[1], turns=turns, noise_prob=noise_prob)


def test_draws_are_counted_by_hand():
    turns = [search("partial", 1.0), search("partial", 1.0, repeated=True), search("useful", 0.0, withheld=True)]
    clean = trajectory([search("useful", 0.0)] * 5, noise_prob=0.0)
    mixed = trajectory([search("outdated", 1 / 3)])
    assert noise_metrics([trajectory(turns), clean, mixed], 0.5) == {
        "noise/realised": pytest.approx((1 + 0 + 1 / 3) / 3),
        "noise/read": pytest.approx((1 + 1 + 0 + 1 / 3) / 4),
        "search/withheld": 1 / 4,
        "noise/drawn_partial": 1 / 3,
        "noise/drawn_useful": 1 / 3,
        "noise/drawn_outdated": 1 / 3,
    }
    noise = noise_metrics([mixed], 0.5, ["partial", "outdated"])
    drawn = {"useful": 0.0, "partial": 0.0, "outdated": 1.0}
    assert {name: noise.get(f"noise/drawn_{name}") for name in drawn} == drawn
    assert noise_metrics([trajectory([search(None, None)])], 0.5, ["partial"]) == {}, "a real engine draws nothing"


@pytest.mark.parametrize("noise_draw", ["call", "query"])
@pytest.mark.parametrize("p", [0.1, 0.4])
def test_realised_noise_follows_the_plan_of_a_policy_that_goes_on_while_it_reads_noise(noise_draw, p):
    """It repeats its words half of the time: the draw of a query is then the one it had."""
    rng = random.Random(0)
    trajectories = []
    for number in range(6000):
        turns = []
        query = 0
        while len(turns) < 8:
            draw = len(turns) if noise_draw == "call" else query
            repeated = noise_draw == "query" and query in {turn.span[0] for turn in turns}
            noisy = draw_noisy(derive_seed(number, noise_draw, draw), p)
            turn = search("noisy" if noisy else "useful", float(noisy), repeated)
            turn.span = (query, query + 1)
            turns.append(turn)
            if not noisy:
                break
            query += rng.random() < 0.5
        trajectories.append(trajectory(turns, p))
    found = noise_metrics(trajectories, p)
    draws = sum(not turn.repeated for t in trajectories for turn in t.turns)
    assert abs(found["noise/realised"] - p) < 4 * math.sqrt(p * (1 - p) / draws)
    assert (found["noise/read"] > p + 0.02) == (noise_draw == "query")


def test_a_share_of_each_group_searches_without_noise(stage):
    engine = Recorder(lambda r: SearchResult(key=r.key, label="noisy", noise=1.0))
    turns = ["<search> a </search>", "<answer> x </answer>"]
    rollout = stage.rollout([(example(1), turns)], engine, clean_share=0.5)
    rollout.noise_prob = 0.4
    finished = rollout.run([example(1)], 5, 0, GREEDY)
    assert [t.noise_prob for t in finished] == [0.0, 0.0, 0.4, 0.4, 0.4]
    expected = [(f"test/1#{i}", t.noise_prob) for i, t in enumerate(finished)]
    assert sorted((r.key, r.noise_prob) for r in engine.requests) == expected
    with pytest.raises(UserError, match=r"^rollout.clean_share: expected a number from 0 to 1"):
        RolloutSpec(clean_share=1.5)


def test_a_search_knows_what_was_shown_before(stage):
    engine = Recorder()
    turns = [f"<search> {query} </search>" for query in ("a", "b", "c")]
    stage.run([(example(1), [*turns, "<answer> x </answer>"])], engine, max_turns=3)
    assert [[d.text for d in r.shown] for r in engine.requests] == [[], ["a is found"], ["a is found", "b is found"]]


def test_what_a_withheld_search_found_vouches_for_no_other(stage):
    documents = (Document(text="Nothing Much"),)
    engine = Recorder(
        lambda r: SearchResult(key=r.key, documents=documents, label="useful", noise=0.0, withheld=r.query == "a")
    )
    turns = [f"<search> {query} </search>" for query in ("a", "b", "c")]
    stage.run([(example(1), [*turns, "<answer> x </answer>"])], engine, max_turns=3)
    assert [r.shown for r in engine.requests] == [(), (), documents]
