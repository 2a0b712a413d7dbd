"""Log-probabilities and attention of training, against the slow way and transformers."""

import random

import pytest
import torch

from support.tiny import make_model
from zs_lightning.models import attention, logprobs
from zs_lightning.models.logprobs import token_logprobs


def random_batch(seed, rows=4, width=24, vocabulary=384, pad=0):
    """Rows of different lengths; trained tokens are scattered over each row but its first."""
    rng = random.Random(seed)
    ids, loss_mask = torch.full((rows, width), pad), torch.zeros(rows, width, dtype=torch.bool)
    for b in range(rows):
        length = rng.randint(2, width)
        for t in range(length):
            # The padding id occurs inside of rows as well.
            ids[b, t] = pad if rng.random() < 0.15 else rng.randrange(vocabulary)
            loss_mask[b, t] = t > 0 and rng.random() < 0.6
    loss_mask[0, 1] = True
    return ids, loss_mask


def last_trained(loss_mask):
    """Column of a row's last trained token, 0 without one."""
    return max([0, *loss_mask.nonzero()[:, 0].tolist()])


def slow_logprobs(model, ids, loss_mask, temperature):
    """Row by row without padding, all logits, in a loop."""
    values, entropies = [], []
    for b in range(len(ids)):
        length = last_trained(loss_mask[b]) + 1
        table = (model(ids[b : b + 1, :length]).logits[0].float() / temperature).log_softmax(-1)
        for t in range(1, length):
            if loss_mask[b, t]:
                values.append(table[t - 1, ids[b, t]])
                entropies.append(-(table[t - 1].exp() * table[t - 1]).sum())
    return torch.stack(values), torch.stack(entropies)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1024, 7])
def test_logprobs_and_gradient_equal_the_slow_way(kind, temperature, chunk, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    # Milder weights than elsewhere: gradients of order 1, so that 1e-5 means something.
    model, batch = make_model(kind, initializer_range=0.08), random_batch(len(kind))
    weights = torch.randn(int(batch[1].sum()), generator=torch.Generator().manual_seed(1))
    results = []
    for compute in (token_logprobs, slow_logprobs):
        values, entropy = compute(model, *batch, temperature)
        model.zero_grad()
        (values * weights).sum().backward()
        results.append((values.detach(), entropy.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (values, entropy, found), (slow_values, slow_entropy, expected) = results
    torch.testing.assert_close(values, slow_values, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, slow_entropy, atol=1e-5, rtol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


def test_padding_does_not_matter():
    model = make_model("qwen3")
    ids, loss_mask = random_batch(3)
    expected, _ = token_logprobs(model, ids, loss_mask)
    wider = [torch.nn.functional.pad(tensor, (0, 9)) for tensor in (ids, loss_mask)]
    torch.testing.assert_close(token_logprobs(model, *wider)[0], expected, atol=1e-5, rtol=0)
    for row, trained in zip(ids, loss_mask, strict=True):
        row[last_trained(trained) + 1 :] = 77
    torch.testing.assert_close(token_logprobs(model, ids, loss_mask)[0], expected, atol=1e-5, rtol=0)


def test_no_trained_token_gives_nothing_but_still_a_graph():
    model = make_model("qwen3")
    ids, loss_mask = random_batch(4)
    values, entropy = token_logprobs(model, ids, torch.zeros_like(loss_mask))
    assert values.shape == entropy.shape == (0,)
    values.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_our_attention_equals_that_of_transformers(kind, tmp_path):
    """The attention that the loader chooses on a CPU, and its gradient."""
    model, batch = make_model(kind, initializer_range=0.08), random_batch(8)
    results = []
    for name in ("sdpa", attention.register()):
        model.config._attn_implementation = name
        values, _ = token_logprobs(model, *batch)
        model.zero_grad()
        values.sum().backward()
        results.append((values.detach(), [p.grad.clone() for p in model.parameters()]))
    (expected, gradient), (found, other) = results
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for one, two in zip(gradient, other, strict=True):
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)
