"""How good the documents of a simulated engine are: functions of texts, one number for a result.

Means over many results, and their intervals, are made by those who call.
"""

import re
from collections.abc import Callable, Sequence

from zs_lightning.search.guard import content
from zs_lightning.streams import stream
from zs_lightning.text.answers import cover_match, fold_answer, telling
from zs_lightning.types import Document, SearchRecord

Documents = Sequence[Document]


def contents(document: Document) -> str:
    return f"{document.title}\n{document.text}".strip()


def recalled(record: SearchRecord, documents: Documents) -> float:
    """1.0 if a document holds the record's evidence, which is to be so in useful ones alone."""
    return float(any(cover_match(contents(found), record.evidence) for found in documents))


def leaked(record: SearchRecord, documents: Documents) -> float:
    """1.0 if a document holds a golden answer of the record's question."""
    return float(any(cover_match(contents(found), telling(record.example.golden_answers)) for found in documents))


def words_of(documents: Documents) -> set[str]:
    return content("\n".join(map(contents, documents)))


def shared_words(one: Documents, other: Documents) -> float:
    """Of all words of content in two results, the share that both have; 1.0 if there are none."""
    mine, theirs = words_of(one), words_of(other)
    return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0


def distinct(documents: Documents) -> float:
    """The share of the documents that do not repeat an earlier one. Of at least one document."""
    return len({fold_answer(contents(found)) for found in documents}) / len(documents)


def repeated(documents: Documents) -> float:
    """The share of all three words in a row that occurred before in the same result."""
    seen: set[tuple[str, ...]] = set()
    total = 0
    for found in documents:
        words = fold_answer(contents(found)).split()
        rows = list(zip(words, words[1:], words[2:], strict=False))
        total += len(rows)
        seen.update(rows)
    return 1 - len(seen) / total if total else 0.0


def sentences_of(documents: Documents) -> list[str]:
    found: list[str] = []
    for document in documents:
        found += re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", document.text)
    return [sentence.strip() for sentence in found if content(sentence)]


def supported(documents: Documents, holds: Callable[[str], bool]) -> float | None:
    """The share of the sentences that a corpus holds; None without a sentence."""
    sentences = sentences_of(documents)
    return sum(map(holds, sentences)) / len(sentences) if sentences else None


def turned(query: str) -> str:
    """The query with its halves exchanged, or with an article where that changes nothing."""
    words = query.split()
    middle = (len(words) + 1) // 2
    other = " ".join(words[middle:] + words[:middle])
    return other if other != " ".join(words) else f"the {other}"


def unrelated_queries(records: Sequence[SearchRecord], seed: int) -> list[str | None]:
    """For each record another's query, whose question and query share no word of content with what
    the record asks, answers and has found; None where no record is so far away."""
    mine: list[set[str]] = []
    theirs: list[set[str]] = []
    for record in records:
        example = record.example
        asked = content(f"{example.question} {record.query}")
        theirs.append(asked | content(" ".join(example.golden_answers)))
        mine.append(theirs[-1] | words_of(record.shown))
    found: list[str | None] = []
    for own in range(len(records)):
        others = list(range(len(records)))
        stream(seed, "unrelated", own).shuffle(others)
        far = (records[other].query for other in others if not mine[own] & theirs[other])
        found.append(next(far, None))
    return found
