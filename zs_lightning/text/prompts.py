"""Every text that we say to a model, as named sets of templates (paper Tables 1 and 2, in our own words).

A template set is complete: policy prompt, closed-book prompt, result block, notice, simulator prompts. Braces mark
fields: {question}, {query}, {answer}, {count}, {documents}, {number}, {text}.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """One set of templates."""

    policy: str
    """Fields: question."""
    closed_book: str
    """The policy's prompt when it may not search. Fields: question."""
    retrieved: str
    """The policy's prompt when it may not search and documents follow the prompt. Fields: question."""
    chat: bool
    """Put the policy's prompt through the tokenizer's chat template, if it has one."""
    document: str
    """One line of a result. Fields: number, text."""
    observation: str
    """What is appended after a search. Fields: documents."""
    notice: str
    """What is appended after an invalid action. It holds no complete tag pair: nothing in it can be taken for an action."""
    simulator_useful: str
    """Fields: question, answer, query, count. A noisy prompt holds the answer as well, as in the paper's fine-tuned style."""
    simulator_noisy: str
    simulator_stop: tuple[str, ...] = ()
    """Texts that end the simulator's output."""


ZEROSEARCH = Prompts(
    policy=(
        "Answer the question below. Reason between <think> and </think> first, and again each time new information "
        "arrives. If knowledge is missing, write a query between <search> and </search>; the best results will follow "
        "between <information> and </information>. You may search as often as you need. Once nothing is missing, write "
        "only the short answer, without explanation, between <answer> and </answer>, for example <answer> Beijing </answer>."
        "\nQuestion: {question}\n"
    ),
    closed_book=(
        "Answer the question below from what you know. Reason between <think> and </think>, then write only the short "
        "answer between <answer> and </answer>.\nQuestion: {question}\n"
    ),
    retrieved=(
        "Answer the question below with the help of the search results that follow it between <information> and "
        "</information>. Reason between <think> and </think>, then write only the short answer between <answer> and "
        "</answer>.\nQuestion: {question}\n"
    ),
    chat=True,
    document="Doc {number}: {text}\n",
    observation="\n\n<information>{documents}</information>\n\n",
    notice=(
        "\nThat was not a valid action. A query goes between search tags, a final answer between answer tags. Let me try "
        "again.\n"
    ),
    simulator_useful=(
        "You are the Google search engine. Write {count} useful documents for the query, each about 30 words. The user's "
        "question is: {question} Its correct answer is: {answer}. Useful documents help to answer it.\n"
        "Query: {query}\nUseful Output:\n"
    ),
    simulator_noisy=(
        "You are the Google search engine. Write {count} noisy documents for the query, each about 30 words. The user's "
        "question is: {question} Its correct answer is: {answer}. Noisy documents do not help to answer it.\n"
        "Query: {query}\nNoisy Output:\n"
    ),
)

MINIATURE = Prompts(
    policy="<question> {question}</question>",
    closed_book="<question> {question}</question><think> I may know this.</think>",
    retrieved="<question> {question}</question>",
    chat=False,
    document=" Doc {number}: {text}",
    observation="<information>{documents}</information>",
    notice=" Try again.",
    simulator_useful=(
        "<question> {question}</question><answer> {answer}</answer><search> {query}</search><think> useful</think><information>"
    ),
    simulator_noisy=(
        "<question> {question}</question><answer> {answer}</answer><search> {query}</search><think> noisy</think><information>"
    ),
    simulator_stop=("</information>",),
)

PROMPTS = {"zerosearch": ZEROSEARCH, "miniature": MINIATURE}


def get_prompts(name: str) -> Prompts:
    """The template set of this name. Raises ValueError naming the known ones."""
    if name not in PROMPTS:
        raise ValueError(f"prompts: no template set is called {name!r}; expected one of {', '.join(sorted(PROMPTS))}")
    return PROMPTS[name]


def fill(template: str, **fields: str | int) -> str:
    """The template with its fields filled in one pass: braces inside a field's value stay text, as do unknown fields."""
    return _FIELD.sub(lambda match: str(fields.get(match[1], match[0])), template)


def ask(question: str) -> str:
    """The question with a question mark at its end."""
    question = question.strip()
    return question if question.endswith("?") else question + "?"
