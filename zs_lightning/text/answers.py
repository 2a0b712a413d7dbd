"""Scores of an answer against golden answers: exact match, cover match and F1 (paper section 3.5).

The reference's "EM" is gold-substring-of-prediction; here that is `cover_match`, and `exact_match` is exact.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single blanks; equal Unicode spellings become equal (NFKC)."""
    return " ".join(_ARTICLES.sub(" ", _without_punctuation(_folded(text))).split())


def _folded(text: str) -> str:
    # Twice: lower case may leave a letter and its accent apart that have a spelling as one.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())


def _without_punctuation(text: str) -> str:
    return "".join(character for character in text if character not in _PUNCTUATION)


def _words(text: str) -> str:
    """The normalised text. One that normalises to nothing keeps its articles ("The"), or else its punctuation ("+"):
    as nothing it would equal, and be contained in, texts it has nothing to do with."""
    folded = _folded(text)
    return normalize_answer(text) or " ".join(_without_punctuation(folded).split()) or " ".join(folded.split())


def _comparable(prediction: str | None, golden_answers: Sequence[str]) -> tuple[str, list[str]]:
    """The words of the prediction, empty for None, and of each golden answer that is not empty."""
    golds = [_words(gold) for gold in golden_answers]
    return _words(prediction or ""), [gold for gold in golds if gold]


def exact_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a golden answer, else 0.0. No prediction is 0.0."""
    said, golds = _comparable(prediction, golden_answers)
    return float(bool(said) and said in golds)


def cover_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """1.0 if a golden answer occurs in the prediction as whole words: lenient, rewards listing many answers."""
    said, golds = _comparable(prediction, golden_answers)
    return float(any(f" {gold} " in f" {said} " for gold in golds))


def f1_score(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """Best over golden answers of 2·IN / (PN + RN): common words, predicted words, reference words."""
    said, golds = _comparable(prediction, golden_answers)
    return max((_word_f1(said.split(), gold.split()) for gold in golds), default=0.0)


def _word_f1(predicted: list[str], reference: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(reference)).values())
    return 2 * common / (len(predicted) + len(reference)) if common else 0.0
