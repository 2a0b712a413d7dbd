"""What a policy begins with: trajectories made by rule, or rollouts of any model that went well."""

import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zs_lightning.errors import UserError, check_shares
from zs_lightning.modules.validation import check_real
from zs_lightning.rollout import RolloutSpec
from zs_lightning.rollout.script import Demonstration
from zs_lightning.search import SearchEngine
from zs_lightning.search.base import answered
from zs_lightning.search.guard import content, named
from zs_lightning.streams import derive_seed, stream
from zs_lightning.text.answers import cover_match, fold_answer, telling
from zs_lightning.text.prompts import fill
from zs_lightning.text.protocol import disarm, document_lines
from zs_lightning.types import Document, QAExample, SearchRequest

SEARCH = "<think> {thought} </think>\n<search> {query} </search>"
ANSWER = "<think> {thought} </think>\n<answer> {answer} </answer>"
FIRST = (
    "I need to find out: {question} Let me search for it.",
    "I am not certain, so I look up {query}.",
    "What I have to know is about {query}. I search for that.",
)
AGAIN = (
    "The results do not say it. I try other words: {query}.",
    "None of these documents answers the question. I search for {query} alone.",
)
LAST = (
    "The information says that the answer is {answer}.",
    "Now I know it: {answer}.",
    "According to the results, it is {answer}.",
)
"""Thoughts of a rule, of which each question draws its own."""
MARKS = "?!.,:;\"'()“”‘’"
"""What is no part of the word that it stands beside."""


Made = tuple[list[Demonstration], Counter[str]]
"""Demonstrations, and how often there was none, by reason."""


class Demonstrations(ABC):
    """A source of trajectories, as text, that a policy learns from."""

    least_f1: float = 1.0
    """F1 of an answer from which on it is right."""

    def setup(self) -> None:  # noqa: B027 - optional
        """Loads what is needed, before weights are. Raises UserError if it cannot."""

    @abstractmethod
    def of(self, examples: Sequence[QAExample], spec: RolloutSpec) -> Made:
        """What there is for these questions, which will be played as rollouts within the limits of
        the spec."""


class RuleDemonstrations(Demonstrations):
    """Searches for each question by rule, and answers it where a golden answer was found.

    The first query is the question's words of content. Where what it finds holds no golden answer,
    the second is the question's names alone. A question without a find, one that is answered by yes
    or no, and one that holds its own answer are left out; so are those that need a fact to ask for
    the next one, of which a rule knows nothing.

    Args:
        search: an engine that finds what the questions ask for, such as BM25Search over a corpus.
    """

    def __init__(self, search: SearchEngine) -> None:
        check_real(search, "model.demonstrations.search")
        self.search = search

    def setup(self) -> None:
        self.search.setup()

    def of(self, examples: Sequence[QAExample], spec: RolloutSpec) -> Made:
        reasons: Counter[str] = Counter()
        # A golden answer stands by chance in what is found for these.
        left: list[QAExample] = []
        for example in examples:
            golds = telling(example.golden_answers)
            if not golds:
                reasons["of the questions are answered by yes or no"] += 1
            elif cover_match(example.question, golds):
                reasons["of the questions hold their answer"] += 1
            else:
                left.append(example)
        made: dict[str, Demonstration] = {}
        found: dict[str, list[tuple[Document, ...]]] = {example.key: [] for example in left}
        asked: dict[str, list[str]] = {example.key: [] for example in left}
        # The environment's own search of retrieve_first, then those of the policy.
        for number in range(0 if spec.retrieve_first else 1, min(2, spec.max_turns) + 1):
            queries = {e.key: queries_of(e.question)[number] for e in left}
            # The same words again would find the same again.
            new = [e for e in left if queries[e.key] not in asked[e.key]]
            results = self._search(new, queries, number)
            for example in new:
                key = example.key
                found[key].append(results[key])
                asked[key] += [queries[key]] if number else []
                if gold := held(example, results[key]):
                    turns = _turns(example, asked[key], gold)
                    made[key] = Demonstration(example, turns, tuple(found[key]), gold)
            left = [example for example in left if example.key not in made]
        reasons["of the questions have no golden answer in what is found"] += len(left)
        return list(made.values()), +reasons

    def _search(
        self, examples: Sequence[QAExample], queries: Mapping[str, str], number: int
    ) -> dict[str, tuple[Document, ...]]:
        """The documents for each question's query, none where the engine failed."""
        requests = []
        for example in examples:
            seed = derive_seed("demonstration", example.key, number)
            query = queries[example.key]
            request = SearchRequest(key=example.key, query=query, example=example, turn=number, seed=seed)
            requests.append(request)
        return {key: result.documents for key, result in answered(self.search, requests).items()}


