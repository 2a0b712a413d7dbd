"""Reads documents out of the JSON answers of servers, which are not to be trusted to be what was documented."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zs_lightning.search.http import BadAnswer
from zs_lightning.types import Document

MOST_CHARACTERS = 20_000
"""Of a document; far more than any policy reads of one."""


@dataclass(frozen=True)
class Found:
    """Documents in the server's order, and how many of its results were none."""

    documents: tuple[Document, ...] = ()
    skipped: int = 0


def field(answer: Any, *path: str) -> Any:
    """The value at the end of a path of keys.

    Raises:
        BadAnswer: it is not there.
    """
    for name in path:
        if not isinstance(answer, dict) or name not in answer:
            raise BadAnswer(f"the answer has no {'.'.join(path)}")
        answer = answer[name]
    return answer


def plain(text: str) -> str:
    return text.strip()


def unmarked(text: str) -> str:
    """HTML without its tags, as text."""
    return html.unescape(re.sub(r"<[^<>]*>", "", text)).strip()


def collect(items: Any, read: Callable[[dict[str, Any]], Document | None]) -> Found:
    """A document of each item that has one; what is no object has none.

    Raises:
        BadAnswer: the items are no list.
    """
    if not isinstance(items, list):
        raise BadAnswer(f"the results are no list but {type(items).__name__}")
    documents = [document for item in items if isinstance(item, dict) and (document := read(item)) is not None]
    return Found(tuple(documents), len(items) - len(documents))


def titled(items: Any, text: str, clean: Callable[[str], str] = plain) -> Found:
    """Documents of a list of objects with a `title` and, under the key `text`, a text.

    Raises:
        BadAnswer: the items are no list, or none of them has either key.
    """
    found = collect(items, lambda item: document(item.get(text), item.get("title"), clean))
    if items and not found.documents and not any(isinstance(item, dict) and {text, "title"} & item.keys() for item in items):
        raise BadAnswer(f"none of the {len(items)} results has a {text}")
    return found


def document(text: Any, title: Any = None, clean: Callable[[str], str] = plain) -> Document | None:
    """None without a text; a title that is no text is left out."""
    if not isinstance(text, str) or not (cleaned := clean(text[:MOST_CHARACTERS])):
        return None
    return Document(text=cleaned, title=clean(title[:MOST_CHARACTERS]) if isinstance(title, str) else "")
