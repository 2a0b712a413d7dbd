"""Memory that is full while rows are generated: an allocator that fails at chosen forward passes."""

import random

import pytest
import torch

from support.mixed import mix
from support.slow_generator import MODELS, request, same, write
from zs_lightning.errors import RunError
from zs_lightning.generation import Generator
from zs_lightning.generation.decoding import MANNERS, Decoding, Manner
from zs_lightning.generation.memory import Fitting, completes

HIDDEN = Decoding.hidden
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: not enough memory: you tried to allocate 9 B"),
]


@pytest.fixture
def full(monkeypatch):
    """Lets forward passes fail, after they have written their keys and values, where `fails(slots)`."""

    def inject(fails, error=FULL[0]):
        def hidden(self, *args):
            states = HIDDEN(self, *args)
            if fails(self.cache.slots):
                raise error
            return states

        monkeypatch.setattr(Decoding, "hidden", hidden)

    return inject


@pytest.mark.parametrize("late", [False, True])
def test_random_mixes_of_calls_with_failing_passes_equal_rows_run_alone(late, full, monkeypatch):
    monkeypatch.setitem(MANNERS, "cpu", Manner(read=32, late=late))
    for seed in range(3000, 3012):
        rng = random.Random(seed)
        full(lambda slots, rng=rng: slots > 1 and rng.random() < 0.2)
        mix(seed)


@pytest.mark.parametrize("error", FULL)
def test_a_pass_that_finds_no_memory_is_repeated_with_half_the_slots(error, full, caplog):
    expected, _ = write(MODELS[1], 20)
    calls = []
    full(lambda slots: calls.append(slots) or len(calls) in (9, 20), error)
    written, generator = write(MODELS[1], Fitting("rollout.slots", 20, "lower max_length"))
    same(written, expected)
    assert (calls[8], calls[9], calls[-1], len(generator.slots)) == (20, 10, 5, 5)
    assert generator.sampled_tokens == sum(len(tokens) for tokens, _, _ in expected.values())
    assert len(caplog.records) == 1, "it is told once"
    assert "lower rollout.slots (20)" in caplog.text


def test_a_generator_that_does_not_fit_one_row_ends_with_a_sentence(full):
    full(lambda slots: True)
    generator = Generator(MODELS[0], 4, 96)
    generator.submit(request("a", [1, 2]))
    with pytest.raises(RunError, match=r"memory is full with slots at its least, 1; lower max_length"):
        generator.run()


def test_slots_come_back_after_some_uses_that_fitted():
    fitting = Fitting("rollout.slots", 5, "")
    generator = Generator(MODELS[0], fitting, 96)
    for _ in range(2):
        fitting.halve(1)
    generator._remake()
    sizes = []
    for i in range(130):
        generator.submit(request(str(i), [1, 2], new=1))
        generator.run()
        sizes.append(len(generator.slots))
    # Forty uses after the second time, and forty more.
    assert [sizes.index(n) for n in (1, 2, 4, 5)] == [0, 39, 79, 119]


def test_other_errors_are_not_taken_for_full_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        completes(lambda: (_ for _ in ()).throw(RuntimeError("shapes differ")))
