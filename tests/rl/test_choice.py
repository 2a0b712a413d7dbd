"""Which trajectories are trained on: by hand, and ties that lie evenly."""

from collections import Counter
from dataclasses import replace

import pytest

from support.runfolders import trajectory
from zs_lightning.rl.choice import deepest, depth


def rollouts(*depths):
    return [trajectory(number, "yes", searches) for number, searches in enumerate(depths)]


def test_depth_counts_the_policys_searches_that_found_something():
    row = trajectory(0, "yes", 4)
    row.turns[1].documents = ()  # found nothing
    row.turns[2] = replace(row.turns[2], text="", span=(0, 0))  # made by the environment
    assert depth(row) == 2
    assert depth(trajectory(0, "yes", 0)) == 0


@pytest.mark.parametrize(
    ("share", "chosen"),
    [(1.0, [0, 1, 2, 3, 4]), (0.6, [1, 2, 4]), (0.4, [2, 4]), (0.2, [4]), (0.01, [4])],
)
def test_the_deepest_of_the_batch_in_their_order(share, chosen):
    """Whatever they earned, and from whichever question."""
    rows = rollouts(0, 1, 2, 0, 3)
    assert deepest(rows, share) == [rows[place] for place in chosen]


def test_of_nothing_nothing_is_chosen():
    assert deepest([], 0.5) == []


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("group_size", [4, 5, 8])
def test_equally_deep_ones_are_taken_evenly_from_questions_and_from_numbers_in_the_group(share, group_size):
    """By order, half of a batch would be the groups of half of the questions."""
    rows = rollouts(*[2] * 16 * group_size)
    for place, row in enumerate(rows):
        row.example, row.sample = replace(row.example, id=str(place // group_size)), place % group_size
    found = deepest(rows, share)
    assert len(found) == round(share * len(rows))
    assert found == deepest(rows, share)
    questions, samples = Counter(row.example.id for row in found), Counter(row.sample for row in found)
    each = share * group_size
    assert all(abs(questions[str(number)] - each) <= 1.5 for number in range(16)), questions
    assert all(abs(samples[number] - 16 * share) <= 4 for number in range(group_size)), samples
