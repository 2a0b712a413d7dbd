"""Options against what alarms say, on the real module: likelihoods that are held, and the deepest rollouts alone."""

import copy
from dataclasses import replace

import pytest
import torch

from support import ppo
from support.detached import (
    NoEngine,
    alike,
    assert_same,
    policy,
    prepare,
    random_trajectories,
    slow_rows,
    step,
    step_of,
)
from support.runfolders import trajectory
from zs_lightning.data.sources import MiniatureSource
from zs_lightning.models.specs import LoraSpec
from zs_lightning.modules import PolicyRL
from zs_lightning.modules.step_metrics import step_metrics
from zs_lightning.rl.losses import LossSpec

LORA = LoraSpec(r=4)
HELD = LossSpec(likelihood_coef=0.8, clip_low=0.3, clip_high=0.3)
SEARCHES = trajectory(0, "yes", 3).turns[:3]


def weights_after(folder, rows, loss, updates):
    module = policy(folder, LORA, loss=loss, updates_per_rollout=2, lr=0.1)
    prepared = prepare(module, copy.deepcopy(rows))
    for _ in range(updates):
        step(module, prepared)
    return list(module.trainable().values())


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------------- likelihood


def test_one_update_that_could_hold_nothing_is_refused():
    with pytest.raises(ValueError, match=r"model\.loss\.likelihood_coef: .*; set model\.updates_per_rollout to 2 or more"):
        PolicyRL(NoEngine(), loss=HELD, updates_per_rollout=1)
    PolicyRL(NoEngine(), loss=HELD, updates_per_rollout=2)


def test_the_second_update_follows_the_slow_gradient(tiny_folder):
    """One row is right and without advantage, one wrong and without; log-probabilities at sampling are far off."""
    rows = random_trajectories(8, zero=2)
    rows[0].reward = 1.0
    module = policy(tiny_folder, LORA, loss=HELD, updates_per_rollout=2, micro_batch_tokens=60, lr=0.3)
    first = []
    for row in rows:
        with torch.no_grad():
            first.append(slow_rows(module.policy, row, 1.0)[0])
    prepared = prepare(module, rows)
    assert sum(len(batch.trajectories) for batch in prepared.batches) == 6
    step(module, prepared)
    tokens, loss, fallen = sum(sum(row.loss_mask) for row in rows), torch.zeros(()), 0
    for row, before in zip(rows, first, strict=True):
        now, old = slow_rows(module.policy, row, 1.0)
        is_right = row.advantage > 0 or row is rows[0]
        has_fallen = is_right and now.sum() < before.sum()
        fallen += int(has_fallen)
        for new_logprob, sampled, was in zip(now, old, before, strict=True):
            ratio = (new_logprob - sampled).exp()
            past = ratio > 1.3 if row.advantage > 0 else ratio < 0.7
            loss = loss - (0.0 if past else row.advantage * ratio / tokens)
            if has_fallen and new_logprob < was:
                loss = loss + 0.8 * (was - new_logprob) / tokens
    parameters = module.trainable()
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    moved, sums = step_of(module, prepared)
    assert_same(moved, expected)
    right = 1 + sum(row.advantage > 0 for row in rows)
    assert 0 < fallen < right
    assert (sums["kept_rows"], sums["fallen_rows"]) == pytest.approx((right, fallen))
    metrics = step_metrics(rows, rows, sums, 0.0, {})
    assert metrics["policy/likelihood_fell"] == pytest.approx(fallen / right)
    assert "policy/likelihood_fell" not in step_metrics(rows, rows, {}, 0.0, {})


@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_micro_batches_do_not_change_the_gradient(mean, tiny_folder):
    steps = []
    for tokens in (1, 60, 100_000):
        loss = replace(HELD, mean=mean)
        module = policy(tiny_folder, LORA, loss=loss, updates_per_rollout=2, micro_batch_tokens=tokens, lr=0.3)
        module.policy.double()
        prepared = prepare(module, random_trajectories(4, zero=2) + alike())
        step(module, prepared)
        moved, sums = step_of(module, prepared)
        steps.append(moved)
        assert sums["fallen_rows"] > 0
    assert_same(steps[1], steps[0], atol=1e-7)
    assert_same(steps[2], steps[0], atol=1e-7)


def test_without_a_fall_nothing_changes_bit_for_bit(tiny_folder):
    """The first update, and all where nothing is right."""
    off = LossSpec(clip_low=0.3, clip_high=0.3)
    rows = random_trajectories(4) + alike()
    first = weights_after(tiny_folder, rows, off, 1)
    assert same(weights_after(tiny_folder, rows, HELD, 1), first)
    second = weights_after(tiny_folder, rows, off, 2)
    assert not same(weights_after(tiny_folder, rows, HELD, 2), second)
    assert not same(first, second)
    for row in rows:
        row.advantage = -abs(row.advantage)
    assert same(weights_after(tiny_folder, rows, HELD, 2), weights_after(tiny_folder, rows, off, 2))


