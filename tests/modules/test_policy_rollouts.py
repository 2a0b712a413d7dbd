"""What the policy's module asks of its rollouts: draws, decoding and the mode they leave the model in."""

import gc
import os
import threading
from types import SimpleNamespace

import pytest
import torch

from support.detached import DetachedPolicy, policy, random_trajectories, step
from support.oracle import Oracle
from zs_lightning.data.sources import MiniatureSource
from zs_lightning.generation import Sampling
from zs_lightning.models.loading import load_model
from zs_lightning.models.lora import add_lora
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.rollout import RolloutSpec, actor
from zs_lightning.rollout.rollouter import Rollouter
from zs_lightning.search import BM25Search
from zs_lightning.search.simulator import SimulatorSearch

GREEDY = Sampling(temperature=0.0)
EXAMPLES = MiniatureSource().questions("validation")[:4]


class Noted(BM25Search):
    """Remembers the noise that it was asked for."""

    def submit(self, requests):
        self.noise = {*getattr(self, "noise", set()), *(request.noise_prob for request in requests)}
        super().submit(requests)


def miniature(run="fit", retrieve_first=False, engine=None, **options):
    limits = RolloutSpec(
        max_turns=1, retrieve_first=retrieve_first, max_new_tokens=24, max_observation_tokens=30, max_length=200, slots=4
    )
    model, options = ModelSpec(device="cpu"), {"lora": LoraSpec(r=2), "group_size": 1, "seed": 0, **options}
    module = DetachedPolicy(engine or Noted(count=1), model, "miniature", rollout=limits, **options)
    module.setup(run)
    # Lightning keeps a weak reference.
    module.trainer = module.held = SimpleNamespace(state=SimpleNamespace(fn=run), global_rank=0)
    return module.attach(torch.optim.SGD(module.trainable().values(), lr=0.0))


def written(trajectories):
    return [(t.example.key, t.token_ids) for t in trajectories]


def test_each_step_draws_anew_and_by_its_number():
    module, drawn = miniature(), []
    for number in (0, 1, 0):
        module.rollout_step = number
        module.training_step(EXAMPLES, 0)
        drawn.append(written(module.trajectories))
    assert all(first != second for first, second in zip(*drawn[:2], strict=True))
    assert drawn[2] == drawn[0]


def test_kinds_of_noise_that_a_step_did_not_draw_are_logged_as_none():
    engine = Oracle()
    engine.orders.weights = {"noisy": 1.0, "off_topic": 0.5, "partial": 0.0}
    module = miniature(retrieve_first=True, engine=engine)
    module.training_step(EXAMPLES, 0)
    drawn = {name: value for name, value in module.logged.items() if name.startswith("noise/drawn_")}
    assert drawn == {"noise/drawn_useful": 1.0, "noise/drawn_noisy": 0.0, "noise/drawn_off_topic": 0.0}


def left_behind():
    """Open files, threads and tensors of this process."""
    gc.collect()
    tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    return len(os.listdir("/proc/self/fd")), threading.active_count(), tensors


def test_steps_leave_nothing_behind():
    module, found = miniature(), []
    for number in range(12):
        module.training_step(EXAMPLES, number)
        found.append(left_behind())
    assert found[3:] == found[3:4] * 9


def test_validation_is_greedy(monkeypatch):
    module, seen = miniature(), []
    roll_out = module.roll_out
    monkeypatch.setattr(module, "roll_out", lambda *args, **more: seen.append(roll_out(*args, **more)) or seen[-1])
    module.validation_step(EXAMPLES, 0)
    assert written(seen[0]) == written(roll_out(EXAMPLES, 1, 99, 0.0, GREEDY))
    assert written(seen[0]) != written(roll_out(EXAMPLES, 1, 99, 0.0, Sampling()))


@pytest.mark.parametrize(("run", "noise"), [("fit", 0.25), ("validate", 0.5)])
def test_validation_has_a_noise_of_its_own_while_training(run, noise):
    """The last training step's would else be in the curve; what is measured by itself has the noise of its option."""
    module = miniature(run, retrieve_first=True, noise_prob=0.5, validation_noise=0.25)
    module.validation_step(EXAMPLES, 0)
    assert module.search.noise == {noise}


@pytest.mark.parametrize(("run", "turns"), [("fit", [3, 3, 1]), ("validate", [1, 1])])
def test_validations_of_a_fit_have_their_own_limit_of_turns(run, turns, monkeypatch):
    """With both engines; what is measured by itself has that of its option."""
    module, specs = miniature(run, validation_turns=3, validation_search=BM25Search(count=1)), []
    monkeypatch.setattr(actor, "Rollouter", lambda *args, **options: specs.append(args[4]) or Rollouter(*args, **options))
    module.on_validation_epoch_start()
    module.validation_step(EXAMPLES, 0)
    module.training_step(EXAMPLES, 0)
    assert [spec.max_turns for spec in specs] == turns


def test_a_tests_draws_do_not_depend_on_what_was_tested_before():
    found = []
    for parts in ([EXAMPLES[:1], EXAMPLES[1:]], [EXAMPLES[1:], EXAMPLES[:1]]):
        module = miniature(decodings=["sampled", "greedy"])
        module.on_test_epoch_start()
        for number, part in enumerate(parts):
            module.test_step(part, number)
        found.append(sorted(written(module.trajectories)))
    assert found[0] == found[1]
    assert len({tuple(ids) for _, ids in found[0]}) > len(EXAMPLES)


@pytest.mark.parametrize("way", ["full", "lora", "shared"])
def test_checkpointing_is_on_in_updates_also_after_a_rollout(tiny_folder, way, tmp_path):
    """Each layer then runs twice for a micro-batch. To load a second adapter, as that of a simulator on the policy's base,
    peft puts the model into eval mode, where it would not."""
    lora, search = None if way == "full" else LoraSpec(r=4), None
    if way == "shared":
        add_lora(load_model(ModelSpec(path=tiny_folder, device="cpu")), LoraSpec(r=2), 1).save_pretrained(tmp_path)
        search = SimulatorSearch(ModelSpec(path="policy", adapter=str(tmp_path)), "miniature", max_new_tokens=8, max_length=160)
    for checkpointing in (False, True):
        options = {"checkpointing": checkpointing, "micro_batch_tokens": 100_000}
        module, calls = policy(tiny_folder, lora, search=search, **options), []
        layer = next(part for name, part in module.policy.named_modules() if name.endswith("layers.0.mlp"))
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        for _ in range(2):
            calls.clear()
            step(module, random_trajectories(0))
            assert len(calls) == 1 + checkpointing
            with module.actor.generating():
                assert not module.policy.training
