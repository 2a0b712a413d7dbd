"""Tokens read one step late, as on a card, run on the CPU."""

import pytest

from support.mixed import mix
from support.slow_generator import MAX_LENGTH, MODELS, StopAt, request, same, slow_turn, write
from support.stage import Recorder as Library
from support.stage import Stage, example
from support.tiny import make_model
from zs_lightning.errors import RunError
from zs_lightning.generation import Generator
from zs_lightning.generation.decoding import MANNERS, Manner


@pytest.fixture
def late(monkeypatch):
    """Generators made from now on read late."""
    return lambda: monkeypatch.setitem(MANNERS, "cpu", Manner(read=32, late=True))


def test_random_mixes_of_calls_equal_rows_run_alone(late):
    late()
    for seed in range(2000, 2080):
        mix(seed)


def test_tokens_logprobs_and_counts_are_the_same(tiny_model, late):
    expected, plain = write(tiny_model)
    late()
    written, generator = write(tiny_model)
    same(written, expected)
    assert generator.sampled_tokens == plain.sampled_tokens == sum(len(tokens) for tokens, _, _ in expected.values())


def test_rollouts_are_the_same(tokenizers, late):
    stage = Stage(tokenizers["raw"])
    # More than a turn is played to its end: what is launched before the end is known.
    turns = [
        "<search> red harbor </search>",
        "I do not know<|endoftext|>",
        "<search> its author </search>",
        "<answer> Foo </answer>",
    ]
    scripts = [(example(i), [[*stage.ids(turn), 0] for turn in turns[i % 3 :]]) for i in range(20)]
    expected = stage.run(scripts, Library(), slots=3)
    late()
    assert stage.run(scripts, Library(), slots=3) == expected
    assert {t.status for t in expected} == {"answered"}


def stopping(model, prompt, at=3, new=12):
    """A row that stops by itself after `at` tokens, found by letting it run."""
    free = slow_turn(model, prompt, request("free", [], new=new))[0]
    assert free.index(free[at - 1]) == at - 1
    return request("stops", prompt, new=new, stop=StopAt(free[at - 1]), keep=True), free


def test_what_was_launched_for_an_ended_row_is_dropped(late):
    late()
    turn, free = stopping(MODELS[1], [5, 6, 7])
    generator = Generator(MODELS[1], 2, MAX_LENGTH)
    generator.submit(turn)
    generator.submit(request("long", [1, 2], new=9))
    ends = []
    while not ends:
        ends = generator.step()
    row = generator.rows["stops"]
    assert (ends[0].token_ids, ends[0].stopped, row.length, row.drawn) == (free[:3], True, 5, 3)
    assert generator.pending.rows.count(None) == 1, "its fourth token is on its way"
    generator.submit(request("stops", [9], new=4, keep=True))
    written = {generated.key: generated.token_ids for generated in generator.run()}
    assert written["stops"] == slow_turn(MODELS[1], [5, 6, 7, *free[:3], 9], request("", [], new=4))[0]
    assert written["long"] == slow_turn(MODELS[1], [1, 2], request("", [], new=9))[0]


def test_what_was_launched_in_vain_keeps_the_generator_busy_no_longer(late):
    late()
    turn, _ = stopping(MODELS[1], [5, 6, 7])
    generator = Generator(MODELS[1], 1, MAX_LENGTH)
    generator.submit(turn)
    generator.run()
    assert generator.pending.rows == [None]
    generator.submit(request("other", [1], new=2))
    assert generator.stalled
    generator.release("stops")
    assert not generator.stalled
    assert generator.run()[0].token_ids == slow_turn(MODELS[1], [1], request("", [], new=2))[0]


def test_no_token_is_launched_beyond_the_limit(late, monkeypatch):
    late()
    generator, launched = Generator(MODELS[0], 4, MAX_LENGTH), []
    launch = generator.decoding.launch
    monkeypatch.setattr(generator.decoding, "launch", lambda rows, before: launched.extend(rows) or launch(rows, before))
    for i, new in enumerate((1, 2, 3, 7)):
        generator.submit(request(str(i), [i + 1], new=new, keep=i % 2 == 0))
    # The last tokens are on their way: rows are neither alive nor ended, and the generator has something to do.
    generator.step()
    assert [generator.live, len(generator.rows), generator.busy, generator.stalled] == [3, 4, True, False]
    generator.step()
    assert generator.live == 2
    assert generator.rows["2"].ended is False
    generator.run()
    assert len(launched) == 0 + 1 + 2 + 6


def test_clear_forgets_a_step_on_its_way(late):
    late()
    generator = Generator(MODELS[0], 2, 30)
    for key in ("a", "b"):
        generator.submit(request(key, [1, 2], new=9, keep=True))
    generator.step()
    assert generator.pending
    generator.clear()
    assert not generator.busy
    generator.submit(request("a", [3, 4], new=9))
    assert generator.run()[0].token_ids == slow_turn(MODELS[0], [3, 4], request("a", [], new=9))[0]


def test_nan_logits_stop_the_run_before_a_token_is_used(late):
    late()
    model = make_model("qwen3")
    generator = Generator(model, slots=1, max_length=30)
    generator.submit(request("a", [1, 2]))
    generator.step()
    model.model.norm.weight.data.fill_(float("nan"))
    generator.step()
    with pytest.raises(RunError, match="NaN"):
        generator.run()
    assert len(generator.rows["a"].token_ids) == 2
