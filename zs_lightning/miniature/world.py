"""A procedurally generated world: entities, facts, the sentences that state them, questions about them.

Everything is a function of the world's seed. The words that names are made of are the same in every world (they are the
language of the miniature); which names exist and what is true of them differs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache

from zs_lightning.streams import stream
from zs_lightning.types import QAExample

RELATIONS = {  # relation: (type of the subject, type of the object)
    "author": ("book", "person"),
    "publisher": ("book", "company"),
    "birthplace": ("person", "city"),
    "employer": ("person", "company"),
    "spouse": ("person", "person"),
    "headquarters": ("company", "city"),
    "founder": ("company", "person"),
    "country": ("city", "country"),
    "mayor": ("city", "person"),
}
SYNONYMS = {
    "author": "writer",
    "publisher": "printer",
    "birthplace": "hometown",
    "employer": "workplace",
    "spouse": "partner",
    "headquarters": "office",
    "founder": "creator",
    "country": "nation",
    "mayor": "governor",
}
RELATIONS_OF: dict[str, list[str]] = {}
for _relation, (_subject, _) in RELATIONS.items():
    RELATIONS_OF.setdefault(_subject, []).append(_relation)
CHAINS = [
    (first, second)
    for first, (_, middle) in RELATIONS.items()
    for second, (subject, _) in RELATIONS.items()
    if middle == subject and (first, second) not in (("spouse", "spouse"), ("spouse", "mayor"))
]
SIZES = {"person": 150, "book": 100, "company": 60, "city": 40, "country": 12}
NEW_SHARE = 0.15
"""Share of persons, books and companies that only the search corpus knows: no question of training, no simulator
document and no pre-training text names them."""
QUESTION_OPENINGS = ("What is", "Name", "Tell me")
QUERY_FORMS = ("{relation} of {subject}", "the {relation} of {subject}")

ADJECTIVES = (
    "Red Quiet Broken Golden Last Hidden Cold Silver Empty Burning Distant Hollow Bright Secret Frozen Lost Wild "
    "Narrow Sleeping Iron Paper Green Second Bitter"
).split()
NOUNS = (
    "Harbor Garden River Tower Letter Winter Mirror Bridge Forest Crown Window Island Clock Valley Song Lantern Road "
    "Sparrow Door Engine Feather Ocean Orchard Stone"
).split()
TRADES = ["Works", "Labs", "Press", "Mills", "Group", "Foods"]


def _invent_words(rng: random.Random, count: int, syllables: int, taken: set[str]) -> list[str]:
    consonants, vowels, endings = "b d f g k l m n p r s t v z j h".split(), "aeiou", ["", *"nrlskt"]
    words: list[str] = []
    while len(words) < count:
        word = "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(syllables)) + rng.choice(endings)
        if word not in taken:
            taken.add(word)
            words.append(word.capitalize())
    return words


@dataclass(frozen=True)
class Names:
    """The words that names are made of."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    company: tuple[str, ...]
    city: tuple[str, ...]
    country: tuple[str, ...]

    def draw(self, kind: str, rng: random.Random, avoid: frozenset[str] | set[str] = frozenset()) -> str:
        """A random name of this kind that is not in `avoid`."""
        while True:
            if kind == "person":
                name = f"{rng.choice(self.first)} {rng.choice(self.last)}"
            elif kind == "book":
                name = f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
            elif kind == "company":
                name = f"{rng.choice(self.company)} {rng.choice(TRADES)}"
            else:
                name = rng.choice(self.city if kind == "city" else self.country)
            if name not in avoid:
                return name

    @property
    def words(self) -> list[str]:
        return [*self.first, *self.last, *self.company, *self.city, *ADJECTIVES, *NOUNS]


@cache
def names() -> Names:
    rng, taken = stream("miniature", "names"), set[str]()
    return Names(
        first=tuple(_invent_words(rng, 48, 2, taken)),
        last=tuple(_invent_words(rng, 64, 2, taken)),
        company=tuple(_invent_words(rng, 40, 2, taken)),
        city=tuple(_invent_words(rng, 48, 2, taken)),
        country=tuple(_invent_words(rng, 12, 3, taken)),
    )


def sentence(subject: str, relation_word: str, object_: str) -> str:
    """One fact as a document states it."""
    return f"{subject} {relation_word} {object_}."


def sentences(subject: str, relation: str, object_: str) -> tuple[str, str]:
    """Both wordings of one fact."""
    return sentence(subject, relation, object_), sentence(subject, SYNONYMS[relation], object_)


