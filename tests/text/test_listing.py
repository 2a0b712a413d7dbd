"""Lists of documents as models write them, thoughts that the prompt opened, and what is no document."""

import json

import pytest

from support.stage import Recorder, Stage
from support.tiny import CHATML, make_tokenizer
from zs_lightning.search.simulator import written_documents
from zs_lightning.text.listing import listed_documents
from zs_lightning.text.prompts import MINIATURE, ZEROSEARCH, ZEROSEARCH_PROMPTED
from zs_lightning.text.protocol import parse_action
from zs_lightning.types import ActionKind

ONE, TWO = "Bonn lies on the Rhine.", "It was a capital. In 1939. He left."
STYLES = {
    "Doc": f"Doc 1: {ONE}\nDoc 2: {TWO}",
    "Document": f"Document 1: {ONE}\n\nDocument 2: {TWO}",
    "bold": f"**Document 1:** {ONE}\n\n**Document 2:** {TWO}",
    "dots": f"Sure, here they are:\n\n1. {ONE}\n2. {TWO}",
    "parentheses": f"1) {ONE}\n2) {TWO}",
    "colons": f"1: {ONE}\n2: {TWO}",
    "brackets": f"[1] {ONE}\n[2] {TWO}",
    "bold numbers": f"**1.** {ONE}\n\n**2.** {TWO}",
    "dashes": f"- {ONE}\n- {TWO}",
    "stars": f"* {ONE}\n* {TWO}",
    "texts": json.dumps([ONE, TWO]),
    "objects": json.dumps([{"text": ONE}, {"snippet": TWO}]),
    "object of a list": json.dumps({"results": [{"content": ONE}, {"text": TWO}]}, indent=1),
    "fence": f"```json\n{json.dumps([ONE, TWO])}\n```",
    "fenced lines": f"```\n1. {ONE}\n2. {TWO}\n```",
    "numbers and Doc": f"1. Doc 1: {ONE}\n\n2. Doc 2: {TWO}",
    "numbers and bold Doc": f"1. **Doc 1: {ONE}**\n2. **Doc 2: {TWO}**",
    "numbers and Document": f"[1] **Document 1:** {ONE}\n[2] **Document 2:** {TWO}",
    "dashes and Doc": f"- Doc 1: {ONE}\n- Doc 2: {TWO}",
    "Doc twice": f"Doc 1: {ONE}\nDoc 2: Doc 2: {TWO}",
    "the order again": f"Question: Where?\nCorrect answer: Bonn\n1. {ONE}\nAnswer: Bonn\n2. {TWO}\n\nCorrect answer: Bonn",
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_a_list_is_read(style):
    assert listed_documents(STYLES[style], 5) == [ONE, TWO]
    assert listed_documents(STYLES[style], 1) == [ONE]


def test_titles_stay_with_their_texts():
    headings = "Here:\n\n**Bonn**\nIt lies on the Rhine.\n\n**Köln**\nSo does it."
    assert listed_documents(headings, 5) == ["Bonn It lies on the Rhine.", "Köln So does it."]
    assert listed_documents(json.dumps([{"title": "Bonn", "text": "A town."}]), 5) == ["Bonn: A town."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Doc 1: The club 1. FC Köln\nDoc 2: b", ["The club 1. FC Köln", "b"]),
        ("1. They beat\n1. FC Köln\n2. In\n1939. He", ["They beat 1. FC Köln", "In 1939. He"]),
        ("1. a\n   - b\n2. c", ["a - b", "c"]),
        ("1. Pat Burrell - Batting hand: Right\n2.\n3. c", ["Pat Burrell - Batting hand: Right", "c"]),
    ],
)
def test_numbers_in_a_text_do_not_divide_it(text, expected):
    assert listed_documents(text, 5) == expected


