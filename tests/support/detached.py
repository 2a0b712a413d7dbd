"""Modules with the optimiser but without a Trainer, trajectories to update them with, and the same numbers the slow way."""

import copy
import random
from dataclasses import replace

import torch

from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules import PolicyRL, SimulatorSFT
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search import SearchEngine
from zs_lightning.types import ActionKind, QAExample, Status, Trajectory, Turn


class NoEngine(SearchEngine):
    """For modules that are updated and never roll out."""

    name = "no engine"

    def submit(self, requests):
        raise AssertionError("nothing should be searched here")

    def poll(self):
        return []


class Detached:
    """What a Trainer gives a module in manual optimisation, without a Trainer."""

    def attach(self, optimizer):
        self.own_optimizer, self.logged = optimizer, {}
        return self

    def optimizers(self, use_pl_optimizer=True):
        return self.own_optimizer

    def lr_schedulers(self):
        return torch.optim.lr_scheduler.ConstantLR(self.own_optimizer, 1.0)

    def manual_backward(self, loss):
        loss.backward()

    def log_dict(self, values, **_):
        self.logged |= values

    def log(self, name, value, **_):
        self.logged[name] = value


class DetachedPolicy(Detached, PolicyRL):
    """With contexts as short as the miniature reads."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"rollout": RolloutSpec(max_length=640), **options})


class DetachedSimulator(Detached, SimulatorSFT):
    pass


def policy(folder, lora=None, lr=1.0, search=None, **options):
    """A module with plain SGD and no clipping: its step is lr times the gradient."""
    options = {"max_grad_norm": 0.0, "estimator": "reinforce", "seed": 0, **options}
    module = DetachedPolicy(search or NoEngine(), model=ModelSpec(path=folder, device="cpu"), lora=lora, **options)
    module.setup("fit")
    move_adapter(module)
    return module.attach(torch.optim.SGD(module.trainable().values(), lr=lr))


def move_adapter(module):
    """A fresh adapter has B = 0: A would get no gradient, and the policy would be the base model."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)


def example(i):
    return QAExample(id=str(i), question=f"Who is {i}?", golden_answers=("gold",), source="test")


def random_trajectories(seed, count=7, zero=0):
    rng = random.Random(seed)
    trajectories = []
    for i in range(count):
        length = rng.randint(3, 40)
        mask = [rng.random() < 0.6 for _ in range(length)]
        trajectories.append(
            Trajectory(
                example=example(i),
                sample=0,
                prompt_ids=[rng.randrange(300) for _ in range(rng.randint(1, 12))],
                token_ids=[rng.randrange(300) for _ in range(length)],
                loss_mask=mask,
                old_logprobs=[-6 + rng.gauss(0, 0.5) if m else 0.0 for m in mask],
                advantage=0.0 if i < zero else rng.gauss(0, 2),
            )
        )
    return trajectories


def alike(logprob=-7.0):
    """A right trajectory and three wrong ones that begin as it does, and so pull it down with them."""
    (right,) = random_trajectories(0, 1)
    right.advantage, right.reward = 1.0, 1.0
    right.old_logprobs = [logprob if sampled else 0.0 for sampled in right.loss_mask]
    rows = [right]
    for number in (1, 2, 3):
        rows.append(replace(copy.deepcopy(right), advantage=-1.0, reward=0.0))
        rows[-1].token_ids[-number] = number
    return rows


def slow_rows(model, trajectory, temperature):
    """Log-probabilities of the sampled tokens, and those of sampling time; one row, no padding, all logits."""
    ids = trajectory.prompt_ids + trajectory.token_ids
    table = (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
    places = [len(trajectory.prompt_ids) + k for k, sampled in enumerate(trajectory.loss_mask) if sampled]
    now = torch.stack([table[place - 1, ids[place]] for place in places]) if places else torch.zeros(0)
    return now, torch.tensor([trajectory.old_logprobs[k] for k, sampled in enumerate(trajectory.loss_mask) if sampled])


def prepare(module, trajectories):
    """The trajectories as the module updates on them; their advantages are as they are, or a critic's."""
    module.update.estimator = None
    return module.update.prepare(trajectories, "cpu")


def step(module, prepared):
    """One update; a list of trajectories is prepared first."""
    prepared = prepare(module, prepared) if isinstance(prepared, list) else prepared
    return module.update.step(prepared, module.trainable().values(), module.optimise)


def step_of(module, prepared):
    """How far one update moves each weight, against the gradient."""
    before = {name: p.detach().clone() for name, p in module.trainable().items()}
    sums = step(module, prepared)
    lr = module.own_optimizer.param_groups[0]["lr"]
    return {name: (before[name] - p.detach()) / lr for name, p in module.trainable().items()}, sums


def assert_same(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    assert max(float(g.abs().max()) for g in expected.values()) > 100 * atol, "gradients too small to say anything"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=atol, rtol=1e-4)


TRAINABLE = [None, LoraSpec(r=4)]


def judged(group, status, answer=None):
    kind = ActionKind.ANSWER if answer else ActionKind.INVALID
    turns = [Turn(text="", kind=kind, content=answer or "no_action", span=(0, 1))]
    failure = "no wire" if status is Status.FAILED else None
    return Trajectory(example=example(group), sample=0, prompt_ids=[1], turns=turns, status=status, failure=failure)
