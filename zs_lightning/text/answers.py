"""Scores of an answer against golden answers: exact match, cover match and F1 (paper section 3.5).

The reference's "EM" is gold-substring-of-prediction; here that is `cover_match`, and `exact_match`
is exact. These two normalise as SQuAD does (after NFKC). F1 and `folded_match`, of which rewards
are made, are also blind to typographic punctuation and count scripts without blanks by character.
ASCII texts are the same to both.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Scripts that put no blanks between words, for a class of a regular expression. Without their
# digits and punctuation: those are no words.
UNSPACED = (
    r"\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    r"\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # Kana
    r"\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ecd\u0edc-\u0edf"  # Thai, Lao
    r"\u1780-\u17d3\u17d7\u17dc\u17dd\u1000-\u103f\u1050-\u108f\u109a-\u109d"  # Khmer, Myanmar
)
_UNSPACED = re.compile(f"[{UNSPACED}]")
_GONE = re.compile("P|Cf")
# Those that Unicode does not count as punctuation. An accent by itself would become a blank (NFKC).
_QUOTES_AND_DASHES = str.maketrans(dict.fromkeys("´ʼʻʹ−", "-"))


def normalize_answer(text: str) -> str:
    """The text in lower case, without ASCII punctuation and articles, blanks collapsed (NFKC)."""
    return " ".join(_ARTICLES.sub(" ", _folded(text).translate(_NO_PUNCTUATION)).split())


def _folded(text: str) -> str:
    lower = unicodedata.normalize("NFKC", text).lower()
    # Twice: lower case may leave a letter and its accent apart that have a spelling as one.
    return unicodedata.normalize("NFKC", lower)


def fold_answer(text: str) -> str:
    """The normalised text, also without Unicode's other punctuation (curly quotes, dashes, the full
    stop of Chinese) and invisible characters, each character of a script without blanks as a
    word."""
    # Normalised once more: letters and accents around a dash may now be one.
    return normalize_answer(_plain(text).translate(_NO_PUNCTUATION))


def _plain(text: str) -> str:
    folded = _folded(text.translate(_QUOTES_AND_DASHES))
    kept = [c for c in folded if c in string.punctuation or not _GONE.match(unicodedata.category(c))]
    return _UNSPACED.sub(r" \g<0> ", "".join(kept))


def _words(text: str) -> str:
    # A text that normalises to nothing keeps its articles ("The"), or else its punctuation ("+"):
    # as nothing it would equal, and be contained in, texts it has nothing to do with.
    folded = _folded(text)
    with_articles = " ".join(folded.translate(_NO_PUNCTUATION).split())
    return normalize_answer(text) or with_articles or " ".join(folded.split())


def _folded_words(text: str) -> str:
    return fold_answer(text) or _words(_plain(text)) or _words(text)


def _comparable(
    prediction: str | None, golden_answers: Sequence[str], words: Callable[[str], str] = _words
) -> tuple[str, list[str]]:
    """The words of the prediction, empty for None, and of each golden answer that is not empty."""
    return words(prediction or ""), list(filter(None, map(words, golden_answers)))


def exact_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a golden answer, else 0.0. No prediction is 0.0."""
    said, golds = _comparable(prediction, golden_answers)
    return float(bool(said) and said in golds)


def folded_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """1.0 if the folded prediction equals a golden answer, else 0.0."""
    said, golds = _comparable(prediction, golden_answers, _folded_words)
    return float(bool(said) and said in golds)


def cover_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """1.0 if a golden answer occurs in the prediction as whole words, else 0.0."""
    said, golds = _comparable(prediction, golden_answers)
    return float(any(f" {gold} " in f" {said} " for gold in golds))


def holds(text: str, *answers: str) -> bool:
    """Whether one of the answers occurs in the text as whole words, all folded."""
    said, golds = _comparable(text, answers, _folded_words)
    return any(f" {gold} " in f" {said} " for gold in golds)


def telling(golden_answers: Sequence[str]) -> list[str]:
    """The golden answers that a text which holds their words can be said to hold: yes, no, true and
    false stand in texts that say nothing of the question."""
    return [gold for gold in golden_answers if _folded_words(gold) not in ("yes", "no", "true", "false")]


def f1_score(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """The best 2·IN / (PN + RN) of a golden answer: common, predicted and reference words,
    folded."""
    said, golds = _comparable(prediction, golden_answers, _folded_words)
    return max((_word_f1(said.split(), gold.split()) for gold in golds), default=0.0)


def _word_f1(predicted: list[str], reference: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(reference)).values())
    return 2 * common / (len(predicted) + len(reference)) if common else 0.0
