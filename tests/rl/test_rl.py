"""Curriculum, rewards and advantages: numbers by hand, slow references, properties."""

import itertools
import math
import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zs_lightning.rl.advantages import ESTIMATORS, compute_advantages
from zs_lightning.rl.curriculum import noise_after, noise_probability
from zs_lightning.rl.rewards import AnswerReward, judge
from zs_lightning.types import ActionKind, QAExample, Status, Trajectory, Turn

# ---------------------------------------------------------------------------------------------------------- curriculum


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (1, 0.001), (50, 0.068), (101, 0.166), (152, 0.304), (202, 0.496), (203, 0.5)]
)
def test_the_papers_curve(step, expected):
    assert noise_probability(step, 203, 0.0, 0.5) == pytest.approx(expected, abs=6e-4)


def test_the_curve_by_hand():
    """Half way, b^(1/2) = 2 of 4: a third of the way up."""
    assert noise_probability(5, 10, 0.25, 0.55) == pytest.approx(0.25 + 0.3 / 3)
    assert noise_probability(5, 10, 0.9, 0.3) == pytest.approx(0.9 - 0.6 / 3)
    assert noise_probability(5, 10, 0.0, 1.0, base=9) == pytest.approx(2 / 8)
    assert noise_probability(99, 10, 0.1, 0.7) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1, 1]),
        # Of an eighth of a half turn: 1 - cos 22.5° = 0.07612, of a quarter: 1 - √½ = 0.29289; both halved.
        ("cosine", [0, 0.03806, 0.14645, 0.30866, 0.5, 0.69134, 0.85355, 0.96194, 1, 1]),
        # Three stages of eight steps end with steps 8/3, 16/3 and 8: two whole steps, then three, then three.
        ("steps", [0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1, 1]),
    ],
)
def test_the_other_schedules_by_hand(schedule, shares):
    """From 0.2 up to 0.6, and reversed from 0.6 down to 0.2; the last number is past the end. Constant where both are one."""
    for start, end in ((0.2, 0.6), (0.6, 0.2), (0.3, 0.3)):
        values = [noise_probability(step, 8, start, end, schedule=schedule, stages=3) for step in range(10)]
        assert values == pytest.approx([start + share * (end - start) for share in shares], abs=3e-6)


@given(st.integers(2, 9), st.integers(1, 12))
def test_stages_are_equally_long_and_at_equal_distances(stages, length):
    """Steps are counted from 1. In floating point, 7 / 25 * 25 would begin the eighth of 25 stages too early."""
    total = stages * length
    levels = [noise_probability(step, total, 0.0, 1.0, schedule="steps", stages=stages) for step in range(1, total + 1)]
    assert levels == [stage / (stages - 1) for stage in range(stages) for _ in range(length)]
    twenty_five = [noise_probability(step, 25, 0.0, 1.0, schedule="steps", stages=25) for step in range(1, 26)]
    assert twenty_five == [stage / 24 for stage in range(25)]


PROBABILITIES = st.floats(0, 1)
SCHEDULES = ["exponential", "linear", "cosine", "steps"]


@given(PROBABILITIES, PROBABILITIES, st.sampled_from(SCHEDULES), st.integers(2, 70), st.integers(1, 60))
def test_every_schedule_is_monotone_and_between_its_ends(start, end, schedule, stages, total):
    values = [noise_probability(step, total, start, end, schedule=schedule, stages=stages) for step in range(total + 1)]
    assert (values[0], values[-1]) == (pytest.approx(start), pytest.approx(end))
    assert all(0 <= value <= 1 for value in values)
    direction = 1 if end >= start else -1
    assert all(direction * (b - a) >= -1e-12 for a, b in itertools.pairwise(values))


@given(PROBABILITIES, PROBABILITIES, st.floats(0.1, 50), st.integers(1, 500), st.integers(0, 600))
def test_the_papers_numbers_are_to_the_bit_what_they_were(start, end, base, total, step):
    """The former function's words."""
    share = min(1.0, step / total)
    if base != 1.0:
        share = (base**share - 1) / (base - 1)
    assert noise_probability(step, total, start, end, base) == start + share * (end - start)


@given(PROBABILITIES, PROBABILITIES, st.floats(0.1, 50), st.integers(1, 60))
def test_the_curve_is_monotone_bounded_and_fixed_at_its_ends(start, end, base, total):
    values = [noise_probability(step, total, start, end, base) for step in range(total + 1)]
    assert values[0] == pytest.approx(start)
    assert values[-1] == pytest.approx(end)
    assert all(0 <= value <= 1 for value in values)
    direction = 1 if end >= start else -1
    assert all(direction * (b - a) >= -1e-12 for a, b in itertools.pairwise(values))
    if base > 1:
        linear = [start + (end - start) * step / total for step in range(total + 1)]
        assert all(direction * (value - line) <= 1e-9 for value, line in zip(values, linear, strict=True))


