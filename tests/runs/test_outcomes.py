"""Outcomes of trajectories and their summaries, against numbers worked out by hand."""

from dataclasses import asdict, replace

import pytest

from zs_lightning.runs.outcomes import (
    SCORES,
    Outcome,
    by_source,
    by_subset,
    search_again,
    share,
    summarise,
)
from zs_lightning.types import ActionKind, Document, QAExample, Status, Trajectory, Turn

SUPPORT = ("Foo author Bar Baz.", "Foo writer Bar Baz.")


def turn(kind: str, content: str, *documents: str, sent: bool = True, noise=None) -> Turn:
    """A turn whose search was answered, unless it was not sent."""
    span = (3, 5) if kind != "answer" and sent else None
    found = tuple(Document(text=text) for text in documents)
    said = f"<{kind}>{content}</{kind}>"
    return Turn(
        text=said, kind=ActionKind(kind), content=content, span=(0, 3), observation_span=span, documents=found, noise=noise
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


# ---------------------------------------------------------------------- outcomes


def test_outcome_of_an_answer():
    row = Outcome.of(
        trajectory(
            turn("search", "author of Foo", SUPPORT[0], noise=1.0), turn("invalid", "no_action"), turn("answer", "the bar BAZ")
        ),
        "greedy",
    )
    expected = {"id": "toy/1", "decoding": "greedy", "subset": "new/one_hop", "em": 1.0, "cover_em": 1.0, "f1": 1.0}
    expected |= {
        "em_folded": 1.0,
        "searches": 1,
        "turns": 3,
        "invalid_actions": 1,
        "truncated": 0.0,
        "invalid": 0.0,
        "sampled_tokens": 3,
    }
    expected |= {
        "noisy_searches": 1,
        "fruitless": 0,
        "first_fruitless": 0,
        "answer": "the bar BAZ",
        "golden_answers": ["Bar Baz"],
    }
    assert asdict(row).items() >= expected.items()


def test_outcome_of_a_partial_answer():
    row = Outcome.of(trajectory(turn("answer", "Bar Qux Quux")))  # 1 word in common of 3 and 2.
    assert (row.em, row.cover_em, row.f1) == (0.0, 0.0, 2 / 5)


@pytest.mark.parametrize(
    ("status", "truncated", "invalid"),
    [(Status.TURN_LIMIT, 1.0, 0.0), (Status.LENGTH_LIMIT, 1.0, 0.0), (Status.FAILED, 0.0, 1.0)],
)
def test_outcome_without_an_answer(status, truncated, invalid):
    """A query that was not sent is no search, and its words are no answer even if they are the golden ones."""
    row = Outcome.of(trajectory(turn("search", "Bar Baz", sent=False), status=status))
    assert (row.em, row.f1, row.answer, row.searches) == (0.0, 0.0, None, 0)
    assert (row.truncated, row.invalid) == (truncated, invalid)


def counts(fruitless=0, repeated=0, reworded=0, other_query=0, first=None):
    """`first`: the same four of the first fruitless results, if they are not all."""
    every = {"fruitless": fruitless, "repeated": repeated, "reworded": reworded, "other_query": other_query}
    first = every if first is None else dict(zip(every, first, strict=True))
    return every | {f"first_{name}": count for name, count in first.items()}


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
        (
            [turn("search", "author of Foo"), turn("invalid", "no_action"), turn("search", "author of Foo", MISS)],
            counts(2, first=(1, 0, 0, 0)),
        ),
        # Three in a row, the last one without a result: two were fruitless.
        (
            [turn("search", "a Foo", MISS), turn("search", "Foo", MISS), turn("search", "Foo", sent=False)],
            counts(2, repeated=2, first=(1, 1, 0, 0)),
        ),
        # A fruitful result in between: the next fruitless one is a first one again.
        (
            [
                turn("search", "author of Foo", MISS),
                turn("search", "writer of Foo", SUPPORT[0]),
                turn("search", "mayor of Qux", MISS),
                turn("search", "governor of Qux", MISS),
                turn("search", "governor of Qux", sent=False),
            ],
            counts(3, repeated=1, reworded=2, first=(2, 0, 2, 0)),
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
    summary = summarise([Outcome.of(t) for t in (right, wrong, lost)])
    assert {name: summary[name]["mean"] for name in SCORES} == {
        "em": 0.33333333,
        "em_folded": 0.33333333,
        "cover_em": 0.33333333,
        "f1": round((1 + 2 / 3) / 3, 8),
    }
    for name in SCORES:
        del summary[name]
    assert summary == {
        "questions": 3,
        "searches_per_question": 1.66666667,
        "empty_searches": 0.0,
        "turns": 2.66666667,
        "sampled_tokens": 3.0,
        "truncated": 0.33333333,
        "invalid": 0.0,
        "invalid_actions": 0.33333333,
        "forged": 0.0,
        "fruitless_results": 4,
        "after_fruitless": {"repeated": 0.25, "reworded": 0.25, "other_query": 0.0},
        "after_first_fruitless": {"repeated": 0.33333333, "reworded": 0.33333333, "other_query": 0.0},
    }


def test_nothing_fruitless_is_not_zero_per_cent():
    summary = summarise([Outcome.of(trajectory(turn("answer", "Bar Baz")))])
    assert summary["after_fruitless"] == {"repeated": None, "reworded": None, "other_query": None}


def scored(em, cover_em=0.0, f1=0.0, **row):
    outcome = Outcome.of(trajectory(turn("answer", "")))
    return replace(outcome, em=em, em_folded=em, cover_em=cover_em, f1=f1, **row)


def test_subsets_are_whole_names_and_their_parts():
    rows = [("new/one_hop", 1.0), ("new/two_hop", 0.0), ("known/two_hop", 0.0), ("", 1.0)]
    groups = by_subset([scored(em, subset=name) for name, em in rows])
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


def same(value):
    """Of few scores the mean alone."""
    return {"mean": value}


def test_a_name_of_one_part_is_counted_once():
    expected = {"questions": 1, **same(0.0), "em_folded": same(0.0), "cover_em": same(1.0), "f1": same(0.5)}
    assert by_subset([scored(0.0, 1.0, 0.5, subset="all")]) == {"all": expected}


def test_each_data_set_counts_the_same_in_their_mean():
    rows = [scored(1.0, source="nq/file")] * 9 + [scored(0.0, 1.0, source="bamboogle/x")]
    found = by_source(rows)
    ones, noughts = same(1.0), same(0.0)
    assert found["sources"]["nq"] == {"questions": 9, "em": ones, "em_folded": ones, "cover_em": noughts, "f1": noughts}
    assert found["sources"]["bamboogle"]["cover_em"] == same(1.0)
    half = same(0.5)
    assert found["mean_of_sources"] == {"em": half, "em_folded": half, "cover_em": half, "f1": same(0.0)}
    assert list(by_source(rows[:9])["sources"]) == ["nq/file"]
    assert "mean_of_sources" not in by_source(rows[:9])


@pytest.mark.parametrize(("text", "forged"), [("<information>x", 1.0), ("<think> <information>", 1.0), ("information", 0.0)])
def test_results_that_the_policy_wrote_itself_are_counted(text, forged):
    said, read = turn("invalid", "no_action"), turn("search", "Foo", "<information> in a document")
    said.text = text
    assert Outcome.of(trajectory(read, said)).forged == forged


def test_a_search_of_the_environment_is_no_turn_of_the_policy():
    first = turn("search", "Who wrote Foo?", SUPPORT[0])
    first.text, first.span = "", (0, 0)
    row = Outcome.of(trajectory(first, turn("answer", "Bar Baz")))
    assert (row.turns, row.searches) == (1, 1)


def test_no_rows():
    assert by_subset([]) == {}
    assert share([], "em") == 0.0
    assert share([scored(1.0), scored(0.0)], "em") == 0.5
