"""Scores of trajectories, and means with 95 % intervals over questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zs_lightning.errors import UserError
from zs_lightning.streams import derive_seed
from zs_lightning.text.answers import cover_match, exact_match, f1_score, folded_match
from zs_lightning.text.protocol import INFORMATION, query_key
from zs_lightning.types import ActionKind, Status, Trajectory, Turn

RESAMPLES = 2000
Z = 1.959963984540054
"""Of a normal distribution, 95 % lies within so many standard deviations."""
DIGITS = 8
"""Kept in results.json. Tables round these again: with four digits, 748 of 827 would be 0.9045 and then 90.5 %, not 90.4 %."""
SCORES = ("em", "em_folded", "cover_em", "f1")
"""`cover_em` is what the published code calls EM."""
NORMALISATION = (
    "em and cover_em normalise as SQuAD does, after NFKC; em_folded and f1, as rewards, also drop typographic punctuation "
    "and count scripts without blanks by character."
)
"""Of the scores. ASCII texts are the same to both."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def rounded(self) -> dict[str, float]:
        return {name: round(value, DIGITS) for name, value in asdict(self).items()}


def resampled_means(values: Sequence[float], *seed: object) -> Tensor:
    """[RESAMPLES] float64: means of the values drawn with replacement.

    Raises:
        UserError: no values.
    """
    if not len(values):
        raise UserError("an interval needs at least one value")
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(derive_seed(*seed, len(values)))
    means = torch.empty(RESAMPLES, dtype=torch.float64)
    for start in range(0, RESAMPLES, 100):
        rows: Tensor = torch.randint(len(data), (100, len(data)), generator=generator)
        means[start : start + 100] = data[rows].mean(1)
    return means


def _interval(mean: float, means: Tensor) -> Interval:
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Percentile bootstrap over questions. The resampling depends on the seed and the number of values alone, so equal
    inputs give equal intervals.

    Raises:
        UserError: no values.
    """
    means = resampled_means(values, seed, "bootstrap")
    return _interval(float(torch.tensor(values, dtype=torch.float64).mean()), means)


def score_interval(values: Sequence[float]) -> Interval:
    """Of the mean of scores: Wilson's where all are 0 or 1, since a resampled share of 20 right of 20 is never less than
    1; a bootstrap of others.

    Raises:
        UserError: no values.
    """
    if not values or not _shares(values):
        return bootstrap_interval(values)
    count, mean = len(values), sum(values) / len(values)
    middle, width = mean + Z**2 / (2 * count), Z * math.sqrt(mean * (1 - mean) / count + (Z / (2 * count)) ** 2)
    low, high = ((middle + side * width) / (1 + Z**2 / count) for side in (-1, 1))
    return Interval(mean, min(mean, max(0.0, low)), max(mean, min(1.0, high)))


def _shares(values: Sequence[float]) -> bool:
    return set(values) <= {0, 1}


def mean_of_groups(groups: Mapping[str, Sequence[float]], seed: int = 0) -> Interval:
    """Mean of the groups' means, each group counting the same whatever its size; every group is resampled by itself."""
    means = [float(torch.tensor(values, dtype=torch.float64).mean()) for values in groups.values()]
    resampled = [resampled_means(values, seed, "group", name) for name, values in groups.items()]
    return _interval(sum(means) / len(means), torch.stack(resampled).mean(0))


def paired_difference(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Interval:
    """Mean of after - before over the same questions, with its interval: for scores of 0 and 1 Newcombe's, which is made of
    both Wilson intervals and their correlation (method 10 of Statistics in Medicine 17, 2635, 1998), else a bootstrap."""
    if len(before) != len(after):
        raise UserError(f"paired values: expected two lists of one length, got {len(before)} and {len(after)}")
    if not before or not _shares([*before, *after]):
        return bootstrap_interval([b - a for a, b in zip(before, after, strict=True)], seed)
    count, first, second = len(before), score_interval(before), score_interval(after)
    # Both right times both wrong, less one times the other way round: its sign is the correlation's.
    both, rights = sum(a * b for a, b in zip(before, after, strict=True)), (sum(before), sum(after))
    excess = both * count - rights[0] * rights[1]
    excess = max(excess - count / 2, 0.0) if excess > 0 else excess
    spread = math.sqrt(math.prod(right * (count - right) for right in rights))
    correlation = excess / spread if spread else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))

    mean = second.mean - first.mean
    low = mean - reach(second.mean - second.low, first.high - first.mean)
    return Interval(mean, low, mean + reach(second.high - second.mean, first.mean - first.low))


def scores(answer: str | None, golden_answers: Sequence[str]) -> dict[str, float]:
    """Of one answer, by the names of SCORES."""
    matches = (exact_match, folded_match, cover_match, f1_score)
    return {name: score(answer, golden_answers) for name, score in zip(SCORES, matches, strict=True)}


