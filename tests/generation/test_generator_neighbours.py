"""What a generator does not hand on: to a slot's next row, to the model's training, from the options in its folder."""

import json
import random
import shutil

import torch

from support.slow_generator import MAX_LENGTH, random_ids, request
from zs_lightning.generation import Generator, Sampling
from zs_lightning.models.loading import load_model
from zs_lightning.models.specs import ModelSpec


def first_turn(generator, key, ids):
    generator.submit(request(key, ids, new=8, keep=True))
    (generated,) = generator.run()
    return generated


def test_a_row_sees_nothing_of_the_one_before_it_in_its_slot(tiny_model):
    """A long one, released with one token written, and then the shortest that there is."""
    rng, generator = random.Random(0), Generator(tiny_model, 1, MAX_LENGTH)
    for n in range(4):
        generator.submit(request(f"long {n}", random_ids(rng, 50, 60), new=1, keep=True))
        generator.run()
        generator.release(f"long {n}")
        ids = random_ids(rng, 1, 1)
        found, alone = (first_turn(e, f"short {n}", ids) for e in (generator, Generator(tiny_model, 1, MAX_LENGTH)))
        assert (found.token_ids, found.logprobs) == (alone.token_ids, alone.logprobs)
        generator.release(f"short {n}")


def test_a_model_is_after_generation_as_it_was_before(tiny_model):
    ids = torch.tensor([random_ids(random.Random(1), 20, 20)])
    seen = []
    for _ in range(2):
        loss = tiny_model(input_ids=ids, labels=ids).loss
        loss.backward()
        seen.append((loss.item(), {name: p.grad.clone() for name, p in tiny_model.named_parameters()}))
        tiny_model.zero_grad()
        seen[-1] += (tiny_model.config._attn_implementation, sorted(vars(tiny_model)))
        first_turn(Generator(tiny_model, 2, MAX_LENGTH), "row", ids[0].tolist())
    before, after = seen
    assert before[0] == after[0]
    assert all(torch.equal(gradient, after[1][name]) for name, gradient in before[1].items())
    assert before[2:] == after[2:]


def test_generation_options_in_a_models_folder_are_not_ours(tiny_folder, tmp_path):
    """Some chat models ship a temperature of next to 0, with which all rollouts of a group would be one."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    options = {"do_sample": True, "temperature": 1e-6, "top_k": 1, "repetition_penalty": 1.3}
    (folder / "generation_config.json").write_text(json.dumps(options))
    written = []
    for path in (tiny_folder, folder):
        generator = Generator(load_model(ModelSpec(path=str(path), device="cpu")), 8, MAX_LENGTH)
        for i in range(8):
            generator.submit(request(str(i), [5, 6, 7], seed=i, sampling=Sampling()))
        written.append(sorted((g.key, g.token_ids) for g in generator.run()))
    assert written[0] == written[1]
    assert len({tuple(ids) for _, ids in written[1]}) == 8
