"""The text that the tiny base model is pre-trained on.

What a web-scale model brings along, in small: pages of documents (the only place where the world's facts occur), the
skill to find a name in documents and copy what they say, and people at work with a search engine, good and bad at it.
The people's texts are about imagined facts, so that only reading can help, and nobody's name in them is a new entity's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from zs_lightning.miniature.searches import KnownFacts, Query, good_query, poor_query, result_sentences
from zs_lightning.miniature.world import CHAINS, RELATIONS, RELATIONS_OF, SYNONYMS, names, question_text, sentences

Segments = list[tuple[str, bool]]
"""Pieces of text; True where the model learns to write them."""
END = "<eos>"
NOTICE = " Try again."
YEARS = range(1900, 2030)


@dataclass(frozen=True)
class Habits:
    """How people behave; each a probability, drawn anew at each occasion."""

    answer_at_once: float = 0.7
    good_query: float = 0.5
    word_of_the_question: float = 0.5
    search_again: float = 0.45
    same_words_again: float = 0.1
    other_words: float = 0.75
    """When searching again: the same words, the other relation word, or else a query of any kind."""
    second_hop: float = 0.45
    use_the_fact: float = 0.85
    needless_search: float = 0.1
    malformed: float = 0.03
    fruitless_result: float = 0.3


class ImaginedFacts(KnownFacts):
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


def results_block(texts: list[str]) -> str:
    return "<information>" + "".join(f" Doc {i}: {text}" for i, text in enumerate(texts, 1)) + "</information>"


class Person:
    """One worker's trajectory on one imagined question."""

    def __init__(self, rng: random.Random, avoid: frozenset[str], habits: Habits) -> None:
        self.rng, self.habits = rng, habits
        self.facts = ImaginedFacts(avoid)
        self.relations: tuple[str, ...] = rng.choice(CHAINS) if rng.random() < 0.55 else (rng.choice(list(RELATIONS)),)
        self.subject = self.facts.some(RELATIONS[self.relations[0]][0], rng)
        self.segments: Segments = []
        self.shown: list[str] = []

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def write(self, text: str, learn: bool = True) -> None:
        self.segments.append((text, learn))

    def answer(self, text: str) -> Segments:
        if self.chance(self.habits.malformed):
            self.write(f"<answer> {text}{END}")
            self.write(NOTICE, learn=False)
            self.write("<think> I guess.</think>")
        self.write(f"<answer> {text}</answer>{END}")
        return self.segments

    def guess(self, unlike: str | None = None) -> Segments:
        """Any object on display, or a made-up name of the right type."""
        seen = [o for o in self.facts.facts.values() if o != unlike and any(o in text for text in self.shown)]
        return self.answer(self.rng.choice(seen) if seen else self.facts.some(RELATIONS[self.relations[-1]][1], self.rng))

    def next_query(self, at: str, relation: str, last: tuple[str, Query] | None) -> tuple[str, Query]:
        """The relation word that the thought names and the query; `last` is the same of a fruitless search for the fact."""
        habits, draw = self.habits, self.rng.random()
        if last and draw < habits.same_words_again:
            return last
        if last and draw < habits.same_words_again + habits.other_words:
            word = SYNONYMS[relation] if last[0] == relation else relation
            return word, good_query(at, relation, self.rng, word)
        word = relation if self.chance(habits.word_of_the_question) else SYNONYMS[relation]
        if self.chance(habits.good_query):
            return word, good_query(at, relation, self.rng, word)
        whole = f"{self.relations[1]} of {self.relations[0]} of {self.subject}" if len(self.relations) == 2 else None
        return word, poor_query(self.facts, at, relation, whole, self.rng)

    def work(self) -> Segments:
        rng, habits = self.rng, self.habits
        question = question_text(self.subject, self.relations, rng.randrange(3))
        self.write(f"<question> {question}</question>", learn=False)
        if self.chance(habits.answer_at_once):
            self.write("<think> I may know this.</think>")
            return self.guess()
        at, hop, lead, last = self.subject, 0, "", None
        for search in range(1, 6):
            relation = self.relations[hop]
            last = word, query = self.next_query(at, relation, last)
            self.write(f"<think> {lead}I need the {word} of {at}.</think><search> {query.text}</search>")
            texts = result_sentences(self.facts, query, not self.chance(habits.fruitless_result), rng)
            self.shown += texts
            self.write(results_block(texts), learn=False)
            fact = self.facts.object_of(at, relation, rng)
            evidence = next((text for text in texts if text in sentences(at, relation, fact)), None)
            if evidence is None:
                lead = f"{at} missing. "
                if search < 5 and self.chance(habits.search_again):
                    continue
                self.write(f"<think> {lead}I guess.</think>")
                return self.guess()
            lead, last = f"{evidence} ", None
            if not self.chance(habits.use_the_fact):
                self.write("<think> I guess.</think>")
                return self.guess(unlike=fact)
            done = hop + 1 == len(self.relations)
            if done and search < 5 and self.chance(habits.needless_search):
                continue
            if done or search == 5 or not self.chance(habits.second_hop):
                self.write(f"<think> {evidence}</think>")
                return self.answer(fact)
            at, hop = fact, hop + 1
        raise AssertionError("the fifth search always ends in an answer")


