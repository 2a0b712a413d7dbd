"""Every text that we say to a model, in sets of templates (paper Tables 1 and 2, in our own words).

A template set is complete: policy prompt, closed-book prompt, result block, notice, simulator
prompts. Braces mark fields. A set may also come from a file, so that a published model gets the
words that it was trained on.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.text.protocol import document_lines
from zs_lightning.types import Document

_FIELD = re.compile(r"\{(\w+)\}")

USEFUL = "useful"
NOISY = "noisy"
"""The paper's one kind of noise."""
EMPTY = "empty"
"""The kind of noise for which nothing is written."""
ANSWERS = {"answer", "first_answer"}
"""Fields that tell a simulator the golden answers."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """One set of templates; `FIELDS` says what stands in their braces."""

    policy: str
    closed_book: str
    """The policy's prompt when it may not search."""
    retrieved: str
    """The policy's prompt when it may not search and documents follow the prompt."""
    chat: bool
    """Put the prompts through the tokenizer's chat template, if it has one."""
    thinking: bool | None = None
    """Whether the chat template lets the model think first, for those that know enable_thinking
    (Qwen3). None says nothing to it."""
    document: str
    """One line of a result."""
    observation: str
    """What is appended after a search."""
    notice: str
    """What is appended after an invalid action."""
    simulator_useful: str
    simulator_noisy: str
    simulator_kinds: Mapping[str, str] = field(default_factory=dict)
    """More kinds of noise, each with its order, besides `noisy` and `empty`."""
    simulator_blind: str = (
        "You are the Google search engine. Write {count} documents for the query, each about 30 "
        "words.\nQuery: {query}\nOutput:\n"
    )
    """The order where question and golden answers are withheld, see search/guard.py."""
    simulator_stop: tuple[str, ...] = ()
    """Texts that end the simulator's output."""
    simulator_system: str | None = None
    """The system's message before a simulator's prompt in a chat template. None sends none."""

    @property
    def noises(self) -> dict[str, str]:
        """The kinds of noise that are written, with their orders."""
        return {NOISY: self.simulator_noisy, **self.simulator_kinds}

    def listed(self, documents: Sequence[Document]) -> str:
        """The sanitised lines of a result, as the policy reads them."""
        lines = ""
        for number, line in enumerate(document_lines(documents), 1):
            lines += fill(self.document, number=number, text=line)
        return lines

    def order(self, label: str, blind: bool = False) -> str:
        """The template that orders documents of this label; a blind one tells no golden answers."""
        template = self.simulator_useful if label == USEFUL else self.noises[label]
        tells = ANSWERS & set(_FIELD.findall(template))
        return self.simulator_blind if blind and tells else template


# Fields that a template must have, and those that it may have. `answer` is all golden answers.
_SIMULATOR_FIELDS = ({"query"}, {"question", *ANSWERS, "count"})
FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "policy": ({"question"}, set()),
    "closed_book": ({"question"}, set()),
    "retrieved": ({"question"}, set()),
    "document": ({"text"}, {"number"}),
    "observation": ({"documents"}, set()),
    "notice": (set(), set()),
    "simulator_useful": _SIMULATOR_FIELDS,
    "simulator_noisy": _SIMULATOR_FIELDS,
    "simulator_kinds": _SIMULATOR_FIELDS,
    "simulator_blind": ({"query"}, {"count"}),
}

_SOME = "You are the Google search engine. Write {count} documents for the query, each about 30 words"
_WRITTEN = "\nQuery: {query}\nNoisy Output:\n"
_TOLD = " The user's question is: {question} Its correct answer is: {first_answer}."
# None of those that need not know the answer are told it: what a prompt holds gets out.
KINDS = {
    "off_topic": f"{_SOME}, all about other things than the query asks about.{_WRITTEN}",
    "partial": (
        f"{_SOME}. They are about what the query names, but the very fact that it asks for is in none of them.{_WRITTEN}"
    ),
    "contradicting": (
        f"{_SOME}. They answer the query with confidence, and wrongly: each names another answer in "
        f"place of the correct one.{_TOLD}{_WRITTEN}"
    ),
    "outdated": (
        f"{_SOME}. Each begins with a year long past and says what was the case then, which is no "
        f"longer the correct answer.{_TOLD}{_WRITTEN}"
    ),
}
"""Kinds of noise besides the paper's."""

