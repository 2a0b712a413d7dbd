"""Rollouts of the shipped miniature over its world."""

import pytest
import torch

from support.stage import GREEDY
from zs_lightning.generation import Generator, StopTags
from zs_lightning.generation.decoding import Decoding
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.rollout import Rollouter, RolloutSpec, collate
from zs_lightning.search import BM25Search
from zs_lightning.text.prompts import MINIATURE
from zs_lightning.text.protocol import STOP_TAGS


@pytest.fixture(scope="module")
def world():
    from zs_lightning.miniature.world import make_world

    search = BM25Search()
    search.setup()
    return [question.example(0) for question in make_world(0).questions()["train"][:6]], search


def real_run(miniature, world, examples, group_size, seed, sampling=None, slots=12, **limits):
    model, tokenizer = miniature
    spec = RolloutSpec(
        **{"max_turns": 2, "max_new_tokens": 30, "max_observation_tokens": 60, "max_length": 320, "slots": slots, **limits}
    )
    engine = Generator(model, spec.slots, spec.max_length)
    rollout = Rollouter(engine, TextEncoder(tokenizer), world[1], MINIATURE, spec, StopTags(tokenizer, STOP_TAGS))
    return {(t.example.id, t.sample): t.token_ids for t in rollout.run(examples, group_size, seed, sampling)}


def test_a_trajectory_is_a_function_of_seed_example_and_sample(miniature, world):
    examples = world[0]
    reference = real_run(miniature, world, examples, 2, seed=7)
    assert len(reference) == 12
    assert len({tuple(ids) for ids in reference.values()}) > 6
    for slots in (3, 5):
        assert real_run(miniature, world, examples[::-1], 2, seed=7, slots=slots) == reference
    alone = real_run(miniature, world, examples[2:3], 3, seed=7)
    assert {key: alone[key] for key in alone if key in reference} == {
        k: v for k, v in reference.items() if k[0] == examples[2].id
    }
    assert real_run(miniature, world, examples, 2, seed=8) != reference


def test_greedy_runs_do_not_depend_on_the_seed(miniature, world):
    greedy = real_run(miniature, world, world[0], 1, 1, GREEDY)
    assert real_run(miniature, world, world[0][::-1], 1, 2, GREEDY, slots=2) == greedy
    assert real_run(miniature, world, world[0], 1, 1) != greedy


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_sampled_logprobs_are_those_that_are_trained(miniature, world, temperature):
    model, tokenizer = miniature
    spec = RolloutSpec(
        max_turns=3, max_new_tokens=30, max_observation_tokens=60, max_length=400, slots=4, temperature=temperature
    )
    engine = Generator(model, spec.slots, spec.max_length)
    rollout = Rollouter(engine, TextEncoder(tokenizer), world[1], MINIATURE, spec, StopTags(tokenizer, STOP_TAGS))
    trajectories = rollout.run(world[0], 1, 3)
    assert any(t.searches for t in trajectories)
    batch = collate(trajectories, tokenizer.eos_token_id)
    with torch.no_grad():
        found, _ = token_logprobs(model, batch.input_ids, batch.loss_mask, temperature)
    torch.testing.assert_close(found, batch.old_logprobs, atol=1e-4, rtol=0)


def test_a_rollout_that_ran_out_of_memory_is_the_same_and_asks_nothing_twice(miniature, world, monkeypatch):
    asked, hidden, submit = [], Decoding.hidden, BM25Search.submit

    def failing(self, *args):
        asked.append("")
        if asked.count("") % 17 == 0 and self.cache.slots > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, *args)

    monkeypatch.setattr(
        BM25Search, "submit", lambda self, requests: asked.extend(r.key for r in requests) or submit(self, requests)
    )
    expected = real_run(miniature, world, world[0], 2, seed=7)
    searches = sorted(asked)
    asked.clear()
    monkeypatch.setattr(Decoding, "hidden", failing)
    assert real_run(miniature, world, world[0], 2, seed=7) == expected
    assert len(searches) > 6
    assert sorted(filter(None, asked)) == searches
