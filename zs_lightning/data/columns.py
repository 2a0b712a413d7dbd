"""From the columns of a row to a question or a search record: which columns, and what may stand in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.text.answers import normalize_answer
from zs_lightning.text.protocol import sanitize, split_documents
from zs_lightning.types import Document, QAExample, SearchRecord

KNOWN = {
    "id": ("id",),
    "question": ("question",),
    "golden_answers": ("golden_answers", "answer", "reward_model.ground_truth.target"),
    "source": ("data_source",),
    "split": ("split", "extra_info.split"),
    "query": ("query",),
    "noisy": ("noisy", "label"),
    "documents": ("documents",),
    "evidence": ("evidence",),
}
"""Columns that are looked for, the first that holds something counts. A dot leads into an object of the column."""
NEEDED = {"questions": ("question", "golden_answers"), "records": ("question", "golden_answers", "query", "noisy", "documents")}
LONGEST, LONGEST_DOCUMENT, MOST_DOCUMENTS = 10_000, 100_000, 100
"""Characters of a question, answer or query, and of a document: longer ones are a mistake in the file."""
_ABSENT = object()
_LABELS = {"useful": False, "noisy": True, "false": False, "true": True}


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason."""


class Columns:
    """Where to find what in a row.

    Args:
        mapping: column of a thing, for those that have another name than KNOWN says.

    Raises:
        UserError: the mapping names a thing that is not in KNOWN.
    """

    def __init__(self, mapping: Mapping[str, str] | None) -> None:
        for thing in mapping or {}:
            if thing not in KNOWN:
                raise UserError(f"data.source.columns: there is nothing called {thing}; expected {', '.join(KNOWN)}")
        self.names = KNOWN | {thing: (column,) for thing, column in (mapping or {}).items()}
        self.mapped = set(mapping or {})

    def get(self, values: Mapping[str, Any], thing: str) -> Any:
        """None if no column holds something."""
        found = (_lookup(values, name) for name in self.names[thing])
        return next((value for value in found if value is not _ABSENT and not _is_nothing(value)), None)

    def check(self, rows: Sequence[Mapping[str, Any]], task: str, place: str) -> None:
        """
        Raises:
            UserError: something needed is in no row's columns, or a mapped column is in none; names what was found.
        """
        for thing in dict.fromkeys((*NEEDED[task], *self.mapped)):
            names = self.names[thing]
            if any(_lookup(values, name) is not _ABSENT for values in rows for name in names):
                continue
            found = list(dict.fromkeys(str(column) for values in rows for column in values))
            example = next((column for column in found if column.casefold().strip() in names), f"COLUMN_OF_{thing.upper()}")
            raise UserError(
                f"data.source: {place} has no column {' or '.join(names)}; found {_shortened(', '.join(found))}; name the "
                f"right one by data.source.columns, such as columns: {{{thing}: {example}}}; its first row is "
                f"{_shortened(json.dumps(dict(rows[0]), ensure_ascii=False, default=str))}"
            )


def _lookup(values: Any, name: str) -> Any:
    if isinstance(values, Mapping) and name in values:
        return values[name]
    first, dot, rest = name.partition(".")
    return _lookup(values[first], rest) if dot and isinstance(values, Mapping) and first in values else _ABSENT


