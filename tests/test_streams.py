"""Random streams by name."""

import random
from collections import Counter

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zs_lightning import streams
from zs_lightning.streams import derive_seed, global_seed, stream, uniform

NAMES = st.lists(st.one_of(st.integers(), st.text(alphabet="ab|, 0", max_size=4)), min_size=1, max_size=5)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(NAMES, NAMES)
def test_seeds_depend_on_every_name_and_on_their_order(one, other):
    assert derive_seed(*one) == derive_seed(*one)
    assume([str(name) for name in one] != [str(name) for name in other])
    assert derive_seed(*one) != derive_seed(*other)


def test_seeds_by_hand():
    """A stored value: the shipped base model and its world were made with this function."""
    assert derive_seed("miniature", 0, "world") == 8828007591917928988
    assert (
        len({derive_seed(*names) for names in [("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("a",), ("a", "b", "b")]}) == 6
    )
    seeds = [derive_seed(0, i) for i in range(2000)]
    assert 0 <= min(seeds) < 1 << 56
    assert (1 << 63) - (1 << 56) < max(seeds) < 1 << 63


def test_uniform_is_uniform():
    """Chi-square with 49 degrees of freedom: 0.01 % of fair samples lie outside of (16, 95)."""
    counts = Counter(int(uniform("fair", i) * 50) for i in range(50_000))
    assert set(counts) == set(range(50))
    assert 16 < sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 95


def test_uniform_stays_below_one(monkeypatch):
    monkeypatch.setattr(streams, "derive_seed", lambda *names: streams.MASK)
    assert uniform("highest") < 1
    monkeypatch.setattr(streams, "derive_seed", lambda *names: 0)
    assert uniform("lowest") == 0


def test_neighbouring_draws_are_not_correlated():
    draws = torch.tensor([[uniform(0, i, "noise"), uniform(0, i + 1, "noise"), uniform(1, i, "noise")] for i in range(20_000)])
    correlation = torch.corrcoef(draws.T)
    assert correlation.fill_diagonal_(0).abs().max() < 5 / 20_000**0.5


def test_a_stream_is_its_own_and_no_global_generator_is_touched():
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    first = [stream("x", 1).random() for _ in range(3)]
    assert len(set(first)) == 1
    generator = stream("x", 1)
    assert [generator.random() for _ in range(3)] != first
    uniform("x")
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(2)
    assert stream("x", 1).random() == first[0]


def test_the_global_seed_is_that_of_seed_everything_unless_given(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert global_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert global_seed() == 7
    assert global_seed(0) == 0
