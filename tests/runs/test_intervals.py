"""Intervals of means, against numbers worked out by hand and slow references."""

import math
import random

import pytest
import torch

from zs_lightning.runs.intervals import (
    FEW,
    Interval,
    bootstrap_interval,
    mean_of_groups,
    paired_difference,
    score_interval,
)
from zs_lightning.runs.outcomes import summarise


@pytest.mark.parametrize("values", [[0.25], [1.0] * 7, [0.0] * 50])
def test_constant_values_have_an_interval_of_no_width(values):
    assert bootstrap_interval(values) == Interval(values[0], values[0], values[0])


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        # Means of resamples are K / n with K binomial. [0, 1]: P(K=0) = P(K=2) = 0.25.
        ([0.0, 1.0], 0.0, 1.0),
        # P(K=4) = 0.004, P(K>=3) = 0.051, so the 97.5 % point is 3 of 4; P(K=0) = 0.316.
        ([0.0, 1.0, 0.0, 0.0], 0.0, 0.75),
        # The same, shifted and scaled: 10 + 4 · mean.
        ([10.0, 14.0, 10.0, 10.0], 10.0, 13.0),
    ],
)
def test_interval_of_tiny_cases_by_hand(values, low, high):
    interval = bootstrap_interval(values)
    assert (interval.mean, interval.low, interval.high) == (sum(values) / len(values), low, high)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    # z² = 3.84146. 20 of 20: mean and squares of 23.84146 values are 21.92073 / 23.84146 = 0.919438, and 0.919438
    # ∓ z · √(0.919438 · 0.080562 / 23.84146) = 0.109243, cut at 1. 81 of 263: 82.92073 / 266.84146 = 0.310749.
    [
        ([1.0] * 20, 0.810195, 1.0),
        ([0.0] * 20, 0.0, 0.189805),
        ([1.0] * 81 + [0.0] * 182, 0.255221, 0.366277),
        # All a half: variance (20 · 0.25 + 1.92073) / 23.84146 - 0.25 = 0.040281.
        ([0.5] * 20, 0.419438, 0.580562),
    ],
)
def test_scores_have_the_interval_of_values_with_noughts_and_ones_added(values, low, high):
    interval = score_interval(values)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert interval.mean == sum(values) / len(values)


def coverage(n, rates):
    """[rates]: the exact share of the samples of n values whose interval holds the rate."""
    found = [score_interval([1.0] * hits + [0.0] * (n - hits)) for hits in range(n + 1)]
    low, high = (torch.tensor([getattr(interval, end) for interval in found]).double() for end in ("low", "high"))
    chances = torch.distributions.Binomial(n, rates[:, None].double()).log_prob(torch.arange(n + 1).double()).exp()
    return (chances * ((low <= rates[:, None] + 1e-9) & (rates[:, None] <= high + 1e-9))).sum(1)


@pytest.mark.parametrize("n", [10, 20, 31, FEW, 33, 36, 40, 51, 78, 92, 110, 204, 500])
def test_intervals_hold_every_rate_as_often_as_they_say(n):
    found = coverage(n, torch.arange(20, 981, 4) / 1000)
    assert 0.949 <= found.mean() <= 0.965
    if n >= FEW:
        assert found.min() >= 0.93


@pytest.mark.parametrize("n", [FEW, 300])
def test_scores_between_0_and_1_are_held_by_their_intervals(n):
    """F1 of policies that are often wholly right, often wholly wrong, or partly right."""
    rng = random.Random(n)
    values = (0.0, 1.0, 0.25, 0.4, 0.57, 0.8)
    shares = []
    for right, partly in ((0.02, 0.0), (0.5, 0.1), (0.8, 0.3), (0.95, 0.6), (0.2, 0.95)):
        weights = [(1 - partly) * (1 - right), (1 - partly) * right, *[partly / 4] * 4]
        truth = sum(w * v for w, v in zip(weights, values, strict=True))
        drawn = (score_interval(rng.choices(values, weights, k=n)) for _ in range(500))
        shares.append(sum(interval.low <= truth <= interval.high for interval in drawn) / 500)
    assert min(shares) >= 0.915
    assert 0.93 <= sum(shares) / len(shares) <= 0.975


