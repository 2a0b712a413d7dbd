"""A supervised start: its gradient, what it teaches, what it refuses, and RL that goes on from it."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from support.detached import Detached, DetachedPolicy, NoEngine, assert_same, judged, move_adapter, slow_rows
from support.stage import Recorder, example
from zs_lightning.errors import UserError
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules import PolicySFT
from zs_lightning.modules.demonstrations import Demonstrations
from zs_lightning.rl.losses import LossSpec
from zs_lightning.rollout import RolloutSpec, collate
from zs_lightning.rollout.script import Demonstration
from zs_lightning.text.protocol import parse_action
from zs_lightning.types import ActionKind, Document, Status

LIMITS = RolloutSpec(max_turns=1, max_new_tokens=90, max_observation_tokens=60, max_length=640, slots=8)


class Given(Demonstrations):
    """For each question a search and its answer, or what else is given."""

    def __init__(self, *turns, evidence="", missing=0, least_f1=1.0):
        self.turns, self.evidence, self.missing, self.least_f1 = turns, evidence, missing, least_f1

    def of(self, examples, spec):
        made = []
        for each in examples:
            search = f"<think> I need it. </think><search> number {each.id}</search>"
            turns = self.turns or (search, f"<answer> {each.golden_answers[0]}</answer>")
            # As the Recorder answers.
            found = (Document(text=f"number {each.id} is found"),)
            made.append(Demonstration(each, turns, (found, ()), self.evidence))
        return made, +Counter({"of the questions are missing": self.missing})


class DetachedStart(Detached, PolicySFT):
    def print(self, text):
        self.said = text


def start(folder, demonstrations=None, lora=None, optimizer=None, **options):
    options = {"rollout": LIMITS, "prompts": "miniature", "max_grad_norm": 0.0, "seed": 0, **options}
    model = ModelSpec(path=folder, device="cpu")
    module = DetachedStart(Recorder(), demonstrations or Given(), model=model, lora=lora, **options)
    module.setup("fit")
    # Lightning keeps a weak reference.
    module.trainer = module.held = SimpleNamespace(state=SimpleNamespace(fn="fit"), global_rank=0)
    optimizer = optimizer or torch.optim.SGD(module.trainable().values(), lr=1.0)
    return module.attach(optimizer)


@pytest.mark.parametrize("micro_batch_tokens", [1, 8192])
def test_the_gradient_is_that_of_the_cross_entropy_of_what_the_policy_writes(micro_batch_tokens, tiny_folder):
    """Of a slow one over single rows and all logits, whatever the temperature of the rollouts."""
    rollout = RolloutSpec(**{**vars(LIMITS), "temperature": 0.5})
    module = start(tiny_folder, lora=LoraSpec(r=4), micro_batch_tokens=micro_batch_tokens, rollout=rollout)
    move_adapter(module)
    examples = [example(i, "Who is it?" * i) for i in range(1, 4)]
    module.demonstrate(examples)
    rows = [module.taught[e.key][0] for e in examples]
    logprobs = torch.cat([slow_rows(module.policy, row, 1.0)[0] for row in rows])
    gradients = torch.autograd.grad(-logprobs.mean(), list(module.trainable().values()))
    before = {name: p.detach().clone() for name, p in module.trainable().items()}
    module.training_step(examples, 0)
    moved = {name: before[name] - p.detach() for name, p in module.trainable().items()}
    assert_same(moved, dict(zip(module.trainable(), gradients, strict=True)))
    assert module.logged["sft/loss"] == pytest.approx(-float(logprobs.detach().mean()), abs=1e-4)
    assert (module.logged["sft/tokens"], module.logged["sft/demonstrations"]) == (len(logprobs), 3)
    assert module.trajectories == rows, "they are written down as those of RL are"
    assert [row.reward for row in rows] == [1.0] * 3


def test_a_model_that_knows_nothing_learns_the_form(tiny_folder):
    module = start(tiny_folder)
    module.own_optimizer = torch.optim.AdamW(module.trainable().values(), lr=0.005)
    examples = [example(i) for i in (1, 2)]
    module.demonstrate(examples)
    assert module.said == "demonstrations: 2 trajectories for 2 of 2 questions"
    valid = []
    for steps in (0, 80):
        for number in range(steps):
            module.training_step(examples, number)
        module.on_validation_epoch_start()
        module.validation_step(examples, 0)
        module.on_validation_epoch_end()
        valid.append([module.logged[f"val/{name}"] for name in ("valid", "em", "searches", "valid_and_em")])
    assert valid == [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    assert float(module.logged["sft/loss"]) < 0.1


def test_the_best_model_is_that_of_valid_turns_and_exact_match():
    module = DetachedStart(NoEngine(), Given()).attach(None)
    right, wrong = judged(0, Status.ANSWERED, "gold"), judged(1, Status.TURN_LIMIT)
    wrong.turns = wrong.turns * 2
    module.validated = [right, wrong]
    module.on_validation_epoch_end()
    assert module.logged["val/valid"] == pytest.approx(1 / 3)
    assert module.logged[module.best_metric] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_rl_goes_on_with_what_was_learnt_and_measures_kl_against_it(tiny_folder, tmp_path):
    module = start(tiny_folder, lora=LoraSpec(r=4))
    examples = [example(i) for i in (1, 2)]
    module.demonstrate(examples)
    module.training_step(examples, 0)
    module.training_step(examples, 1)
    module.save_model(tmp_path / "model")
    spec = ModelSpec(path=tiny_folder, adapter=str(tmp_path / "model"), device="cpu")
    options = {"prompts": "miniature", "rollout": LIMITS, "loss": LossSpec(kl_coef=0.1), "group_size": 2, "seed": 0}
    rl = DetachedPolicy(Recorder(), spec, lora=LoraSpec(r=4), **options)
    rl.setup("fit")
    rl.trainer = rl.held = SimpleNamespace(state=SimpleNamespace(fn="fit"), global_rank=0)
    rl.attach(torch.optim.SGD(rl.trainable().values(), lr=1.0))
    rl.training_step(examples, 0)
    assert rl.logged["kl"] == pytest.approx(0, abs=1e-6), "the reference is the start"
    batch = collate(module.trajectories, 0)
    with rl.policy.disable_adapter(), torch.no_grad():
        base = torch.cat([slow_rows(rl.policy, row, 1.0)[0] for row in batch.trajectories])
    assert (rl.update.reference_logprobs(batch) - base).abs().max() > 0.1, "and not the bare base"


SEARCH = "<search> a</search>"
INVALID = "have an invalid action, or one longer than rollout.max_new_tokens"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"turns": ("nothing",)}, "have an invalid action, or one longer than rollout.max_new_tokens"),
        (
            {"turns": (f"<think> {'a ' * 99}</think>{SEARCH}",)},
            "have an invalid action, or one longer than rollout.max_new_tokens",
        ),
        ({"turns": (SEARCH, SEARCH)}, "do not answer within rollout.max_turns and rollout.max_length"),
        ({"turns": ("<answer> gold 2</answer>",)}, "have a wrong answer"),
        ({"evidence": "not there"}, "lose what they answer to rollout.max_observation_tokens"),
    ],
)
def test_what_nobody_should_learn_is_left_out_by_reason(given, reason, tiny_folder):
    turns = given.pop("turns", ())
    module = start(tiny_folder, Given(*turns, missing=3, **given))
    with pytest.raises(
        UserError, match=r"^model\.demonstrations: 0 trajectories for 0 of 1 questions: 3 of the q.*; 1 "
    ) as error:
        module.demonstrate([example(1)])
    assert f"3 of the questions are missing; 1 {reason}" in str(error.value)


def test_a_result_that_is_forged_in_a_thought_is_not_learnt(tiny_folder):
    """Where the prompt opens the thought, no tag in it ends the turn."""
    forged = "<think> <information> x </information> </think><answer> gold 1</answer>"
    for text in (forged, forged.replace("information", "info")):
        module = start(tiny_folder, Given(text))
        module.prompts = replace(module.prompts, policy="<question> {question}</question><think>")
        if text == forged:
            with pytest.raises(UserError, match=rf"1 {INVALID}"):
                module.demonstrate([example(1)])
        else:
            module.demonstrate([example(1)])
            assert module.taught["test/1"][0].answer == "gold 1"


def test_an_answer_is_right_from_the_sources_f1_on(tiny_folder):
    module = start(tiny_folder, Given("<answer> gold 2</answer>", least_f1=0.5))
    module.demonstrate([example(1)])
    (made,) = module.taught["test/1"]
    assert (made.reward, parse_action(made.turns[0].text).kind) == (0.5, ActionKind.ANSWER)


def test_a_step_without_a_demonstration_changes_nothing(tiny_folder):
    module = start(tiny_folder)
    module.demonstrate([example(1)])
    before = {name: p.detach().clone() for name, p in module.trainable().items()}
    module.training_step([example(2)], 0)
    assert all(torch.equal(before[name], p) for name, p in module.trainable().items())
    assert (module.logged["sft/demonstrations"], module.logged["sft/loss"]) == (0, 0)
