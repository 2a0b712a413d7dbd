"""What a rollout step says about itself: numbers by hand."""

import mmap

import pytest
import torch

from support.runfolders import trajectory
from zs_lightning.modules.step_metrics import memory, more_searches, step_metrics
from zs_lightning.types import Status


def searching(*noise, answer="yes"):
    """A rollout whose results had these shares of noise."""
    row = trajectory(0, answer, len(noise))
    for turn, share in zip(row.turns, noise, strict=False):
        turn.noise = share
    return row


def test_searches_after_useful_and_after_noisy_results():
    """Useful ones are followed by 2, 1 and 0 searches, noisy ones (0.75 of a list is) by 3 and 0."""
    rows = [searching(1.0, 0.0, 0.5, 0.75), searching(0.0)]
    expected = {"search/more_after_noise": 1.5, "search/more_after_useful": 1.0}
    assert more_searches(rows) == expected
    metrics = step_metrics(rows, rows, {}, 0.0, {})
    assert expected.items() <= metrics.items()
    rows[0].status = Status.FAILED
    metrics = step_metrics(rows, rows[1:], {}, 0.0, {})
    assert metrics["search/more_after_useful"] == 0, "of a rollout that failed, nobody knows how it had gone on"
    assert "search/more_after_noise" not in metrics
    assert more_searches([searching(None, None)]) == {}, "a real engine has no kinds"


def test_the_likelihood_of_correct_answers_is_that_of_their_sampled_tokens():
    """-1 and -2 of the first, -3 of the second; what was inserted, and what a wrong answer was, does not count."""
    rows = [trajectory(0, "yes"), trajectory(1, "yes"), trajectory(2, "no")]
    for row, logprobs in zip(rows, ([-1.0, 0.0, -2.0], [-3.0, 0.0, 0.0], [-9.0, 0.0, -9.0]), strict=True):
        row.old_logprobs = logprobs
    rows[1].loss_mask = [True, False, False]
    assert step_metrics(rows, rows, {}, 0.0, {})["policy/correct_logprob"] == -2.0
    assert "policy/correct_logprob" not in step_metrics(rows[2:], rows[2:], {}, 0.0, {})


def test_memory_is_that_of_the_process_where_there_is_no_card(monkeypatch):
    (name, before) = next(iter(memory(torch.device("cpu")).items()))
    assert name == "memory/resident"
    # Not from the allocator, which may have kept as much of what was freed.
    with mmap.mmap(-1, 64 * 2**20) as held:
        for _ in range(64):
            held.write(bytes(2**20))
        assert memory(torch.device("cpu"))[name] - before == pytest.approx(64, abs=16)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {torch.device("cuda:1"): 3 * 2**20}.get)
    assert memory(torch.device("cuda:1")) == {"memory/card_peak": 3.0}
