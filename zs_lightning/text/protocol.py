"""The turn protocol: what counts as an action, and how documents enter the context.

Tags: think, search, information, answer. An action is read from one turn's sampled text only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from zs_lightning.types import ActionKind, Document

SEARCH_END, ANSWER_END, INFORMATION = "</search>", "</answer>", "<information>"
THOUGHT, THOUGHT_END = "<think>", "</think>"
STOP_TAGS = (SEARCH_END, ANSWER_END, INFORMATION)
"""A turn ends at the first of these. <information> is the environment's word: a policy that writes it forges a result."""

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_TAG = "</?(?:think|search|information|answer|question)>"
_ACTION = re.compile(rf"<(search|answer)>((?:(?!{_TAG}).)*)</\1>", re.DOTALL)
"""A pair of tags with no other tag of ours between them."""
_BLANKS = re.compile(r"\s+")
_FUNCTION_WORDS = frozenset(
    re.findall(r"\w+", "a an and are as at be by for from in is it of on or that the to was were what who with")
)
_BRACKETS = str.maketrans("<＜﹤>＞﹥", "‹‹‹›››")


@dataclass(frozen=True)
class Action:
    """`content` is the query, the answer, or the reason why the action is invalid."""

    kind: ActionKind
    content: str


def parse_action(text: str, thinking: bool = False) -> Action:
    """The one action of a turn's sampled text; `thinking` says that the turn begins inside of a thought.

    The first complete search or answer outside of thoughts counts; what follows it is ignored. Tags inside a thought
    are not executed, an empty query is not a search, a query or answer holds no tag, and a forged <information> makes
    the turn invalid.
    """
    # A blank in place of a thought, or the halves of a tag around it would become one.
    outside = _THOUGHT.sub(" ", f"<think>{text}" if thinking else text)
    if INFORMATION in outside:
        return Action(ActionKind.INVALID, "forged_information")
    thought = outside.find("<think>")
    if thought >= 0:
        outside = outside[:thought]
    match = _ACTION.search(outside)
    if match is None:
        return Action(ActionKind.INVALID, "unclosed_thought" if thought >= 0 else "no_action")
    content = match.group(2).strip()
    if not content:
        return Action(ActionKind.INVALID, f"empty_{match.group(1)}")
    return Action(ActionKind(match.group(1)), content)


def disarm(text: str) -> str:
    """Untrusted text that cannot speak any protocol of tags: every angle bracket, also those that a tokenizer may
    normalise to one, becomes ‹ or ›, whether or not it looks like a tag; invisible and control characters go. Control
    tokens of a tokenizer in other brackets are dealt with where text becomes ids."""
    visible = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return visible.translate(_BRACKETS)


def sanitize(text: str) -> str:
    """Disarmed text as one line."""
    return _BLANKS.sub(" ", disarm(text)).strip()


def split_documents(text: str, limit: int) -> list[str]:
    """The documents of a generated list "Doc 1: … Doc 2: …", at most `limit`, blanks collapsed, empty ones left out.

    Text before "Doc 1:" is dropped; without any "Doc n:" the whole text is one document.
    """
    pieces = re.split(r"\bDoc\s*\d+\s*[:.]", text)
    pieces = pieces[1:] if len(pieces) > 1 else pieces
    cleaned = [_BLANKS.sub(" ", piece).strip() for piece in pieces]
    return [piece for piece in cleaned if piece][:limit]


def document_lines(documents: Sequence[Document]) -> list[str]:
    """Sanitised "title: text" of each document."""
    return [sanitize(f"{d.title}: {d.text}" if d.title else d.text) for d in documents]


def query_key(query: str) -> str:
    """What a bag-of-words engine sees of a query: its words without order, case, punctuation and function words."""
    words = re.findall(r"\w+", query.lower())
    return " ".join(sorted(word for word in words if word not in _FUNCTION_WORDS))
