"""Records of the named kinds of noise, made by rule from what useful searches found."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from random import Random

from zs_lightning.search.guard import content, named
from zs_lightning.streams import stream
from zs_lightning.text.answers import cover_match
from zs_lightning.text.prompts import NOISY, USEFUL
from zs_lightning.types import Document, SearchRecord

TRIES = 200
"""Draws from what other searches found, until documents fit a query."""
YEARS = range(1900, 1990)
# Of the documents in a noisy twin: the share of an engine's own that stay, and of the others that
# are about what the query names, or share a word of what it asks for. With more about the very
# thing small models slip into the fact, which they were taught to write for the same query.
KEPT, SAME_THING, SAME_ASKED = 0.4, 0.2, 0.5

_NAMES = re.compile(r"\b[A-Z0-9][\w'-]*(?: [A-Z0-9][\w'-]*)*")
"""Words with capitals or digits that stand beside each other."""

_words = cache(content)


def said(document: Document) -> str:
    return f"{document.title} {document.text}"


def object_of(record: SearchRecord) -> str | None:
    """What a useful search was to find: a golden answer in its evidence, or else the one name in it
    that the query lacks. None if there is none, or several."""
    for gold in record.example.golden_answers:
        if cover_match("\n".join(record.evidence), [gold]):
            return gold
    query = content(record.query)
    found: set[str] = set()
    for text in record.evidence:
        for name in _NAMES.findall(text):
            if not content(name) & query:
                found.add(name)
    return found.pop() if len(found) == 1 else None


class Kinds:
    """Makes noise of the named kinds out of all records that searches found, useful and not. Every
    draw is a function of the seed, of the record and of `variant`, which may be set to make another
    result for the same query."""

    variant = 0

    def __init__(self, records: Sequence[SearchRecord], seed: int) -> None:
        self.records = records
        self.seed = seed
        self.every = list(dict.fromkeys(found for record in records for found in record.documents))
        self.by_word: dict[str, list[Document]] = defaultdict(list)
        self.objects: dict[tuple[object, ...], set[str]] = defaultdict(set)
        for document in self.every:
            for word in sorted(_words(said(document))):
                self.by_word[word].append(document)
        for record in records:
            if record.label == USEFUL and (found := object_of(record)):
                self.objects[_sort(record, found)].add(found)
                self.objects[_shape(found)].add(found)

    def made(self, kind: str, record: SearchRecord) -> SearchRecord | None:
        """The useful record's query with documents of this kind; None where there are none."""
        documents = KINDS[kind](self, record)
        return replace(record, label=kind, documents=tuple(documents)) if documents else None

    def twin(self, record: SearchRecord) -> SearchRecord | None:
        """The useful record's query as if nothing useful had been found: near misses are in place
        of what tells. None where there are too few of them, or nothing is known of what tells."""
        rng = self._rng(NOISY, record)
        documents = self._filled(record, _kept(record, rng), rng) if record.evidence else []
        return replace(record, label=NOISY, documents=tuple(documents)) if documents else None

    def _filled(self, record: SearchRecord, kept: list[Document], rng: Random, first: Document | None = None) -> list[Document]:
        """The kept documents with near misses between them, as many as the record has in all; none
        if there are too few. A `first` one stands before them, and no other is about what the query
        names then."""
        if first:
            # Small models that come back to it later slip into the fact.
            kept = [found for found in kept if not _about(record, found)]
        begun = [first] if first else []
        for _ in range(TRIES):
            if len(begun) + len(kept) >= len(record.documents):
                return [*begun, *kept][: len(record.documents)]
            near = rng.choice(self._near(record.query, rng))
            other = near not in (*record.documents, *begun, *kept) and not (first and _about(record, near))
            if other and _misses(record, near):
                # Anywhere: a place of its own would say where the evidence stood.
                kept.insert(rng.randrange(len(kept) + 1), near)
        return []

    def _near(self, query: str, rng: Random) -> Sequence[Document]:
        """Documents that share a word with the query, or all."""
        names = _capitals(query)
        draw = rng.random()
        words = names if draw < SAME_THING else content(query) - names
        known = sorted(words & self.by_word.keys())
        # By the word, or the many documents of a common one would crowd out the rest.
        near = draw < SAME_THING + SAME_ASKED and known
        return self.by_word[rng.choice(known)] if near else self.every

    def off_topic(self, record: SearchRecord) -> Sequence[Document]:
        """What another search found, if it has no word by which this query names anything."""
        names = named([record.query])
        rng = self._rng("off_topic", record)
        for _ in range(TRIES):
            other = rng.choice(self.records).documents[: len(record.documents)]
            words: set[str] = set().union(*(_words(said(document)) for document in other))
            full = len(other) == len(record.documents)
            if full and not names & words and not any(_tells(record, document) for document in other):
                return other
        return []

    def partial(self, record: SearchRecord) -> Sequence[Document]:
        """A document that names what the query names, and near misses; none says what it asks
        for."""
        words = sorted(_named(record.query))
        if not words:
            return []
        # Together: the words of one name may stand there in two others.
        names = [name for name in _NAMES.findall(record.query) if content(name).issubset(words)]
        rng = self._rng("partial", record)
        pool = [document for document in self.by_word.get(words[0], []) if document not in record.documents]
        pool += [_without_answer(record, document) for document in record.documents]
        rng.shuffle(pool)
        about: list[Document] = []
        for document in pool:
            text = said(document)
            named_here = _about(record, document) and all(cover_match(text, [name]) for name in names)
            if document.text and named_here and not _tells(record, document):
                about.append(document)
        return self._filled(record, [], rng, _soonest(record, about)[0]) if about else []

    def contradicting(self, record: SearchRecord) -> Sequence[Document]:
        """A document that tells, with another answer of the same sort in place of the right one,
        and near misses."""
        return self._falsified("contradicting", record)

    def outdated(self, record: SearchRecord) -> Sequence[Document]:
        """Documents with another answer, each of which begins with a year long past."""
        rng = self._rng("year", record)
        other = self._falsified("outdated", record)
        return [replace(document, text=f"In {rng.choice(YEARS)}: {document.text}") for document in other]

    def _falsified(self, kind: str, record: SearchRecord) -> Sequence[Document]:
        right = object_of(record)
        if right is None:
            return []
        alike = self._others(_sort(record, right), record) or self._others(_shape(right), record)
        if not alike:
            return []
        rng = self._rng(kind, record)
        wrong = rng.choice(alike)
        answers = [right, *record.example.golden_answers]
        word = min(_named(record.query) & self.by_word.keys(), default="")
        pool = [found for found in self.by_word.get(word, []) if _about(record, found)]
        for document in _soonest(record, [*record.documents, *pool]):
            false = _with_another(document, answers, wrong)
            # In another spelling the answer would still stand there.
            if false != document and not cover_match(said(false), answers):
                return self._filled(record, _kept(record, rng), rng, false)
        return []

    def _others(self, sort: tuple[object, ...], record: SearchRecord) -> list[str]:
        """Answers of this sort that are neither right nor named by the query."""
        mine = " ".join([*record.example.golden_answers, record.query, object_of(record) or ""])
        known = content(mine)
        return sorted(other for other in self.objects[sort] if not content(other) & known)

    def _rng(self, kind: str, record: SearchRecord) -> Random:
        variant = (self.variant,) if self.variant else ()
        return stream(self.seed, kind, record.example.key, record.query, *variant)