def question_text(subject: str, relations: tuple[str, ...], opening: int) -> str:
    text = subject
    for relation in relations:
        text = f"the {relation} of {text}"
    return f"{QUESTION_OPENINGS[opening]} {text}?"


@dataclass(frozen=True)
class Question:
    """A question and the path through the facts that answers it."""

    subject: str
    relations: tuple[str, ...]
    objects: tuple[str, ...]
    """The object of each hop; the last one is the answer."""
    text: str
    new: bool

    def example(self, world_seed: int) -> QAExample:
        hops = "one_hop" if len(self.relations) == 1 else "two_hop"
        return QAExample(
            id=f"{self.subject}|{'|'.join(self.relations)}",
            question=self.text,
            golden_answers=(self.objects[-1],),
            source=f"miniature-{world_seed}",
            subset=("new" if self.new else "known") + f"/{hops}",
            support=tuple(
                text
                for subject, relation, object_ in zip((self.subject, *self.objects), self.relations, self.objects, strict=False)
                for text in sentences(subject, relation, object_)
            ),
        )


@dataclass(frozen=True)
class World:
    """`facts[subject, relation]` is the object. Entities in `new` appear nowhere but in the search corpus."""

    seed: int
    kind: dict[str, str]
    facts: dict[tuple[str, str], str]
    new: frozenset[str] = frozenset()
    entities: dict[str, list[str]] = field(default_factory=dict)

    def known_facts(self) -> list[tuple[str, str, str]]:
        """Facts without any new entity: what pre-training and the simulator may see."""
        return [(s, r, o) for (s, r), o in self.facts.items() if s not in self.new and o not in self.new]

    def corpus(self) -> list[str]:
        """The documents of the real search engine: one wording of each fact, both of 30 % of them."""
        rng = stream("miniature", self.seed, "corpus")
        texts: list[str] = []
        for (subject, relation), object_ in self.facts.items():
            wordings = sentences(subject, relation, object_)
            texts += wordings if rng.random() < 0.3 else [rng.choice(wordings)]
        return texts

    def questions(self) -> dict[str, list[Question]]:
        """Splits: train, validation, and test (questions never trained on, about known and about new entities)."""
        paths: list[tuple[str, tuple[str, ...]]] = [(subject, (relation,)) for subject, relation in self.facts]
        paths += [(s, chain) for s, kind in self.kind.items() for chain in CHAINS if RELATIONS[chain[0]][0] == kind]
        known: list[Question] = []
        new: list[Question] = []
        for number, (subject, relations) in enumerate(paths):
            objects, at = [], subject
            for relation in relations:
                at = self.facts[at, relation]
                objects.append(at)
            if at == subject:
                continue
            text = question_text(subject, relations, number % len(QUESTION_OPENINGS))
            question = Question(subject, relations, tuple(objects), text, subject in self.new)
            (new if question.new else known).append(question)
        stream("miniature", self.seed, "splits").shuffle(known)
        stream("miniature", self.seed, "splits", "new").shuffle(new)
        train, validation = int(0.76 * len(known)), int(0.8 * len(known))
        return {"train": known[:train], "validation": known[train:validation], "test": known[validation:] + new}


def _invent_facts(entities: dict[str, list[str]], new: set[str], rng: random.Random) -> dict[tuple[str, str], str]:
    facts: dict[tuple[str, str], str] = {}
    for kind, members in entities.items():
        for subject in members:
            for relation in RELATIONS_OF.get(kind, []):
                if (subject, relation) in facts:
                    continue
                # No known entity points to a new one, or the simulator would learn its name.
                choices = [o for o in entities[RELATIONS[relation][1]] if o != subject and (subject in new or o not in new)]
                if relation == "spouse":
                    free = [o for o in choices if (o, "spouse") not in facts and (o in new) == (subject in new)]
                    choices = free or choices
                object_ = facts[subject, relation] = rng.choice(choices)
                if relation == "spouse" and (object_ in new) == (subject in new):
                    facts.setdefault((object_, "spouse"), subject)
    return facts


@cache
def make_world(seed: int = 0) -> World:
    """The world of this seed."""
    rng = stream("miniature", seed, "world")
    entities: dict[str, list[str]] = {}
    taken, new, kinds = set[str](), set[str](), dict[str, str]()
    for kind, count in SIZES.items():
        members: list[str] = []
        while len(members) < count:
            name = names().draw(kind, rng, taken)
            taken.add(name)
            members.append(name)
        entities[kind] = members
        kinds |= dict.fromkeys(members, kind)
        if kind in ("person", "book", "company"):
            new |= set(members[round(count * (1 - NEW_SHARE)) :])
    return World(seed, kinds, _invent_facts(entities, new, rng), frozenset(new), entities)
