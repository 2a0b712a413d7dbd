"""What a search engine of this world would show: queries, good and poor, and the documents that answer them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from zs_lightning.miniature.world import (
    QUERY_FORMS,
    RELATIONS,
    RELATIONS_OF,
    SYNONYMS,
    Question,
    World,
    names,
    sentences,
)
from zs_lightning.types import Document, SearchRecord

DOCUMENTS_PER_SEARCH = 3
GOOD_QUERY_SHARE = 0.75
"""Share of simulator training queries that ask for a fact of the question; the others are poor, and get documents about
what they ask, so that the simulator does not learn to print the answer whatever the query."""


class Facts(Protocol):
    """Somewhere to look facts up: the known part of the world, or one imagined for a single text."""

    def kind_of(self, subject: str) -> str: ...
    def object_of(self, subject: str, relation: str, rng: random.Random) -> str: ...
    def some(self, kind: str, rng: random.Random) -> str: ...


class KnownFacts:
    """The world without its new entities."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.members = {k: [x for x in members if x not in world.new] for k, members in world.entities.items()}

    def kind_of(self, subject: str) -> str:
        return self.world.kind[subject]

    def object_of(self, subject: str, relation: str, rng: random.Random) -> str:
        return self.world.facts[subject, relation]

    def some(self, kind: str, rng: random.Random) -> str:
        return rng.choice(self.members[kind])


class ImaginedFacts:
    """Random facts about random names, invented when asked for and never about a name in `avoid`."""

    def __init__(self, avoid: frozenset[str]) -> None:
        self.avoid = avoid
        self.kinds: dict[str, str] = {}
        self.facts: dict[tuple[str, str], str] = {}

    def kind_of(self, subject: str) -> str:
        return self.kinds[subject]

    def object_of(self, subject: str, relation: str, rng: random.Random) -> str:
        if (subject, relation) not in self.facts:
            self.facts[subject, relation] = self.some(RELATIONS[relation][1], rng, frozenset(self.kinds))
        return self.facts[subject, relation]

    def some(self, kind: str, rng: random.Random, unlike: frozenset[str] = frozenset()) -> str:
        name = names().draw(kind, rng, self.avoid | unlike)
        self.kinds[name] = kind
        return name


@dataclass(frozen=True)
class Query:
    """A query's words and the fact they ask for; a poor query may lack the subject, the relation or both."""

    text: str
    subject: str | None
    relation: str | None


def good_query(subject: str, relation: str, rng: random.Random, word: str | None = None) -> Query:
    """Asks for one fact, with the given relation word or either of the two."""
    word = word or rng.choice((relation, SYNONYMS[relation]))
    return Query(rng.choice(QUERY_FORMS).format(relation=word, subject=subject), subject, relation)


def poor_query(facts: Facts, subject: str, relation: str, question: str | None, rng: random.Random) -> Query:
    """A query that does not ask for the fact: wrong relation, no subject, wrong subject, the whole question, no relation.

    `question` is the unsplit two-hop phrase, None for a one-hop question.
    """
    draw = rng.random()
    if draw < 0.3:
        return good_query(subject, rng.choice(RELATIONS_OF[facts.kind_of(subject)]), rng)
    if draw < 0.5:
        return Query(rng.choice((relation, SYNONYMS[relation])), None, relation)
    if draw < 0.7:
        return good_query(facts.some(facts.kind_of(subject), rng), relation, rng)
    if draw < 0.85 and question:
        return Query(question, subject, None)
    return Query(subject, subject, None)


def result_sentences(facts: Facts, query: Query, useful: bool, rng: random.Random, shuffle: bool = True) -> list[str]:
    """Three sentences for a query. Useful: exactly one of them is the fact that was asked for (the first, unless
    shuffled). Otherwise all are near misses: the subject's other facts, the same relation of others, anything."""
    subject, relation = query.subject, query.relation
    chosen: list[tuple[str, str]] = []
    if useful and subject and relation:
        chosen.append((subject, relation))
    if subject and facts.kind_of(subject) not in RELATIONS_OF:
        subject = None
    for attempt in range(1000):
        if len(chosen) == DOCUMENTS_PER_SEARCH:
            break
        draw = rng.random()
        if subject and draw < 0.4 and attempt < 20:
            fact = subject, rng.choice(RELATIONS_OF[facts.kind_of(subject)])
        elif relation and draw < 0.8:
            fact = facts.some(RELATIONS[relation][0], rng), relation
        else:
            kind = rng.choice(list(RELATIONS_OF))
            fact = facts.some(kind, rng), rng.choice(RELATIONS_OF[kind])
        if fact not in chosen and fact != (query.subject, relation):
            chosen.append(fact)
    texts = [rng.choice(sentences(s, r, facts.object_of(s, r, rng))) for s, r in chosen]
    if shuffle:
        rng.shuffle(texts)
    return texts


def search_record(facts: KnownFacts, question: Question, good: bool, noisy: bool, rng: random.Random) -> SearchRecord:
    """One training row of the simulator for one hop of the question."""
    hop = rng.randrange(len(question.relations))
    subject = question.subject if hop == 0 else question.objects[0]
    relation = question.relations[hop]
    whole = (
        f"{question.relations[1]} of {question.relations[0]} of {question.subject}" if len(question.relations) == 2 else None
    )
    query = good_query(subject, relation, rng) if good else poor_query(facts, subject, relation, whole, rng)
    texts = result_sentences(facts, query, not noisy, rng, shuffle=False)
    evidence: tuple[str, ...] = ()
    if query.subject and query.relation:
        evidence = sentences(query.subject, query.relation, facts.object_of(query.subject, query.relation, rng))
    return SearchRecord(
        example=question.example(facts.world.seed),
        query=query.text,
        noisy=noisy,
        documents=tuple(Document(text=text) for text in texts),
        evidence=evidence,
    )


def search_records(
    world: World, questions: list[Question], count: int, good_share: float, rng: random.Random
) -> list[SearchRecord]:
    """`count` rows over random questions, half of them noisy."""
    facts = KnownFacts(world)
    return [
        search_record(facts, rng.choice(questions), rng.random() < good_share, rng.random() < 0.5, rng) for _ in range(count)
    ]
