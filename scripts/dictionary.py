"""Makes a corpus, and questions that it answers, from a dictionary of computing: real text without a hub.

    apt-get download dict-foldoc && dpkg-deb -x dict-foldoc_*.deb foldoc     # Debian or Ubuntu; nothing is installed
    python scripts/dictionary.py foldoc/usr/share/dictd data/dictionary

Reads NAME.index and NAME.dict.dz of the folder and writes corpus.jsonl ({id, title, text}, for `BM25Search` with `corpus`)
and questions.jsonl ({id, question, golden_answers, title}, for `FileSource`). An id begins with the kind of question. The
rules that make questions know the style of FOLDOC, in which a definition opens with what the thing is and who made it when.
"""

from __future__ import annotations

import argparse
import gzip
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

from zs_lightning.runs.checkpoints import json_lines
from zs_lightning.search.corpus import WORDS
from zs_lightning.streams import drawn
from zs_lightning.text.answers import cover_match, normalize_answer

DIGITS = ascii_uppercase + ascii_lowercase + digits + "+/"
MOST = 500
"""Questions of one kind."""
AGAIN = 3
"""Questions of two steps with the same answer."""
SMALL = {"a", "an", "and", "by", "de", "for", "in", "of", "on", "or", "the", "to", "with"}

_WORD = r"(?:(?:[A-Z]\.)+(?= ?[A-Z])|[A-Z](?:[\w+*/&-]|'(?!s\b))*)"
_NAME = rf"{_WORD}(?: (?:de |van |von |del )?{_WORD}|(?<=University|.Institute|Laboratory) of {_WORD})*"
_NAMES = rf"{_NAME}(?:, {_NAME})*(?:,? (?:and|&) {_NAME})?"
# After a name there must be nothing that it could be a part of ("developed by Ada users").
_AFTER = "in|at|of|for|to|as|from|on|with|during|which|that|while|around|circa|since|used|using|and"
_END = rf"(?!(?<=\b\w)\. [A-Z])(?=[,.;:()\[]|$| (?:{_AFTER})\b)"
_MADE = "developed|designed|written|created|invented|produced|implemented|founded|introduced|released|published|proposed"
# What is made must be the thing that is defined, not another that its definition names.
_OPENING = r"^(?:(?!\b(?:to|that|which|where|when|by|using|with|from|on)\b)[^;:()])*?"
_THING = _OPENING + r"(?:.*?, )?(?:\w+ )?"
_BEFORE = r"(?:the |Dr\.? |Prof\.? |CEO )*"
_BY = rf"by {_BEFORE}({_NAMES}){_END}"
_IN = rf"(?:by {_BEFORE}{_NAMES} )?(?:at {_NAME} )?in (?:[A-Z]\w+ )?((?:19|20)\d\d)\b"
_PART = "dialect|subset|superset|variant|descendant|clone|implementation|version"
_KIN = rf"(?:{_PART}) of|(?:successor|predecessor|extension) (?:to|of)"
_DEFINED = r"(?:^[^.]*|\. (?:(?:It|\w+) is )?)\b(?:[Dd]efined|described|specified) (?:in|by)"

MADE = {
    "maker": rf"{_THING}\b({_MADE})(?: in \d{{4}})? {_BY}",
    "year": rf"{_THING}\b({_MADE}) {_IN}",
    "origin": rf"{_OPENING}(?<!ed|ng|ff|te)(?<!descendant) from (?:the )?()({_NAME}){_END}(?! to\b)",
    "kin": rf"^(?:An?|The)(?: [\w-]+){{0,4}}? ({_KIN}) (?:the )?({_NAME}){_END}",
    "base": rf"{_THING}\bbased on (?:the )?()({_NAME}){_END}",
    "language": rf"\b(?:written|implemented) in ()({_NAME}){_END}",
    "rfc": rf"{_DEFINED} (?:STD \d+, )?()(RFC \d+)",
    "country": r"country code for (?:the )?()([A-Z][\w' -]+)",
}
"""What a definition says that a question can be made of: a word for the question, and the answer."""
ASKED = {
    "maker": "Who {past} {it}?",
    "year": "In which year was {it} {word}?",
    "origin": "From which company, institution or country is {it}?",
    "kin": "What is {it} {article} {word}?",
    "base": "On what is {it} based?",
    "language": "In which language is {it} written?",
    "rfc": "Which RFC defines {it}?",
    "country": "Which country has the country code {it}?",
}
CALLED = {
    "maker": "the maker of {it}",
    "origin": "the company or institution that {it} is from",
    "kin": "the language or system that {it} is {article} {word}",
    "base": "the language or system that {it} is based on",
    "language": "the language in which {it} is written",
}
"""How the answer is called in a question about it, which has two steps then."""


