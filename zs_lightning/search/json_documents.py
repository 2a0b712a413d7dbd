"""Documents out of the JSON answers of servers, which need not be what was documented."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from typing import Any

from zs_lightning.search.http import Failed
from zs_lightning.types import Document

MOST_CHARACTERS = 20_000
"""Longest text of a document; far more than any policy reads of one."""

Found = list[Document | None]
"""What a server's results are, in its order; None for one that is no document."""


def field(answer: Any, *path: str) -> Any:
    """The value at the end of a path of keys. Raises Failed if it is not there."""
    for name in path:
        if not isinstance(answer, dict) or name not in answer:
            raise Failed(f"the answer has no {'.'.join(path)}")
        answer = answer[name]
    return answer


def rows(items: Any) -> list[dict[str, Any]]:
    """The list, with nothing in place of what is no object. Raises Failed if it is no list."""
    if not isinstance(items, list):
        raise Failed(f"the results are no list but {type(items).__name__}")
    return [item if isinstance(item, dict) else {} for item in items]


def unmarked(text: str) -> str:
    """The text of HTML."""
    return html.unescape(re.sub(r"<[^<>]*>", "", text)).strip()


def titled(items: Any, text: str, clean: Callable[[str], str] = str.strip) -> Found:
    """Documents of a list of objects with a `title` and, under the key `text`, a text.

    Raises:
        Failed: the items are no list, or none of them has either key.
    """
    found = [document(item.get(text), item.get("title"), clean) for item in rows(items)]
    # Pages without a snippet are no documents; an answer in another form is a failure.
    if items and not any(found) and not any({text, "title"} & item.keys() for item in rows(items)):
        raise Failed(f"none of the {len(items)} results has a {text}")
    return found


def document(text: Any, title: Any = "", clean: Callable[[str], str] = str.strip) -> Document | None:
    """None without a text; a title that is no text is left out."""
    cleaned = clean(text[:MOST_CHARACTERS]) if isinstance(text, str) else ""
    named = clean(title[:MOST_CHARACTERS]) if isinstance(title, str) else ""
    return Document(text=cleaned, title=named) if cleaned else None
