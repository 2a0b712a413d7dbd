"""Which questions that a model wrote are any good, by rules that need no model."""

import re
from collections.abc import Sequence

from zs_lightning.search.guard import content
from zs_lightning.text.answers import holds, telling

WORDS, CHARACTERS = 6, 60
"""Most words, of scripts with blanks, and most characters of an answer."""
LEAST, MOST = 10, 300
"""Characters of a question; of scripts without blanks the least is half of it."""
MARKS = ("?", "？", "؟", "\u037e")
"""Question marks of Latin, Chinese, Arabic and Greek."""

_LABEL = r"(?:[^\W\d_][^\W\d_ ]{0,15}|[^\W\d_][^\W\d_]{0,12} \d{1,2}|[^\W\d_]\d{1,2})"
# "Question 2: …", "**Answer:** …", "- Q: …", "1. …", in any language.
_LABELLED = re.compile(
    rf"^[\s*#>•–_-]*(?:\d{{1,2}}[.)]\s+)?[*_]*"
    rf"(?:({_LABEL})[*_]*\s?[:：][*_]*\s*)?(.*?)[\s*_]*$"
)
_ANSWER = re.compile(r"(?<=[?？؟])\s*(?=\**(?:Answer|A)\**\s?[:：])")
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)

_TEXT = "passage|text|document|article|paragraph|excerpt|snippet|context"
_VERBS = "mention|say|describe|state|provide|give|talk|refer|discuss"
_BEHIND = rf"(?=\W*$|\s*[?,.;:]|\s+(?:(?:{_VERBS})\w*|above|below|about|is|are|does|do|and)\b)"
# "The text editor" is no passage: what stands behind the word tells.
_ABOUT = re.compile(
    r"\b(?:the|this|these|that|which|both|given|above|following|provided|two|first|second) "
    rf"(?:{_TEXT})s?\b{_BEHIND}"
    r"|\b(?:according to|mentioned in|described in|stated in|in) (?:the|this|these|both) "
    rf"(?:\w+ )?(?:{_TEXT})s?\b{_BEHIND}"
    r"|\b(?:im|dem|diesem|der|laut) (?:Text|Textes|Abschnitt|Dokument|Passage)\b"
    r"|\b(?:le|ce|du|au|la|cette) (?:texte|passage|document|paragraphe)\b"
    r"|\b(?:el|este|del|al) (?:texto|pasaje|documento)\b"
    r"|本文|文中|文章|上文|短文|段落",
    re.IGNORECASE,
)
_POINT = "mentioned|described|given|listed|shown|stated"
_POINTING = re.compile(rf"\b(?:{_POINT}) (?:above|below|here)\b", re.IGNORECASE)
# Disarmed they harm nobody, but a question that holds one is a slip of the model.
_OURS = "think|search|answer|information|question"
_CONTROL = re.compile(rf"[‹<]/?(?:{_OURS})[›>]|[‹<]\|.{{0,40}}?\|[›>]", re.IGNORECASE)


def read_questions(text: str, count: int) -> list[tuple[str, str]]:
    """The questions that a model wrote, at most `count`, each with the line below it as its answer.

    Lines may be labelled in any language, numbered and bold; what stands between is passed over.
    """
    found: list[tuple[str, str]] = []
    question = ""
    for line in _ANSWER.sub("\n", _THOUGHT.sub(" ", text)).splitlines():
        match = _LABELLED.match(line)
        label, rest = (match[1] or "", match[2]) if match else ("", line)
        # A label alone, such as "Answer:", has what it announces on the next line.
        if not rest:
            continue
        if label.lower().startswith(("question", "q")) or rest.endswith(MARKS):
            question = rest
        elif question:
            found.append((question, rest.strip(" \"“”'`").removesuffix(".")))
            question = ""
    return found[:count]


def fault(question: str, answer: str, passages: Sequence[str]) -> str:
    """Why a question about passages cannot be kept; empty for a good one."""
    blanks = len(question.split()) > 1
    if not question.endswith(MARKS):
        return "does not end with a question mark"
    if not (LEAST if blanks else LEAST // 2) <= len(question) <= MOST:
        return "too short or too long"
    if _CONTROL.search(question + answer):
        return "holds a tag or a control token"
    if _ABOUT.search(question) or _POINTING.search(question):
        return "speaks of the passage itself"
    # Before its length: a dash is short enough.
    if not any(map(str.isalnum, answer)):
        return "has no answer"
    if len(answer.split()) > WORDS or len(answer) > CHARACTERS:
        return "its answer is long"
    if not telling([answer]):
        return "its answer is yes or no"
    # In another order its words tell the answer as well.
    told = content(answer)
    if holds(question, answer) or (told and told <= content(question)):
        return "holds its answer"
    if not any(holds(passage, answer) for passage in passages):
        return "its answer is not in the passage"
    asked = content(question)
    named = [bool(asked & content(passage)) for passage in passages]
    # Of two passages each must have to do with it, or one would be enough.
    useful = all(name or holds(text, answer) for name, text in zip(named, passages, strict=True))
    return "" if useful and any(named) else "names nothing of the passage"