@dataclass(frozen=True)
class Entry:
    """One entry: the word, its other spellings, its topic, its text, and the first sentence of that."""

    title: str
    aliases: list[str]
    topic: str
    text: str
    definition: str

    @property
    def it(self) -> str:
        """The word in a sentence."""
        return f'"{self.title}"' if self.title.split()[0].islower() else self.title


@dataclass(frozen=True)
class Question:
    """A question and the entry that answers it.

    `again` is the question with {it} for its subject, and `called` is what its answer is called, to ask on about that.
    """

    kind: str
    entry: Entry
    text: str
    answers: list[str]
    subject: str = ""
    again: str = ""
    called: str = ""


def read_entries(folder: Path) -> Iterator[str]:
    """The text of every entry of a folder's dictionaries, in their order; spellings of one are one."""
    for index in sorted(folder.glob("*.index")):
        text = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
        places = set()
        for line in index.read_text().splitlines():
            word, start, length = line.split("\t")[:3]
            # What a dictionary says about itself is no entry.
            if not word.startswith(("00-database", "00database")):
                places.add((number(start), number(length)))
        for start, length in sorted(places):
            yield text[start : start + length].decode(errors="replace")


def number(written: str) -> int:
    """A number as an index writes it, in digits of base 64."""
    value = 0
    for digit in written:
        value = 64 * value + DIGITS.index(digit)
    return value


def parse(raw: str) -> Entry | None:
    """An entry: lines of words, then the indented text; None without a text."""
    heads, _, body = raw.strip().partition("\n ")
    title, *aliases = [line.strip() for line in heads.splitlines() if line.strip()] or [""]
    topic = re.match(r"\s*(?:1\. )?<([^<>]+)>", body)
    plain = re.sub(r"((?:^|\s)(?:\d\. )?)<[\w ,/-]+>", r"\1", re.sub(r"[{}]", "", body))
    plain = re.sub(r"\s*\(\d{4}-\d\d-\d\d\)\s*$", "", plain)
    first = " ".join(re.split(r"\n\s*\n", plain.strip())[0].split())
    # Before the definition: the number of the sense, its sound, its abbreviation.
    first = re.sub(r"^(?:1\. )?(?:/[^/]+/ )?(?:\([^()]*\) )?", "", first)
    definition = re.split(r'(?<=[\w)"]{2}\.)(?<!Mr\.)(?<!Dr\.)(?<!St\.) (?=[A-Z"(\[]|\d{4}\b)', first)[0]
    text = " ".join(plain.split())
    return Entry(title, aliases, topic[1] if topic else "", text, definition) if title and text else None


