"""Advantages from a critic's values, and the critic's loss: numbers by hand, and slow references over random masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.slow_gae import by_definition, tensor
from zs_lightning.modules.critic import CriticSpec
from zs_lightning.rl.gae import gae, value_loss, variance, whiten


def moments(numbers):
    return len(numbers), float(numbers.sum()), float((numbers**2).sum())


def test_gae_by_hand():
    """Two rows: three tokens that end with reward 1, and one with reward 0."""
    values, rewards, rows = tensor(0.5, 0.2, 0.4, 0.3), tensor(1.0, 0.0), torch.tensor([0, 0, 0, 1])
    # Lambda and gamma 1: the reward less the value.
    torch.testing.assert_close(gae(values, rewards, rows, 1.0, 1.0), tensor(0.5, 0.8, 0.6, -0.3))
    # Differences 0.9 * 0.2 - 0.5 = -0.32, 0.9 * 0.4 - 0.2 = 0.16 and 1 - 0.4 = 0.6, each worth 0.45 of the one before.
    expected = tensor(-0.32 + 0.45 * (0.16 + 0.45 * 0.6), 0.16 + 0.45 * 0.6, 0.6, -0.3)
    torch.testing.assert_close(gae(values, rewards, rows, 0.9, 0.5), expected)
    # Lambda 0: the differences alone.
    torch.testing.assert_close(gae(values, rewards, rows, 0.9, 0.0), tensor(-0.32, 0.16, 0.6, -0.3))


def test_no_tokens_and_rows_without_any():
    none = torch.zeros(0)
    assert gae(none, tensor(1.0), none.long(), 1.0, 1.0).shape == (0,)
    # The second of three rows has no trained token.
    found = gae(tensor(0.25, 0.5), tensor(1.0, 9.0, 2.0), torch.tensor([0, 2]), 1.0, 1.0)
    torch.testing.assert_close(found, tensor(0.75, 1.5))


def by_columns(values, rewards, masks, gamma, lam):
    """As frameworks compute it on padded tensors [B, T]: from the right, where tokens without mask hand on what they get."""
    values, mask = torch.tensor(values, dtype=torch.float64), torch.tensor(masks)
    places = torch.arange(mask.shape[1])
    last = (places * mask).amax(1)
    gains = torch.where((places == last[:, None]) & mask, tensor(*rewards)[:, None], 0.0)
    value, carried, columns = torch.zeros(len(mask)).double(), torch.zeros(len(mask)).double(), []
    for t in reversed(range(mask.shape[1])):
        here = gains[:, t] + gamma * value - values[:, t] + gamma * lam * carried
        value, carried = torch.where(mask[:, t], values[:, t], value), torch.where(mask[:, t], here, carried)
        columns.append(carried)
    return torch.stack(columns[::-1], 1)[mask]


numbers = st.floats(-2, 2, width=32)


@st.composite
def batches(draw):
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    return (
        [[draw(numbers) for _ in range(width)] for _ in range(rows)],
        [draw(numbers) for _ in range(rows)],
        [[draw(st.booleans()) for _ in range(width)] for _ in range(rows)],
        draw(st.sampled_from([0.3, 0.99, 1.0])),
        draw(st.sampled_from([0.0, 0.5, 0.95, 1.0])),
    )


@settings(deadline=None, max_examples=150)
@given(batches())
def test_gae_follows_the_definition_whatever_the_mask(batch):
    values, rewards, masks, gamma, lam = batch
    mask = torch.tensor(masks)
    found = gae(torch.tensor(values)[mask], tensor(*rewards), mask.nonzero()[:, 0], gamma, lam)
    torch.testing.assert_close(found, by_definition(values, rewards, masks, gamma, lam), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found, by_columns(values, rewards, masks, gamma, lam), atol=1e-9, rtol=1e-9)


@given(st.lists(numbers, min_size=2, max_size=20).filter(lambda n: max(n) - min(n) > 0.1), st.integers(0, 20))
def test_whitening_is_over_the_whole_batch_whatever_its_parts(values, cut):
    whole = tensor(*values)
    sums = [a + b for a, b in zip(moments(whole[:cut]), moments(whole[cut:]), strict=True)]
    assert variance(*sums) == pytest.approx(float(whole.var()), rel=1e-6)
    found = torch.cat([whiten(whole[:cut], *sums), whiten(whole[cut:], *sums)])
    torch.testing.assert_close(found, (whole - whole.mean()) / (whole.var() + 1e-8).sqrt(), atol=1e-6, rtol=1e-6)


def test_whitening_by_hand_and_without_a_spread():
    # Mean 2, deviations -1, 0 and 1, unbiased variance 1.
    torch.testing.assert_close(whiten(tensor(1, 2, 3), 3, 6.0, 14.0), tensor(-1, 0, 1))
    one, same = tensor(0.7), torch.full((16,), 0.7).double()
    assert whiten(one, *moments(one)).tolist() == [0.0]
    assert whiten(same, *moments(same)).abs().max() < 1e-9
    assert whiten(tensor(), 0, 0.0, 0.0).shape == (0,)


def test_value_loss_by_hand():
    """Old values 0.2 and at most 0.5 from there: of 0.9, 0.7 counts."""
    old, returns = tensor(0.2, 0.2, 0.2), tensor(1.0, 0.0, 0.0)
    values = tensor(0.9, 0.3, 0.9).requires_grad_()
    loss, clipped = value_loss(values, old, returns, 0.5, 6)
    # (1 - 0.7)² although (1 - 0.9)² is less; 0.3²; and 0.9², which is worse than 0.7².
    assert float(loss) == pytest.approx(0.5 * (0.09 + 0.09 + 0.81) / 6)
    assert int(clipped) == 1
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient, tensor(0.0, 0.3 / 6, 0.9 / 6))
    free, clipped = value_loss(values, old, returns, None, 6)
    assert float(free) == pytest.approx(0.5 * (0.01 + 0.09 + 0.81) / 6)
    assert int(clipped) == 0


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=8), st.sampled_from([0.1, 0.5]))
def test_the_clip_only_ever_raises_the_loss(rows, clip):
    values, old, returns = tensor(*rows).T
    bounded, _ = value_loss(values, old, returns, clip, len(rows))
    free, _ = value_loss(values, old, returns, None, len(rows))
    assert bounded >= free
    near, _ = value_loss(old + (values - old).clamp(-clip, clip) * 0.999, old, returns, clip, len(rows))
    same, _ = value_loss(old + (values - old).clamp(-clip, clip) * 0.999, old, returns, None, len(rows))
    torch.testing.assert_close(near, same)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": 0.0}, "critic: lr must be above 0 and warmup_steps >= 0; got 0 and 3"),
        ({"warmup_steps": -1}, "critic: lr must be above 0 and warmup_steps >= 0; got 0.0001 and -1"),
        ({"gamma": 0.0}, r"critic: gamma must be in \(0, 1\] and lam in \[0, 1\]; got 0 and 1"),
        ({"lam": 1.5}, r"critic: gamma must be in \(0, 1\] and lam in \[0, 1\]; got 1 and 1.5"),
        ({"clip": 0.0}, "critic.clip: expected a number above 0, or null; got 0"),
    ],
)
def test_impossible_constants_are_refused(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        CriticSpec(**options)
