"""The pool of questions that groups without signal are replaced from."""

import json
import random

import pytest

from zs_lightning.errors import UserError
from zs_lightning.rl.pool import Pool, RefillSpec, replaced, without_signal
from zs_lightning.types import QAExample, Status, Trajectory


def example(key):
    return QAExample(id=key, question=f"Who is {key}?", golden_answers=("Foo", "Bar"), source="s", subset="new", support=("x",))


def group(key, *rewards, refilled=False):
    """Rollouts of a question; None has failed."""
    rows = []
    for sample, reward in enumerate(rewards):
        row = Trajectory(example=example(key), sample=sample, prompt_ids=[1], refilled=refilled, reward=reward or 0.0)
        row.status = Status.FAILED if reward is None else Status.ANSWERED
        rows.append(row)
    return rows


def groups(keys, rewards):
    return [row for key in keys for row in group(key, *rewards())]


def usable(rows):
    return [row for row in rows if row.status is not Status.FAILED]


def known(pool):
    return [key.removeprefix("s/") for key in pool.questions]


def drawn(pool, rows, seed=0):
    asked = {row.group_id: row.example for row in rows}.values()
    return [question.id for question in pool.draw(usable(rows), list(asked), random.Random(seed))]


def test_the_pool_has_what_was_neither_always_right_nor_always_wrong_when_it_was_asked_last():
    pool = Pool(RefillSpec())
    pool.remember(group("right", 1, 1) + group("wrong", 0, 0) + group("mixed", 0, 1) + group("other", 0.5, 0.25))
    assert known(pool) == ["mixed", "other"]
    # Failed rollouts earn nothing, which says nothing; nor does one that is left alone.
    pool.remember(group("mixed", 1, None) + group("failed", 1, None, None) + group("none", None, None))
    assert known(pool) == ["mixed", "other"]
    pool.remember(group("mixed", 1, 0, None))
    assert known(pool) == ["other", "mixed"]
    pool.remember(group("other", 1, 1, None))
    assert known(pool) == ["mixed"]


def test_what_was_asked_longest_ago_is_forgotten():
    pool = Pool(RefillSpec(pool_size=2))
    pool.remember(group("a", 0, 1) + group("b", 0, 1))
    pool.remember(group("a", 0, 1))
    pool.remember(group("c", 0, 1))
    assert known(pool) == ["a", "c"]
    smaller = Pool(RefillSpec(pool_size=1))
    smaller.load(pool.state())
    assert known(smaller) == ["c"]


def test_a_draw_is_bounded_and_asks_nothing_of_the_step_again():
    pool = Pool(RefillSpec(share=0.5))
    dead = [group(f"dead {i}", 0, 0) for i in range(3)]
    step = sum(dead, group("mixed", 0, 1) + group("none", None, None))
    assert drawn(pool, step) == []
    pool.remember(step)
    assert drawn(pool, step) == []
    pool.remember(group("a", 0, 1))
    assert drawn(pool, step) == ["a"]
    pool.remember(group("b", 0, 1) + group("c", 0, 1) + group("dead 1", 0, 1))
    # Half of five questions are two, of three that have no signal.
    assert len(set(drawn(pool, step)) & {"a", "b", "c"}) == len(drawn(pool, step)) == 2
    assert {tuple(drawn(pool, step, seed)) for seed in range(40)} == {(x, y) for x in "abc" for y in "abc" if x != y}
    assert len(drawn(pool, dead[0] + group("mixed", 0, 1))) == 1
    # At least one, or a step of one question would have none.
    assert len(drawn(pool, dead[0])) == 1
    assert drawn(pool, group("x", 0, 1)) == []


def test_groups_with_signal_take_the_places_of_those_without():
    step = group("right", 1, 1) + group("mixed", 0, 1) + group("wrong", 0, 0) + group("other", 0, 0)
    fresh = group("dead", 1, 1, refilled=True) + group("a", 0, 1, refilled=True) + group("b", 1, 0, refilled=True)
    found = replaced(step, fresh)
    assert [row.example.id for row in found] == ["mixed"] * 2 + ["other"] * 2 + ["a"] * 2 + ["b"] * 2
    assert replaced(step, []) == step == replaced(step, fresh[:2])
    pool = Pool(RefillSpec())
    pool.remember(group("x", 0, 1))
    assert pool.metrics(fresh, found) == {"groups/pool": 1, "groups/drawn": 3, "groups/refilled": 2}
    assert pool.metrics([], step) == {"groups/pool": 1, "groups/drawn": 0, "groups/refilled": 0}


def test_a_state_is_json_and_has_whole_questions():
    pool, other = Pool(RefillSpec()), Pool(RefillSpec())
    pool.remember(group("b", 0, 1) + group("a", 0, 1))
    other.load(json.loads(json.dumps(pool.state())))
    assert list(other.questions.items()) == list(pool.questions.items()) == [(f"s/{key}", example(key)) for key in "ba"]


def test_any_steps_keep_what_is_promised():
    rng = random.Random(0)
    refills = 0
    for _ in range(60):
        share, size, each = rng.choice([0.1, 0.5, 1.0]), rng.randint(1, 8), rng.randint(2, 4)
        pool, last = Pool(RefillSpec(share=share, pool_size=size)), {}
        for number in range(15):
            names = rng.sample("abcdefghijklmnop", rng.randint(1, 8))
            step = groups(names, lambda each=each: rng.choices((0, 1, None), (4, 4, 1), k=each))
            before = pool.state()
            chosen = drawn(pool, step, number)
            assert pool.state() == before
            assert drawn(pool, step, number) == chosen
            assert len(set(chosen)) == len(chosen) <= max(1, round(share * len(names)))
            assert not set(chosen) & set(names)
            assert all(last[name] for name in chosen)
            fresh = groups(chosen, lambda each=each: rng.choices((0, 1), k=each))
            trained = replaced(usable(step), usable(fresh))
            count = len({row.group_id for row in usable(step)})
            assert len({row.group_id for row in trained}) == count
            dead, left = len(without_signal(usable(step))), len(without_signal(trained))
            assert left == dead - (len(chosen) - len(without_signal(usable(fresh))))
            refills += dead - left
            pool.remember(step + fresh)
            for name in [*names, *chosen]:
                rewards = [row.reward for row in usable(step + fresh) if row.example.id == name]
                if len(rewards) > 1:
                    last[name] = min(rewards) < max(rewards)
            assert len(pool.questions) <= size
            assert all(last[name] for name in known(pool))
    assert refills > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, r"^model\.refill\.share: expected a number above 0, up to 1; got 0$"),
        ({"share": 1.5}, r"refill\.share: .* got 1\.5"),
        ({"share": float("nan")}, r"refill\.share"),
        ({"pool_size": 0}, r"^model\.refill\.pool_size: expected 1 or more; got 0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        RefillSpec(**options)


def test_estimators_that_learn_from_equal_rewards_are_refused():
    for estimator in ("reinforce", "reinforce_baseline", "ppo"):
        with pytest.raises(UserError, match=rf"model\.refill: .*rloo, grpo, .* {estimator} learns .*model\.estimator or"):
            RefillSpec().check(estimator, 4)
    with pytest.raises(UserError, match=r"model\.refill: expected model\.group_size of 2 or more; got 1"):
        RefillSpec().check("my_estimators.mine", 1)
    for estimator in ("rloo", "grpo", "grpo_no_std", "my_estimators.mine"):
        RefillSpec().check(estimator, 2)