def passages(entry: Entry) -> list[str]:
    """The text, shared out over pieces of about as many words as those of other corpora."""
    words = entry.text.split()
    count = max(1, round(len(words) / WORDS))
    return [" ".join(words[i * len(words) // count : (i + 1) * len(words) // count]) for i in range(count)]


def abbreviates(short: str, long: str) -> bool:
    """Whether the letters are the initials of the words, or their capitals (COMmon ALgorithm)."""
    words = re.findall(r"\w+", long)
    letters = short.lower()
    initials = "".join(word[0] for word in words).lower()
    large = "".join(word[0] for word in words if word.lower() not in SMALL).lower()
    capitals = "".join(c for c in long if c.isupper()).lower()
    return len(words) > 1 and len(letters) > 1 and letters in (initials, large, capitals)


def expansions(entries: Iterable[Entry]) -> Iterator[Question]:
    """What abbreviations stand for; one that stands for two things has two answers."""
    found: dict[str, list[tuple[str, Entry]]] = defaultdict(list)
    for entry in entries:
        opening = re.match(r"\(([\w/-]+)", entry.text)
        for short in {*entry.aliases, opening[1] if opening else ""}:
            if abbreviates(short, entry.title) and short in entry.text:
                found[short].append((entry.title, entry))
        spelt = entry.definition.rstrip(".")
        if abbreviates(entry.title, spelt):
            found[entry.title].append((spelt, entry))
    for short, pairs in found.items():
        answers = {normalize_answer(answer): answer for answer, _ in pairs}
        if len(answers) <= 2:
            text, again = (f"What is {what} short for?" for what in (short, "the name of {it}"))
            yield Question("expansion", pairs[0][1], text, list(answers.values()), short, again)


def by_rule(entry: Entry) -> Iterator[Question]:
    """The questions that the rules make from an entry."""
    for kind, pattern in MADE.items():
        match = re.search(pattern, entry.text if kind == "rfc" else entry.definition)
        if match:
            words = {"word": match[1], "past": "wrote" if match[1] == "written" else match[1]}
            words["article"] = "an" if match[1][:1] in "aeiou" else "a"
            text = ASKED[kind].format(it=entry.it, **words)
            again = ASKED[kind].format(it="{it}", **words)
            called = CALLED.get(kind, "").format(it=entry.it, **words)
            yield Question(kind, entry, text, [match[2].strip()], entry.title, again, called)


def term(entry: Entry) -> Iterator[Question]:
    """The word from its definition, if that is long enough to know it by and does not hold it."""
    said = entry.definition.rstrip(".")
    own = {word for word in normalize_answer(entry.title).split() if len(word) > 2}
    if (
        re.match(r"(?:An?|The|Any|One) ", said)
        and 8 <= len(said.split()) <= 30
        and not own & set(normalize_answer(said).split())
        and not re.search(r"[\[\]:<>]", said)
    ):
        kind = entry.topic if entry.topic in ("language", "company", "person", "protocol") else "term"
        yield Question("term", entry, f'Which {kind} is meant: "{said}"?', [entry.title, *entry.aliases])


def two_steps(questions: list[Question]) -> Iterator[Question]:
    """Questions about the answer of another: "In which year was the language in which X is written released?"."""
    about: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        # A thing of which a thing of which …: correct, and nobody would ask it.
        if question.again and question.kind != "kin":
            for name in {question.subject, question.entry.title, *question.entry.aliases}:
                about[name].append(question)
    often: Counter[str] = Counter()
    for first in questions:
        for second in about[first.answers[0]] if first.called else []:
            # Companies are founded, and what they make is not.
            fits = first.kind not in ("maker", "origin") or re.search("founded|created|short for", second.text)
            often[second.answers[0]] += bool(fits)
            if fits and often[second.answers[0]] <= AGAIN:
                yield Question("two_steps", second.entry, second.again.format(it=first.called), second.answers)


def answered(question: Question) -> bool:
    """Whether a passage of the entry has an answer, in so many words, and the question has none."""
    if cover_match(question.text, question.answers):
        return False
    title = question.entry.title
    return any(cover_match(f"{title} {text}", question.answers) for text in passages(question.entry))


def make_questions(entries: list[Entry]) -> list[Question]:
    """All questions, at most `MOST` of a kind, each text once."""
    made = list(expansions(entries))
    for entry in entries:
        made += [*by_rule(entry), *term(entry)]
    made += list(two_steps(made))
    often = Counter(question.text for question in made)
    kinds: dict[str, list[Question]] = defaultdict(list)
    for question in made:
        if often[question.text] == 1 and answered(question):
            kinds[question.kind].append(question)
    kept = []
    for same in kinds.values():
        kept += [same[i] for i in drawn([question.text for question in same], MOST)]
    return kept


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with NAME.index and NAME.dict.dz")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args(words)
    entries = [entry for raw in read_entries(arguments.folder) if (entry := parse(raw))]
    if not entries:
        parser.error(f"expected a folder with NAME.index and NAME.dict.dz; got {arguments.folder}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, entry in enumerate(entries):
        rows += [{"id": f"{i}#{j}", "title": entry.title, "text": text} for j, text in enumerate(passages(entry))]
    write(arguments.out / "corpus.jsonl", rows)
    questions = make_questions(entries)
    rows = []
    for i, q in enumerate(questions):
        rows.append({"id": f"{q.kind}-{i}", "question": q.text, "golden_answers": q.answers, "title": q.entry.title})
    write(arguments.out / "questions.jsonl", rows)
    print(dict(Counter(question.kind for question in questions)))


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """One JSON object a line."""
    path.write_text(json_lines(rows))
    print(f"{path}: {len(rows)} lines")


if __name__ == "__main__":
    main()