@given(PROBABILITIES, PROBABILITIES, st.integers(0, 30))
def test_base_one_is_the_linear_limit(start, end, step):
    linear = noise_probability(step, 30, start, end, base=1.0)
    assert linear == pytest.approx(start + (end - start) * step / 30)
    assert noise_probability(step, 30, start, end, base=1 + 1e-6) == pytest.approx(linear, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": -0.1}, "start -0.1"),
        ({"end": 1.5}, "end 1.5"),
        ({"start": math.nan}, "nan"),
        ({"base": 0.0}, "base"),
        ({"base": -4.0}, "-4"),
        ({"base": math.inf}, "inf"),
        ({"base": math.nan}, "nan"),
        ({"schedule": "sine"}, "exponential, linear, cosine, steps; got sine"),
        ({"stages": 1}, "stages 1"),
        ({"step": -1}, "step=-1"),
        ({"total_steps": 0}, "total_steps=0"),
    ],
)
def test_the_curve_refuses_what_is_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        noise_probability(**{"step": 1, "total_steps": 10, "start": 0.0, "end": 0.5, **change})


@pytest.mark.parametrize(
    ("rewards", "noise", "after"),
    [
        ([0.7, 0.5], 0.3, 0.4),
        ([0.6], 0.3, 0.4),  # Just at the threshold.
        ([0.7, 0.4], 0.3, 0.3),  # A mean of 0.55.
        ([0.3, 0.1], 0.3, 0.3),  # Just not below.
        ([0.2, 0.1], 0.3, 0.25),
        ([1.0], 0.45, 0.5),
        ([0.0], 0.12, 0.1),
    ],
)
def test_noise_after_success_by_hand(rewards, noise, after):
    """From 0.1 to 0.5, a tenth up from 0.6 on, a twentieth down below 0.2."""
    rule = {"start": 0.1, "end": 0.5, "threshold": 0.6, "rise": 0.1, "fall": 0.05, "lower": 0.2}
    assert noise_after(rewards, noise, **rule) == pytest.approx(after)


# ---------------------------------------------------------------------------------------------------------- rewards


def searched(queries, valid, invalid, answer="gold"):
    """A trajectory with these searches, turns that are valid actions, the answer among them, and invalid ones."""
    kinds = [ActionKind.SEARCH] * len(queries) + [ActionKind.INVALID] * invalid + [ActionKind.ANSWER]
    contents = [*queries, *["no_action"] * invalid, answer]
    assert valid == len(queries) + 1
    turns = [
        Turn(text="x", kind=kind, content=content, span=(0, 1), observation_span=(1, 2))
        for kind, content in zip(kinds, contents, strict=True)
    ]
    example = QAExample(id="1", question="?", golden_answers=("gold bar",), source="test")
    return Trajectory(example=example, sample=0, prompt_ids=[1], turns=turns, status=Status.ANSWERED)


def test_rewards_by_hand():
    plain = searched([], 1, 0)
    judge([plain], AnswerReward())
    assert plain.reward == pytest.approx(2 / 3), "F1 of gold against gold bar"
    judge([plain], AnswerReward(score="em"))
    assert plain.reward == 0.0
    # Three searches, two of them repeats, one invalid turn of five.
    busy = searched(["red harbor", "Harbor  red", "red harbor"], 4, 1)
    judge([busy], AnswerReward(format_weight=0.2, repeat_cost=0.1, search_cost=0.05))
    assert busy.reward == pytest.approx(0.8 * 2 / 3 + 0.2 * 0.8 - 0.2 - 0.15)
    assert busy.reward_parts == pytest.approx({"answer": 0.8 * 2 / 3, "format": 0.16, "repeats": -0.2, "searches": -0.15})


@given(st.lists(st.sampled_from("abc"), max_size=5), st.integers(0, 4), PROBABILITIES, PROBABILITIES, PROBABILITIES)
def test_parts_add_up_and_nothing_but_the_answer_pays(queries, invalid, weight, cost, search_cost):
    reward = AnswerReward(format_weight=weight, repeat_cost=cost, search_cost=search_cost)
    right, wrong, longer = (
        searched(queries, len(queries) + 1, invalid, "gold bar"),
        searched(queries, len(queries) + 1, invalid, "red"),
        searched([*queries, "a"], len(queries) + 2, invalid, "gold bar"),
    )
    judge([right, wrong, longer], reward)
    assert right.reward == pytest.approx(sum(right.reward_parts.values()))
    assert wrong.reward <= right.reward <= 1 + 1e-9
    parts = longer.reward_parts
    assert parts["repeats"] + parts["searches"] <= right.reward_parts["repeats"] + right.reward_parts["searches"] + 1e-9


# ---------------------------------------------------------------------------------------------------------- advantages


def advantages(name, rewards, groups):
    return compute_advantages(ESTIMATORS[name], torch.tensor(rewards), torch.tensor(groups)).tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reinforce", [1.0, 0.0, 0.5, 0.2, 0.8]),
        ("reinforce_baseline", [0.5, -0.5, 0.0, -0.3, 0.3]),
        ("rloo", [0.75, -0.75, 0.0, -0.6, 0.6]),
        ("grpo_no_std", [0.5, -0.5, 0.0, -0.3, 0.3]),
        # Unbiased deviations: sqrt((0.25 + 0.25) / 2) = 0.5 and sqrt(0.09 + 0.09).
        ("grpo", [1.0, -1.0, 0.0, -(0.5**0.5), 0.5**0.5]),
    ],
)
def test_advantages_by_hand(name, expected):
    assert advantages(name, [1.0, 0.0, 0.5, 0.2, 0.8], [0, 0, 0, 1, 1]) == pytest.approx(expected, abs=1e-5)


