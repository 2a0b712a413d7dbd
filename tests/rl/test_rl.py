"""Curriculum, rewards and advantages: numbers by hand, slow references, properties."""

import itertools
import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zs_lightning.rl.advantages import ESTIMATORS, compute_advantages
from zs_lightning.rl.curriculum import noise_probability
from zs_lightning.rl.rewards import outcome_reward

settings.register_profile("here", max_examples=200, deadline=None, derandomize=True)
settings.load_profile("here")

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


PROBABILITIES = st.floats(0, 1)


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
        ({"step": -1}, "step=-1"),
        ({"total_steps": 0}, "total_steps=0"),
    ],
)
def test_the_curve_refuses_what_is_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        noise_probability(**{"step": 1, "total_steps": 10, "start": 0.0, "end": 0.5, **change})


# ---------------------------------------------------------------------------------------------------------- rewards


def test_rewards_by_hand():
    assert outcome_reward(0.8)[0] == 0.8
    assert outcome_reward(0.0, format_share=1.0)[0] == 0.0
    reward, parts = outcome_reward(
        0.8, format_share=0.5, repeats=2, format_weight=0.2, repeat_cost=0.1, searches=3, search_cost=0.05
    )
    assert reward == pytest.approx(0.8 * 0.8 + 0.2 * 0.5 - 0.2 - 0.15)
    assert parts == pytest.approx({"answer": 0.64, "format": 0.1, "repeats": -0.2, "searches": -0.15})


@given(PROBABILITIES, PROBABILITIES, st.integers(0, 5), PROBABILITIES, PROBABILITIES, st.integers(0, 5), PROBABILITIES)
def test_parts_add_up_and_the_score_never_hurts(score, share, repeats, weight, cost, searches, search_cost):
    reward, parts = outcome_reward(score, share, repeats, weight, cost, searches, search_cost)
    assert reward == pytest.approx(sum(parts.values()))
    assert -cost * repeats - search_cost * searches - 1e-9 <= reward <= 1 + 1e-9
    assert outcome_reward(1.0, share, repeats, weight, cost, searches, search_cost)[0] >= reward - 1e-9
    assert outcome_reward(score, share, repeats + 1, weight, cost, searches, search_cost)[0] <= reward + 1e-9
    assert outcome_reward(score, share, repeats, weight, cost, searches + 1, search_cost)[0] <= reward + 1e-9


# ---------------------------------------------------------------------------------------------------------- advantages


def advantages(name, rewards, groups):
    return compute_advantages(name, torch.tensor(rewards), torch.tensor(groups)).tolist()


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
        shuffled = compute_advantages(name, rewards[order], groups[order])
        assert torch.allclose(shuffled, compute_advantages(name, rewards, groups)[order], atol=1e-6)
        renamed = compute_advantages(name, rewards, torch.tensor([2, 0, 1])[groups])
        assert torch.allclose(renamed, compute_advantages(name, rewards, groups), atol=1e-6)


@pytest.mark.parametrize("name", ["rloo", "grpo", "grpo_no_std"])
def test_a_reward_added_to_a_whole_group_changes_nothing(name):
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        rewards, groups = torch.rand(12, generator=generator), torch.arange(12) % 3
        shifted = compute_advantages(name, rewards + torch.tensor([0.0, 0.5, -2.0])[groups], groups)
        assert torch.allclose(shifted, compute_advantages(name, rewards, groups), atol=1e-4)
        assert shifted.view(4, 3).sum(0).abs().max() < 1e-5


def test_grpo_does_not_depend_on_the_scale_and_rloo_does():
    rewards, groups = torch.rand(8, generator=torch.Generator().manual_seed(2)), torch.zeros(8, dtype=torch.long)
    assert torch.allclose(
        compute_advantages("grpo", 3 * rewards, groups), compute_advantages("grpo", rewards, groups), atol=1e-4
    )
    assert torch.allclose(compute_advantages("rloo", 3 * rewards, groups), 3 * compute_advantages("rloo", rewards, groups))


@pytest.mark.parametrize("name", ["reinforce_baseline", "rloo", "grpo", "grpo_no_std"])
def test_groups_without_a_signal_have_exactly_none(name):
    """In single precision, the mean of sixteen times 0.7 is not 0.7, and grpo divides the rest by next to nothing."""
    for size, reward in itertools.product((1, 2, 3, 5, 7, 16, 100), (0.0, 0.1, 1 / 3, 0.7, 1.0, -0.05)):
        for dtype in (torch.float32, torch.float64):
            rewards = torch.full((size,), reward, dtype=dtype)
            values = compute_advantages(name, rewards, torch.zeros(size, dtype=torch.long))
            assert values.dtype == dtype
            assert values.tolist() == [0.0] * size, (size, reward, dtype)


@pytest.mark.parametrize("name", ["rloo", "grpo", "grpo_no_std"])
def test_a_group_of_one_has_none_beside_others_that_have(name):
    values = advantages(name, [0.9, 1.0, 0.0, 0.3], [1, 0, 0, 2])
    assert values[0] == values[3] == 0.0
    assert values[1] == -values[2] > 0.1


def test_nothing_to_compare_is_no_error_and_wrong_shapes_are():
    assert compute_advantages("grpo", torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        compute_advantages("grpo", torch.zeros(3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        compute_advantages("grpo", torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long))
