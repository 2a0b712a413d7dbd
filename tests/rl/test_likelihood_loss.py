"""What keeps right rollouts from becoming less likely: numbers by hand, and gradients that must be exactly 0."""

from types import SimpleNamespace

import pytest
import torch

from support.tokens import tokens
from zs_lightning.rl.losses import LossSpec, is_kept, likelihood_loss, micro_batch_loss

ROWS = torch.tensor([0, 0, 0, 1, 1, 2, 3])
KEPT = torch.tensor([True, True, True, True, True, False, True])
FIRST = [-1.0, -1.0, -1.0, -2.0, -2.0, -3.0, -0.5]
NOW = [-1.5, -1.25, -0.75, -2.5, -1.0, -9.0, -0.5]
"""Row 0 fell by 0.5 in all, row 1 rose by 0.5, row 2 fell but is not kept, row 3 stayed."""


def leaf(values):
    return torch.tensor(values, requires_grad=True)


@pytest.mark.parametrize("weights", [None, torch.tensor([2.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0])])
def test_the_term_by_hand(weights):
    """0.5 and 0.25 of row 0; its third token has become likelier and is left alone."""
    now = leaf(NOW)
    loss, counts = likelihood_loss(now, torch.tensor(FIRST), ROWS, KEPT, 0.1, 10.0, weights)
    factors = [1.0, 1.0] if weights is None else [2.0, 4.0]
    assert loss.item() == pytest.approx(0.1 * (factors[0] * 0.5 + factors[1] * 0.25) / 10)
    expected = [-0.01 * factors[0], -0.01 * factors[1], 0, 0, 0, 0, 0]
    assert torch.autograd.grad(loss, now)[0].tolist() == pytest.approx(expected)
    assert {name: value.item() for name, value in counts.items()} == pytest.approx({"kept_rows": 3, "fallen_rows": 1})
    assert not any(value.requires_grad for value in counts.values())


@pytest.mark.parametrize("now", [FIRST, [-1.5, -1.0, -0.5, -2.5, -1.5, -9.0, -0.25]], ids=["unmoved", "evened out"])
def test_where_no_row_fell_the_gradient_is_exactly_zero(now):
    now = leaf(now)
    loss, counts = likelihood_loss(now, torch.tensor(FIRST), ROWS, KEPT, 5.0, 1.0)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, now)[0].any()
    assert counts["fallen_rows"] == 0


def test_a_token_that_did_not_move_is_not_pushed_where_its_row_fell():
    now = leaf([-1.0, -2.0])
    loss, _ = likelihood_loss(now, torch.tensor([-1.0, -1.0]), torch.tensor([0, 0]), torch.tensor([True, True]), 1.0, 1.0)
    assert torch.autograd.grad(loss, now)[0].tolist() == [0, -1]


def test_descent_stops_where_the_row_is_as_likely_as_it_was():
    now = leaf(NOW[:3])
    for _ in range(200):
        loss, counts = likelihood_loss(now, torch.tensor(FIRST[:3]), ROWS[:3], KEPT[:3], 1.0, 1.0)
        now = leaf((now - 0.01 * torch.autograd.grad(loss, now)[0]).tolist())
    assert counts["fallen_rows"] == 0
    assert now.sum().item() == pytest.approx(-3.0, abs=0.03)
    assert now[2].item() == NOW[2]


@pytest.mark.parametrize(
    ("advantage", "reward", "kept"),
    [(0.5, 1.0, True), (0.5, -1.0, True), (0.0, 1.0, True), (0.0, 0.0, False), (0.0, -1.0, False), (-0.5, 1.0, False)],
)
def test_what_is_kept(advantage, reward, kept):
    assert is_kept(SimpleNamespace(advantage=advantage, reward=reward)) is kept


def test_the_fall_is_measured_from_the_trained_model_and_not_from_the_one_that_sampled():
    """Sampled in another precision: all tokens are less likely when trained, and none has fallen."""
    trajectories = [SimpleNamespace(advantage=1.0, reward=1.0) for _ in range(4)]
    first, metrics = torch.tensor(FIRST), {}
    columns = {"old_logprobs": first + 0.5, "advantages": torch.ones(7)}
    batch = tokens(ROWS, trajectories, first_logprobs=first, **columns)
    losses = []
    for coef in (0.0, 2.0):
        loss, metrics = micro_batch_loss(batch, leaf(FIRST), LossSpec(likelihood_coef=coef), True, 7.0)
        losses.append(loss)
    assert torch.equal(*losses)
    assert (metrics["kept_rows"].item(), metrics["fallen_rows"].item()) == (pytest.approx(4), 0)
    rose = micro_batch_loss(batch, leaf(NOW), LossSpec(likelihood_coef=2.0), True, 7.0)[1]
    assert rose["fallen_rows"].item() == pytest.approx(2)
