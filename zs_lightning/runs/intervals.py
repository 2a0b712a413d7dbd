"""Means over questions with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from zs_lightning.streams import derive_seed

if TYPE_CHECKING:  # Torch takes seconds to import, which `compare --help` does without.
    from torch import Tensor

RESAMPLES = 2000
Z = 1.959963984540054
"""95 % of a normal distribution lies within so many standard deviations."""
DIGITS = 8
"""Digits in results.json. Tables round again: 748 of 827 as 0.9045 would become 90.5 %, not 90.4."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def rounded(self) -> dict[str, float]:
        return {name: round(value, DIGITS) for name, value in asdict(self).items()}


def resampled_means(values: Sequence[float], *seed: object) -> Tensor:
    """[RESAMPLES] float64: means of the values drawn with replacement. ValueError for no values."""
    import torch

    if not len(values):
        raise ValueError("an interval needs at least one value")
    data = torch.tensor(values, dtype=torch.float64)
    # Seeded with the number of values and never from outside: equal inputs give equal intervals.
    generator = torch.Generator().manual_seed(derive_seed(*seed, len(values)))
    means = torch.empty(RESAMPLES, dtype=torch.float64)
    # A hundred at a time: all of them at once would take 2,000 × 50,000 numbers in a large test.
    for start in range(0, RESAMPLES, 100):
        rows: Tensor = torch.randint(len(data), (100, len(data)), generator=generator)
        means[start : start + 100] = data[rows].mean(1)
    return means


def _interval(mean: float, means: Tensor) -> Interval:
    # The percentile method: the interval of a share stays between 0 and 1.
    low, high = means.quantile(means.new_tensor([0.025, 0.975])).tolist()
    return Interval(mean, low, high)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean with its percentile bootstrap. Raises ValueError for no values."""
    means = resampled_means(values, seed, "bootstrap")
    return _interval(fmean(values), means)


def score_interval(values: Sequence[float]) -> Interval:
    """The mean of scores: with Wilson's interval where all are 0 or 1, else with a bootstrap.
    Raises ValueError for no values."""
    # A resampled share of 20 right of 20 is never less than 1, as if nothing could go wrong.
    if not values or not set(values) <= {0, 1}:
        return bootstrap_interval(values)
    count = len(values)
    mean = sum(values) / count
    middle = mean + Z**2 / (2 * count)
    width = Z * math.sqrt(mean * (1 - mean) / count + (Z / (2 * count)) ** 2)
    low, high = ((middle + side * width) / (1 + Z**2 / count) for side in (-1, 1))
    # At 0 or n of n rounding could put an end on the wrong side of the mean.
    return Interval(mean, min(mean, max(0.0, low)), max(mean, min(1.0, high)))


def mean_of_groups(groups: Mapping[str, Sequence[float]], seed: int = 0) -> Interval:
    """The mean of the groups' means: a group counts the same whatever its size."""
    mean = fmean(map(fmean, groups.values()))
    # Only questions are drawn: another set of data sets would be another benchmark.
    resampled = [resampled_means(values, seed, "group", name) for name, values in groups.items()]
    return _interval(mean, sum(resampled[1:], resampled[0]) / len(resampled))


def paired_difference(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Interval:
    """The mean of after - before over the same questions. Scores of 0 and 1 have Newcombe's
    interval, made of both Wilson intervals and their correlation (method 10 of Statistics in
    Medicine 17, 2635, 1998), others a bootstrap. Raises ValueError for no values, or lists of
    different length."""
    pairs = list(zip(before, after, strict=True))
    if not pairs or not {*before, *after} <= {0, 1}:
        return bootstrap_interval([b - a for a, b in pairs], seed)
    count = len(pairs)
    first = score_interval(before)
    second = score_interval(after)
    # Both right times both wrong, less one alone times the other: the correlation has its sign.
    excess = sum(a * b for a, b in pairs) * count - sum(before) * sum(after)
    # Newcombe's correction for continuity, of positive correlations only.
    excess = max(excess - count / 2, 0.0) if excess > 0 else excess
    rights = (sum(before), sum(after))
    spread = math.sqrt(math.prod(right * (count - right) for right in rights))
    correlation = excess / spread if spread else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))

    mean = second.mean - first.mean
    low = mean - reach(second.mean - second.low, first.high - first.mean)
    return Interval(mean, low, mean + reach(second.high - second.mean, first.mean - first.low))