ZEROSEARCH = Prompts(
    # In place of the paper's example of an answer, which small models give as their own: dots,
    # which they do not copy. Without any form they answer much less often.
    policy=(
        "Answer the question below. Reason between <think> and </think> first, and again each time "
        "new information arrives. If knowledge is missing, write a query between <search> and "
        "</search>; the best results will follow between <information> and </information>. You may "
        "search as often as you need. Once nothing is missing, write only the short answer, "
        "without explanation, between <answer> and </answer>, in the form <answer> ... </answer>."
        "\nQuestion: {question}\n"
    ),
    closed_book=(
        "Answer the question below from what you know. Reason between <think> and </think>, then "
        "write only the short answer between <answer> and </answer>.\nQuestion: {question}\n"
    ),
    retrieved=(
        "Answer the question below with the help of the search results that follow it between "
        "<information> and </information>. Reason between <think> and </think>, then write only "
        "the short answer between <answer> and </answer>.\nQuestion: {question}\n"
    ),
    chat=True,
    document="Doc {number}: {text}\n",
    observation="\n\n<information>{documents}</information>\n\n",
    # No complete pair of tags: nothing in it can be taken for an action.
    notice=(
        "\nThat was not a valid action. A query goes between search tags, a final answer between "
        "answer tags. Let me try again.\n"
    ),
    # As in the paper's fine-tuned style, the noisy prompt holds the answer as well.
    simulator_useful=(
        "You are the Google search engine. Write {count} useful documents for the query, each about "
        "30 words. The user's question is: {question} Its correct answer is: {answer}. Useful "
        "documents help to answer it.\nQuery: {query}\nUseful Output:\n"
    ),
    simulator_noisy=(
        "You are the Google search engine. Write {count} noisy documents for the query, each about "
        "30 words. The user's question is: {question} Its correct answer is: {answer}. Noisy "
        "documents do not help to answer it.\nQuery: {query}\nNoisy Output:\n"
    ),
    simulator_kinds=KINDS,
)

_ASKED = "<search> {query}</search>"
_GIVEN = "<question> {question}</question><answer> {answer}</answer>" + _ASKED
MINIATURE = Prompts(
    policy="<question> {question}</question>",
    closed_book="<question> {question}</question><think> I may know this.</think>",
    # What the tiny models know: documents follow a search.
    retrieved="<question> {question}</question><search> {question}</search>",
    chat=False,
    document=" Doc {number}: {text}",
    observation="<information>{documents}</information>",
    notice=" Try again.",
    simulator_useful=_GIVEN + "<think> useful</think><information>",
    simulator_noisy=_GIVEN + "<think> noisy</think><information>",
    simulator_kinds={
        "off_topic": _ASKED + "<think> off topic</think><information>",
        "partial": _ASKED + "<think> partial</think><information>",
        "contradicting": _GIVEN + "<think> contradicting</think><information>",
        "outdated": _GIVEN + "<think> outdated</think><information>",
    },
    # As search results stand in what the tiny model was made of.
    simulator_blind=_ASKED + "<think> useful</think><information>",
    simulator_stop=("</information>",),
)

_RESULT_FORM = (
    "each in one full sentence of 20 to 30 words, such as an encyclopedia or a newspaper prints. Give "
    'every result a line of its own: begin the first with "Doc 1:", the second with "Doc 2:" and so '
    'on up to "Doc {count}:". Write nothing besides these {count} lines.\n'
)

