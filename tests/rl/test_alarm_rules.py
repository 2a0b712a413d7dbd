"""What tells a run that is dying from a healthy one, on numbers by hand and those of a run that learnt."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from support.runfolders import trajectory
from zs_lightning.rl.alarms import CHANCE, RULES, divergence, empty_results
from zs_lightning.rl.vitals import CURVES, ENOUGH, WINDOW, History, vitals
from zs_lightning.types import ActionKind, Status, Turn

STEP = {
    "rollouts": 128, "failed": 0, "scored": 64, "right": 50, "logprob": -500.0, "tokens": 2500, "forged": 1,
    "cut": 2, "spent": 20, "turns": 400, "queries": 300, "invalid": 10, "thought": 12_000, "searches": 290, "empty": 1,
    "draws": 200, "noise": 50,
    "reward": 0.4, "frac_reward_zero_std": 0.2, "entropy": 0.3, "kl": 0.05, "grad_norm": 0.1, "policy/sampling_gap": 1e-6,
    "noise/planned": 0.25, "moved": 1.0,
}  # fmt: skip
"""Of a healthy run."""


def after(changes, steps=10, before=25, first=STEP):
    history = History()
    for _ in range(before):
        history.add(first)
    for _ in range(steps):
        history.add({**STEP, **changes})
    return history


def found(history):
    findings = ((rule.name, rule.find(history)) for rule in RULES)
    return {name: finding for name, finding in findings if finding}


CASES = [
    ("reward", {"reward": 0.19}, "it is 0.19, below half of its best mean over 20 steps, 0.4", {"reward": 0.2}),
    ("score", {"scored": 2}, "only 10 of 640 rollouts of the last 5 steps earned an answer's reward", {"scored": 3}),
    ("groups", {"frac_reward_zero_std": 0.95}, "95% of the questions had equal rewards, most of them all wrong", {}),
    ("groups", {"frac_reward_zero_std": 0.95}, "", {"frac_reward_zero_std": 0.9}),
    ("groups", {"frac_reward_zero_std": 1.0, "scored": 120}, "equal rewards, most of them all right", {"scored": 128}),
    ("learning", {"grad_norm": 0.0}, "all gradients of the last 5 steps were 0", {"grad_norm": 1e-6}),
    ("learning", {"moved": 0.0}, "the weights have not changed in 5 steps, with gradients of 0.1", {"moved": 1.0}),
    ("likelihood", {"logprob": -800.0}, "right rollouts have a log-probability of -0.32, after -0.2", {"logprob": -725.0}),
    ("entropy", {"entropy": 0.029}, "it is 0.029, after 0.3 at the start", {"entropy": 0.03}),
    ("learning rate", {"kl": 1.1}, "KL to the start is 1.1 nats a token", {"kl": 1.0}),
    ("learning rate", {"entropy": 1.1}, "entropy rose from 0.3 to 1.1", {"entropy": 1.0}),
    ("actions", {"invalid": 210}, "52% of the turns neither search nor answer, 2% at the start", {"invalid": 200}),
    ("no search", {"queries": 6}, "0.05 searches a rollout", {"queries": 7}),
    ("only search", {"spent": 103}, "80% of the rollouts search until their turns are spent", {"spent": 102}),
    ("thought", {"thought": 1_100}, "a turn has 2.8 characters beside its action, after 30 at the start", {"thought": 1_200}),
    ("truncation", {"cut": 65}, "51% of the rollouts are cut for their length", {"cut": 64}),
    ("forged results", {"forged": 13}, "10% of the rollouts write their own results", {"forged": 12}),
    ("empty results", {"empty": 146}, "the engine found nothing in 730 of 1450 searches", {"empty": 144}),
    ("failed searches", {"failed": 7}, "the engine failed in 5% of the rollouts", {"failed": 6}),
    ("noise", {"noise": 80}, "0.33 of 4000 searches were noisy, where 0.25 was planned", {"noise": 55}),
    ("sampling gap", {"policy/sampling_gap": 0.06}, "are 0.06 nats a token apart", {"policy/sampling_gap": 0.05}),
]  # fmt: skip


def test_a_healthy_run_raises_no_alarm():
    assert found(after({}, 40, 0)) == {}


@pytest.mark.parametrize(("name", "changes", "reason", "allowed"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_each_alarm_begins_at_its_threshold_and_alone(name, changes, reason, allowed):
    (alarm,) = found(after(changes)).items()
    assert alarm[0] == name
    assert reason in alarm[1].reason
    assert alarm[1].hint
    assert name not in found(after(allowed))


def test_every_rule_has_a_case():
    here = {"skipped steps"}
    assert {rule.name for rule in RULES} == {case[0] for case in CASES} | here


def test_a_step_that_was_skipped_is_an_alarm_for_five_steps():
    for since in range(7):
        history = after({}, 3)
        history.add({"skipped": 1.0})
        for _ in range(since):
            history.add(STEP)
        assert list(found(history)) == (["skipped steps"] if since < 5 else [])
    history = History()
    history.add({"skipped": 1.0})
    assert history.first == {}
    assert "1 of the last 5 steps met numbers that are not finite" in found(history)["skipped steps"].reason


def test_gradients_that_rise_twentyfold_are_an_alarm_within_three_steps():
    assert "gradients rose from 0.1 to 2.1" in found(after({"grad_norm": 2.1}, 3))["learning rate"].reason
    assert found(after({"grad_norm": 2.0}, 3)) == {}
    assert found(after({"grad_norm": 9.0}, 1, 9)) == {}


def test_what_was_so_from_the_start_has_another_hint():
    history = after({"invalid": 300}, 10, 0)
    assert "format_weight" in found(history)["actions"].hint
    assert "format_weight" not in found(after({"invalid": 300}))["actions"].hint
    assert found(after({"thought": 400}, 30, 0)) == {}


def test_hints_name_the_remedies():
    falls, asks = found(after({"logprob": -800.0})), found(after({"queries": 6}))
    assert "model.loss.likelihood_coef to 0.1 with model.updates_per_rollout at 2 or more" in falls["likelihood"].hint
    assert "model.loss.deepest_share" in asks["no search"].hint


def test_who_hardly_thought_has_nothing_to_lose():
    assert found(after({"thought": 0}, first={**STEP, "thought": 9 * 400})) == {}


def test_costs_that_outweigh_rewards_have_no_half():
    assert found(after({"reward": -0.9}, first={**STEP, "reward": -0.4})) == {}


def test_gradients_of_a_few_rollouts_differ_by_as_much():
    few = {**STEP, "rollouts": 2}
    assert found(after({"grad_norm": 9.0, "rollouts": 2}, 3, first=few)) == {}


@pytest.mark.parametrize(
    ("before", "now", "falls"), [(-0.1, -0.21, True), (-0.1, -0.19, False), (-1, -1.6, True), (-1, -1.4, False)]
)
def test_likelihood_falls_by_a_tenth_of_a_nat_and_by_half(before, now, falls):
    history = after({"logprob": 2500 * now}, first={**STEP, "logprob": 2500 * before})
    assert list(found(history)) == (["likelihood"] if falls else [])
    assert after({}, 9, 0).logprob() is None
    assert after({}, 10, 0).logprob() == pytest.approx(-0.2)


def test_who_knows_the_answers_need_not_doubt():
    assert "entropy" in found(after({"entropy": 0.01, "right": 110}))
    assert found(after({"entropy": 0.01, "right": 120, "logprob": -50.0})) == {}


def test_where_nothing_is_right_the_groups_are_not_blamed():
    history = after(
        {"reward": 0.0, "scored": 0, "right": 0, "logprob": 0.0, "tokens": 0, "frac_reward_zero_std": 1.0, "grad_norm": 0.0}
    )
    assert set(found(history)) == {"reward", "score", "learning"}


def test_few_rollouts_are_no_habit():
    """Of 3 rollouts a step, 20 steps are less than ENOUGH; of 4, sixteen steps are."""
    for rollouts, steps, begins in ((3, 40, False), (4, 15, False), (4, 16, True)):
        history = History()
        for _ in range(steps):
            history.add({**STEP, "rollouts": rollouts, "scored": 0})
        assert ("score" in found(history)) == begins == (min(steps, WINDOW) * rollouts >= ENOUGH)


def test_what_is_not_watched_raises_no_alarm():
    for name in ("queries", "frac_reward_zero_std", "policy/sampling_gap"):
        history = History()
        for _ in range(30):
            history.add({key: value for key, value in STEP.items() if key != name})
        assert found(history) == {}


@pytest.mark.parametrize(
    ("empty", "searches", "said"), [(9, 19, ""), (19, 19, ""), (10, 20, "10 of 20"), (10, 21, ""), (20, 20, "20 of 20")]
)
def test_empty_results_are_wrong_where_half_of_enough_searches_are(empty, searches, said):
    assert empty_results(empty, searches) == (f"found nothing in {said} searches" if said else "")


# ---------------------------------------------------------------------------------------------- noise


def tail_of_binomial(n, p, least):
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(least, n + 1))


def test_noise_is_blamed_only_where_chance_would_do_it_once_in_a_million_times():
    """Against the exact tail: the bound is never smaller, and not more than a hundred times larger."""
    for n, p in ((25, 0.5), (40, 0.05), (300, 0.1), (300, 0.5)):
        blamed = next(k for k in range(round(n * p), n + 1) if n * divergence(k / n, p) > CHANCE)
        assert 1e-8 < tail_of_binomial(n, p, blamed) < 1e-6, (n, p, blamed)
    assert divergence(0.25, 0.25) == 0
    assert divergence(0.1, 0.0) == divergence(0.9, 1.0) == math.inf


def test_noise_as_it_is_drawn_is_never_off_its_plan():
    """A curriculum of few and of many searches a step, with shares of results and with whole ones."""
    rng = random.Random(0)
    (rule,) = (rule for rule in RULES if rule.name == "noise")
    for run in range(30):
        history = History()
        for step in range(100):
            planned, draws = step / 200, rng.choice([0, 1, 5, 50])
            parts = 3 if run % 2 else 1
            noise = sum(rng.random() < planned for _ in range(draws * parts)) / parts
            history.add({**STEP, "draws": draws, "noise": noise, "noise/planned": planned})
            assert rule.find(history) is None, (run, step)


# ---------------------------------------------------------------------------------------------- vitals


def test_vitals_are_counted_by_hand():
    right, wrong, cut, forger, failed = (trajectory(i, a, 2) for i, a in enumerate(["yes", "no", None, "yes", None]))
    right.reward_parts, wrong.reward_parts, forger.reward_parts = (
        {"answer": 1.0},
        {"answer": 0.0, "format": 0.5},
        {"answer": -1},
    )
    wrong.reward, forger.reward = 0.5, 0.7
    right.searches[0].documents = ()
    right.searches[1].label, right.searches[1].documents = "empty", ()
    right.searches[1].noise = 1.0
    wrong.searches[0].label, wrong.searches[0].noise = "noisy", 0.5
    wrong.searches[1].label, wrong.searches[1].noise, wrong.searches[1].repeated = "noisy", 0.5, True
    cut.turns.append(Turn(text="<think> I", kind=ActionKind.INVALID, content="turn_too_long", span=(2, 3)))
    forger.turns[0].text = "<think> x </think><information>"
    failed.status = Status.FAILED
    rows = [right, wrong, cut, forger, failed]
    for row in rows:
        row.noise_prob = 0.25
    clean = trajectory(5, None, 1)
    clean.searches[0].label = "useful"
    found = vitals([*rows, clean], 0.25)
    assert found == {
        "rollouts": 6, "failed": 1, "scored": 1, "right": 2, "logprob": -4.0, "tokens": 4, "forged": 1, "cut": 1, "spent": 1,
        "turns": 15, "queries": 11, "invalid": 1, "searches": 10, "empty": 1, "draws": 2, "noise": 1.5,
        "thought": 10 * len("Doc of Foo.") + len("I") + len("x"),
    }  # fmt: skip
    assert found["empty"] / found["searches"] == 0.1


def test_the_search_of_the_environment_is_none_of_the_policys():
    row = trajectory(0, "yes", 1)
    row.turns[0] = replace(row.turns[0], text="", span=(0, 0))
    found = vitals([row], 0.0)
    assert (found["queries"], found["searches"], found["spent"]) == (0, 1, 0)


def test_a_history_goes_on_where_it_was():
    rng = random.Random(1)
    whole, parts = History(), History()
    for _ in range(50):
        step = {**STEP, "reward": rng.random(), "right": rng.randrange(10)}
        whole.add(step)
        parts.add(step)
        parts = History(**json.loads(json.dumps(parts.state())))
        assert parts == whole
        assert len(parts.recent) <= WINDOW


def test_the_miniature_raises_no_alarm():
    """Curves of the quickstart, and counts of the eight rollouts of each step that it wrote down."""
    recorded = json.loads((Path(__file__).parent / "healthy.json").read_text())
    assert set(recorded) >= set(CURVES)
    history = History()
    for number in range(50):
        history.add({name: values[number] for name, values in recorded.items()})
        assert found(history) == {}, number
