"""Answers and their scores, against an independent implementation and over random texts."""

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.text import squad

from zs_lightning.text.answers import cover_match, exact_match, f1_score, fold_answer, folded_match, normalize_answer


def random_answer(rng):
    words = "the a an The Beijing beijing Paris U.S. US 1998, 1998 new New-York york (city) O'Neil of and Éclair x".split()
    return rng.choice(["", " "]) + rng.choice([" ", "  ", "\n"]).join(rng.choices(words, k=rng.randint(0, 5)))


def squad_scores(prediction, golds):
    target = {"answers": {"answer_start": [0] * len(golds), "text": golds}, "id": "1"}
    scores = squad({"prediction_text": prediction, "id": "1"}, target)
    return scores["exact_match"].item() / 100, scores["f1"].item() / 100


def test_random_pairs_score_as_the_squad_implementation_scores_them():
    rng, compared, partial, equal = random.Random(0), 0, 0, 0
    while compared < 4_000:
        golds = [random_answer(rng) for _ in range(rng.randint(1, 3))]
        prediction = rng.choice([random_answer(rng), random_answer(rng), f"the {rng.choice(golds).upper()}!"])
        if not normalize_answer(prediction) or not all(normalize_answer(gold) for gold in golds):
            continue  # The stated difference, tested below.
        exact, f1 = squad_scores(prediction, golds)
        assert exact_match(prediction, golds) == exact, (prediction, golds)
        assert abs(f1_score(prediction, golds) - f1) < 1e-6, (prediction, golds)
        compared, partial, equal = compared + 1, partial + (0 < f1 < 1), equal + (exact == 1)
    assert partial > 400
    assert 400 < equal < 3600


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("Beijing", "The", 0.0),
        ("", "The", 0.0),
        ("a", "The", 0.0),
        ("the", "The", 1.0),
        ("A.", "a", 1.0),
        ("+", " + ", 1.0),
        ("-", "+", 0.0),
        ("", "", 0.0),
        ("", "Beijing", 0.0),
        ("The", "Beijing", 0.0),
        (None, "Beijing", 0.0),
        (None, "", 0.0),
    ],
)
def test_answers_that_normalise_to_nothing_are_compared_by_their_plain_words(prediction, gold, expected):
    """Where we differ from SQuAD: there, "a" equals "The", and the empty text equals both."""
    for score in (exact_match, folded_match, cover_match, f1_score):
        assert score(prediction, [gold]) == expected, score


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ﬁlm", "film"),
        ("Ｂｅｉｊｉｎｇ", "Beijing"),
        ("cafe\u0301", "caf\u00e9"),
        ("H\u0331", "\u1e96"),
        ("𝐀ve", "ave"),
        ("10\u00a0km", "10 km"),
    ],
)
def test_equal_spellings_of_unicode_are_equal(one, other):
    """The other difference from SQuAD, which compares code points."""
    assert squad_scores(one, [other])[0] == 0 or one == "10\u00a0km"
    assert exact_match(one, [other]) == exact_match(other, [one]) == 1


def test_f1_by_hand():
    assert f1_score("the red harbor book", ["Red Harbor"]) == pytest.approx(2 * 2 / (3 + 2))
    assert f1_score("red red red", ["red"]) == pytest.approx(2 * 1 / (3 + 1))
    assert f1_score("Ann Lee", ["Bo Ray", "Lee Ann", "Ann"]) == 1.0
    assert f1_score("anything", []) == 0.0


def test_exact_match_is_not_containment():
    """The reference's "EM" takes the golden answer anywhere in the prediction."""
    assert exact_match("not known", ["no"]) == cover_match("not known", ["no"]) == 0
    listing = "1998, 1999 or 2001"
    assert exact_match(listing, ["1999"]) == 0
    assert cover_match(listing, ["1999"]) == 1
    assert cover_match("anything at all", ["The"]) == cover_match("anything at all", ["A"]) == 0
    assert cover_match("in New York City", ["york new"]) == 0
    assert cover_match("born in the New York!", ["new york"]) == 1


