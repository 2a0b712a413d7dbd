"""What a search engine of this world would show: queries, good and poor, and their documents."""

import random
from dataclasses import dataclass

from zs_lightning.miniature.world import QUERY_FORMS, RELATIONS, RELATIONS_OF, SYNONYMS, Question, World, sentences
from zs_lightning.types import Document, SearchRecord

DOCUMENTS_PER_SEARCH = 3
# Share of simulator training queries that ask for a fact of the question. The others are poor, and
# get documents about what they ask, so that the simulator does not learn to print the answer
# whatever the query.
GOOD_QUERY_SHARE = 0.75


class KnownFacts:
    """Where facts are looked up: the world without its new entities."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.members: dict[str, list[str]] = {}
        # The simulator learns from these alone: new entities must be new to it.
        for kind, members in world.entities.items():
            self.members[kind] = [name for name in members if name not in world.new]

    def kind_of(self, subject: str) -> str:
        return self.world.kind[subject]

    # Known facts need no draw. Those of an imagined world, for pre-training, are drawn when asked
    # for.
    def object_of(self, subject: str, relation: str, rng: random.Random) -> str:
        return self.world.facts[subject, relation]

    def some(self, kind: str, rng: random.Random) -> str:
        return rng.choice(self.members[kind])


@dataclass(frozen=True)
class Query:
    """A query's words and the fact they ask for; a poor one may lack a part of it."""

    text: str
    subject: str | None
    relation: str | None


def good_query(subject: str, relation: str, rng: random.Random, word: str | None = None) -> Query:
    """A query that asks for one fact, with the given relation word or either of the two."""
    word = word or rng.choice((relation, SYNONYMS[relation]))
    text = rng.choice(QUERY_FORMS).format(relation=word, subject=subject)
    return Query(text, subject, relation)


def poor_query(facts: KnownFacts, subject: str, relation: str, whole: str | None, rng: random.Random) -> Query:
    """A query that does not ask for the fact: in part another or missing, or the whole two-hop
    phrase."""
    draw = rng.random()
    if draw < 0.3:
        return good_query(subject, rng.choice(RELATIONS_OF[facts.kind_of(subject)]), rng)
    if draw < 0.5:
        return Query(rng.choice((relation, SYNONYMS[relation])), None, relation)
    if draw < 0.7:
        return good_query(facts.some(facts.kind_of(subject), rng), relation, rng)
    if draw < 0.85 and whole:
        return Query(whole, subject, None)
    return Query(subject, subject, None)


def result_sentences(facts: KnownFacts, query: Query, useful: bool, rng: random.Random, shuffle: bool = True) -> list[str]:
    """Three near misses for a query; the first of useful ones is the fact itself."""
    subject = query.subject
    relation = query.relation
    chosen: list[tuple[str, str]] = []
    if useful and subject and relation:
        chosen.append((subject, relation))
    # Countries have no facts of their own.
    if subject and facts.kind_of(subject) not in RELATIONS_OF:
        subject = None
    for attempt in range(1000):
        if len(chosen) == DOCUMENTS_PER_SEARCH:
            break
        # The subject's other facts, the same relation of others, or anything.
        draw = rng.random()
        # A subject may have fewer facts than there are places left: not for ever.
        if subject and draw < 0.4 and attempt < 20:
            fact = subject, rng.choice(RELATIONS_OF[facts.kind_of(subject)])
        elif relation and draw < 0.8:
            fact = facts.some(RELATIONS[relation][0], rng), relation
        else:
            kind = rng.choice(list(RELATIONS_OF))
            fact = facts.some(kind, rng), rng.choice(RELATIONS_OF[kind])
        if fact not in chosen and fact != (query.subject, relation):
            chosen.append(fact)
    texts = []
    for about, asked in chosen:
        wordings = sentences(about, asked, facts.object_of(about, asked, rng))
        texts.append(rng.choice(wordings))
    if shuffle:
        rng.shuffle(texts)
    return texts


def search_record(facts: KnownFacts, question: Question, good: bool, noisy: bool, rng: random.Random) -> SearchRecord:
    """One training row of the simulator for one hop of the question."""
    hop = rng.randrange(len(question.relations))
    subject = question.subject if hop == 0 else question.objects[0]
    relation = question.relations[hop]
    if good:
        query = good_query(subject, relation, rng)
    else:
        first, *rest = question.relations
        whole = f"{rest[0]} of {first} of {question.subject}" if rest else None
        query = poor_query(facts, subject, relation, whole, rng)
    # Unshuffled: the fact comes first in what the simulator learns to write.
    texts = result_sentences(facts, query, not noisy, rng, shuffle=False)
    evidence: tuple[str, ...] = ()
    if query.subject and query.relation:
        asked = facts.object_of(query.subject, query.relation, rng)
        evidence = sentences(query.subject, query.relation, asked)
    example = question.example(facts.world.seed)
    documents = tuple(Document(text=text) for text in texts)
    shown = [sentences(question.subject, question.relations[0], subject)[0]] if hop else []
    return SearchRecord(
        example=example,
        query=query.text,
        label="noisy" if noisy else "useful",
        documents=documents,
        evidence=evidence,
        shown=tuple(Document(text=text) for text in shown),
    )


def search_records(
    world: World, questions: list[Question], count: int, good_share: float, rng: random.Random
) -> list[SearchRecord]:
    """`count` rows over random questions, half of them noisy."""
    facts = KnownFacts(world)
    records = []
    for _ in range(count):
        question = rng.choice(questions)
        good = rng.random() < good_share
        records.append(search_record(facts, question, good, rng.random() < 0.5, rng))
    return records