def test_right_rows_without_advantage_are_held_only_where_others_move_the_policy(tiny_folder):
    rows = random_trajectories(5, zero=4)
    for row in rows[:3]:
        row.reward = 1.0
    counts = []
    for loss in (LossSpec(), HELD):
        module = policy(tiny_folder, LORA, loss=loss, updates_per_rollout=2)
        counts += [len(prepare(module, part).lengths) for part in (rows, rows[:4])]
    assert counts == [3, 0, 6, 0]


def fall(folder, coef, updates=4):
    """How far a right answer falls in a few updates, in nats."""
    module = policy(folder, LORA, loss=LossSpec(likelihood_coef=coef), updates_per_rollout=updates, lr=0.1)
    rows = alike()
    for row in rows:
        now = iter(slow_rows(module.policy, row, 1.0)[0].tolist())
        row.old_logprobs = [next(now) if sampled else 0.0 for sampled in row.loss_mask]
    found, prepared = [], prepare(module, rows)
    for _ in range(updates + 1):
        with torch.no_grad():
            found.append(float(slow_rows(module.policy, rows[0], 1.0)[0].sum()))
        step(module, prepared)
    return found[0] - found[-1]


def test_right_answers_fall_with_their_wrong_likenesses_and_less_where_they_are_held(tiny_folder):
    free, held = fall(tiny_folder, 0.0), fall(tiny_folder, 2.0)
    assert free > 3
    assert held < free / 3


# ---------------------------------------------------------------------------------------------- choice


def searching(rows, *depths):
    """Gives the trajectories so many searches that found something."""
    for row, searches in zip(rows, depths, strict=True):
        row.turns = list(SEARCHES[:searches])
    return rows


def test_a_share_trains_as_its_rows_alone_with_the_advantages_of_all(tiny_folder):
    rows = searching(random_trajectories(6), 0, 3, 1, 3, 0, 2, 0)
    for number, row in enumerate(rows):
        row.example, row.reward = replace(row.example, id=str(number // 4)), float(number % 3)
    options = {"micro_batch_tokens": 60, "estimator": "grpo_no_std", "group_size": 4}
    module = policy(tiny_folder, LORA, loss=LossSpec(deepest_share=0.43), **options)
    prepared = module.update.prepare(rows, "cpu")
    # Rewards 0, 1, 2, 0 and 1, 2, 0: the means of the whole groups are 3/4 and 1.
    assert [row.advantage for row in rows] == pytest.approx([-0.75, 0.25, 1.25, -0.75, 0.0, 1.0, -1.0])
    assert prepared.metrics == {"chosen/share": pytest.approx(3 / 7), "chosen/searches": pytest.approx(8 / 3)}
    chosen = [rows[1], rows[3], rows[5]]
    assert prepared.tokens == prepared.denominator == sum(sum(row.loss_mask) for row in chosen)
    moved, _ = step_of(module, prepared)
    alone, _ = step_of(policy(tiny_folder, LORA), chosen)
    assert_same(moved, alone)


def test_all_are_trained_on_where_nothing_is_said(tiny_folder):
    module = policy(tiny_folder, LORA)
    prepared = prepare(module, random_trajectories(6))
    assert len(prepared.lengths) == 7
    assert prepared.metrics == {}


def test_the_critic_learns_from_the_chosen_alone():
    depths = (0, 3, 3, 3, 0, 2, 0)
    rows, chosen = searching(ppo.rollouts(0), *depths), searching(ppo.rollouts(0), *depths)
    chosen = [row for row, searches in zip(chosen, depths, strict=True) if searches]
    steps = []
    for given, share in ((rows, 0.57), (chosen, 1.0)):
        module = ppo.policy(loss=LossSpec(deepest_share=share))
        steps.append(step_of(module, module.update.prepare(given, "cpu"))[0])
    assert_same(*steps)
    advantages = [row.advantage for row in rows if row.turns]
    assert advantages == pytest.approx([row.advantage for row in chosen], abs=1e-5)
    assert [row.advantage for row in rows if not row.turns] == [0.0] * 3


def test_curves_of_a_step_are_those_of_all_its_rollouts(monkeypatch, tiny_folder):
    rows = searching(random_trajectories(6), 0, 3, 1, 3, 0, 2, 0)
    for row in rows:
        row.example = MiniatureSource().questions("validation")[0]
    module = policy(tiny_folder, LORA, loss=replace(HELD, deepest_share=0.43), updates_per_rollout=2, lr=0.3)
    module.update.estimator = None
    monkeypatch.setattr(module, "roll_out", lambda *_: rows)

    def judge(trajectories):
        for number, row in enumerate(trajectories):
            row.reward = float(number)
        return trajectories

    monkeypatch.setattr(module, "judge", judge)
    module.training_step([], 0)
    assert module.logged["reward"] == 3.0
    assert module.logged["search/per_question"] == pytest.approx(9 / 7)
    assert module.logged["chosen/searches"] == pytest.approx(8 / 3)
    assert module.logged["policy/likelihood_fell"] >= 0
