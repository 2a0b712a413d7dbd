"""The policy-gradient loss and its parts: numbers by hand, and gradients."""

import math

import pytest
import torch

from zs_lightning.rl.losses import (
    LossSpec,
    importance_weights,
    kl_estimate,
    kl_penalty,
    loss_denominator,
    policy_gradient_loss,
    row_means,
    sampling_gap,
)


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


def test_the_gradient_raises_good_tokens_and_lowers_bad_ones():
    logits = torch.zeros(2, 4, requires_grad=True)
    chosen = torch.tensor([1, 2])
    for _ in range(10):
        logprobs = logits.log_softmax(-1)[torch.arange(2), chosen]
        loss, _ = policy_gradient_loss(logprobs, logprobs.detach(), torch.tensor([1.0, -1.0]), 2.0)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 0.5 * gradient).detach().requires_grad_()
    probabilities = logits.softmax(-1)
    assert probabilities[0, 1] > 0.4 > 0.25 > probabilities[1, 2] > 0


def test_without_a_clip_the_gradient_is_that_of_reinforce():
    """On-policy or not: the expected gradient sum_a p(a) A(a) grad log p(a), by differentiating sum_a p(a) A(a)."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    reward = torch.tensor([1.0, 0.0, 0.5, -1.0, 0.25], dtype=torch.float64)
    (exact,) = torch.autograd.grad((logits.softmax(-1) * reward).sum(), logits)
    weighted = torch.zeros(5, dtype=torch.float64)
    for action, probability in enumerate(logits.softmax(-1).tolist()):
        old = torch.tensor([-3.7], dtype=torch.float64)
        loss, _ = policy_gradient_loss(logits.log_softmax(-1)[action : action + 1], old, reward[action : action + 1], 1.0)
        weighted -= probability * torch.autograd.grad(loss, logits)[0]
    assert torch.allclose(weighted, exact, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "moves"),
    [
        (1.5, 1.0, 1.3, False),  # bounded above at 1.3: no reason to go on
        (1.5, -1.0, -1.5, True),  # too likely already and bad: still pushed down
        (0.5, 1.0, 0.5, True),  # fell although good: still pushed up
        (0.5, -1.0, -0.9, False),  # bounded below at 0.9
        (1.2, 1.0, 1.2, True),
        (0.95, -2.0, -1.9, True),
        (1.0, 0.0, 0.0, False),
    ],
)
def test_the_clip_by_hand_with_unequal_bounds(ratio, advantage, objective, moves):
    logprobs = leaf(math.log(ratio) - 1.0)
    loss, metrics = policy_gradient_loss(logprobs, torch.tensor([-1.0]), torch.tensor([advantage]), 2.0, 0.1, 0.3)
    assert loss.item() == pytest.approx(-objective / 2, abs=1e-6)
    assert torch.autograd.grad(loss, logprobs)[0].item() == pytest.approx(-ratio * advantage / 2 if moves else 0.0, abs=1e-6)
    assert metrics["clip_fraction"].item() == float(not moves and advantage != 0)


def test_no_clip_where_the_policy_is_fresh_and_none_is_counted():
    loss, metrics = policy_gradient_loss(leaf(-1.0, -2.0), torch.tensor([-5.0, -2.0]), torch.tensor([1.0, -0.5]), 2.0)
    assert loss.item() == pytest.approx(-0.25)
    assert metrics["clip_fraction"].item() == 0


def test_far_away_policies_give_finite_losses():
    logprobs = leaf(-0.1, -0.1, -300.0)
    old = torch.tensor([-200.0, -200.0, -0.1])
    loss, _ = policy_gradient_loss(logprobs, old, torch.tensor([0.0, -1.0, 1.0]), 3.0, 0.2, 0.2)
    penalty, _ = kl_penalty(logprobs, old, 0.1, 3.0)
    assert math.isfinite(loss.item() + penalty.item())
    assert torch.autograd.grad(loss + penalty, logprobs)[0].isfinite().all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "moves"),
    [
        (2.0, -1.0, -2.0, True),  # below the second bound: still pushed down
        (5.0, -1.0, -3.0, False),  # above it: counted as 3
        (5.0, 1.0, 1.2, False),  # good ones are bounded by clip_high as ever
        (0.5, -2.0, -1.6, False),
    ],
)
def test_the_dual_clip_by_hand(ratio, advantage, objective, moves):
    logprobs = leaf(math.log(ratio) - 1.0)
    loss, metrics = policy_gradient_loss(
        logprobs, torch.tensor([-1.0]), torch.tensor([advantage]), 2.0, 0.2, 0.2, dual_clip=3.0
    )
    assert loss.item() == pytest.approx(-objective / 2, abs=1e-6)
    assert torch.autograd.grad(loss, logprobs)[0].item() == pytest.approx(-ratio * advantage / 2 if moves else 0.0, abs=1e-5)
    assert metrics["clip_fraction"].item() == float(not moves)


def test_the_ratio_of_sequences_by_hand():
    """Row 0 has ratios 2 and 1/2, so 1 together; row 1 has 4 and 1, so 2, past its bound; row 2 the same with A < 0."""
    old = torch.full((6,), -3.0)
    logprobs = leaf(*(-3.0 + math.log(ratio) for ratio in (2.0, 0.5, 4.0, 1.0, 4.0, 1.0)))
    advantages, rows = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    loss, metrics = policy_gradient_loss(logprobs, old, advantages, 1.0, 0.1, 0.5, sequences=rows)
    # Each token counts its row's ratio: 1 + 1, then 1.5 + 1.5, then -2 - 2.
    assert loss.item() == pytest.approx(-(2 + 3 - 4), abs=1e-5)
    assert metrics["clip_fraction"].item() == 2
    # d(ratio of the row)/d(log p of one token) is the ratio / 2, and two tokens count it.
    gradient = torch.autograd.grad(loss, logprobs)[0]
    assert gradient.tolist() == pytest.approx([-1, -1, 0, 0, 2, 2], abs=1e-5)


def test_weights_by_hand():
    logprobs, weights = leaf(-1.0, -2.0), torch.tensor([0.5, 2.0])
    loss, _ = policy_gradient_loss(logprobs, torch.zeros(2), torch.tensor([1.0, -1.0]), 4.0, weights=weights)
    assert loss.item() == pytest.approx(-(0.5 - 2.0) / 4)
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == pytest.approx([-0.125, 0.5])
    penalty, total = kl_penalty(logprobs, logprobs.detach() + math.log(2), 0.1, 4.0, weights)
    assert penalty.item() == pytest.approx(0.1 * (1 - math.log(2)) * 2.5 / 4)
    assert total.item() == pytest.approx(2 * (1 - math.log(2)))


def test_importance_weights_by_hand_and_without_gradient():
    train, sampled = leaf(-1.0, -1.0, -1.0, -1.0), torch.log(torch.tensor([1.0, 2.0, 0.25, 1e-30])) - 1
    weights = importance_weights(train, sampled, 2.0)
    assert weights.tolist() == pytest.approx([1.0, 0.5, 2.0, 2.0])
    assert not weights.requires_grad
    assert importance_weights(torch.tensor([-0.1]), torch.tensor([-300.0]), 1e30).isfinite().all()


def test_importance_weights_make_an_off_policy_gradient_right():
    """Sampled by q, trained as p, expectation over q: the gradient of p's expected reward, if nothing is cut off."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    sampler = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    reward = torch.tensor([1.0, 0.0, 0.5, -1.0, 0.25], dtype=torch.float64)
    (exact,) = torch.autograd.grad((logits.softmax(-1) * reward).sum(), logits)

    def expected(cap):
        total = torch.zeros(5, dtype=torch.float64)
        for action, probability in enumerate(sampler.exp().tolist()):
            now, then = logits.log_softmax(-1)[action : action + 1], sampler[action : action + 1]
            weights = None if cap is None else importance_weights(now, then, cap)
            loss, _ = policy_gradient_loss(now, then, reward[action : action + 1], 1.0, weights=weights)
            total -= probability * torch.autograd.grad(loss, logits)[0]
        return total

    assert torch.allclose(expected(math.inf), exact, atol=1e-12)
    assert not torch.allclose(expected(None), exact, atol=0.05)
    # A cap is a bias that shrinks as it rises.
    errors = [float((expected(cap) - exact).norm()) for cap in (0.5, 1.0, 2.0, 100.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12 < errors[1]


def test_the_gap_to_the_sampled_distribution_by_hand():
    gap = sampling_gap(leaf(-1.0, -2.0, -3.0), torch.tensor([-1.5, -2.0, -2.0]))
    assert {name: value.item() for name, value in gap.items()} == {"sampling_gap": 1.5, "sampling_gap_max": 1.0}
    assert sampling_gap(torch.zeros(0), torch.zeros(0))["sampling_gap_max"].item() == 0.0


def test_means_of_rows_by_hand():
    means = row_means(torch.tensor([1.0, 5.0, 2.0, 3.0]), torch.tensor([2, 0, 2, 2]))
    assert means.tolist() == [2.0, 5.0, 2.0, 2.0]
    assert row_means(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_denominators_by_hand():
    sizes = {"tokens": 70, "rollouts": 4, "budget": 50}
    assert [loss_denominator(mean, **sizes) for mean in ("token", "sequence", "constant")] == [70, 4, 200]
    assert loss_denominator("token", 0, 0, 50) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"importance_cap": 0.0},
        {"importance_cap": math.nan},
        {"dual_clip": 1.0},
        {"deepest_share": 0.0},
        {"deepest_share": 1.1},
        {"deepest_share": math.nan},
    ],
)
def test_impossible_parts_are_refused(options):
    with pytest.raises(ValueError, match=rf"loss.{next(iter(options))}: .*; got"):
        LossSpec(**options)


