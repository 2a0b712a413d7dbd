"""The policy's update against slow gradients: one unpadded trajectory at a time, all logits, the whole batch's denominator."""

import copy

import pytest
import torch

from support.detached import (
    TRAINABLE,
    DetachedPolicy,
    NoEngine,
    assert_same,
    policy,
    prepare,
    random_trajectories,
    slow_rows,
    step,
    step_of,
)
from support.tiny import make_model
from zs_lightning.models.specs import ModelSpec
from zs_lightning.models.vocabulary import leave_out_padding
from zs_lightning.rl.losses import LossSpec
from zs_lightning.rollout import RolloutSpec


def slow_gradient(module, trajectories, base=None, kl_coef=0.0, clip=None):
    """By name, from one backward pass over a loss written as loops."""
    tokens = sum(sum(t.loss_mask) for t in trajectories)
    temperature, loss = module.rollout.temperature, torch.zeros(())
    for trajectory in trajectories:
        now, old = slow_rows(module.policy, trajectory, temperature)
        for new_logprob, old_logprob in zip(now, old, strict=True):
            if clip is None:
                loss = loss - trajectory.advantage * new_logprob / tokens
            else:
                ratio = (new_logprob - old_logprob).exp()
                # Pessimistic: no gradient where the ratio has gone past the bound in the direction that pays.
                past = ratio > 1 + clip if trajectory.advantage > 0 else ratio < 1 - clip
                loss = loss - (0.0 if past else trajectory.advantage * ratio / tokens)
        if base is not None:
            with torch.no_grad():
                reference, _ = slow_rows(base, trajectory, temperature)
            difference = reference - now
            loss = loss + kl_coef * (difference.exp() - difference - 1).sum() / tokens
    parameters = module.trainable()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), gradients, strict=True)}


@pytest.mark.parametrize("lora", TRAINABLE)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_update_follows_the_slow_gradient(tiny_folder, lora, temperature):
    trajectories = random_trajectories(0)
    # A trajectory without any sampled token, and advantages of both signs.
    trajectories[2].loss_mask = [False] * len(trajectories[2].loss_mask)
    module = policy(tiny_folder, lora, rollout=RolloutSpec(temperature=temperature))
    expected = slow_gradient(module, trajectories)
    moved, sums = step_of(module, trajectories)
    assert_same(moved, expected)
    norm = sum(float((g**2).sum()) for g in expected.values()) ** 0.5
    assert sums["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert sums["tokens"] == sum(sum(t.loss_mask) for t in trajectories)


@pytest.mark.parametrize("lora", TRAINABLE)
def test_micro_batches_do_not_change_the_gradient(tiny_folder, lora):
    trajectories = random_trajectories(1)
    steps = []
    for tokens in (1, 60, 100_000):
        steps.append(step_of(policy(tiny_folder, lora, micro_batch_tokens=tokens), trajectories)[0])
    assert_same(steps[1], steps[0])
    assert_same(steps[2], steps[0])


def test_rows_without_signal_are_skipped_and_count_in_the_denominator(tiny_folder):
    trajectories = random_trajectories(2, zero=3)
    module = policy(tiny_folder)
    expected = slow_gradient(module, trajectories)
    prepared = prepare(module, trajectories)
    assert sum(len(batch.input_ids) for batch in prepared.batches) == 4
    moved, _ = step_of(module, prepared)
    assert_same(moved, expected)


def test_no_signal_at_all_is_no_step(tiny_folder):
    module = policy(tiny_folder)
    module.own_optimizer = torch.optim.AdamW(module.trainable().values(), lr=1.0, weight_decay=0.5)
    before = copy.deepcopy(module.state_dict())
    for parameter in module.trainable().values():
        parameter.grad = torch.zeros_like(parameter)  # As where ranks add up: AdamW would decay the weights.
    sums = step(module, random_trajectories(3, zero=7))
    assert sums["grad_norm"] == 0.0
    assert all(torch.equal(before[name], p) for name, p in module.trainable().items())


@pytest.mark.parametrize("lora", TRAINABLE)
def test_later_updates_on_a_batch_are_clipped(tiny_folder, lora):
    trajectories = random_trajectories(4)
    module = policy(tiny_folder, lora, updates_per_rollout=2, loss=LossSpec(clip_low=0.3, clip_high=0.3))
    expected = slow_gradient(module, trajectories, clip=0.3)
    moved, sums = step_of(module, trajectories)
    assert_same(moved, expected)
    assert 0.1 < sums["clip_fraction"] / sums["tokens"] < 0.9


@pytest.mark.parametrize("lora", TRAINABLE)
def test_the_kl_term_follows_the_slow_gradient_and_pulls_to_the_base(tiny_folder, lora):
    trajectories = random_trajectories(5, zero=7)
    limits = RolloutSpec(temperature=0.7)  # The reference too is at the temperature that sampled.
    module, base = (
        policy(tiny_folder, lora, loss=LossSpec(kl_coef=0.5), lr=0.5, rollout=limits),
        make_model("qwen3", initializer_range=0.1),
    )
    leave_out_padding(base, module.tokenizer)
    if lora is None:
        generator = torch.Generator().manual_seed(2)
        for parameter in module.policy.parameters():
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)

    def divergence():
        """KL(policy || base), exactly, over all places of all rows."""
        total = 0.0
        with torch.no_grad():
            for t in trajectories:
                ids = torch.tensor([t.prompt_ids + t.token_ids])
                mine, other = (m(ids).logits.log_softmax(-1) for m in (module.policy, base))
                total += float((mine.exp() * (mine - other)).sum())
        return total

    expected, before = slow_gradient(module, trajectories, base, 0.5), divergence()
    moved, sums = step_of(module, trajectories)
    assert_same(moved, expected)
    assert sums["kl"] > 0
    for _ in range(30):
        step(module, trajectories)
    assert divergence() < 0.97 * before


def test_the_kl_of_an_unchanged_policy_is_zero(tiny_folder):
    for lora in TRAINABLE:
        module = DetachedPolicy(
            NoEngine(), model=ModelSpec(path=tiny_folder, device="cpu"), lora=lora, loss=LossSpec(kl_coef=1.0), seed=0
        )
        module.setup("fit")
        module.attach(torch.optim.SGD(module.trainable().values(), lr=1.0))
        moved, sums = step_of(module, random_trajectories(6, zero=7))
        assert sums["kl"] == pytest.approx(0.0, abs=1e-6)
        assert all(float(step.abs().max()) < 1e-5 for step in moved.values())


def test_gradients_are_clipped_to_the_norm(tiny_folder):
    trajectories = random_trajectories(0)
    free, sums = step_of(policy(tiny_folder), trajectories)
    clipped, _ = step_of(policy(tiny_folder, max_grad_norm=sums["grad_norm"] / 4), trajectories)
    assert_same({name: 4 * step for name, step in clipped.items()}, free)


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_a_batch_without_any_sampled_token_changes_nothing(tiny_folder, kl_coef):
    """There is nothing to divide by, and what is differentiated is empty."""
    trajectories = random_trajectories(7)
    for trajectory in trajectories:
        trajectory.loss_mask = [False] * len(trajectory.loss_mask)
    for lora in TRAINABLE:
        moved, sums = step_of(policy(tiny_folder, lora, loss=LossSpec(kl_coef=kl_coef), micro_batch_tokens=60), trajectories)
        assert not any(step.any() for step in moved.values())
        assert sums["grad_norm"] == 0.0