KINDS: dict[str, Callable[[Kinds, SearchRecord], Sequence[Document]]] = {
    "off_topic": Kinds.off_topic,
    "partial": Kinds.partial,
    "contradicting": Kinds.contradicting,
    "outdated": Kinds.outdated,
}


def _misses(record: SearchRecord, document: Document) -> bool:
    """Whether a document is a near miss: it does not say what the query was to find."""
    # One with half of a name (Cold Harbor for Red Harbor) leads small models to the whole.
    names = _capitals(record.query)
    half = 0 < len(names & _words(said(document))) < len(names)
    return not half and not _tells(record, document)


def _about(record: SearchRecord, document: Document) -> bool:
    """Whether a document names all that the query names."""
    names = _named(record.query)
    return bool(names) and names <= _words(said(document))


def _soonest(record: SearchRecord, documents: Sequence[Document]) -> list[Document]:
    """The documents, those first that come soonest to what the query names. A small model copies
    such a beginning from the query; of others (Ada founded Red Works) it has to remember who it
    was."""

    def before(document: Document) -> int:
        words = said(document).split()
        return next((n for n, word in enumerate(words) if _words(word) & _named(record.query)), len(words))

    return sorted(documents, key=before)


def _kept(record: SearchRecord, rng: Random) -> list[Document]:
    """Those of the record's own documents that stay in its noise."""
    return [found for found in record.documents if _misses(record, found) and rng.random() < KEPT]


@cache
def _named(query: str) -> set[str]:
    return named([query])


@cache
def _capitals(query: str) -> set[str]:
    """The words of the names in a query, empty where nothing has a capital."""
    return content(" ".join(_NAMES.findall(query)))


def _tells(record: SearchRecord, document: Document) -> bool:
    """Whether a document says what the query was to find."""
    telling = [*record.example.golden_answers, *record.evidence, object_of(record) or ""]
    return bool(cover_match(said(document), telling))


def _with_another(document: Document, answers: Sequence[str], wrong: str) -> Document:
    """The document with a wrong answer in place of each of these."""
    # The longest first: a shorter one may be a part of it.
    for answer in sorted(set(answers), key=lambda a: (-len(a), a)):
        # As whole words in any case, however they are spaced.
        words = r"\s+".join(map(re.escape, answer.split()))
        spelt = re.compile(rf"\b{words}\b", re.IGNORECASE)
        text, title = (spelt.sub(lambda _: wrong, part) for part in (document.text, document.title))
        document = Document(text=text, title=title)
    return document


def _without_answer(record: SearchRecord, document: Document) -> Document:
    """The document without the sentences that say what the query was to find."""
    sentences = re.split(r"(?<=[.!?])\s+", document.text)
    kept = [text for text in sentences if not _tells(record, Document(text=text))]
    return replace(document, text=" ".join(kept))


def _sort(record: SearchRecord, found: str) -> tuple[object, ...]:
    """What answers have in common that could stand in each other's place: what is asked for."""
    asked = content(record.query) - named([record.query])
    question = record.example.question
    return (frozenset(asked or content(question) - named([question])), *_shape(found))


def _shape(text: str) -> tuple[object, ...]:
    """What can be seen of a sort: a number, a name, and of how many words."""
    return (any(map(str.isdigit, text)), text[:1].isupper(), min(len(text.split()), 4))