def test_the_penalty_pulls_the_policy_to_the_reference():
    """Sampled from the policy and minimised as it is used. The reference implementation subtracts it: the same steps
    with the other sign drive the policy away."""
    generator = torch.Generator().manual_seed(0)
    start, reference = (torch.randn(2, 6, generator=generator)).log_softmax(-1)

    def kl_after(sign):
        logits = start.clone()
        for _ in range(200):
            logits.requires_grad_()
            logprobs = logits.log_softmax(-1)
            sampled = torch.multinomial(logprobs.exp(), 64, replacement=True, generator=generator)
            loss, _ = policy_gradient_loss(logprobs[sampled], logprobs.detach()[sampled], torch.zeros(64), 64.0)
            penalty, _ = kl_penalty(logprobs[sampled], reference[sampled], 0.5, 64.0)
            (gradient,) = torch.autograd.grad(loss + sign * penalty, logits)
            logits = (logits - 0.5 * gradient).detach()
        policy = logits.log_softmax(-1)
        return (policy.exp() * (policy - reference)).sum().item()

    before = (start.exp() * (start - reference)).sum().item()
    assert before > 0.2
    assert kl_after(1.0) < 0.1 * before
    assert kl_after(-1.0) > before


def test_k3_by_hand():
    estimate = kl_estimate(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0 + math.log(2), -1.0 - math.log(2)]))
    assert estimate.tolist() == pytest.approx([0.0, 2 - 1 - math.log(2), 0.5 - 1 + math.log(2)], abs=1e-6)
    penalty, total = kl_penalty(torch.tensor([-1.0]), torch.tensor([-1.0 + math.log(2)]), 0.1, 4.0)
    assert total.item() == pytest.approx(1 - math.log(2), abs=1e-6)
    assert penalty.item() == pytest.approx(0.1 * (1 - math.log(2)) / 4, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 50.0])
def test_k3_is_never_negative(scale):
    logprobs, reference = scale * torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    assert kl_estimate(logprobs, reference).min() >= 0


def test_k3_is_the_divergence_in_expectation():
    for seed in range(20):
        policy, reference = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(
            -1
        )
        divergence = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
        assert (policy.exp() * kl_estimate(policy, reference)).sum().item() == pytest.approx(divergence.item(), abs=1e-12)