def _is_nothing(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _shortened(text: str) -> str:
    return text if len(text) <= 400 else text[:400] + "..."


def example_of(values: Mapping[str, Any], columns: Columns, name: str) -> QAExample:
    """The question of a row.

    Args:
        name: of the data set, for a row that does not say.

    Raises:
        BadRow: with the reason.
    """
    question = checked(columns.get(values, "question"), "the question")
    golds = _golds(columns.get(values, "golden_answers"))
    source = columns.get(values, "source")
    source = name if source is None else checked(source, "the source")
    given = columns.get(values, "id")
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    if given is None:
        identity = hashlib.blake2b(spelling(question).encode(), digest_size=8).hexdigest()
    else:
        identity = checked(given, "the id")
    return QAExample(id=identity, question=question, golden_answers=golds, source=source, subset=source)


def spelling(question: str) -> str:
    """Equal for questions that differ in case, punctuation, articles or Unicode form only."""
    return normalize_answer(question) or question


def checked(value: Any, what: str, longest: int = LONGEST) -> str:
    """The text without blanks around it.

    Raises:
        BadRow: it is no text, is empty or invisible, too long, or cannot be given to a tokenizer.
    """
    if value is None:
        raise BadRow(f"{what} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{what} is not a text but {_kind(value)}")
    if len(value) > longest:
        raise BadRow(f"{what} has more than {longest} characters")
    if "\0" in value:
        raise BadRow(f"{what} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} is not UTF-8 or holds half a character") from error
    if not any(map(str.isalnum, value)) and not sanitize(value):
        raise BadRow(f"{what} is empty")
    return value.strip()


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _golds(value: Any) -> tuple[str, ...]:
    """Golden answers from a text, a whole number, a list of these, or a list in JSON (a cell of a spreadsheet)."""
    if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow('the golden answers look like a list but are not JSON, such as ["a", "b"]') from error
    answers = value if isinstance(value, list) else [value]
    if all(_is_nothing(answer) for answer in answers):
        raise BadRow("there is no golden answer")
    # Other numbers and true do not say how they are spelt.
    plain = [str(answer) if type(answer) is int else answer for answer in answers if not _is_nothing(answer)]
    return tuple(dict.fromkeys(checked(answer, "a golden answer") for answer in plain))


def remarks(values: Mapping[str, Any], columns: Columns, example: QAExample) -> list[str]:
    """What is odd about a row that can be used."""
    said = []
    if not all(normalize_answer(gold) for gold in example.golden_answers):
        said.append("a golden answer is only articles or punctuation, and counts as it is spelt")
    golds = columns.get(values, "golden_answers")
    if isinstance(golds, list) and any(map(_is_nothing, golds)):
        said.append("an empty golden answer was left out")
    return said


def record_of(values: Mapping[str, Any], columns: Columns, name: str) -> SearchRecord:
    """The search record of a row. Without evidence of its own, a useful record's are the golden answers in its documents.

    Raises:
        BadRow: with the reason.
    """
    example = example_of(values, columns, name)
    query = checked(columns.get(values, "query"), "the query")
    label = columns.get(values, "noisy")
    noisy = label if isinstance(label, bool) else _LABELS.get(label.strip().lower()) if isinstance(label, str) else None
    if noisy is None:
        raise BadRow("the label is neither useful nor noisy, nor true (noisy) nor false")
    documents = _documents(columns.get(values, "documents"))
    given = columns.get(values, "evidence")
    texts = [document.text for document in documents]
    evidence: tuple[str, ...] = ()
    if given is not None:
        evidence = tuple(checked(text, "the evidence") for text in (given if isinstance(given, list) else [given]))
    elif not noisy:
        evidence = tuple(gold for gold in example.golden_answers if any(gold in text for text in texts))
    return SearchRecord(example=example, query=query, noisy=noisy, documents=documents, evidence=evidence)


def _documents(value: Any) -> tuple[Document, ...]:
    """From a list of texts or of objects with text and title, or from one text "Doc 1: ... Doc 2: ..."."""
    if isinstance(value, str):
        value = split_documents(checked(value, "the documents", LONGEST_DOCUMENT), MOST_DOCUMENTS)
    if not isinstance(value, list) or not value:
        raise BadRow("there are no documents" if _is_nothing(value) else f"the documents are not a list but {_kind(value)}")
    return tuple(_document(item) for item in value)


def _document(item: Any) -> Document:
    if not isinstance(item, dict):
        return Document(text=checked(item, "a document", LONGEST_DOCUMENT))
    title = item.get("title")
    text = checked(item.get("text"), "a document", LONGEST_DOCUMENT)
    return Document(text=text, title="" if _is_nothing(title) else checked(title, "a title"))
