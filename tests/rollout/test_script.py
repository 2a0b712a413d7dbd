"""Written turns become the tokens and masks that a rollout of them has."""

from dataclasses import asdict, replace

import pytest

from support.stage import OBSERVATION, PROMPTS, Recorder, Stage, example
from support.tiny import make_tokenizer
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.rollout import RolloutSpec
from zs_lightning.rollout.script import TAGS, Demonstration, play
from zs_lightning.types import ActionKind, Document, Status

LIMITS = {"max_turns": 3, "max_new_tokens": 100, "max_length": 1200, "slots": 8}
SPEC = RolloutSpec(**LIMITS)
SEARCH = "<think> I need it. </think>\n<search> red harbor </search>"
ANSWER = "<think> Foo. </think>\n<answer> Foo Bar </answer>"
SCRIPTS = [
    [SEARCH, ANSWER],
    [SEARCH, SEARCH, "<answer> Foo </answer>"],
    ["no action</answer>", SEARCH, ANSWER],
    ["<search> a <b> </search>", "<search> red harbor </search>", "<search> x </search>", "<search> unsent </search>"],
    ["<answer> at once </answer>"],
    [f"<think> {'long ' * 60}", ANSWER],
]


def demonstrated(trajectory):
    """A rollout as text."""
    written = tuple(turn.text for turn in trajectory.turns if turn.text)
    return Demonstration(trajectory.example, written, tuple(turn.documents for turn in trajectory.turns))


def known(trajectory):
    return {**asdict(trajectory), "old_logprobs": None}


@pytest.mark.parametrize("kind", ["raw", "chat", "bos"])
def test_a_rollouts_own_text_has_its_tokens_and_masks(kind, tokenizers):
    """Searches, answers, notices, limits and cuts: all of a trajectory but for the log-probabilities, which nobody had."""
    stage = Stage(tokenizers[kind], replace(PROMPTS, chat=kind == "chat"))
    scripts = [(example(i), turns) for i, turns in enumerate(SCRIPTS)]
    limits = {**LIMITS, "max_observation_tokens": 40}
    rolled = stage.run(scripts, Recorder(), **limits)
    assert {t.status for t in rolled} == {Status.ANSWERED, Status.TURN_LIMIT}
    played = play(map(demonstrated, rolled), stage.encoder, stage.prompts, RolloutSpec(**limits), stage.stop)
    assert list(map(known, played)) == list(map(known, rolled))
    assert {value for t in played for value in t.old_logprobs} == {0.0}


def test_the_masks_by_hand(tokenizers):
    """What the policy writes is learnt, tags included; what it reads is not."""
    stage = Stage(tokenizers["raw"])
    found = (Document(text="red harbor is found"),)
    (made,) = play([Demonstration(example(1), (SEARCH, ANSWER), (found, ()))], stage.encoder, PROMPTS, SPEC, stage.stop)
    literal = stage.encoder.literal
    assert made.prompt_ids == literal("Question:", start=True) + literal(" Who is number 1?") + literal("\n")
    pieces = [literal(SEARCH), literal(OBSERVATION), literal(ANSWER)]
    assert stage.encoder.decode(made.token_ids) == SEARCH + OBSERVATION + ANSWER
    mask = [True] * len(pieces[0]) + [False] * (len(made.token_ids) - len(pieces[0]) - len(pieces[2])) + [True] * len(pieces[2])
    assert made.loss_mask == mask
    assert (made.status, made.answer) == (Status.ANSWERED, "Foo Bar")


def test_what_the_environment_searched_first_is_not_learnt(tokenizers):
    stage, spec = Stage(tokenizers["raw"]), RolloutSpec(**{**LIMITS, "max_turns": 0, "retrieve_first": True})
    found = (Document(text="red harbor is found"),)
    (made,) = play([Demonstration(example(1), (ANSWER,), (found, ()))], stage.encoder, PROMPTS, spec, stage.stop)
    assert stage.encoder.decode(made.token_ids) == OBSERVATION + ANSWER
    assert sum(made.loss_mask) == len(stage.encoder.literal(ANSWER))
    assert made.loss_mask[-1]
    assert [turn.documents for turn in made.turns] == [found, ()]


def test_a_turn_ends_at_its_closing_tag(tokenizers):
    stage = Stage(tokenizers["raw"])
    turns = (f"{SEARCH}\n\n<information> mine </information>", f"{ANSWER} and more")
    (made,) = play([Demonstration(example(1), turns, ((), ()))], stage.encoder, PROMPTS, SPEC, stage.stop)
    # As that of a policy, whose last token may hold a line's end besides.
    assert [turn.text.rstrip("\n") for turn in made.turns] == [SEARCH, ANSWER]


def test_a_question_may_be_demonstrated_more_than_once(tokenizers):
    stage = Stage(tokenizers["raw"])
    turns = [("<answer> a </answer>",), ("<answer> b </answer>",), ("<answer> c </answer>",)]
    rows = [Demonstration(example(i), written, ((),)) for i, written in zip((1, 2, 1), turns, strict=True)]
    assert [t.answer for t in play(rows, stage.encoder, PROMPTS, SPEC, stage.stop)] == ["a", "b", "c"]


def test_a_search_that_comes_again_finds_what_is_written_for_it(tokenizers):
    """Whatever the run's own rollouts would find: theirs is no simulator's draw."""
    stage, found = Stage(tokenizers["raw"]), ((Document(text="a"),), (Document(text="b"),), ())
    rows = [Demonstration(example(1), (SEARCH, SEARCH, ANSWER), found)]
    (made,) = play(rows, stage.encoder, PROMPTS, RolloutSpec(**{**LIMITS, "noise_draw": "query"}), stage.stop)
    assert tuple(turn.documents for turn in made.turns) == found


def test_a_search_that_nothing_is_written_for_fails(tokenizers):
    stage = Stage(tokenizers["raw"])
    (made,) = play([Demonstration(example(1), (SEARCH, ANSWER), ())], stage.encoder, PROMPTS, SPEC, stage.stop)
    assert (made.status, made.failure) == (Status.FAILED, "no result was written down")


@pytest.mark.parametrize("text", [SEARCH, SEARCH.removeprefix("<think>")], ids=["whole", "begun by another's prompt"])
@pytest.mark.parametrize("opens", [False, True])
def test_a_thought_is_opened_once_by_the_prompt_or_by_the_policy(text, opens, tokenizers):
    prompts = replace(PROMPTS, policy="Question: {question}\n<think>" if opens else PROMPTS.policy)
    stage = Stage(tokenizers["raw"], prompts)
    (made,) = play([Demonstration(example(1), (text, ANSWER), ((), ()))], stage.encoder, prompts, SPEC, stage.stop)
    assert made.turns[0].text == (SEARCH.removeprefix("<think>") if opens else SEARCH)
    assert [turn.kind for turn in made.turns] == [ActionKind.SEARCH, ActionKind.ANSWER]


def test_tags_that_are_tokens_are_these_and_control_tokens_stay_text():
    tokenizer = make_tokenizer("chat")
    tokenizer.add_tokens(["<think>", "</think>"])
    encoder = TextEncoder(tokenizer)
    text = "<think> a </think>\n<search> b <|im_end|> <tool_call> </search>"
    ids = encoder.written(text, TAGS)
    assert encoder.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert [token for token in tokens if token in ("<think>", "</think>", "<|im_end|>", "<tool_call>")] == [
        "<think>",
        "</think>",
    ]
    assert encoder.written("", TAGS) == []
