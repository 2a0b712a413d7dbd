"""Means over questions with their 95 % intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from zs_lightning.streams import derive_seed

RESAMPLES = 2000
Z = 1.959963984540054
"""95 % of a normal distribution lies within so many standard deviations."""
FEW = 32
"""Values, below which no interval is told: from here on it holds every rate from .02 to .98 in at
least 93 of 100 samples, by exact coverage up to 5,000 values, and in 95 to 96.4 in the mean over
the rates. With 10 values and a rate of .02 no interval could hold it in 93 to 97 of 100: 82 samples
of 100 have no 1, so that a method holds it in at most 82, or in at least 98."""
DIGITS = 8
"""Digits in results.json. Tables round again: 748 of 827 as 0.9045 would become 90.5 %, not
90.4."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def rounded(self) -> dict[str, float]:
        return {name: round(value, DIGITS) for name, value in asdict(self).items()}

    def told(self, count: int) -> dict[str, float]:
        """What a reader is told if it is made of `count` values: the mean alone if they are FEW."""
        found = self.rounded()
        return found if count >= FEW else {"mean": found["mean"]}


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean with its percentile bootstrap. Raises ValueError for no values."""
    import torch

    if not len(values):
        raise ValueError("an interval needs at least one value")
    data = torch.tensor(values, dtype=torch.float64)
    # Seeded with the number of values and never from outside: equal inputs give equal intervals.
    generator = torch.Generator().manual_seed(derive_seed(seed, "bootstrap", len(values)))
    means = torch.empty(RESAMPLES, dtype=torch.float64)
    # A hundred at a time: all of them at once would take 2,000 × 50,000 numbers in a large test.
    for start in range(0, RESAMPLES, 100):
        rows = torch.randint(len(data), (100, len(data)), generator=generator)
        means[start : start + 100] = data[rows].mean(1)
    low, high = means.quantile(means.new_tensor([0.025, 0.975])).tolist()
    return Interval(fmean(values), low, high)


def score_interval(values: Sequence[float]) -> Interval:
    """The mean of scores from 0 to 1 with its interval: that of Agresti and Coull (The American
    Statistician 52, 119, 1998), which has the middle of Wilson's and fewer rates that it misses too
    often, and the same for scores between 0 and 1. Other values have a bootstrap. Raises
    ValueError for no values."""
    # A resampled share of 20 right of 20 is never less than 1, as if nothing could go wrong.
    if not values or not all(0 <= value <= 1 for value in values):
        return bootstrap_interval(values)
    return _around(fmean(values), *_with_both(values, Z**2))


def _with_both(values: Sequence[float], added: float) -> tuple[float, float]:
    """The mean of the values and of `added` more, half of them 0 and half 1, and its squared
    error."""
    count = len(values) + added
    mean = (sum(values) + added / 2) / count
    squares = (sum(value * value for value in values) + added / 2) / count
    return mean, max(0.0, squares - mean * mean) / count


def _around(mean: float, middle: float, square: float) -> Interval:
    width = Z * math.sqrt(square)
    # At 0 or n of n an end could lie on the wrong side of the mean.
    return Interval(mean, min(mean, max(0.0, middle - width)), max(mean, min(1.0, middle + width)))


def mean_of_groups(groups: Mapping[str, Sequence[float]]) -> Interval:
    """The mean of the groups' means, all from 0 to 1: a group counts the same whatever its size."""
    # Only questions are drawn: another set of data sets would be another benchmark. What is added
    # is shared out, or many small groups would pull the middle to a half.
    parts = [_with_both(values, Z**2 / len(groups)) for values in groups.values()]
    middle = fmean(mean for mean, _ in parts)
    return _around(fmean(map(fmean, groups.values())), middle, sum(e for _, e in parts) / len(parts) ** 2)


def _wilson(values: Sequence[float]) -> Interval:
    """The mean of values that are 0 or 1 with Wilson's interval."""
    count = len(values)
    mean = sum(values) / count
    middle = (mean + Z**2 / (2 * count)) / (1 + Z**2 / count)
    error = (mean * (1 - mean) / count + (Z / (2 * count)) ** 2) / (1 + Z**2 / count) ** 2
    return _around(mean, middle, error)


def paired_difference(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Interval:
    """The mean of after - before over the same questions. Scores of 0 and 1 have Newcombe's
    interval, made of both Wilson intervals and their correlation (method 10 of Statistics in
    Medicine 17, 2635, 1998), others a bootstrap. Raises ValueError for no values, or lists of
    different length."""
    pairs = list(zip(before, after, strict=True))
    if not pairs or not {*before, *after} <= {0, 1}:
        return bootstrap_interval([b - a for a, b in pairs], seed)
    count = len(pairs)
    first = _wilson(before)
    second = _wilson(after)
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
