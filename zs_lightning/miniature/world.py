"""A procedurally generated world: entities, facts, the sentences that state them, questions.

Everything is a function of the world's seed. The words that names are made of are the same in every
world (they are the language of the miniature); which names exist and what is true of them differs.
"""

import random
from collections.abc import Set
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
# Pairs of relations that a question can ask for in turn. The spouse of a spouse is the subject.
CHAINS = [
    (first, second)
    for first, (_, middle) in RELATIONS.items()
    for second, (subject, _) in RELATIONS.items()
    if middle == subject and (first, second) not in (("spouse", "spouse"), ("spouse", "mayor"))
]
SIZES = {"person": 150, "book": 100, "company": 60, "city": 40, "country": 12}
# Share of persons, books and companies that only the search corpus knows: no question of training,
# no simulator document and no pre-training text names them.
NEW_SHARE = 0.15
QUESTION_OPENINGS = ("What is", "Name", "Tell me")
QUERY_FORMS = ("{relation} of {subject}", "the {relation} of {subject}")

ADJECTIVES = (
    "Red Quiet Broken Golden Last Hidden Cold Silver Empty Burning Distant Hollow Bright Secret "
    "Frozen Lost Wild Narrow Sleeping Iron Paper Green Second Bitter"
).split()
NOUNS = (
    "Harbor Garden River Tower Letter Winter Mirror Bridge Forest Crown Window Island Clock Valley "
    "Song Lantern Road Sparrow Door Engine Feather Ocean Orchard Stone"
).split()
TRADES = ["Works", "Labs", "Press", "Mills", "Group", "Foods"]


def _invent_words(rng: random.Random, count: int, syllables: int, taken: set[str]) -> list[str]:
    words: list[str] = []
    while len(words) < count:
        parts = [rng.choice("bdfgklmnprstvzjh") + rng.choice("aeiou") for _ in range(syllables)]
        word = "".join(parts) + rng.choice(["", *"nrlskt"])
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

    def draw(self, kind: str, rng: random.Random, avoid: Set[str] = frozenset()) -> str:
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
    rng = stream("miniature", "names")
    taken: set[str] = set()
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
        support: list[str] = []
        subject = self.subject
        for relation, object_ in zip(self.relations, self.objects, strict=True):
            support += sentences(subject, relation, object_)
            subject = object_
        return QAExample(
            id=f"{self.subject}|{'|'.join(self.relations)}",
            question=self.text,
            golden_answers=(self.objects[-1],),
            source=f"miniature-{world_seed}",
            subset=("new" if self.new else "known") + f"/{hops}",
            support=tuple(support),
        )


@dataclass(frozen=True, eq=False)
class World:
    """`facts[subject, relation]` is the object. The search corpus alone knows entities in `new`."""

    seed: int
    kind: dict[str, str]
    facts: dict[tuple[str, str], str]
    new: frozenset[str] = frozenset()
    entities: dict[str, list[str]] = field(default_factory=dict)

    def corpus(self) -> list[str]:
        """The documents of the real search engine: one wording of each fact, or both (30 %)."""
        rng = stream("miniature", self.seed, "corpus")
        texts: list[str] = []
        for (subject, relation), object_ in self.facts.items():
            wordings = sentences(subject, relation, object_)
            texts += wordings if rng.random() < 0.3 else [rng.choice(wordings)]
        return texts

    @cache  # noqa: B019 - make_world keeps all worlds anyway
    def questions(self) -> dict[str, list[Question]]:
        """The splits train, validation and test; test asks about known and about new entities."""
        paths: list[tuple[str, tuple[str, ...]]] = []
        paths += [(subject, (relation,)) for subject, relation in self.facts]
        for subject, kind in self.kind.items():
            paths += [(subject, chain) for chain in CHAINS if RELATIONS[chain[0]][0] == kind]
        known: list[Question] = []
        new: list[Question] = []
        for number, (subject, relations) in enumerate(paths):
            objects: list[str] = []
            for relation in relations:
                objects.append(self.facts[objects[-1] if objects else subject, relation])
            # The founder of the employer of somebody may be that person: no question.
            if objects[-1] == subject:
                continue
            text = question_text(subject, relations, number % len(QUESTION_OPENINGS))
            question = Question(subject, relations, tuple(objects), text, subject in self.new)
            (new if question.new else known).append(question)
        stream("miniature", self.seed, "splits").shuffle(known)
        stream("miniature", self.seed, "splits", "new").shuffle(new)
        train = int(0.76 * len(known))
        held = int(0.8 * len(known))
        return {"train": known[:train], "validation": known[train:held], "test": known[held:] + new}


Facts = dict[tuple[str, str], str]


def _invent_facts(entities: dict[str, list[str]], new: set[str], rng: random.Random) -> Facts:
    facts: Facts = {}
    for kind, members in entities.items():
        for subject in members:
            for relation in RELATIONS_OF.get(kind, []):
                if (subject, relation) in facts:
                    continue
                choices = [name for name in entities[RELATIONS[relation][1]] if name != subject]
                # No known entity points to a new one, or the simulator would learn its name.
                if subject not in new:
                    choices = [name for name in choices if name not in new]
                if relation == "spouse":
                    # Both ways where there is somebody left of the same kind.
                    alike = [name for name in choices if (name in new) == (subject in new)]
                    choices = [name for name in alike if (name, "spouse") not in facts] or choices
                object_ = rng.choice(choices)
                facts[subject, relation] = object_
                if relation == "spouse" and (object_ in new) == (subject in new):
                    facts.setdefault((object_, "spouse"), subject)
    return facts


@cache
def make_world(seed: int = 0) -> World:
    """The world of this seed."""
    rng = stream("miniature", seed, "world")
    entities: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    new: set[str] = set()
    taken: set[str] = set()
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
