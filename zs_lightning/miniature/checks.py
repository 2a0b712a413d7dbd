"""What is true of texts about a world: exact, where for other corpora one can only guess."""

import re
from collections.abc import Sequence
from functools import cached_property

from zs_lightning.miniature.world import RELATIONS, SYNONYMS, make_world, sentences

_ASKED = re.compile(r"(the )?(\w+) of (.+)")
_YEAR = re.compile(r"\W*(?:in )?(?:1\d|20)\d\d\b", re.IGNORECASE)
_RELATIONS = {word: relation for relation in RELATIONS for word in (relation, SYNONYMS[relation])}


class Truth:
    """The facts of one world, those of new entities included."""

    def __init__(self, world_seed: int) -> None:
        self.world = make_world(world_seed)

    @cached_property
    def statements(self) -> set[str]:
        """Every true sentence, in both wordings."""
        found: set[str] = set()
        for (subject, relation), object_ in self.world.facts.items():
            found |= set(sentences(subject, relation, object_))
        return found

    def holds(self, sentence: str) -> bool:
        return sentence in self.statements

    def asked(self, query: str) -> tuple[str, str] | None:
        """Subject and relation that a query asks for, if it asks for one fact."""
        match = _ASKED.fullmatch(query.strip())
        fact = (match[3], _RELATIONS.get(match[2], "")) if match else ("", "")
        return fact if fact in self.world.facts else None

    def reworded(self, query: str) -> str | None:
        """The query with the other word for its relation; None if it asks for no fact."""
        asked = self.asked(query)
        if asked is None:
            return None
        subject, relation = asked
        word = SYNONYMS[relation] if f"{relation} of" in query else relation
        return f"{word} of {subject}"

    def kinds(self, query: str, texts: Sequence[str]) -> set[str]:
        """The kinds of documents that these are, by what they state of the asked fact; none for a
        query that asks for no fact."""
        asked = self.asked(query)
        if asked is None:
            return set()
        if not texts:
            return {"empty"}
        subject, relation = asked
        stated = [(text, self._stated(text, subject, relation)) for text in texts]
        right = any(self.world.facts[asked] in objects for _, objects in stated)
        wrong = [text for text, objects in stated if objects]
        found = {"useful"} if right else {"noisy"}
        if not any(re.search(rf"\b{re.escape(subject)}\b", text) for text in texts):
            found.add("off_topic")
        elif not right and not wrong:
            found.add("partial")
        if wrong and not right:
            found.add("contradicting")
            if all(map(_YEAR.match, wrong)):
                found.add("outdated")
        return found

    def _stated(self, text: str, subject: str, relation: str) -> list[str]:
        """The objects that a text gives the subject."""
        name, words = re.escape(subject), f"(?:{relation}|{SYNONYMS[relation]})"
        found = re.findall(rf"\b{name} {words} ([^.]+)\.", text)
        if relation == "spouse":
            # Said of either.
            found += re.findall(rf"(\w+ \w+) {words} {name}\.", text)
        return found


def truth_of(sources: Sequence[str]) -> Truth | None:
    """The truth of the world that all these data sets are about; None for other data."""
    seeds = {match[1] if (match := re.fullmatch(r"miniature-(\d+)", name)) else "" for name in sources}
    return Truth(int(seeds.pop())) if len(seeds) == 1 and "" not in seeds else None