# For a simulator that was never trained for it: an instruct model, also the policy's own base. As
# in the paper's prompted style the noisy prompt holds neither question nor answer. There is no
# example: small models return its documents.
ZEROSEARCH_PROMPTED = replace(
    ZEROSEARCH,
    simulator_useful=(
        "Play the search engine of somebody who looks for the answer to a question.\n\nQuestion: "
        "{question}\nCorrect answer: {answer}\nQuery: {query}\n\nWrite {count} different results for "
        "the query, from which the correct answer can be read or worked out, " + _RESULT_FORM
    ),
    simulator_noisy=(
        "Play a search engine that finds the right topic but misses the point.\n\nQuery: {query}\n\n"
        "Write {count} different results that share the topic and some words of the query, yet say "
        "nothing that answers it, " + _RESULT_FORM
    ),
    simulator_kinds={
        "off_topic": (
            "Play a broken search engine, which returns results for another query.\n\nQuery: {query}"
            "\n\nWrite {count} different results about anything else, without a name or topic of the "
            "query, " + _RESULT_FORM
        ),
        "partial": (
            "Play a search engine that finds only half of what is asked.\n\nQuery: {query}\n\nWrite "
            "{count} different results about the person, place or thing that the query names, none of "
            "which states the fact that it asks for, " + _RESULT_FORM
        ),
        "contradicting": (
            "Play a search engine that finds pages with a mistake.\n\nQuestion: {question}\nTrue "
            "answer, which no result names: {first_answer}\nQuery: {query}\n\nWrite {count} different "
            "results that answer the query with confidence and name another answer, " + _RESULT_FORM
        ),
        "outdated": (
            "Play a search engine that finds old pages only.\n\nQuestion: {question}\nAnswer of "
            "today, which no result names: {first_answer}\nQuery: {query}\n\nWrite {count} different "
            "results that begin with a year long past and say what was the case then, " + _RESULT_FORM
        ),
    },
    simulator_blind=(
        "Play a search engine.\n\nQuery: {query}\n\nWrite {count} different results for the query, " + _RESULT_FORM
    ),
)

_NOISY_UNTOLD = f"{_SOME}. They share its topic and some of its words, but do not help to answer it.{_WRITTEN}"
# The paper's noisy order tells the answer, which gets into documents that should not hold it.
ZEROSEARCH_NOISY_UNTOLD = replace(ZEROSEARCH, simulator_noisy=_NOISY_UNTOLD)
# For a simulator that knows what the corpus says, and need not be told.
ZEROSEARCH_UNTOLD = replace(
    ZEROSEARCH_NOISY_UNTOLD,
    simulator_useful=f"{_SOME}. They answer it.\nQuery: {{query}}\nUseful Output:\n",
)

PROMPTS = {
    "zerosearch": ZEROSEARCH,
    "zerosearch_noisy_untold": ZEROSEARCH_NOISY_UNTOLD,
    "zerosearch_untold": ZEROSEARCH_UNTOLD,
    "zerosearch_prompted": ZEROSEARCH_PROMPTED,
    "miniature": MINIATURE,
}
FILE_TYPES = (".yaml", ".yml", ".json")
_OPTIONAL = ("simulator_stop", "simulator_system", "simulator_kinds", "simulator_blind", "thinking")


def get_prompts(name: str) -> Prompts:
    """The template set of this name, or of this file, see `read_prompts`. Raises UserError if there
    is none, or the file holds none."""
    if Path(name).suffix in FILE_TYPES:
        return read_prompts(Path(os.path.expanduser(name)))
    if name not in PROMPTS:
        expected = f"expected one of {', '.join(sorted(PROMPTS))} or a .yaml or .json file"
        raise UserError(f"prompts: no template set is called {name!r}; {expected}")
    return PROMPTS[name]


