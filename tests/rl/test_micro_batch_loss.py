"""The loss of a whole batch as the config composes it: against loops over tokens, and whatever the split."""

import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from support.tokens import tokens
from zs_lightning.rl.losses import LossSpec, loss_denominator, micro_batch_loss

BUDGET, VOCABULARY = 40, 7
SPECS = [
    LossSpec(mean=mean, ratio=ratio, dual_clip=dual, importance_cap=cap, likelihood_coef=hold)
    for mean, ratio, (dual, cap, hold) in itertools.product(
        ("token", "sequence", "constant"), ("token", "sequence"), ((None, None, 0.0), (1.6, 1.2, 0.0), (None, None, 0.7))
    )
]
NAMES = [f"{s.mean}-{s.ratio}-{'capped' if s.importance_cap else 'held' if s.likelihood_coef else 'plain'}" for s in SPECS]


class Rollouts:
    """Random logits of rollouts of unequal length, one of them without a trained token; float64."""

    def __init__(self, seed, count=9):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.lengths = [0, *(rng.randint(1, 15) for _ in range(count - 1))]
        starts = list(itertools.accumulate(self.lengths, initial=0))
        self.places = [list(range(start, end)) for start, end in itertools.pairwise(starts)]

        def draw(scale):
            return scale * torch.randn(starts[-1], VOCABULARY, generator=generator, dtype=torch.float64)

        self.logits = draw(1.0)
        self.first = (self.logits + draw(0.2)).log_softmax(-1)[:, 0]
        self.sampled = (self.logits + draw(0.3)).log_softmax(-1)[:, 0]
        self.reference = draw(1.0).log_softmax(-1)[:, 0]
        self.advantages = torch.randn(count, generator=generator, dtype=torch.float64)
        # Two of groups without signal, one of them all right and the other all wrong.
        self.advantages[3:5] = 0.0
        earned = [(a, float(i == 3)) for i, a in enumerate(self.advantages.tolist())]
        self.trajectories = [SimpleNamespace(advantage=advantage, reward=reward) for advantage, reward in earned]
        self.logits.requires_grad_()

    def loss(self, spec, clip, kl_coef, pieces):
        """Over micro-batches, each a list of rollouts."""
        total = torch.zeros((), dtype=torch.float64)
        for piece in pieces:
            places = torch.tensor([p for i in piece for p in self.places[i]], dtype=torch.long)
            rows = torch.tensor([row for row, i in enumerate(piece) for _ in self.places[i]], dtype=torch.long)
            batch = tokens(
                rows,
                [self.trajectories[i] for i in piece],
                old_logprobs=self.sampled[places],
                advantages=self.advantages[torch.tensor(piece)][rows],
                first_logprobs=self.first[places],
                ref_logprobs=self.reference[places] if kl_coef else None,
            )
            denominator = loss_denominator(spec.mean, sum(self.lengths), len(self.lengths), BUDGET)
            bounds = {} if clip is None else {"clip_low": clip[0], "clip_high": clip[1]}
            logprobs = self.logits.log_softmax(-1)[places, 0]
            whole = replace(spec, kl_coef=kl_coef, **bounds)
            total = total + micro_batch_loss(batch, logprobs, whole, clip is not None, denominator)[0]
        return total

    def slow_loss(self, spec, clip, kl_coef):
        """Token after token, as the papers write it."""
        logprobs, total = self.logits.log_softmax(-1)[:, 0], torch.zeros((), dtype=torch.float64)
        old = self.first if spec.importance_cap else self.sampled
        for i, (advantage, places) in enumerate(zip(self.advantages.tolist(), self.places, strict=True)):
            fallen = (advantage > 0 or i == 3) and sum((self.first - logprobs)[p].item() for p in places) > 0
            for p in places:
                if clip is None:
                    objective = advantage * (logprobs[p] - logprobs[p].item()).exp()
                else:
                    over = places if spec.ratio == "sequence" else [p]
                    ratio = (sum(logprobs[q] - old[q] for q in over) / len(over)).exp()
                    past = ratio > 1 + clip[1] if advantage > 0 else ratio < 1 - clip[0]
                    objective = advantage * ((1 + clip[1] if advantage > 0 else 1 - clip[0]) if past else ratio)
                    if spec.dual_clip and advantage < 0:
                        objective = advantage * spec.dual_clip if ratio > spec.dual_clip else objective
                if spec.importance_cap:
                    objective = objective * min(math.exp(self.first[p] - self.sampled[p]), spec.importance_cap)
                difference = self.reference[p] - logprobs[p]
                loss = kl_coef * (difference.exp() - difference - 1) - objective
                if fallen and logprobs[p] < self.first[p]:
                    loss = loss + spec.likelihood_coef * (self.first[p] - logprobs[p])
                share = {"token": sum(self.lengths), "constant": len(self.lengths) * BUDGET}.get(spec.mean)
                total = total + loss / (share or len(self.lengths) * len(places))
        return total


