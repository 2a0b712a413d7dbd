"""From the columns of a row to a question or a search record."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.text.answers import normalize_answer, telling
from zs_lightning.text.prompts import EMPTY, NOISY, USEFUL
from zs_lightning.text.protocol import sanitize, split_documents
from zs_lightning.types import Document, QAExample, SearchRecord

# Names that Search-R1, ZeroSearch and FlashRAG give their columns. The first that holds something
# counts; a dot leads into an object of the column.
KNOWN = {
    "id": ("id",),
    "question": ("question",),
    "golden_answers": ("golden_answers", "answer", "reward_model.ground_truth.target"),
    "source": ("data_source",),
    "query": ("query",),
    "label": ("label", "noisy"),
    "documents": ("documents",),
    "shown": ("shown",),
    "evidence": ("evidence",),
}
NEEDED = {
    "questions": ("question", "golden_answers"),
    "records": ("question", "golden_answers", "query", "label", "documents"),
}
# In characters, of a question, answer or query, and of a document: longer is a mistake in the file.
LONGEST = 10_000
LONGEST_DOCUMENT = 100_000
MOST_DOCUMENTS = 100
_ABSENT = object()
_LABELS = {"false": USEFUL, "true": NOISY}


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason."""


class Columns:
    """Where to find what in a row: in the columns of KNOWN, or of the mapping where they have
    others."""

    def __init__(self, mapping: Mapping[str, str] | None) -> None:
        self.mapped = dict(mapping or {})
        if unknown := sorted(self.mapped.keys() - KNOWN):
            expected = f"expected {', '.join(KNOWN)}"
            raise UserError(f"data.source.columns: there is nothing called {unknown[0]}; {expected}")
        self.names = KNOWN | {thing: (column,) for thing, column in self.mapped.items()}

    def get(self, values: Mapping[str, Any], thing: str) -> Any:
        """What the row's columns hold of the thing, None if they hold nothing."""
        for name in self.names[thing]:
            value = _lookup(values, name)
            if value is not _ABSENT and not _is_nothing(value):
                return value
        return None

    def check(self, rows: Sequence[Mapping[str, Any]], task: str, place: str) -> None:
        """Raises UserError, with what was found, if a needed or mapped column is in no row."""
        for thing in dict.fromkeys((*NEEDED[task], *self.mapped)):
            names = self.names[thing]
            if any(_lookup(values, name) is not _ABSENT for values in rows for name in names):
                continue
            found = {str(column): None for values in rows for column in values}
            first = json.dumps(dict(rows[0]), ensure_ascii=False, default=str)
            raise UserError(
                f"data.source: {place} has no column {' or '.join(names)}; "
                f"found {_shortened(', '.join(found))}; name the right one by data.source.columns, "
                f"such as columns: {{{thing}: COLUMN}}; its first row is {_shortened(first)}"
            )


def _lookup(values: Any, name: str) -> Any:
    if not isinstance(values, Mapping):
        return _ABSENT
    # The whole name first: a column's own name may have a dot in it.
    if name in values:
        return values[name]
    first, _, rest = name.partition(".")
    return _lookup(values.get(first), rest) if rest else _ABSENT


def _is_nothing(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _shortened(text: str) -> str:
    return text if len(text) <= 400 else text[:400] + "..."


def spelling(question: str) -> str:
    """Equal for questions that differ in case, punctuation, articles or Unicode form only."""
    return normalize_answer(question) or question


def example_of(values: Mapping[str, Any], columns: Columns, name: str) -> QAExample:
    """The question of a row, of the data set `name` if the row does not say. Raises BadRow."""
    question = checked(columns.get(values, "question"), "the question")
    golds = _golds(columns.get(values, "golden_answers"))
    source = columns.get(values, "source")
    source = name if source is None else checked(source, "the source")
    given = columns.get(values, "id")
    given = str(given) if type(given) is int else given
    # Made of the question alone, so that an id does not hang on the row's place in the file.
    own = id_of(spelling(question)) if given is None else checked(given, "the id")
    return QAExample(id=own, question=question, golden_answers=golds, source=source, subset=source)


def id_of(text: str) -> str:
    """The id of a question that has none of its own."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def checked(value: Any, what: str, longest: int = LONGEST) -> str:
    """The text without blanks around it. Raises BadRow if no tokenizer or judge can use it."""
    if value is None:
        raise BadRow(f"{what} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{what} is not a text but of type {type(value).__name__}")
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


def _golds(value: Any, what: str = "golden answer") -> tuple[str, ...]:
    """Short texts from a text, a whole number, a list of these, or a list in JSON."""
    # The cell of a spreadsheet holds several answers as JSON.
    if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            expected = 'expected ["a", "b"]'
            raise BadRow(f"the {what}s look like a list but are not JSON; {expected}") from error
    golds = []
    for answer in value if isinstance(value, list) else [value]:
        if not _is_nothing(answer):
            # Other numbers and true do not say how they are spelt.
            golds.append(checked(str(answer) if type(answer) is int else answer, f"a {what}"))
    if not golds:
        raise BadRow(f"there is no {what}")
    return tuple(dict.fromkeys(golds))


def record_of(values: Mapping[str, Any], columns: Columns, name: str) -> SearchRecord:
    """The search record of a row, of the data set `name` if the row does not say. Raises BadRow."""
    example = example_of(values, columns, name)
    query = checked(columns.get(values, "query"), "the query")
    label = str(columns.get(values, "label")).strip().lower()
    label = _LABELS.get(label, label)
    if not re.fullmatch("[a-z][a-z0-9_]*", label) or label in ("none", EMPTY):
        raise BadRow("the label is neither useful nor a kind of noise, nor true (noisy) nor false")
    documents = _documents(columns.get(values, "documents"))
    # What a useful result must hold are the golden answers that it does hold.
    texts = "\n".join(document.text for document in documents)
    evidence = tuple(g for g in telling(example.golden_answers) if g in texts and label == USEFUL)
    if (given := columns.get(values, "evidence")) is not None:
        evidence = _golds(given, "text of evidence")
    shown = columns.get(values, "shown")
    return SearchRecord(
        example=example,
        query=query,
        label=label,
        documents=documents,
        evidence=evidence,
        shown=_documents(shown) if shown else (),
    )


def _documents(value: Any) -> tuple[Document, ...]:
    """Documents from a list of texts or of objects with text and title, or from one text."""
    if isinstance(value, str):
        value = split_documents(checked(value, "the documents", LONGEST_DOCUMENT), MOST_DOCUMENTS)
    if not value or not isinstance(value, list):
        raise BadRow("there are no documents, or they are no list")
    documents = []
    for item in value:
        fields = item if isinstance(item, dict) else {"text": item}
        text = checked(fields.get("text"), "a document", LONGEST_DOCUMENT)
        title = fields.get("title")
        title = "" if _is_nothing(title) else checked(title, "a title")
        documents.append(Document(text=text, title=title))
    return tuple(documents)
