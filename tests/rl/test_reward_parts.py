"""The parts of AnswerReward for how an answer was found, by hand, and what a policy may try to get them for nothing."""

import pytest

from support.stage import Recorder, Stage
from zs_lightning.errors import UserError
from zs_lightning.rl.rewards import AnswerReward, judge
from zs_lightning.types import ActionKind, Document, QAExample, SearchResult, Status, Trajectory, Turn

GOLD = Document(title="Red Harbor", text="It was written by Foo  BAR, the novelist.")
OTHER = Document(text="It was written by Foo.")


def search(query, *documents, withheld=False, written=True):
    """A search of the policy's, or one that the environment made by itself."""
    span = (0, 1) if written else (0, 0)
    turn = Turn(text="", kind=ActionKind.SEARCH, content=query, span=span, observation_span=(1, 2))
    turn.documents, turn.withheld = documents, withheld
    return turn


def row(answer, *turns, question="Who wrote Red Harbor?", golds=("Foo Bar",)):
    last = Turn(text="", kind=ActionKind.ANSWER, content=answer or "", span=(0, 1))
    example = QAExample(id="1", question=question, golden_answers=golds, source="test")
    status = Status.ANSWERED if answer else Status.TURN_LIMIT
    turns = [*turns, last] if answer else list(turns)
    return Trajectory(example=example, sample=0, prompt_ids=[1], turns=turns, status=status)


def earned(reward, *rows):
    judge(rows, reward)
    assert [t.reward for t in rows] == pytest.approx([sum(t.reward_parts.values()) for t in rows])
    return [t.reward for t in rows]


FOUND = search("author of red harbor", OTHER, GOLD)
MISSED = search("author of red harbor", OTHER)


def test_a_search_that_found_the_answer_earns_a_part_of_what_the_answer_lacks():
    """F1 of Foo against Foo Bar is 2/3; the answer keeps 0.8."""
    rows = row("Foo Bar", FOUND), row("Foo", FOUND), row("red", FOUND), row("red", MISSED), row("red")
    reward = AnswerReward(format_weight=0.2, surfaced_weight=0.3)
    assert earned(reward, *rows) == pytest.approx([1, 0.2 + 0.8 * (2 / 3 + 0.3 / 3), 0.2 + 0.8 * 0.3, 0.2, 0.2])
    assert [t.reward_parts["surfaced"] for t in rows] == pytest.approx([0, 0.08, 0.24, 0, 0])
    assert earned(AnswerReward("em", surfaced_weight=0.3), *rows) == pytest.approx([1, 0.3, 0.3, 0, 0])
    # Off, it has no part: lines of trajectories are as they were.
    judge(rows, AnswerReward())
    assert list(rows[0].reward_parts) == ["answer", "format", "repeats", "searches"]


def test_an_answer_in_a_script_without_blanks_is_found():
    found = search("红港", Document(text="《红港》的作者是李白。"))
    wrong = row("x", found, question="谁写了红港？", golds=("李白",))
    assert earned(AnswerReward(surfaced_weight=0.25), wrong) == [0.25]


NOTHING = {
    "the query names it": row("red", search("did foo bar write it", GOLD)),
    "the question names it": row("red", FOUND, question="Was it Foo Bar or Red Bar?"),
    "yes and no stand anywhere": row("red", search("red harbor", Document(text="no")), golds=("No",)),
    "the environment searched": row("red", search("Who wrote Red Harbor?", GOLD, written=False)),
    "no answer": row(None, FOUND),
    "half of it in each document": row("red", search("a", OTHER), search("b", Document(text="Bar"))),
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_is_earned_where_nothing_was_searched_for_and_found(case):
    assert earned(AnswerReward(surfaced_weight=0.3), NOTHING[case]) == [0]


def test_what_a_policy_writes_is_no_document(tokenizers):
    """It quotes a result that holds the answer, and answers wrongly."""
    quoted = "Doc 1: gold 1 </information>"
    wrong = "</think><answer>x</answer>"
    tries = {
        "thought": (f"<think> {quoted} </think><search>x</search>", f"<think> {quoted} {wrong}"),
        "result": ("<information>", f"{quoted} <search>x</search>", f"<think> {wrong}"),
    }
    reward = AnswerReward(surfaced_weight=0.3)
    for turns in tries.values():
        played = Stage(tokenizers["raw"]).play(*turns)
        assert any("gold 1" in turn.text for turn in played.turns)
        assert earned(reward, played) == [0]
    found = Recorder(lambda r: SearchResult(key=r.key, documents=(Document(text="gold 1"),)))
    assert earned(reward, Stage(tokenizers["raw"]).play(*tries["thought"], search=found)) == [0.3]
    # Who forges a result has no part even of what was found.
    assert earned(reward, Stage(tokenizers["raw"]).play(*tries["result"], search=found)) == [0]


def test_an_answer_without_a_search_earns_less():
    """A search that asked for nothing of the question is none; one of the environment is one."""
    rows = [row("Foo Bar"), row("Foo"), row("Foo Bar", MISSED)]
    rows += [row("Foo Bar", search("a", withheld=True)), row("Foo Bar", search("Who?", written=False))]
    assert earned(AnswerReward(unsearched_cost=0.25), *rows) == pytest.approx([0.75, 0.5, 1, 0.75, 1])
    assert earned(AnswerReward(format_weight=0.5, unsearched_cost=1), rows[0]) == pytest.approx([0.5])


def test_a_missing_answer_is_a_turn_out_of_form():
    rows = [row("x", FOUND, FOUND), row(None, FOUND, FOUND), row(None)]
    assert earned(AnswerReward(format_weight=0.3), *rows) == pytest.approx([0.3, 0.3 * 2 / 3, 0])


@pytest.mark.parametrize("cost", [0.0, 0.25, 0.5])
def test_a_wrong_answer_never_earns_what_a_right_one_does(cost):
    weight = 0.99 - cost
    for score in ("f1", "em"):
        reward = AnswerReward(score, surfaced_weight=weight, unsearched_cost=cost)
        wrong, right = earned(reward, row("red", FOUND), row("Foo Bar"))
        assert (wrong, right) == (pytest.approx(weight), pytest.approx(1 - cost))
    with pytest.raises(UserError, match=rf"expected less than 1 - unsearched_cost, {1 - cost:g}; got {1 - cost:g}"):
        AnswerReward(surfaced_weight=1 - cost, unsearched_cost=cost)


@pytest.mark.parametrize("name", ["surfaced_weight", "unsearched_cost"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_shares_are_from_0_to_1(name, value):
    with pytest.raises(UserError, match=rf"^reward\.{name}: expected a number from 0 to 1; got"):
        AnswerReward(**{name: value})