def gradient(loss, rollouts):
    return torch.autograd.grad(loss, rollouts.logits)[0]


@pytest.mark.parametrize("clip", [None, (0.1, 0.25)])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_the_loss_is_the_papers_written_as_loops(spec, clip):
    for seed in range(3):
        rollouts = Rollouts(seed)
        fast = rollouts.loss(spec, clip, 0.3, [list(range(9))])
        slow = rollouts.slow_loss(spec, clip, 0.3)
        assert fast.item() == pytest.approx(slow.item(), abs=1e-10)
        expected = gradient(slow, rollouts)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(gradient(fast, rollouts), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("clip", [None, (0.1, 0.25)])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_micro_batches_of_any_split_give_the_whole_batchs_gradient(spec, clip):
    """The reference divides each micro-batch by its own tokens, so that long trajectories weigh less."""
    rollouts = Rollouts(7)
    whole = gradient(rollouts.loss(spec, clip, 0.3, [list(range(9))]), rollouts)
    assert whole.abs().max() > 1e-3
    for seed in range(10):
        rng, order = random.Random(seed), list(range(9))
        rng.shuffle(order)
        cuts = [0, *sorted(rng.sample(range(1, 9), rng.randint(1, 8))), 9]
        pieces = [order[a:b] for a, b in itertools.pairwise(cuts)]
        split = gradient(rollouts.loss(spec, clip, 0.3, pieces), rollouts)
        torch.testing.assert_close(split, whole, atol=1e-12, rtol=0)


def test_means_prefer_no_length_one_length_or_another():
    """Two rollouts of 1 and 4 tokens, advantage 1, ratio 1: what each token weighs."""
    rows = torch.tensor([0, 1, 1, 1, 1])
    weights = {}
    for mean in ("token", "sequence", "constant"):
        logprobs = torch.full((5,), -1.0, requires_grad=True)
        batch = tokens(rows, old_logprobs=torch.full((5,), -1.0), advantages=torch.ones(5))
        loss, _ = micro_batch_loss(batch, logprobs, LossSpec(mean=mean), False, loss_denominator(mean, 5, 2, 10))
        weights[mean] = (-torch.autograd.grad(loss, logprobs)[0]).tolist()
    assert weights["token"] == pytest.approx([0.2] * 5)
    assert weights["sequence"] == pytest.approx([0.5, *[0.125] * 4])
    assert weights["constant"] == pytest.approx([0.05] * 5)


def test_metrics_are_sums_over_tokens():
    rollouts = Rollouts(3)
    places = torch.tensor(rollouts.places[4])
    logprobs = rollouts.logits.log_softmax(-1)[places, 0]
    batch = tokens(
        torch.zeros(len(places), dtype=torch.long),
        old_logprobs=rollouts.sampled[places],
        advantages=rollouts.advantages[4].expand(len(places)),
        first_logprobs=rollouts.first[places],
        ref_logprobs=rollouts.reference[places],
    )
    spec = LossSpec(importance_cap=1.2, clip_low=0.1, clip_high=0.1, kl_coef=0.5)
    loss, metrics = micro_batch_loss(batch, logprobs, spec, True, 10.0)
    ratios = (rollouts.first - rollouts.sampled)[places].exp().tolist()
    assert metrics["importance_weight"].item() == pytest.approx(sum(min(ratio, 1.2) for ratio in ratios))
    gaps = (logprobs - batch.old_logprobs).abs().tolist()
    assert metrics["sampling_gap"].item() == pytest.approx(sum(gaps))
    assert metrics["sampling_gap_max"].item() == pytest.approx(max(gaps))
    assert loss.item() == pytest.approx(metrics["policy_loss"].item() + 0.5 * metrics["kl"].item() / 10)
    assert not any(value.requires_grad for value in metrics.values())
