"""A thousand random mixes of submit, extend, release and step against rows that are computed alone."""

import random

import pytest
from slowengine import GREEDY, MAX_LENGTH, MODELS, SlowEngine, StopAt, random_ids, request

from zs_lightning.engine import Engine, Sampling


def mix(seed):
    """Submit, extend and release at random moments between steps, with few slots."""
    rng = random.Random(seed)
    model = MODELS[seed % 3]
    engine, slow = Engine(model, slots=rng.randint(1, 5), max_length=MAX_LENGTH), SlowEngine(model)
    parked, open_turns, made, seen = [], {}, 0, 0
    while made < 9 or open_turns:
        choice = rng.random()
        if choice < 0.35 and made < 9:
            again = parked and rng.random() < 0.6
            key = parked.pop(rng.randrange(len(parked))) if again else f"row {made}"
            ids = random_ids(rng, 0 if again else 1, 8, 40) if rng.random() < 0.7 else [7, 7, 7]
            sampling = rng.choice([GREEDY, Sampling(), Sampling(temperature=0.6, top_k=20), Sampling(top_p=0.8)])
            turn = request(key, ids, rng.randint(1, 6), rng.randrange(99), sampling, StopAt(3, 14, 159), rng.random() < 0.6)
            open_turns[key] = turn
            engine.submit(turn)
            made += 1
        elif choice < 0.45 and parked:
            key = parked.pop()
            engine.release(key)
            del slow.contexts[key]
        elif engine.stalled:
            engine.release(parked.pop(0))
        else:
            for generated in engine.step():
                turn = open_turns.pop(generated.key)
                slow.check(turn, generated)
                seen += 1
                if turn.keep:
                    parked.append(generated.key)
    assert seen == 9
    for key in parked:
        engine.release(key)
    assert engine.slots == [None] * len(engine.slots)
    assert not engine.rows


@pytest.mark.parametrize("hundred", range(10))
def test_random_mixes_of_calls_equal_rows_run_alone(hundred):
    for seed in range(100 * hundred, 100 * hundred + 100):
        mix(seed)
