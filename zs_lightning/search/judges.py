"""Whether what a search found is useful: a judge that goes by words, one that asks a language
model, and how far two judges agree."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from zs_lightning.search.base import beginning
from zs_lightning.search.guard import content, holds_answer, named
from zs_lightning.search.writing import ModelWriter
from zs_lightning.text.answers import cover_match, telling
from zs_lightning.text.prompts import NOISY, USEFUL
from zs_lightning.text.protocol import document_lines
from zs_lightning.types import Document, QAExample

JUDGE = (
    "Judge the results of a web search that was made on the way to the answer of a question.\n\n"
    "Question: {question}\nCorrect answer: {answer}\nQuery: {query}\nResults:\n{documents}\n"
    "The results are useful if one of them says what the query asks for and this helps to find the "
    "correct answer. Otherwise they are noisy. Reply with one word, useful or noisy.\nVerdict:"
)
VERDICT_TOKENS = 12
"""Most tokens of a model's verdict."""


@dataclass(frozen=True)
class Case:
    """One search of a trajectory and what it found."""

    example: QAExample
    query: str
    documents: tuple[Document, ...]
    shown: tuple[Document, ...] = ()
    """What earlier searches of the trajectory found."""


@dataclass(frozen=True)
class Verdict:
    """Whether the documents are useful, and the texts of which useful ones hold at least one."""

    useful: bool
    evidence: tuple[str, ...] = ()


def about(document: Document, names: set[str]) -> bool:
    """Whether a document has more than half of the names: some are shared by many things."""
    return 2 * len(names & content(f"{document.title} {document.text}")) > len(names)


def by_rule(case: Case) -> Verdict:
    """The verdict of the words alone.

    With supporting texts, the documents are useful if one of them states what a support adds to the
    words of the query. Without any, one of them has to hold a golden answer and to be about what
    the query names, which has to do with the question or with what was found before. So a first hop
    that finds no answer is noisy to it, and whatever is found where the answer is yes or no: only a
    model can tell.
    """
    if holds_answer(case.query, case.example):
        return Verdict(False)
    return _by_support(case) if case.example.support else _by_answer(case)


def _by_support(case: Case) -> Verdict:
    asked = content(case.query)
    support = case.example.support
    names = asked & named([case.example.question]).union(*(named([text]) for text in support))
    about_what = named([case.query])
    if 2 * len(names & about_what) <= len(about_what):
        return Verdict(False)
    stated: list[str] = []
    wanted: list[str] = []
    for text in support:
        words = content(text)
        # It has the subject and, if the query asks for something of it, a word of that.
        if names <= words and (asked == names or (asked - names) & words):
            new = (words - asked) | names
            stated += [found.text for found in case.documents if new <= content(found.text)]
            wanted += [other for other in support if new <= content(other)]
    return Verdict(bool(stated), tuple(dict.fromkeys(stated + wanted)))


def _by_answer(case: Case) -> Verdict:
    example = case.example
    known = content(example.question) | named(f"{d.title} {d.text}" for d in case.shown)
    names = named([case.query])
    if not content(case.query) & known:
        return Verdict(False)
    texts = " ".join(f"{d.title} {d.text}" for d in case.documents if about(d, names))
    held = [gold for gold in telling(example.golden_answers) if cover_match(texts, [gold])]
    return Verdict(bool(held), tuple(held))


def read_verdict(text: str) -> bool | None:
    """Whether a model's words say useful; None if they say neither or both."""
    said = set(re.findall(r"\b(not useful|useful|noisy)\b", text.lower()))
    noisy = bool(said & {"not useful", NOISY})
    return None if noisy == (USEFUL in said) else not noisy


def judge_fields(case: Case) -> dict[str, str]:
    """The fields of JUDGE."""
    return {
        "question": case.example.question,
        "answer": ", ".join(case.example.golden_answers),
        "query": case.query,
        "documents": "\n".join(document_lines(case.documents)),
    }


class ModelJudge(ModelWriter):
    """A model in memory that judges; of documents that are too long it reads the beginning."""

    def verdicts(self, cases: Sequence[Case]) -> list[bool | None]:
        """Whether each one's documents are useful; None where the model said neither."""
        return list(map(read_verdict, self.texts(list(map(self._prompt, cases)), VERDICT_TOKENS)))

    def _prompt(self, case: Case) -> list[int]:
        fields = judge_fields(case)

        def ids_of(text: str) -> list[int]:
            return self.prompt(JUDGE, fields | {"documents": text})

        room = self.max_length - VERDICT_TOKENS
        return ids_of(beginning(fields["documents"], lambda text: len(ids_of(text)) <= room))[-room:]


def kappa(verdicts: Sequence[tuple[bool, bool]]) -> float | None:
    """Cohen's kappa of two judges: how much more often they agree than chance has it, 1 at most.

    None without verdicts, or where both judges say one thing only: chance then agrees always.
    """
    if not verdicts:
        return None
    count = len(verdicts)
    first = Counter(one for one, _ in verdicts)
    second = Counter(other for _, other in verdicts)
    agreed = sum(one == other for one, other in verdicts) / count
    chance = sum(first[said] * second[said] for said in (True, False)) / count**2
    return None if chance == 1 else (agreed - chance) / (1 - chance)