ANSWERS = st.text(alphabet=string.ascii_letters + string.digits + " .,'-\nàßΣİﬁ½Ⅷ", max_size=24)


@given(ANSWERS, st.lists(ANSWERS, max_size=3))
def test_scores_are_ordered_symmetric_and_never_hurt_by_another_golden_answer(prediction, golds):
    exact, cover, f1 = (score(prediction, golds) for score in (exact_match, cover_match, f1_score))
    assert exact in (0, 1)
    assert exact <= cover <= 1
    assert exact <= f1 <= 1
    for gold in golds:
        assert f1_score(prediction, [gold]) == f1_score(gold, [prediction])
        assert exact_match(prediction, [gold]) == exact_match(gold, [prediction])
        assert f1 >= f1_score(prediction, [gold])


@given(ANSWERS)
def test_normalising_is_idempotent_and_blind_to_case_and_articles(text):
    normal = normalize_answer(text)
    assert normalize_answer(normal) == normal
    assert not {"a", "an", "the"} & set(normal.split())
    assert normalize_answer(f" The {normal.title() if normal.isascii() else normal}!") == normal


# ---------------------------------------------------------------------- folded


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("O'Brien", "O’Brien"),
        ("O´Brien", "OʼBrien"),
        ("1939-45", "1939–45"),
        ("1939—45", "1939−45"),
        ("“Heroes”", "Heroes"),
        ("«Heroes» …", "„heroes“"),
        ("“The”", "The"),
        ("北京。", "北京"),
        ("Ｂｅｉｊｉｎｇ！", "beijing"),
        ("北京 市", "北京市"),
        ("O\u200bBrien\u200e", "O'Brien"),
    ],
)
def test_typographic_spellings_are_equal_when_folded_and_only_then(prediction, gold):
    assert folded_match(prediction, [gold]) == folded_match(gold, [prediction]) == f1_score(prediction, [gold]) == 1
    strict = {"北京 市": 0, "Ｂｅｉｊｉｎｇ！": 1}.get(prediction, 0)
    assert exact_match(prediction, [gold]) == strict


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        ("北京市", "北京", 0.8),
        ("東京タワー", "東京", 2 * 2 / (5 + 2)),
        ("ปารีส", "ปารี", 2 * 4 / (5 + 4)),
        ("ວຽງຈັນ", "ວຽງ", 2 * 3 / (6 + 3)),
        ("ភ្នំ", "ភ", 2 * 1 / (4 + 1)),
        ("မြန်မာ", "မာ", 2 * 2 / (6 + 2)),
        ("iPhone 15手机", "iphone 15", 2 * 2 / (4 + 2)),
        ("Москва река", "Москва", 2 * 1 / (2 + 1)),
        ("2024年", "2023年", 2 * 1 / (2 + 2)),
    ],
)
def test_scripts_without_blanks_count_by_character(prediction, gold, f1):
    assert f1_score(prediction, [gold]) == pytest.approx(f1)
    assert folded_match(prediction, [gold]) == 0


def test_gold_of_other_punctuation_only_still_equals_itself():
    for text in ("…", "—", "。", "¿?"):
        assert folded_match(text, [text]) == f1_score(text, [text]) == 1
        assert folded_match("Beijing", [text]) == folded_match("", [text]) == folded_match(text, ["Beijing"]) == 0


@given(st.text(st.characters(max_codepoint=127), max_size=20), st.text(st.characters(max_codepoint=127), max_size=20))
def test_of_ascii_nothing_changes(prediction, gold):
    assert fold_answer(prediction) == normalize_answer(prediction)
    for answer in (gold, f"{prediction}.", prediction.upper()):
        assert folded_match(prediction, [answer]) == exact_match(prediction, [answer])


@given(st.text(max_size=12) | st.text("ab’´ʼ—−…Σ\u0301\u0307İ北京。がハ゛\u3099ปำ½ﬁ the\u200b-'", max_size=12))
def test_folding_is_idempotent(text):
    assert fold_answer(fold_answer(text)) == fold_answer(text)