@pytest.mark.parametrize("sizes", [[FEW] * 7, [FEW, 500]])
def test_means_of_groups_are_held_by_their_intervals(sizes):
    rng = random.Random(0)
    shares = []
    for rate in (0.05, 0.3, 0.9):
        held = 0
        for _ in range(500):
            drawn = {str(i): [float(rng.random() < rate) for _ in range(n)] for i, n in enumerate(sizes)}
            interval = mean_of_groups(drawn)
            held += interval.low <= rate <= interval.high
        shares.append(held / 500)
    assert min(shares) >= 0.915
    assert 0.93 <= sum(shares) / len(shares) <= 0.98


def test_few_values_tell_no_interval():
    interval = score_interval([0.0] * FEW)
    assert interval.told(FEW) == interval.rounded()
    assert interval.told(FEW - 1) == {"mean": 0.0}


def test_values_beyond_1_are_resampled():
    assert score_interval([0.0, 0.5, 3.0]) == bootstrap_interval([0.0, 0.5, 3.0])


def test_differences_of_0_and_1_have_newcombes_interval():
    """36 pairs both right, 12 and 2 by one alone, none both wrong: an example of the method's article."""
    found = paired_difference([1] * 36 + [0] * 12 + [1] * 2, [1] * 36 + [1] * 12 + [0] * 2)
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)
    few = paired_difference([0.0] * 20, [1.0] * 20)
    assert (few.low, few.high) == (pytest.approx(1 - 2**0.5 * 0.161125, abs=1e-5), 1.0)
    same = paired_difference([0.0, 1.0] * 10, [0.0, 1.0] * 10)
    assert same.low == -same.high < 0.0


def binomial_quantile(n: int, p: float, share_below: float) -> int:
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= share_below:
            return k
    return n


@pytest.mark.parametrize(("n", "hits"), [(20, 7), (50, 3), (200, 150)])
def test_interval_of_shares_is_that_of_the_binomial_distribution(n, hits):
    interval = bootstrap_interval([1.0] * hits + [0.0] * (n - hits))
    for value, point in ((interval.low, 0.025), (interval.high, 0.975)):
        assert abs(value * n - binomial_quantile(n, hits / n, point)) <= 1


def test_intervals_cover_the_truth_in_95_of_100_cases():
    rng = random.Random(0)
    samples = [[float(rng.random() < 0.3) for _ in range(100)] for _ in range(400)]
    found = [bootstrap_interval(sample, seed) for seed, sample in enumerate(samples)]
    assert 0.915 <= sum(i.low <= 0.3 <= i.high for i in found) / len(found) <= 0.975


def test_interval_is_a_function_of_values_and_seed():
    rng = random.Random(1)
    values = [rng.random() for _ in range(30)]
    first = bootstrap_interval(values, 3)
    torch.rand(5)
    assert bootstrap_interval(list(values), 3) == first
    assert bootstrap_interval(values, 3) != bootstrap_interval(values, 4)


def test_rounded_has_eight_digits():
    assert Interval(1 / 3, 4e-9, 1 - 4e-9).rounded() == {"mean": 0.33333333, "low": 0.0, "high": 1.0}


def slow_paired(before, after, rng):
    """Resamples questions; each brings both of its values."""
    n, differences = len(before), []
    for _ in range(2000):
        total = 0.0
        for _ in range(n):
            i = rng.randrange(n)
            total += after[i] - before[i]
        differences.append(total / n)
    differences.sort()
    return differences[50], differences[1949]


def test_paired_difference_is_that_of_a_slow_reference_and_narrower_than_unpaired():
    rng = random.Random(2)
    before = [float(rng.random() < 0.5) for _ in range(200)]
    after = [1.0 if rng.random() < 0.1 else value for value in before]
    found = paired_difference(before, after)
    low, high = slow_paired(before, after, rng)
    assert found.mean == pytest.approx(sum(after) / 200 - sum(before) / 200)
    assert found.low == pytest.approx(low, abs=0.006)
    assert found.high == pytest.approx(high, abs=0.006)
    shuffled = rng.sample(after, 200)
    assert paired_difference(before, shuffled).high - paired_difference(before, shuffled).low > 2 * (found.high - found.low)


def test_paired_difference_is_after_minus_before():
    assert paired_difference([0.0, 1.0], [1.0, 2.0]) == Interval(1.0, 1.0, 1.0)


def test_nothing_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="longer"):
        paired_difference([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


def test_groups_are_drawn_each_by_itself():
    """Two groups of 50 fair draws: the standard error of their mean is that of 100 draws, 0.05."""
    halves = [0.0, 1.0] * 25
    found = mean_of_groups({"a": halves, "b": halves})
    assert found.mean == 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.05, abs=0.02)
