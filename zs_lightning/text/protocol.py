"""The turn protocol: what counts as an action, and how documents enter the context.

Tags: think, search, information, answer. An action is read from one turn's sampled text only.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zs_lightning.types import ActionKind, Document, Turn

SEARCH_END, ANSWER_END, INFORMATION = "</search>", "</answer>", "<information>"
THOUGHT, THOUGHT_END = "<think>", "</think>"
# A turn ends at the first of these. <information> is the environment's word: a policy that writes
# it forges a result.
STOP_TAGS = (SEARCH_END, ANSWER_END, INFORMATION)
DOC = r"\bDoc\s*\d+\s*[:.]"
"""How our templates begin a document, as a regular expression."""

_TAGS = "think|search|answer|information"
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
# A pair of tags with no other tag of ours between them.
_ACTION = re.compile(rf"<(search|answer)>((?:(?!</?(?:{_TAGS}|question)>).)*)</\1>", re.DOTALL)
_PIECE = re.compile(rf"<({_TAGS})>(.*?)(?:</\1>|\Z)", re.DOTALL)
FUNCTION_WORDS = set("a an and are as at be by for from in is it of on or that the to".split())
FUNCTION_WORDS |= set("was were what who with".split())
# Also those that a tokenizer may normalise to an angle bracket.
_BRACKETS = str.maketrans("<＜﹤>＞﹥", "‹‹‹›››")


@dataclass(frozen=True)
class Action:
    """`content` is the query, the answer, or the reason why the action is invalid."""

    kind: ActionKind
    content: str


def parse_action(text: str, thinking: bool = False) -> Action:
    """The action of a turn's sampled text: the first complete search or answer outside of thoughts,
    in one of which the turn begins if it is `thinking`.

    Deviations from the reference: tags inside of a thought are not executed, an empty query is not
    a search, a query or answer holds no tag, and a forged <information> makes the turn invalid.
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


def forges(turns: Sequence[Turn]) -> bool:
    """Whether the policy wrote an <information> of its own, in a thought or outside of one."""
    return any(INFORMATION in turn.text for turn in turns)


def disarm(text: str) -> str:
    """The untrusted text without anything that speaks a protocol of tags.

    Every angle bracket becomes ‹ or ›, whether or not it looks like a tag, and invisible and
    control characters go. A tokenizer's own control tokens are dealt with where text becomes ids.
    """
    hidden = ("Cc", "Cf", "Cs")
    kept = [c for c in text if c.isspace() or unicodedata.category(c) not in hidden]
    return "".join(kept).translate(_BRACKETS)


def sanitize(text: str) -> str:
    """The disarmed text as one line."""
    return " ".join(disarm(text).split())


def split_documents(text: str, limit: int) -> list[str]:
    """The documents of a generated list "Doc 1: … Doc 2: …", at most `limit`, no empty ones.

    Text before "Doc 1:" is dropped; without any "Doc n:" the whole text is one document.
    """
    before, *listed = re.split(DOC, text)
    cleaned = [" ".join(document.split()) for document in listed or [before]]
    return list(filter(None, cleaned))[:limit]


def document_lines(documents: Sequence[Document]) -> list[str]:
    """The sanitised "title: text" of each document."""
    return [sanitize(f"{d.title}: {d.text}" if d.title else d.text) for d in documents]


def query_key(query: str) -> str:
    """What a bag-of-words engine sees of a query: its content words, without order and case. C, C++
    and C# are three."""
    words = re.findall(r"\w+(?:[+#]+(?![\w+#]))?", query.lower())
    return " ".join(sorted(word for word in words if word not in FUNCTION_WORDS))


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """Kind (think, search, answer, information or text) and content of a turn's parts, in order."""
    end = 0
    for match in _PIECE.finditer(text):
        if before := text[end : match.start()].strip():
            yield "text", before
        yield match[1], match[2].strip()
        end = match.end()
    if rest := text[end:].strip():
        yield "text", rest
