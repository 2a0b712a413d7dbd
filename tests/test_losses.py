"""The policy-gradient loss and its penalty: numbers by hand, gradients, independence of the micro-batches."""

import math
import random

import pytest
import torch

from zs_lightning.rl.losses import kl_estimate, kl_penalty, policy_gradient_loss


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
    assert metrics["sampling_gap"].item() == pytest.approx(abs(math.log(ratio)), abs=1e-6)


def test_no_clip_where_the_policy_is_fresh_and_none_is_counted():
    loss, metrics = policy_gradient_loss(leaf(-1.0, -2.0), torch.tensor([-5.0, -2.0]), torch.tensor([1.0, -0.5]), 2.0)
    assert loss.item() == pytest.approx(-0.25)
    assert metrics["clip_fraction"].item() == 0
    assert metrics["sampling_gap"].item() == pytest.approx(4.0)


def test_far_away_policies_give_finite_losses():
    logprobs = leaf(-0.1, -0.1, -300.0)
    old = torch.tensor([-200.0, -200.0, -0.1])
    loss, _ = policy_gradient_loss(logprobs, old, torch.tensor([0.0, -1.0, 1.0]), 3.0, 0.2, 0.2)
    penalty, _ = kl_penalty(logprobs, old, 0.1, 3.0)
    assert math.isfinite(loss.item() + penalty.item())
    assert torch.autograd.grad(loss + penalty, logprobs)[0].isfinite().all()


@pytest.mark.parametrize("clip", [(), (0.2, 0.3)])
def test_micro_batches_of_any_split_give_the_whole_batchs_gradient(clip):
    """The reference divides each micro-batch by its own tokens, so that long trajectories weigh less."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 7, generator=generator, requires_grad=True)
    reference = torch.randn(60, 7, generator=generator).log_softmax(-1)[:, 0]
    old, advantage = (
        logits.detach().log_softmax(-1)[:, 0] + 0.3 * torch.randn(60, generator=generator),
        torch.randn(60, generator=generator),
    )

    def gradient(pieces):
        total = torch.zeros_like(logits)
        for piece in pieces:
            logprobs = logits.log_softmax(-1)[piece, 0]
            loss, _ = policy_gradient_loss(logprobs, old[piece], advantage[piece], 60.0, *clip)
            penalty, _ = kl_penalty(logprobs, reference[piece], 0.5, 60.0)
            total += torch.autograd.grad(loss + penalty, logits)[0]
        return total

    whole = gradient([torch.arange(60)])
    assert whole.abs().max() > 1e-3
    for seed in range(20):
        order = torch.randperm(60, generator=generator)
        cuts = sorted(random.Random(seed).sample(range(1, 60), 5))
        assert torch.allclose(gradient(torch.tensor_split(order, cuts)), whole, atol=1e-6)


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