def record(trajectory: Trajectory, decoding: str = "") -> dict[str, Any]:
    """One question's outcome, as a line of JSON. `turns` counts what the policy wrote; `forged` is 1 if it wrote an
    <information> of its own, in a thought or outside of one."""
    answer, golds = trajectory.answer, trajectory.example.golden_answers
    return {
        "id": trajectory.example.key,
        "source": trajectory.example.source,
        "decoding": decoding,
        "subset": trajectory.example.subset,
        "question": trajectory.example.question,
        "golden_answers": list(golds),
        "answer": answer,
        **scores(answer, golds),
        "searches": len(trajectory.searches),
        "empty_searches": sum(not turn.documents for turn in trajectory.searches),
        "turns": len(trajectory.written),
        "invalid_actions": sum(turn.kind is ActionKind.INVALID for turn in trajectory.turns),
        "forged": float(any(INFORMATION in turn.text for turn in trajectory.turns)),
        "truncated": float(trajectory.status.is_truncated),
        "invalid": float(trajectory.status is Status.FAILED),
        "status": str(trajectory.status),
        "sampled_tokens": sum(trajectory.loss_mask),
        "noisy_searches": sum(turn.noisy is True for turn in trajectory.searches),
        **search_again(trajectory),
    }


FOLLOWED = ("repeated", "reworded", "other_query")


def search_again(trajectory: Trajectory) -> dict[str, int]:
    """What followed each fruitless result (no document that is known to help): the same query, other words about
    the same thing, another query, or no further search. Counted twice: for all of them, and (`first_…`) for those that
    did not follow another fruitless result, where no wording has been tried in vain yet. All 0 where the data set does
    not say what helps."""
    counts = {f"{which}{name}": 0 for which in ("", "first_") for name in ("fruitless", *FOLLOWED)}
    support, first = set(trajectory.example.support), True
    for turn, following in zip(trajectory.turns, [*trajectory.turns[1:], None], strict=False):
        if not support or turn.kind is not ActionKind.SEARCH or turn.observation_span is None:
            continue
        if any(document.text in support for document in turn.documents):
            first = True
            continue
        followed = "" if following is None else _compared(turn, following)
        for which in ("", "first_") if first else ("",):
            counts[f"{which}fruitless"] += 1
            if followed:
                counts[f"{which}{followed}"] += 1
        first = False
    return counts


def _compared(turn: Turn, following: Turn) -> str:
    if following.kind is not ActionKind.SEARCH:
        return ""
    words, others = set(query_key(turn.content).split()), set(query_key(following.content).split())
    if words == others:
        return "repeated"
    return "reworded" if len(words & others) * 2 >= max(1, len(others)) else "other_query"


def share(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Mean of one column; 0 for no rows."""
    return sum(row[name] for row in rows) / max(1, len(rows))


def empty_share(rows: Sequence[dict[str, Any]]) -> float:
    """Share of the searches that found nothing at all; 0 for no search."""
    return sum(row["empty_searches"] for row in rows) / max(1, sum(row["searches"] for row in rows))


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of one policy with one engine and one decoding: SCORES as intervals, the rest as means.
    `empty_searches` is None for a test of a version that did not count them."""
    counted = all("empty_searches" in row for row in rows)
    return {
        "questions": len(rows),
        **_scores(rows),
        "searches_per_question": round(share(rows, "searches"), DIGITS),
        "empty_searches": round(empty_share(rows), DIGITS) if counted else None,
        "turns": round(share(rows, "turns"), DIGITS),
        "sampled_tokens": round(share(rows, "sampled_tokens"), DIGITS),
        "truncated": round(share(rows, "truncated"), DIGITS),
        "invalid": round(share(rows, "invalid"), DIGITS),
        "invalid_actions": round(share(rows, "invalid_actions"), DIGITS),
        "forged": round(share(rows, "forged"), DIGITS),
        "fruitless_results": sum(row["fruitless"] for row in rows),
        "after_fruitless": _followed(rows, ""),
        "after_first_fruitless": _followed(rows, "first_"),
    }


def _followed(rows: Sequence[dict[str, Any]], which: str) -> dict[str, float | None]:
    """Shares of what followed; None if there was no fruitless result."""
    fruitless = sum(row[f"{which}fruitless"] for row in rows)
    again = {name: sum(row[f"{which}{name}"] for row in rows) for name in FOLLOWED}
    return {name: round(count / fruitless, DIGITS) if fruitless else None for name, count in again.items()}


def _scores(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {name: score_interval([row[name] for row in rows]).rounded() for name in SCORES}


def subset_groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each subset, and of each part of its name."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for name in {row["subset"], *row["subset"].split("/")} - {""}:
            groups.setdefault(name, []).append(row)
    return groups


def source_groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each data set. A mixed source's name stands before the first slash of its rows' sources."""
    several = len({row["source"].split("/")[0] for row in rows}) > 1
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["source"].split("/")[0] if several else row["source"], []).append(row)
    return groups


def by_subset(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Number of questions, EM (mean, low, high) and the other SCORES of each subset, and of each part of its name: new/one_hop,
    new, one_hop."""
    found: dict[str, dict[str, Any]] = {}
    for name, part in sorted(subset_groups(rows).items()):
        intervals = _scores(part)
        found[name] = {"questions": len(part), **intervals.pop("em"), **intervals}
    return found


def by_source(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of each data set under `sources`; with more than one, also their mean over data sets under `mean_of_sources`,
    which is what papers call average: there each set counts the same, however many questions it has."""
    groups = source_groups(rows)
    parts = {name: {"questions": len(part), **_scores(part)} for name, part in sorted(groups.items())}
    found: dict[str, Any] = {"sources": parts}
    if len(groups) > 1:
        columns = {name: {source: [row[name] for row in part] for source, part in groups.items()} for name in SCORES}
        found["mean_of_sources"] = {name: mean_of_groups(column).rounded() for name, column in columns.items()}
    return found
