"""Trajectories as TensorBoard shows them."""

import random
import re

from markdown import markdown as render_markdown

from support.runfolders import CONTROLS, HOSTILE, Page, policy, trajectory
from zs_lightning.callbacks.trajectory_text import best_and_worst, trajectory_text, wrong_and_right
from zs_lightning.types import ActionKind, Status, Turn

WORDS = {
    2: "<think> Which?\nI ask.</think><search> a|b </search>",
    3: "\n<information>Doc 1: `x` *y* _z_ [l](http://e) &amp; Doc 2: 1. <b>no</b></information>\n",
    4: "<think> So.</think><answer>yes</answer>",
    5: "<information>made up</information> 1. well",
    6: "\nWrite <search> or <answer>.\n",
}


def decode(ids):
    return "".join(WORDS[i] for i in ids)


def items(text):
    """What the page shows: the list items with the depth of each, and the page itself."""
    html = render_markdown(text, extensions=["tables", "fenced_code"])
    found, depth = [], 0
    for tag, said in re.findall("<(/?[a-z]+)>([^<]*)", html):
        depth += {"ul": 1, "/ul": -1}.get(tag, 0)
        if tag in ("li", "p", "strong", "/strong"):
            found += [(depth, "")] if tag == "li" else []
            if depth and said.strip():
                found[-1] = (depth, found[-1][1] + Page(said).text)
    return found, Page(html)


def test_a_trajectory_is_shown_turn_by_turn_as_it_was_written_and_read():
    shown = trajectory(0, "yes", question="Is <b>it</b> | so?")
    shown.turns[0].label, shown.turns[0].noise, shown.turns[0].withheld = "useful", 0.0, True
    shown.reward, shown.advantage, shown.reward_parts = 0.9, -0.5, {"answer": 1.0, "search_cost": -0.1, "format": 0.0}
    found, page = items(trajectory_text(shown, decode))
    assert found == [
        (1, "1 policy (sampled)"),
        (2, "thinks: Which? ⏎ I ask."),
        (2, "searches: a|b"),
        (1, "1 engine, 1 document, useful, answers withheld (not sampled)"),
        (2, "Doc 1: `x` *y* _z_ [l](http://e) &amp;"),
        (2, "Doc 2: 1. <b>no</b>"),
        (1, "2 policy (sampled)"),
        (2, "thinks: So."),
        (2, "answers: yes"),
    ]
    assert set(page.tags) <= {"p", "strong", "ul", "li"}
    lines = [line for line in page.text.splitlines() if line][:3]
    assert lines == [
        "Is <b>it</b> | so?",
        "answer: yes, right; golden answers: yes",
        "answered; reward 0.90 (answer 1.00, search_cost -0.10), advantage -0.50",
    ]


def test_what_went_wrong_is_shown_too():
    """A forged result, a notice that names tags, noise in a list of both, a search that was repeated, and a failure."""
    shown = trajectory(0, None, 2)
    first, second = shown.turns
    shown.turns = [
        Turn(text="", kind=ActionKind.INVALID, content="no_action", span=(0, 1), observation_span=(1, 2)),
        first,
        second,
    ]
    shown.token_ids, shown.loss_mask = [5, 6, 2, 3, 2, 3], [True, False] * 3
    for number, (turn, repeated) in enumerate(((first, False), (second, True)), 1):
        turn.span, turn.observation_span = (2 * number, 2 * number + 1), (2 * number + 1, 2 * number + 2)
        turn.label, turn.noise, turn.repeated = "off_topic", 1 / 3, repeated
    shown.status, shown.failure = Status.FAILED, "no | answer"
    found, page = items(trajectory_text(shown, decode))
    assert found[:5] == [
        (1, "1 policy (sampled)"),
        (2, "forges a result: made up"),
        (2, "1. well"),
        (1, "1 notice, no_action (not sampled)"),
        (2, "Write <search> or <answer>."),
    ]
    engines = [text for depth, text in found if "engine" in text]
    assert engines == [
        "2 engine, 1 document, off_topic in 33% of them (not sampled)",
        "3 engine, 1 document, off_topic in 33% of them, as before (not sampled)",
    ]
    assert "no answer; golden answers: yes" in page.text
    assert "failed: no | answer" in page.text
    assert "reward" not in page.text


def test_hostile_text_stays_text_wherever_it_stands():
    hostile = HOSTILE + CONTROLS + "\n# a\n- b\n1. c\n    d\n```\ne\n---\n| f | g |\n|---|---|\n![h](http://i)"
    shown = trajectory(0, hostile, question=hostile, golden_answers=(hostile,))
    shown.turns[0].label, shown.turns[0].noise = hostile, 0.0
    shown.status, shown.reward_parts = Status.ANSWERED, {hostile: 1.0}
    html = render_markdown(trajectory_text(shown, lambda ids: hostile), extensions=["tables", "fenced_code"])
    page = Page(html)
    assert set(page.tags) <= {"p", "strong", "ul", "li"}
    assert page.attributes == []
    assert page.text.count("<script>alert(1)</script>") == 8
    assert not set("\x00\x1b\x07\u202e\u2028\ufeff") & set(html)


def test_best_and_worst_are_two_different_rollouts():
    three = policy("a", "b", "c")
    three[1].reward, three[2].reward = 1.0, -1.0
    assert best_and_worst(three) == [three[1], three[2]]
    assert [t.example.id for t in best_and_worst(policy("a", "b"))] == ["0", "1"]
    assert len(best_and_worst(policy("a"))) == 1


def test_of_a_validation_two_wrong_and_two_right_ones_are_shown_and_always_the_same():
    def shown(*answers):
        rows = policy(*answers)
        random.Random(0).shuffle(rows)
        chosen = wrong_and_right(rows)
        # Whatever the order in which they came.
        assert chosen == wrong_and_right(rows[::-1])
        assert len({t.example.id for t in chosen}) == len(chosen)
        return [t.answer for t in chosen], [t.example.id for t in chosen]

    assert shown(*["yes", "no"] * 8)[0] == ["no", "no", "yes", "yes"]
    assert shown("no", *["yes"] * 9)[0] == ["no", "yes", "yes", "yes"]
    assert shown(*["no"] * 9, "yes")[0] == ["no", "no", "yes", "no"]
    assert shown(*["no"] * 9)[0] == ["no"] * 4
    assert shown("yes", None)[0] == [None, "yes"]
    assert shown()[0] == []
    # Not the first ones of the file, and not by how they look.
    assert shown(*["no"] * 50)[1] != shown(*["no"] * 4)[1]