def read_prompts(file: Path) -> Prompts:
    """A template set from a YAML or JSON file with the fields of Prompts.

    With `base: NAME` a file may leave fields out, which are those of the named set then. A
    published simulator, for example, needs no more than `base: zerosearch`, `simulator_useful`,
    `simulator_noisy` and perhaps `simulator_system`. Raises UserError if there is no such file, or
    something in it is unknown, missing or of a wrong kind.
    """
    content = _parsed(file)
    base = content.pop("base", None)
    if base is not None and str(base) not in PROMPTS:
        known = ", ".join(sorted(PROMPTS))
        raise UserError(f"prompts: {file} has the base {base!r}; expected one of {known}")
    names = [field.name for field in fields(Prompts)]
    missing = [name for name in names if name not in content and name not in _OPTIONAL]
    if missing and base is None:
        hint = "add them, or take them from a set of this program with `base: zerosearch`"
        raise UserError(f"prompts: {file} lacks {', '.join(missing)}; {hint}")
    for key, value in content.items():
        if key not in names:
            expected = f"expected base, {', '.join(names)}"
            raise UserError(f"prompts: {file} has an unknown key '{key}'; {expected}")
        _check_kind(file, key, value)
        if key in FIELDS:
            templates = value if isinstance(value, dict) else {"": value}
            for name, template in templates.items():
                _check_fields(file, f"{key}.{name}" if name else key, FIELDS[key], template)
    if "simulator_kinds" in content and base is not None:
        content["simulator_kinds"] = {**PROMPTS[base].simulator_kinds, **content["simulator_kinds"]}
    if "simulator_stop" in content:
        content["simulator_stop"] = tuple(content["simulator_stop"])
    prompts = replace(PROMPTS[base], **content) if base is not None else Prompts(**content)
    if prompts.simulator_system is not None and not prompts.chat:
        needs = "which only a chat template can take; set chat: true"
        raise UserError(f"prompts: {file} has a simulator_system, {needs}")
    return prompts


def _parsed(file: Path) -> dict[Any, Any]:
    import yaml

    if not file.is_file():
        expected = f"expected {', '.join(sorted(PROMPTS))} or a .yaml or .json file"
        raise UserError(f"prompts: there is no file {file}; {expected}")
    try:
        text = file.read_text("utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"prompts: {file} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        expected = "expected keys such as policy: and simulator_useful:"
        raise UserError(f"prompts: {file} holds no template set; {expected}")
    return content


def _check_kind(file: Path, key: str, value: Any) -> None:
    if key == "chat":
        expected, fits = "true or false", isinstance(value, bool)
    elif key == "thinking":
        expected, fits = "true, false or null", value is None or isinstance(value, bool)
    elif key == "simulator_stop":
        expected = "a list of texts that are not empty"
        fits = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
    elif key == "simulator_kinds":
        expected = f"names of kinds of noise, not {USEFUL}, {NOISY} or {EMPTY}, each with a text"
        fits = isinstance(value, dict) and all(map(_is_kind, value, value.values()))
    else:
        empty = key == "simulator_system" and value is None
        expected, fits = "a text", isinstance(value, str) or empty
    if not fits:
        raise UserError(f"prompts: {key} in {file} is {str(value)[:60]!r}; expected {expected}")


def _is_kind(name: Any, template: Any) -> bool:
    named = isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*", name)
    return bool(named) and name not in (USEFUL, NOISY, EMPTY) and isinstance(template, str)


def _check_fields(file: Path, key: str, known: tuple[set[str], set[str]], value: str) -> None:
    needed, allowed = known
    names = _FIELD.findall(value)
    place = f"prompts: {key} in {file}"
    for name in names:
        if name not in needed | allowed:
            listed = ", ".join(f"{{{name}}}" for name in sorted(needed | allowed)) or "none"
            raise UserError(f"{place} has an unknown field {{{name}}}; its fields: {listed}")
    for name in needed - set(names):
        raise UserError(f"{place} has no {{{name}}}; write it where its text belongs")
    # A rollout cuts documents to what fits, so there is one place for them.
    if names.count("documents") > 1:
        raise UserError(f"{place} has {{documents}} twice; expected it once")


def fill(template: str, **values: str | int) -> str:
    """The template with its fields filled in; unknown fields stay, as do braces in a value."""
    # In one pass: a question that holds {answer} must not get the answer.
    return _FIELD.sub(lambda match: str(values.get(match[1], match[0])), template)


def ask(question: str) -> str:
    """The question with a question mark at its end."""
    question = question.strip()
    return question if question.endswith("?") else question + "?"