def page(facts: KnownFacts, known: list[tuple[str, str, str]], rng: random.Random) -> Segments:
    """A page of true documents; half of the pages are search results, with the query and sometimes a word on quality."""
    subject, relation, _ = rng.choice(known)
    if rng.random() < 0.5:
        useful = rng.random() < 0.6
        query = good_query(subject, relation, rng)
        label = f"<think> {'useful' if useful else 'noisy'}</think>" if rng.random() < 0.5 else ""
        texts = result_sentences(facts, query, useful, rng, shuffle=rng.random() < 0.5)
        return [(f"<search> {query.text}</search>{label}{results_block(texts)}{END}", True)]
    chosen = [(subject, relation)]
    while len(chosen) < 3:
        other, another, _ = rng.choice(known)
        if rng.random() < 0.5:
            other, another = subject, rng.choice(RELATIONS_OF[facts.kind_of(subject)])
        chosen.append((other, another))
    texts = [rng.choice(sentences(s, r, facts.object_of(s, r, rng))) for s, r in chosen]
    return [(results_block(texts) + END, True)]


def dated_page(facts: KnownFacts, known: list[tuple[str, str, str]], rng: random.Random) -> Segments:
    """A page of true documents, each of which begins with a year."""
    documents: list[str] = []
    for subject, relation, object_ in rng.sample(known, 3):
        documents.append(f"In {rng.choice(YEARS)}: {rng.choice(sentences(subject, relation, object_))}")
    return [(results_block(documents) + END, True)]


def imagined_facts(rng: random.Random, avoid: frozenset[str], count: int, same_subject: float) -> dict[tuple[str, str], str]:
    """`count` imagined facts (fewer on repeats), some about a subject already there; values are their sentences."""
    facts, stated = ImaginedFacts(avoid), dict[tuple[str, str], str]()
    for _ in range(count):
        if stated and rng.random() < same_subject:
            subject = rng.choice(list(stated))[0]
            relation = rng.choice(RELATIONS_OF[facts.kind_of(subject)])
        else:
            relation = rng.choice(list(RELATIONS))
            subject = facts.some(RELATIONS[relation][0], rng)
        stated[subject, relation] = rng.choice(sentences(subject, relation, facts.object_of(subject, relation, rng)))
    return stated


def restatement(rng: random.Random, avoid: frozenset[str]) -> Segments:
    """The same imagined facts three times in different orders: dense practice in matching names."""
    stated = list(imagined_facts(rng, avoid, rng.randint(2, 6), 0.35).items())
    segments: Segments = [(results_block([text for _, text in stated]), False)]
    for _ in range(2):
        rng.shuffle(stated)
        for (subject, _), text in stated:
            segments += [(f"<think> {subject}", False), (f"{text[len(subject) :]}</think>", True)]
    return [*segments, (END, False)]


def drill(rng: random.Random, avoid: frozenset[str]) -> Segments:
    """Requests after documents: copy the sentence that answers, or say that it is missing."""
    stated = imagined_facts(rng, avoid, rng.randint(1, 4), 0.5)
    segments: Segments = [(results_block(list(stated.values())), False)]
    asked = list(stated.items())
    rng.shuffle(asked)
    for (subject, relation), text in asked:
        reply = text
        if rng.random() < 0.35:
            kind = RELATIONS[relation][0]
            if rng.random() < 0.5:
                relation = rng.choice(RELATIONS_OF[kind])
            else:
                subject = ImaginedFacts(avoid).some(kind, rng)
            reply = stated.get((subject, relation), f"{subject} missing.")
        word = rng.choice((relation, SYNONYMS[relation]))
        segments += [(f"<think> I need the {word} of {subject}.", False), (f" {reply}</think>", True)]
    return [*segments, (END, False)]
