"""Scores of trajectories, and intervals, against numbers worked out by hand and slow references."""

import math
import random

import pytest
import torch

from zs_lightning.evaluation.metrics import (
    Interval,
    bootstrap_interval,
    by_subset,
    paired_difference,
    record,
    search_again,
    share,
    summarise,
)
from zs_lightning.types import ActionKind, Document, QAExample, Status, Trajectory, Turn

SUPPORT = ("Foo author Bar Baz.", "Foo writer Bar Baz.")


def turn(kind: str, content: str, *documents: str, sent: bool = True, noisy=None) -> Turn:
    """A turn whose search was answered, unless it was not sent."""
    span = (3, 5) if kind != "answer" and sent else None
    found = tuple(Document(text=text) for text in documents)
    return Turn(
        text="", kind=ActionKind(kind), content=content, span=(0, 3), observation_span=span, documents=found, noisy=noisy
    )


def trajectory(*turns: Turn, golds=("Bar Baz",), status=Status.ANSWERED, support=SUPPORT, subset="new/one_hop") -> Trajectory:
    example = QAExample(id="1", question="Who wrote Foo?", golden_answers=golds, source="toy", subset=subset, support=support)
    return Trajectory(
        example=example,
        sample=0,
        prompt_ids=[1],
        token_ids=[5, 6, 7, 8, 9],
        loss_mask=[True, True, True, False, False],
        turns=list(turns),
        status=status,
    )


# ---------------------------------------------------------------------- intervals


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


def test_rounded_has_four_digits():
    assert Interval(1 / 3, 0.00004, 0.99996).rounded() == {"mean": 0.3333, "low": 0.0, "high": 1.0}


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
    with pytest.raises(ValueError, match="got 1 and 2"):
        paired_difference([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


# ---------------------------------------------------------------------- outcomes


def test_record_of_an_answer():
    row = record(
        trajectory(
            turn("search", "author of Foo", SUPPORT[0], noisy=True), turn("invalid", "no_action"), turn("answer", "the bar BAZ")
        ),
        "greedy",
    )
    expected = {"id": "toy/1", "decoding": "greedy", "subset": "new/one_hop", "em": 1.0, "cover_em": 1.0, "f1": 1.0}
    expected |= {"searches": 1, "turns": 3, "invalid_actions": 1, "truncated": 0.0, "invalid": 0.0, "sampled_tokens": 3}
    expected |= {"noisy_searches": 1, "fruitless": 0, "answer": "the bar BAZ", "golden_answers": ["Bar Baz"]}
    assert {name: row[name] for name in expected} == expected


def test_record_of_a_partial_answer():
    row = record(trajectory(turn("answer", "Bar Qux Quux")))  # 1 word in common of 3 and 2.
    assert (row["em"], row["cover_em"], row["f1"]) == (0.0, 0.0, 2 / 5)


@pytest.mark.parametrize(
    ("status", "truncated", "invalid"),
    [(Status.TURN_LIMIT, 1.0, 0.0), (Status.LENGTH_LIMIT, 1.0, 0.0), (Status.FAILED, 0.0, 1.0)],
)
def test_record_without_an_answer(status, truncated, invalid):
    """A query that was not sent is no search, and its words are no answer even if they are the golden ones."""
    row = record(trajectory(turn("search", "Bar Baz", sent=False), status=status))
    assert (row["em"], row["f1"], row["answer"], row["searches"]) == (0.0, 0.0, None, 0)
    assert (row["truncated"], row["invalid"]) == (truncated, invalid)


def counts(fruitless=0, repeated=0, reworded=0, other_query=0):
    return {"fruitless": fruitless, "repeated": repeated, "reworded": reworded, "other_query": other_query}


MISS = "Foo publisher Qux."


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([turn("search", "author of Foo", SUPPORT[1]), turn("search", "author of Foo", MISS)], counts(1)),
        ([turn("search", "author of Foo", MISS), turn("search", "Foo, the AUTHOR", SUPPORT[0])], counts(1, repeated=1)),
        ([turn("search", "author of Foo", MISS), turn("search", "writer of Foo", SUPPORT[0])], counts(1, reworded=1)),
        ([turn("search", "author of Foo", MISS), turn("search", "mayor of Quux", SUPPORT[0])], counts(1, other_query=1)),
        # One of three words is the same: another query.
        ([turn("search", "author Foo", MISS), turn("search", "mayor Quux Foo", SUPPORT[0])], counts(1, other_query=1)),
        # No word at all is another query, not other words about the same thing.
        ([turn("search", "author of Foo", MISS), turn("search", "the", SUPPORT[0])], counts(1, other_query=1)),
        ([turn("search", "author of Foo", MISS), turn("answer", "Bar Baz")], counts(1)),
        ([turn("search", "author of Foo"), turn("invalid", "no_action"), turn("search", "author of Foo", MISS)], counts(2)),
        # Three in a row, the last one without a result: two were fruitless.
        (
            [turn("search", "a Foo", MISS), turn("search", "Foo", MISS), turn("search", "Foo", sent=False)],
            counts(2, repeated=2),
        ),
        ([turn("search", "author of Foo", MISS, SUPPORT[0]), turn("answer", "Bar")], counts()),
        ([], counts()),
    ],
)
def test_what_followed_a_fruitless_search(turns, expected):
    assert search_again(trajectory(*turns)) == expected


