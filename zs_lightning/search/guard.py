"""When a simulator is not told the golden answers: nobody should be paid for a query that asks for
nothing.

The published simulator is told question and answer whatever the query is, so that even nonsense can
bring the answer back, and a policy is rewarded for it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zs_lightning.search.dense import Encoder
from zs_lightning.text.answers import cover_match, fold_answer, telling
from zs_lightning.text.protocol import FUNCTION_WORDS
from zs_lightning.types import QAExample, SearchRequest

_ASKING = set("who whom whose which when where why how name tell me did does do many much".split())


def content(text: str) -> set[str]:
    """The folded words of a text that mean something by themselves."""
    # Folding alone would make one word of those around a hyphen.
    words = fold_answer(" ".join(re.findall(r"\w+", text))).split()
    return set(words) - FUNCTION_WORDS - _ASKING


def named(texts: Iterable[str]) -> set[str]:
    """What texts are about: their words with capitals or digits; of a text without any, which may
    be of a script that has none, all words of content."""
    found: set[str] = set()
    for text in texts:
        words = re.findall(r"\w+", text)
        marked = [word for word in words if word != word.casefold() or word.isdigit()]
        # The capital of the first word alone says nothing.
        found |= content(" ".join(words if marked == words[:1] else marked)) or content(text)
    return found


def nameless(text: str) -> str:
    """A text without the words that say what it is about."""
    names = named([text])
    return " ".join(word for word in re.findall(r"\w+", text) if not content(word) & names)


def asks_nothing(query: str) -> bool:
    """Whether a query has no word that a search engine could look for."""
    return not content(query)


def holds_answer(query: str, example: QAExample) -> bool:
    """Whether a query names a golden answer, so that it has nothing left to find.

    The alternatives of a question ("Who is older, A or B?") are no such answer, nor are yes and no.
    """
    own = [gold for gold in telling(example.golden_answers) if not cover_match(example.question, [gold])]
    return bool(cover_match(query, own))


def withholds(request: SearchRequest) -> bool:
    """Whether the golden answers are none of this query's business.

    It names nothing of the question, of its answers and of what earlier searches of the trajectory
    found (the second hop of a question names what the first one found), or it holds an answer: who
    asks for the answer itself only wants to hear it confirmed.
    """
    example = request.example
    if holds_answer(request.query, example):
        return True
    shown = [f"{document.title} {document.text}" for document in request.shown]
    known = named([example.question]) | content(" ".join(telling(example.golden_answers)))
    return not content(request.query) & (known | named(shown))


@dataclass(frozen=True)
class GuardModel:
    """A sentence embedder that may find a query related which shares no word with its question.

    It does so if the query is near the question, and not nearer to the question without its names:
    "the birthplace of" asks about nobody. With all-MiniLM-L6-v2 it lets 29 of 35 paraphrases pass,
    3 of 17 queries in other languages than English, 23 of 1,694 random other questions, but 238 of
    835 that ask the same about others.

    Args:
        model: the encoder, a folder or a hub name, see DenseSearch.
        threshold: least cosine of query and question; at 0.5 they are 26, 3, 10 and 233. Models
            whose cosines are all high need a higher one.
    """

    model: str
    threshold: float = 0.45

    def related(self, requests: Sequence[SearchRequest], encoder: Encoder) -> list[bool]:
        """Whether each query is about its question, all of them in one go."""
        rows = [(r.query, r.example.question, nameless(r.example.question)) for r in requests]
        texts = list(dict.fromkeys(text for row in rows for text in row))
        vectors = dict(zip(texts, encoder.encode("query", texts), strict=True))
        found = []
        for query, question, rest in rows:
            near = vectors[query] @ vectors[question]
            found.append(bool(near >= max(self.threshold, vectors[query] @ vectors[rest])))
        return found
