"""What documents of the miniature are, by the facts of its world."""

import pytest

from zs_lightning.miniature.checks import Truth, truth_of
from zs_lightning.miniature.world import SYNONYMS, sentence

TRUTH = Truth(0)
FACTS = TRUTH.world.facts
(SUBJECT, RELATION), OBJECT = next((key, value) for key, value in FACTS.items() if key[1] == "author")
WORD = SYNONYMS[RELATION]
QUERY = f"{RELATION} of {SUBJECT}"
OTHER = next(value for (_, relation), value in FACTS.items() if relation == RELATION and value != OBJECT)
RIGHT, WRONG = sentence(SUBJECT, WORD, OBJECT), sentence(SUBJECT, RELATION, OTHER)
PARTIAL = sentence(SUBJECT, "publisher", FACTS[SUBJECT, "publisher"])
AWAY = next(sentence(*key, value) for key, value in FACTS.items() if key[1] == "spouse")


@pytest.mark.parametrize(
    ("texts", "kinds"),
    [
        ([], {"empty"}),
        ([AWAY, RIGHT], {"useful"}),
        ([RIGHT, WRONG], {"useful"}),
        ([AWAY], {"noisy", "off_topic"}),
        ([AWAY, PARTIAL], {"noisy", "partial"}),
        ([AWAY, WRONG], {"noisy", "contradicting"}),
        ([f"1987 {WRONG}", AWAY], {"noisy", "contradicting", "outdated"}),
        ([f"In 1987, {WRONG}", f"2001: {WRONG}"], {"noisy", "contradicting", "outdated"}),
        ([f"1987 {WRONG}", WRONG], {"noisy", "contradicting"}),
        ([f"1987 {RIGHT}"], {"useful"}),
    ],
)
def test_the_kinds_of_documents(texts, kinds):
    for query in (QUERY, f"the {WORD} of {SUBJECT}"):
        assert TRUTH.kinds(query, texts) == kinds


def test_a_marriage_is_stated_of_either():
    subject = next(s for (s, r), o in FACTS.items() if r == "spouse" and FACTS.get((o, "spouse")) == s)
    right = FACTS[subject, "spouse"]
    other = next(s for (s, r), o in FACTS.items() if r == "spouse" and o not in (subject, right) and s not in (subject, right))
    kinds = {}
    for name in (right, other):
        kinds[name] = TRUTH.kinds(f"partner of {subject}", [f"In 1950: {name} spouse {subject}."])
    assert kinds == {right: {"useful"}, other: {"noisy", "contradicting", "outdated"}}


def test_a_query_that_asks_for_no_fact_has_no_kinds():
    for query in ("", RELATION, SUBJECT, f"colour of {SUBJECT}", f"birthplace of {SUBJECT}"):
        assert TRUTH.asked(query) is None
        assert TRUTH.kinds(query, [RIGHT]) == set()
        assert TRUTH.reworded(query) is None


def test_the_other_word_for_a_relation():
    assert TRUTH.reworded(f"the {RELATION} of {SUBJECT}") == f"{WORD} of {SUBJECT}"
    assert TRUTH.reworded(f"{WORD} of {SUBJECT}") == QUERY


def test_sentences_are_true_in_both_wordings():
    assert TRUTH.holds(RIGHT)
    assert TRUTH.holds(sentence(SUBJECT, RELATION, OBJECT))
    assert not TRUTH.holds(WRONG)
    assert all(map(TRUTH.holds, TRUTH.world.corpus()))


def test_only_data_of_one_world_has_a_truth():
    assert truth_of(["miniature-3", "miniature-3"]).world.seed == 3
    for sources in ([], ["miniature-0", "miniature-1"], ["miniature-0", "nq"], ["nq"]):
        assert truth_of(sources) is None