def test_without_known_support_nothing_is_called_fruitless():
    turns = [turn("search", "author of Foo", MISS), turn("search", "author of Foo", MISS)]
    assert search_again(trajectory(*turns, support=())) == counts()


# ---------------------------------------------------------------------- summaries


def test_summary_by_hand():
    right = trajectory(turn("search", "Foo", MISS), turn("search", "Foo", SUPPORT[0]), turn("answer", "Bar Baz"))
    wrong = trajectory(turn("search", "Foo", MISS), turn("search", "writer Foo", MISS), turn("answer", "Bar"))
    lost = trajectory(turn("search", "Foo", MISS), turn("invalid", "no_action"), status=Status.TURN_LIMIT)
    summary = summarise([record(t) for t in (right, wrong, lost)])
    assert {name: summary[name]["mean"] for name in ("em", "cover_em", "f1")} == {
        "em": 0.3333,
        "cover_em": 0.3333,
        "f1": round((1 + 2 / 3) / 3, 4),
    }
    del summary["em"], summary["cover_em"], summary["f1"]
    assert summary == {
        "questions": 3,
        "searches_per_question": 1.6667,
        "turns": 2.6667,
        "sampled_tokens": 3.0,
        "truncated": 0.3333,
        "invalid": 0.0,
        "invalid_actions": 0.3333,
        "fruitless_results": 4,
        "after_fruitless": {"repeated": 0.25, "reworded": 0.25, "other_query": 0.0},
    }


def test_nothing_fruitless_is_not_zero_per_cent():
    summary = summarise([record(trajectory(turn("answer", "Bar Baz")))])
    assert summary["after_fruitless"] == {"repeated": None, "reworded": None, "other_query": None}


def test_subsets_are_whole_names_and_their_parts():
    rows = [("new/one_hop", 1.0), ("new/two_hop", 0.0), ("known/two_hop", 0.0), ("", 1.0)]
    groups = by_subset([{"subset": name, "em": em} for name, em in rows])
    assert {name: (group["questions"], group["mean"]) for name, group in groups.items()} == {
        "known": (1, 0.0),
        "known/two_hop": (1, 0.0),
        "new": (2, 0.5),
        "new/one_hop": (1, 1.0),
        "new/two_hop": (1, 0.0),
        "one_hop": (1, 1.0),
        "two_hop": (2, 0.0),
    }
    assert list(groups) == sorted(groups)


def test_a_name_of_one_part_is_counted_once():
    assert by_subset([{"subset": "all", "em": 1.0}]) == {"all": {"questions": 1, "mean": 1.0, "low": 1.0, "high": 1.0}}


def test_no_rows():
    assert by_subset([]) == {}
    assert share([], "em") == 0.0
    assert share([{"em": 1.0}, {"em": 0.0}], "em") == 0.5