WRITTEN = {
    "numbers": (
        "1. Undersea area, with a water mass of up to 18 miles high.\n2. At an altitude of approximately 2,535 miles above "
        "sea level.\n3. Located in the eastern states of Alaska, primarily between the Eastern United States and the West "
        "Atlantic.\n4. Known for its extensive coastline, with over 1,000 miles of coastline.\n5. A major agricultural region, "
        "with over 3,500 acres of land.",
        5,
    ),
    "colons": ("1: Pat Burrell is an American boxing champion.\n2: Pat Burrell is a former English actor", 2),
    "blank lines": ("1. Rio de Janeiro: Population: 126,739,000\n\n2. 2010 Rio de Janeiro population (informal)", 2),
    "numbers and Doc": ("1. Doc 1: The GDP of Gansu is USD 159 billion.\n2. Doc 2: In 2022, it was lifted.", 2),
    "blank lines and Doc": (
        "Doc 1: Yale University offers many degrees.\n\nDoc 2: It has produced over 300,000 students, with a reputation fo",
        2,
    ),
    "Doc in one line": ("Doc 1: Nvidia was founded in 1990. Doc 2: CUDA was revolutionary. Doc 3: Nvidia's", 3),
    "a long document cut by the limit": ("Doc 1: South Asia spans over India, Pakistan, Nepal, Bhutan, India, Nepal, Bhu", 1),
    "more than were ordered": ("\n".join(f"Doc {n}: Squid Game Season 1: Episode {n}" for n in range(1, 8)), 5),
    "prose with the answer": ("The highest point in the Philippines is Mount Atamadol, which is Mount Atamadol", 0),
    "a number that is none": ("52. The Star Wars: The Force Awakens is 447 million USD.\n\nI'm happy with my answer!", 0),
    "the answer": ("The correct answer is China.", 0),
}
"""By models of 135 M and 0.5 B parameters."""


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_small_models_wrote(kind):
    text, documents = WRITTEN[kind]
    assert len(written_documents(text, ZEROSEARCH_PROMPTED, 5)) == documents


THOUGHT = "Okay, the user wants noisy documents. The correct answer is Paris, so I must not mention it. Let me"


def test_an_unfinished_thought_is_no_document():
    for text in (THOUGHT, f"<think>{THOUGHT}", f"<think>{THOUGHT}\n1. Paris"):
        assert written_documents(text, ZEROSEARCH, 5) == ()
    assert written_documents(f"{THOUGHT}\n1. Paris", ZEROSEARCH, 5, thinking=True) == ()
    assert [d.text for d in written_documents(f"1. Paris</think>\n1. {ONE}", ZEROSEARCH, 5, thinking=True)] == [ONE]
    # The miniature's models were made for its one form, and have no thoughts.
    assert [d.text for d in written_documents("1. Paris", MINIATURE, 5)] == ["1. Paris"]


# ------------------------------------------------------------------------------------- thoughts that the prompt opens


@pytest.fixture(scope="module")
def thinker():
    tokenizer = make_tokenizer("chat")
    tokenizer.chat_template = CHATML.replace("assistant\n", "assistant\n<think>\n")
    return tokenizer


def test_a_tag_in_a_thought_that_the_prompt_opened_neither_ends_the_turn_nor_acts(thinker):
    stage, search = Stage(thinker, ZEROSEARCH), Recorder()
    assert "<think>\n" in stage.encoder.decode(stage.encoder.prompt("{question}", {"question": "x"}, True))[-12:]
    first = "maybe <search>foo</search> or <answer>x</answer>, <information> no</think><search>real query</search>"
    trajectory = stage.play(first, "<answer>Foo</answer>", search=search, max_new_tokens=200, max_length=1500)
    assert [request.query for request in search.requests] == ["real query"]
    assert [turn.text for turn in trajectory.turns] == [first, "<answer>Foo</answer>"]
    assert trajectory.answer == "Foo"
    endless = stage.play("<search>foo</search><|im_end|>", "<answer>Foo</answer>", max_length=1500)
    assert [turn.content for turn in endless.turns] == ["unclosed_thought", "Foo"]


def test_whether_a_turn_begins_in_a_thought_is_read_from_the_template_alone(thinker, tokenizers):
    opens = Stage(thinker).encoder.opens_thought
    assert opens("Between <think> and </think>: {question}", True)
    assert not opens("{question}", False)
    assert opens("{question}\n<think>", False)
    assert not Stage(tokenizers["chat"]).encoder.opens_thought("Begin with <think>.", True)
    assert parse_action("maybe I <search>foo</search>", thinking=True).content == "unclosed_thought"
    assert parse_action("a </think><answer>x</answer>", thinking=True).kind is ActionKind.ANSWER