def slow_advantages(name, rewards, groups):
    """One trajectory after the other, with the standard library's statistics."""
    values = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        mine = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        others = [r for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == group and j != i]
        baseline = {
            "reinforce": 0.0,
            "reinforce_baseline": statistics.fmean(rewards),
            "rloo": statistics.fmean(others) if others else reward,
        }.get(name, statistics.fmean(mine))
        scale = statistics.stdev(mine) + 1e-6 if name == "grpo" and len(mine) > 1 else 1.0
        values.append((reward - baseline) / scale)
    return values


@pytest.mark.parametrize("name", ESTIMATORS)
def test_random_groups_in_shuffled_order_match_a_slow_reference(name):
    for case in range(100):
        rng = random.Random(case)
        groups = [group for group in range(rng.randint(1, 6)) for _ in range(rng.randint(1, 7))]
        rng.shuffle(groups)
        # Grid values tie often, as F1 scores do; differences between groups stay far above rounding.
        rewards = [rng.choice([0.0, 0.25, 0.5, 1.0, round(rng.random(), 2)]) for _ in groups]
        assert advantages(name, rewards, groups) == pytest.approx(slow_advantages(name, rewards, groups), abs=1e-4)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_order_of_trajectories_does_not_matter(name):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rewards, groups = torch.rand(12, generator=generator), torch.randint(3, (12,), generator=generator)
        order = torch.randperm(12, generator=generator)
        shuffled = compute_advantages(ESTIMATORS[name], rewards[order], groups[order])
        assert torch.allclose(shuffled, compute_advantages(ESTIMATORS[name], rewards, groups)[order], atol=1e-6)
        renamed = compute_advantages(ESTIMATORS[name], rewards, torch.tensor([2, 0, 1])[groups])
        assert torch.allclose(renamed, compute_advantages(ESTIMATORS[name], rewards, groups), atol=1e-6)


@pytest.mark.parametrize("name", ["rloo", "grpo", "grpo_no_std"])
def test_a_reward_added_to_a_whole_group_changes_nothing(name):
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        rewards, groups = torch.rand(12, generator=generator), torch.arange(12) % 3
        shifted = compute_advantages(ESTIMATORS[name], rewards + torch.tensor([0.0, 0.5, -2.0])[groups], groups)
        assert torch.allclose(shifted, compute_advantages(ESTIMATORS[name], rewards, groups), atol=1e-4)
        assert shifted.view(4, 3).sum(0).abs().max() < 1e-5


def test_grpo_does_not_depend_on_the_scale_and_rloo_does():
    rewards, groups = torch.rand(8, generator=torch.Generator().manual_seed(2)), torch.zeros(8, dtype=torch.long)
    assert torch.allclose(
        compute_advantages(ESTIMATORS["grpo"], 3 * rewards, groups),
        compute_advantages(ESTIMATORS["grpo"], rewards, groups),
        atol=1e-4,
    )
    assert torch.allclose(
        compute_advantages(ESTIMATORS["rloo"], 3 * rewards, groups), 3 * compute_advantages(ESTIMATORS["rloo"], rewards, groups)
    )


@pytest.mark.parametrize("name", ["reinforce_baseline", "rloo", "grpo", "grpo_no_std"])
def test_groups_without_a_signal_have_exactly_none(name):
    """In single precision, the mean of sixteen times 0.7 is not 0.7, and grpo divides the rest by next to nothing."""
    for size, reward in itertools.product((1, 2, 3, 5, 7, 16, 100), (0.0, 0.1, 1 / 3, 0.7, 1.0, -0.05)):
        for dtype in (torch.float32, torch.float64):
            rewards = torch.full((size,), reward, dtype=dtype)
            values = compute_advantages(ESTIMATORS[name], rewards, torch.zeros(size, dtype=torch.long))
            assert values.dtype == dtype
            assert values.tolist() == [0.0] * size, (size, reward, dtype)


@pytest.mark.parametrize("name", ["rloo", "grpo", "grpo_no_std"])
def test_a_group_of_one_has_none_beside_others_that_have(name):
    values = advantages(name, [0.9, 1.0, 0.0, 0.3], [1, 0, 0, 2])
    assert values[0] == values[3] == 0.0
    assert values[1] == -values[2] > 0.1


def test_nothing_to_compare_is_no_error_and_wrong_shapes_are():
    assert compute_advantages(ESTIMATORS["grpo"], torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match=r"expected 3 finite advantages of 3 rewards; got \(2,\)"):
        compute_advantages(lambda rewards, groups: rewards[:2], torch.zeros(3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="2 of them finite"):
        compute_advantages(lambda rewards, groups: 1 / rewards, torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3, dtype=torch.long))
