"""Every text that we say to a model, in sets of templates (paper Tables 1 and 2, in our own words).

A template set is complete: policy prompt, closed-book prompt, result block, notice, simulator
prompts. Braces mark fields. A set may also come from a file, so that a published model gets the
words that it was trained on.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from zs_lightning.errors import UserError

_FIELD = re.compile(r"\{(\w+)\}")


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
    simulator_stop: tuple[str, ...] = ()
    """Texts that end the simulator's output."""
    simulator_system: str | None = None
    """The system's message before a simulator's prompt in a chat template. None sends none."""


# Fields that a template must have, and those that it may have. `answer` is all golden answers.
_SIMULATOR_FIELDS = ({"query"}, {"question", "answer", "first_answer", "count"})
FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "policy": ({"question"}, set()),
    "closed_book": ({"question"}, set()),
    "retrieved": ({"question"}, set()),
    "document": ({"text"}, {"number"}),
    "observation": ({"documents"}, set()),
    "notice": (set(), set()),
    "simulator_useful": _SIMULATOR_FIELDS,
    "simulator_noisy": _SIMULATOR_FIELDS,
}

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
)

_GIVEN = "<question> {question}</question><answer> {answer}</answer><search> {query}</search>"
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
)

PROMPTS = {
    "zerosearch": ZEROSEARCH,
    "zerosearch_prompted": ZEROSEARCH_PROMPTED,
    "miniature": MINIATURE,
}
FILE_TYPES = (".yaml", ".yml", ".json")
_OPTIONAL = ("simulator_stop", "simulator_system", "thinking")


def get_prompts(name: str) -> Prompts:
    """The template set of this name, or of this file (see `read_prompts`).

    Raises:
        UserError: there is none, or the file holds none.
    """
    if Path(name).suffix in FILE_TYPES:
        return read_prompts(Path(name))
    if name not in PROMPTS:
        expected = f"expected one of {', '.join(sorted(PROMPTS))} or a .yaml or .json file"
        raise UserError(f"prompts: no template set is called {name!r}; {expected}")
    return PROMPTS[name]


def read_prompts(file: Path) -> Prompts:
    """A template set from a YAML or JSON file with the fields of Prompts.

    With `base: NAME` a file may leave fields out, which are those of the named set then. A
    published simulator, for example, needs no more than `base: zerosearch`, `simulator_useful`,
    `simulator_noisy` and perhaps `simulator_system`.

    Raises:
        UserError: there is no such file, or something in it is unknown, missing or of a wrong kind.
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
            _check_fields(file, key, value)
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
    else:
        empty = key == "simulator_system" and value is None
        expected, fits = "a text", isinstance(value, str) or empty
    if not fits:
        raise UserError(f"prompts: {key} in {file} is {str(value)[:60]!r}; expected {expected}")


def _check_fields(file: Path, key: str, value: str) -> None:
    needed, allowed = FIELDS[key]
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
