"""Row 19: what may change memory, time or machines changes no step: micro-batches, caches, checkpointing, ranks."""

import random
from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing

from support.detached import DetachedSimulator, move_adapter, policy, random_trajectories, slow_rows, step_of
from support.ports import free_port
from support.stage import Recorder
from zs_lightning.generation import Generator, StopTags
from zs_lightning.miniature.world import make_world
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.rl.losses import LossSpec
from zs_lightning.rollout import Rollouter, RolloutSpec
from zs_lightning.text.prompts import MINIATURE
from zs_lightning.text.protocol import STOP_TAGS
from zs_lightning.types import Document, QAExample, SearchRecord

NEAR = 1e-5


def grpo(folder, **options):
    """How far one step of eight trajectories moves each weight."""
    module = policy(folder, LoraSpec(r=4), loss=LossSpec(kl_coef=0.1), **{"micro_batch_tokens": 9999, **options})
    module.policy.train()
    return step_of(module, random_trajectories(19, 8))[0]


def record(i):
    asked = QAExample(id=str(i), question=f"Who wrote book {i}?", golden_answers=("Foo", "Bar"), source="test")
    documents = tuple(Document(text=f"The Red Harbor author {'Foo ' * (i + k)}.") for k in range(1 + i % 3))
    return SearchRecord(example=asked, query=f"author {i}", label="noisy" if i % 2 else "useful", documents=documents)


def sft(folder=None, **options):
    module = DetachedSimulator(
        model=ModelSpec(device="cpu"), lora=LoraSpec(r=4), prompts="miniature", max_grad_norm=0.0, seed=0, **options
    )
    module.setup("fit")
    move_adapter(module)
    module.attach(torch.optim.SGD(module.trainable().values(), lr=1.0))
    module.language_model.train()
    before = {name: p.detach().clone() for name, p in module.trainable().items()}
    module.learn([record(i) for i in range(8)], 0)
    return {name: before[name] - p.detach() for name, p in module.trainable().items()}


def farthest(found, expected):
    assert found.keys() == expected.keys()
    assert max(float(moved.abs().max()) for moved in expected.values()) > 0.01
    return max(float((found[name] - moved).abs().max()) for name, moved in expected.items())


STAGES = {"GRPO": grpo, "SFT": sft}


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_and_checkpointing_make_the_same_step(stage, tiny_folder, figure):
    expected = STAGES[stage](tiny_folder)
    differences = {
        "eight micro-batches of one row": farthest(STAGES[stage](tiny_folder, micro_batch_tokens=1), expected),
        "checkpointing": farthest(STAGES[stage](tiny_folder, checkpointing=True), expected),
    }
    for name, difference in differences.items():
        figure(19, f"{stage}: {name}", f"the same step within {difference:.0e}")
    assert max(differences.values()) <= NEAR


def one_of_two(rank, port, folder, path):
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=600), rank=rank, world_size=2)
    torch.save({stage: make(folder) for stage, make in STAGES.items()}, f"{path}/{rank}")
    distributed.destroy_process_group()


def test_two_ranks_make_the_same_step(tiny_folder, tmp_path, figure):
    # Forked, since loading the libraries twice takes most of the time.
    multiprocessing.start_processes(one_of_two, (free_port(), tiny_folder, str(tmp_path)), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1)]
    difference = max(farthest(steps[stage], make(tiny_folder)) for stage, make in STAGES.items() for steps in found)
    figure(19, "GRPO and SFT: two ranks", f"the same step within {difference:.0e}")
    assert difference <= NEAR


def test_what_is_sampled_with_kept_keys_and_values_is_what_the_whole_context_gives(miniature, figure):
    """Several turns in few slots, against one pass of transformers over each whole context without a cache."""
    model, tokenizer = miniature
    spec = RolloutSpec(max_turns=3, max_new_tokens=24, max_observation_tokens=48, max_length=400, slots=5)
    tools = (Generator(model, spec.slots, spec.max_length), TextEncoder(tokenizer), Recorder())
    rollouter = Rollouter(*tools, MINIATURE, spec, StopTags(tokenizer, STOP_TAGS))
    questions = [question.example(0) for question in make_world(0).questions()["train"]]
    rows = rollouter.run(random.Random(19).sample(questions, 8), 2, seed=0)
    differences = torch.cat([torch.sub(*slow_rows(model, row, 1.0)).detach() for row in rows])
    assert len(differences) > 200
    assert any(row.searches for row in rows)
    difference, mean = float(differences.abs().max()), float(differences.mean())
    held = f"log-probabilities of {len(differences)} tokens within {difference:.0e}, {abs(mean):.0e} in the mean"
    figure(19, "kept keys and values against transformers without them", held)
    assert difference <= 3e-5  # In float32, of numbers down to -20.
    assert abs(mean) <= 1e-6
