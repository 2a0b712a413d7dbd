"""Reads the lists of documents that chat models write, in whatever style they number them."""

import json
import re
from collections.abc import Iterator
from typing import Any

from zs_lightning.text.protocol import DOC, split_documents

_FENCE = r"^[ \t]*```.*$"
_LABEL = r"\b(?:Doc|Document|Result|Passage)[ \t]*#?\d+\W{0,2}[:.)][*_]*"
_ORDERED = re.compile(rf"^[ \t]*\W{{0,4}}{_LABEL}", re.MULTILINE | re.IGNORECASE)
# The first number of a line that is numbered twice, "2. Doc 2: …", belongs to no document.
_FIRST_MARK = rf"^[ \t]*(?:[#*_(\[]*\d{{1,3}}[.:)\]]+|[-*•#>]+)[*_]*[ \t]*(?=[*_]*{_LABEL})"
_NUMBER = r"^[ \t]*[#*_]*[ \t]*(?:\[(\d{1,3})\]|\(?(\d{1,3})[.:)])[.:)*_]*(?=\s)"
_NUMBERED = re.compile(_NUMBER, re.MULTILINE)
_BULLET = re.compile(r"^[ \t]*[-*•][ \t]+", re.MULTILINE)
_HEADING = re.compile(r"^[ \t]*(?=\*\*[^*\n]+\*\*|#+[ \t])", re.MULTILINE)
# A line of the order that a model writes again would tell the answer.
_ORDER = r"^[ \t*_#-]*(?:(?:correct )?answer|question|query|note)[*_]*:.*$"
_TEXTS = ("text", "content", "snippet", "contents", "description")


def listed_documents(text: str, limit: int) -> list[str]:
    """The documents of a list, at most `limit`.

    A list is JSON, "Doc 1:" and the like, 1. 2. 3., bullets, or headings with texts. Numbers count
    at the beginning of a line and in their order only: "In 1939. He" and "1. FC Köln" inside of a
    document divide nothing.
    """
    for mark in (_FENCE, _ORDER, _FIRST_MARK):
        text = re.sub(mark, "", text, flags=re.MULTILINE | re.IGNORECASE)
    found = _from_json(text)
    # Text before a list is no document, and neither is text without any: it may be an unfinished
    # thought or the order said again, and hold the answer.
    if found is None:
        found = split_documents(text, limit) if re.search(DOC, text) else _pieces(text)
    cleaned = [" ".join(piece.replace("**", "").split()) for piece in found]
    return [piece for piece in cleaned if any(map(str.isalnum, piece))][:limit]


def _pieces(text: str) -> list[str]:
    marks = list(_ORDERED.finditer(text)) or list(_in_order(text)) or list(_BULLET.finditer(text))
    marks = marks or list(_HEADING.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [text[mark.end() : end] for mark, end in zip(marks, ends, strict=False)]


def _in_order(text: str) -> Iterator[re.Match[str]]:
    """The marks 1, 2, 3, …; others are part of the text."""
    wanted = 1
    for match in _NUMBERED.finditer(text):
        if int(match[1] or match[2]) == wanted:
            wanted += 1
            yield match


def _from_json(text: str) -> list[str] | None:
    """The texts of a list in JSON, alone or as an object's value; None for other text."""
    start = re.search(r"^\s*[\[{]", text, re.MULTILINE)
    if start is None:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start.end() - 1)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = next((inner for inner in value.values() if isinstance(inner, list)), None)
    if not isinstance(value, list) or not all(isinstance(item, str | dict) for item in value):
        return None
    return [_as_text(item) for item in value]


def _as_text(item: str | dict[str, Any]) -> str:
    if isinstance(item, str):
        return re.sub(f"^{DOC}", "", item)
    body = next((item[name] for name in _TEXTS if isinstance(item.get(name), str)), "")
    title = item.get("title")
    if isinstance(title, str) and title.strip() and body:
        return f"{title}: {body}"
    return body or str(title or "")