def queries_of(question: str) -> tuple[str, str, str]:
    """The question, its words of content, and its names, in their order."""
    # A tag in a question would end a turn.
    words = [word.strip(MARKS) for word in disarm(question).split()]
    names = named([question])
    first = " ".join(word for word in words if content(word)) or question
    return question, first, " ".join(word for word in words if content(word) & names) or first


def held(example: QAExample, documents: Sequence[Document]) -> str:
    """The first golden answer that one of the documents holds; empty if none does."""
    lines = document_lines(documents)
    for gold in telling(example.golden_answers):
        if any(cover_match(line, [gold]) for line in lines):
            return gold
    return ""


def _turns(example: QAExample, queries: Sequence[str], answer: str) -> tuple[str, ...]:
    """What the policy writes: a search for each query, then the answer."""
    # By the question, so that a run that goes on learns the same words.
    draw = stream("demonstration", example.key)
    turns = []
    fields = {"question": disarm(example.question), "answer": disarm(answer)}
    for number, query in enumerate(queries):
        thought = fill(draw.choice(AGAIN if number else FIRST), **fields, query=query)
        turns.append(fill(SEARCH, thought=thought, query=query))
    thought = fill(draw.choice(LAST), **fields)
    return (*turns, fill(ANSWER, thought=thought, **fields))


class FileDemonstrations(Demonstrations):
    """Rollouts that went well: of this policy or another model, under whatever prompt.

    Only what was written and found is taken: the policy learns it after its own prompt, in its own
    tokens.

    Args:
        path: trajectories/*.jsonl of a run folder, or lines of one's own such as {"question": "…",
            "turns": [{"text": "…", "documents": [{"title": "…", "text": "…"}]}, …]}.
        least_f1: F1 of an answer, against the golden answers of the run's own questions, from which
            on a rollout is learnt.
    """

    def __init__(self, path: str, least_f1: float = 0.8) -> None:
        check_shares("model.demonstrations", least_f1=least_f1)
        self.path = Path(os.path.expanduser(path))
        self.least_f1 = least_f1

    def setup(self) -> None:
        if not self.path.is_file():
            made = "a `fit` or `test` writes trajectories/*.jsonl into its run folder"
            raise UserError(f"model.demonstrations.path: there is no file {self.path}; {made}")

    def of(self, examples: Sequence[QAExample], spec: RolloutSpec) -> Made:
        # By the question: ids hang on what a file of questions is called.
        known = {_spelling(example.question): example for example in examples}
        missing, reasons = set(known), Counter[str]()
        # A greedy and a sampled rollout may be the same.
        made: dict[Demonstration, None] = {}
        for question, turns, found in self._lines():
            if (example := known.get(_spelling(question))) is None:
                continue
            missing.discard(_spelling(question))
            written = tuple(filter(None, turns))
            if spec.retrieve_first != (len(written) < len(turns)):
                reasons["were made with another rollout.retrieve_first"] += 1
            else:
                made[Demonstration(example, written, found)] = None
        reasons["of the questions are not in the file"] += len(missing)
        return list(made), +reasons

    def _lines(self) -> Iterator[tuple[str, list[str], tuple[tuple[Document, ...], ...]]]:
        """Question, turns and what each of them found. Raises UserError for a line without."""
        # Half a character is no reason to lose a file.
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    turns = [_text(turn["text"]) for turn in row["turns"]]
                    found = [turn.get("documents", ()) for turn in row["turns"]]
                    documents = tuple(tuple(map(_document, each)) for each in found)
                    yield _text(row["question"]), turns, documents
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                    expected = """expected {"question": "…", "turns": [{"text": "…", "documents": […]}]}"""
                    what = f"is no trajectory ({type(error).__name__}: {error}); {expected}"
                    place = f"line {number} of {self.path}"
                    raise UserError(f"model.demonstrations.path: {place} {what}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:60]} is no text")
    return value


def _document(value: Any) -> Document:
    """A document from an object with text and title, or from a text."""
    if isinstance(value, str):
        return Document(text=value)
    return Document(text=_text(value["text"]), title=_text(value.get("title") or ""))


def _spelling(question: str) -> str:
    return fold_answer(question) or question
