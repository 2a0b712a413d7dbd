"""What is asked about: passages of a corpus, pairs that share a name, and their documents."""

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from zs_lightning.data.sources import SPLITS
from zs_lightning.search.base import beginning
from zs_lightning.search.corpus import TEXTS, Passage, read_passages
from zs_lightning.search.guard import named
from zs_lightning.streams import derive_seed, uniform
from zs_lightning.text.answers import fold_answer
from zs_lightning.text.protocol import sanitize

LEAST, MOST = 40, 3000
"""Characters of a passage: a shorter one says too little, of a longer one the beginning is read."""
RARE = 5
"""Most passages that have a name which makes pairs of them: one of everywhere tells nothing."""

_FILE = re.compile(rf"(.+(?:{'|'.join(map(re.escape, TEXTS))}))#\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Task:
    """One passage, or two that share a name, about which a model is to write."""

    passages: tuple[Passage, ...]
    part: str
    name: str = ""


def document_of(passage: Passage) -> str:
    """What a passage is cut out of: its file or, in a jsonl, its title."""
    found = _FILE.fullmatch(passage.id)
    return found[1] if found else passage.title or passage.id


def chosen(corpus: str, most: int, seed: int, counts: Counter[str]) -> list[Passage]:
    """Up to `most` passages, drawn, in the order of the draw; `counts` has what was passed over.
    All are sanitised: nothing in them can be taken for a tag."""
    skipped: Counter[str] = Counter()

    def usable() -> Iterator[Passage]:
        seen: set[int] = set()
        for passage in read_passages(corpus, skipped, "corpus"):
            text = sanitize(passage.text)
            counts["passages: cut at their beginning"] += len(text) > MOST
            text = beginning(text, lambda part: len(part) <= MOST)
            folded = derive_seed(fold_answer(text))
            if sum(map(str.isalnum, text)) < LEAST:
                counts["passages: too short to ask about"] += 1
            elif folded in seen:
                counts["passages: repeat another"] += 1
            else:
                seen.add(folded)
                yield Passage(id=passage.id, text=text, title=sanitize(passage.title))

    # Not more in memory than are asked about: a corpus may have millions.
    def place(passage: Passage) -> tuple[float, str]:
        # By its own name: files that come or go move no other passage.
        return uniform(seed, "passage", passage.id), passage.id

    drawn = heapq.nsmallest(most, usable(), key=place)
    for reason, count in skipped.items():
        counts[f"documents: {reason}"] = count
    return drawn


def parts_of(documents: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """The part of each document. Few documents are parted as well as they can be."""
    ordered = sorted(dict.fromkeys(documents), key=lambda name: (uniform(seed, "part", name), name))
    parts: dict[str, str] = {}
    # By rank and not by a threshold: of three documents all could fall to the test.
    total = sum(shares.values())
    held = {split: round(len(ordered) * shares.get(split, 0) / total) for split in SPLITS[1:]}
    for split, count in held.items():
        for name in ordered[len(parts) : len(parts) + count]:
            parts[name] = split
    return parts | {name: "train" for name in ordered if name not in parts}


def pairs_of(passages: Sequence[Passage], parts: Mapping[str, str], most: int, counts: Counter[str]) -> list[Task]:
    """Up to `most` pairs of passages of two documents that share a rare name, best first: the title
    of one of them in the other, then the rarest. No passage is in two pairs.

    Documents of different parts make no pair, or what is trained on would be known from a test.
    """
    of_name: dict[str, list[int]] = defaultdict(list)
    for number, passage in enumerate(passages):
        for name in sorted(named([passage.text]) | named([passage.title])):
            # Initials and years are shared by what has nothing else in common.
            if len(name) > 2 and not name.isdigit():
                of_name[name].append(number)
    found: list[tuple[bool, int, int, int, str]] = []
    for name, numbers in of_name.items():
        if 2 <= len(numbers) <= RARE:
            for place, first in enumerate(numbers):
                for second in numbers[place + 1 :]:
                    # What a passage is about is what another one can lead to.
                    titles = [passages[first].title, passages[second].title]
                    titled = any(name in named([title]) for title in titles)
                    found.append((not titled, len(numbers), first, second, name))
    taken: set[int] = set()
    tasks: list[Task] = []
    apart: set[tuple[int, int]] = set()
    for _, _, first, second, name in sorted(found):
        pair = (passages[first], passages[second])
        one, other = map(document_of, pair)
        # Two passages of one document are read together anyway.
        if one == other or {first, second} & taken:
            continue
        if parts[one] != parts[other]:
            apart.add((first, second))
        elif len(tasks) < most:
            taken |= {first, second}
            tasks.append(Task(pair, parts[one], spelt(name, pair)))
    counts["pairs: their documents are in different parts"] = len(apart)
    return tasks


def spelt(name: str, passages: Sequence[Passage]) -> str:
    """The folded name as a passage spells it."""
    words = re.findall(r"\w+", " ".join(f"{passage.title} {passage.text}" for passage in passages))
    return next((word for word in words if fold_answer(word) == name), name)
