"""Micro-batches of trajectories."""

import random

import pytest

from support.stage import example
from zs_lightning.rollout import collate, micro_batches
from zs_lightning.types import Trajectory


def random_trajectory(rng, i):
    prompt, tokens = rng.randint(1, 20), rng.randint(1, 60)
    mask = [rng.random() < 0.6 for _ in range(tokens)]
    return Trajectory(
        example=example(i),
        sample=0,
        prompt_ids=[rng.randrange(50) for _ in range(prompt)],
        token_ids=[rng.randrange(50) for _ in range(tokens)],
        loss_mask=mask,
        old_logprobs=[-rng.random() if m else 0.0 for m in mask],
        advantage=rng.gauss(0, 1),
    )


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_hold_each_trajectory_once_within_the_budget(seed):
    rng = random.Random(seed)
    trajectories = [random_trajectory(rng, i) for i in range(rng.randint(0, 40))]
    budget = rng.choice([1, 50, 200, 10_000])
    batches = micro_batches(trajectories, budget)
    assert sorted(id(t) for batch in batches for t in batch) == sorted(map(id, trajectories))
    for batch in batches:
        width = max(len(t.prompt_ids) + len(t.token_ids) for t in batch)
        assert batch
        assert len(batch) == 1 or len(batch) * width <= budget


@pytest.mark.parametrize("seed", range(20))
def test_collate_keeps_every_token_at_its_place(seed):
    rng = random.Random(seed)
    trajectories, pad = [random_trajectory(rng, i) for i in range(rng.randint(1, 6))], rng.randrange(50)
    batch = collate(trajectories, pad)
    width = batch.input_ids.shape[1]
    for b, t in enumerate(trajectories):
        for position in range(width):
            after = position - len(t.prompt_ids)
            inside = after < len(t.token_ids)
            token = t.prompt_ids[position] if after < 0 else t.token_ids[after] if inside else pad
            assert int(batch.input_ids[b, position]) == token
            assert bool(batch.loss_mask[b, position]) == (after >= 0 and inside and t.loss_mask[after])
    trained = [(b, k) for b, t in enumerate(trajectories) for k, sampled in enumerate(t.loss_mask) if sampled]
    assert batch.rows.tolist() == [b for b, _ in trained]
    assert batch.old_logprobs.tolist() == pytest.approx([trajectories[b].old_logprobs[k] for b, k in trained], abs=1e-6)
    assert batch.advantages.tolist() == pytest.approx([trajectories[b].advantage for b, _ in trained])
    assert batch.trajectories == trajectories
