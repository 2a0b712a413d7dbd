"""Models with several adapters, and a random mix of what a generator is asked."""

import random

import torch
from peft import LoraConfig, get_peft_model

from support.slow_generator import GREEDY, MAX_LENGTH, MODELS, SlowGenerator, StopAt, random_ids, request
from zs_lightning.generation import Generator, Sampling

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_adapters(model, **ranks):
    """The model with a random adapter of each name; ranks and scales differ, and not every layer has each of them."""
    rng = random.Random(len(ranks))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, rank in ranks.items():
            layers = [layer for layer in LAYERS if rng.random() < 0.8] or LAYERS
            config = LoraConfig(
                r=rank, lora_alpha=rank * rng.choice([0.5, 1, 2]), target_modules=layers, init_lora_weights=False
            )
            if hasattr(model, "peft_config"):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
    return model.eval()


def mix(seed):
    """Submit, extend and release at random moments between steps, with few slots."""
    rng = random.Random(seed)
    model = MODELS[seed % 3]
    generator, slow = Generator(model, slots=rng.randint(1, 5), max_length=MAX_LENGTH), SlowGenerator(model)
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
            generator.submit(turn)
            made += 1
        elif choice < 0.45 and parked:
            key = parked.pop()
            generator.release(key)
            del slow.contexts[key]
        elif generator.stalled:
            generator.release(parked.pop(0))
        else:
            for generated in generator.step():
                turn = open_turns.pop(generated.key)
                slow.check(turn, generated)
                seen += 1
                if turn.keep:
                    parked.append(generated.key)
    assert seen == 9
    for key in parked:
        generator.release(key)
    assert generator.slots == [None] * len(generator.slots)
    assert not generator.rows
