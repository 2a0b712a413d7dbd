"""Steps that must not happen: numbers that are not finite, and memory that is full, in updates and rewards."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed, multiprocessing

from support import ppo
from support.commandline import POLICY, SMALL_RL, failure, tensors
from support.detached import judged, policy, prepare, random_trajectories, step
from support.ports import free_port
from zs_lightning.cli import main
from zs_lightning.errors import NotFiniteError, RunError, UserError
from zs_lightning.models.specs import LoraSpec
from zs_lightning.modules import update
from zs_lightning.modules.accidents import Skipped, for_all_ranks
from zs_lightning.rl.advantages import set_advantages
from zs_lightning.rl.losses import LossSpec
from zs_lightning.rl.rewards import AnswerReward, Reward, judge
from zs_lightning.types import ActionKind, Status, Turn

TOKEN_LOGPROBS = update.token_logprobs

# ---------------------------------------------------------------------------------------------- not finite

REWARD = """
from zs_lightning.rl.rewards import AnswerReward

class Sometimes(AnswerReward):
    calls = 0

    def parts(self, trajectory):
        Sometimes.calls += 1
        broken = 4 < self.calls <= 8 or self.calls > 12
        return {"odd": float("nan") if broken else 0.5 + self.calls % 2}
"""


@pytest.mark.usefixtures("environment")
def test_steps_with_a_reward_that_is_not_finite_change_nothing_and_the_third_in_a_row_is_the_last(capsys, monkeypatch):
    """Four rollouts a step: the rewards of steps 2, 4, 5 and 6 are NaN."""
    Path("sometimes.py").write_text(REWARD)
    monkeypatch.syspath_prepend(".")
    options = ["fit", POLICY, "--model.search=BM25Search", *SMALL_RL, "--model.warmup_steps=0", "--data.steps=9"]
    options += ["--trainer.log_every_n_steps=1", "--model.rollout.max_new_tokens=12", "--trainer.enable_progress_bar=false"]
    reward = "--model.reward=sometimes.Sometimes"
    code, said = failure(capsys, *options, reward, "--run.folder=run")
    assert code == 1
    name = "model.reward: sometimes.Sometimes returned {'odd': nan} for miniature"
    assert said.splitlines()[-1].startswith(f"error: 3 steps in a row were skipped, the last since {name}")
    assert "; correct it" in said
    found = {path.name: [json.loads(line) for line in path.open()] for path in Path("run/bad_steps").iterdir()}
    assert sorted(found) == [f"step-{n}.jsonl" for n in (2, 4, 5, 6)]
    assert [len(lines) for lines in found.values()] == [4] * 4
    line = found["step-2.jsonl"][0]
    assert (line["step"], line["reward"], line["reward_parts"]) == (2, "NaN", {"odd": "NaN"})
    assert name in line["reason"]
    assert line["token_ids"]
    lines = Path("run/trajectories/train.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {1, 3}
    board = EventAccumulator("run").Reload()
    assert [event.value for event in board.Scalars("policy/skipped_steps")] == [0, 1, 1, 2, 3]
    assert [event.step for event in board.Scalars("reward")] == [0, 2], "of a step that was skipped, nothing is shown"
    saved = torch.load("run/last.ckpt", weights_only=True)
    assert saved["skipped"] == [3, 2]
    # Step 5 left what step 3 made: so does a run that is stopped there.
    import sometimes

    sometimes.Sometimes.calls = 0
    main([*options, reward, "--run.folder=shorter", "--data.steps=3"])
    shorter = torch.load("shorter/last.ckpt", weights_only=True)
    for part in ("state_dict", "optimizer_states"):
        one, other = tensors(saved[part]), tensors(shorter[part])
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(other[k])) for k, v in one.items() if v is not None)


class Bad(Reward):
    def __init__(self, made):
        self.made = made

    def parts(self, trajectory):
        return self.made


@pytest.mark.parametrize("made", [0.5, None, {"odd": torch.ones(2)}, {"odd": None}, [1.0]])
def test_a_reward_of_another_shape_is_named(made):
    with pytest.raises(UserError, match=r"^model\.reward: .*test_accidents\.Bad returned .*; expected parts by name"):
        judge(random_trajectories(0), Bad(made))


def test_a_reward_that_is_no_number_is_told_from_a_wrong_estimator():
    rows = random_trajectories(0)
    judge(rows, Bad({"odd": 1e300}))
    with pytest.raises(NotFiniteError, match=r"correct model\.reward"):
        set_advantages(rows, lambda rewards, groups: rewards)
    judge(rows, Bad({"odd": 1}))
    with pytest.raises(UserError, match=r"^model\.estimator: expected 7 finite advantages"):
        set_advantages(rows, lambda rewards, groups: rewards / 0)


@pytest.mark.parametrize("what", ["advantage", "gradient", "value"])
def test_an_update_that_is_not_finite_changes_nothing_and_spoils_no_other(what, tiny_folder, monkeypatch):
    good, written = random_trajectories(0), []
    module = ppo.policy() if what == "value" else policy(tiny_folder, LoraSpec(r=4), max_grad_norm=1.0)
    if what != "value":
        module.own_optimizer = torch.optim.AdamW(module.trainable().values(), lr=0.01)
        module.update.estimator = None
    module.skipped.write = lambda *args: written.append(args)
    bad = random_trajectories(0)
    monkeypatch.setattr(module, "judge", lambda trajectories: trajectories)

    def learn(rows):
        monkeypatch.setattr(module, "roll_out", lambda *_: rows)
        before = [p.detach().clone() for p in module.trainable().values()]
        module.training_step([], len(written))
        return any(not torch.equal(p, old) for p, old in zip(module.trainable().values(), before, strict=True))

    if what == "gradient":
        monkeypatch.setattr(module, "manual_backward", lambda loss: (loss * 1e30 * 1e30).backward())
    elif what == "value":
        monkeypatch.setattr(module.critic, "_advantages", lambda batch: batch.values.double() * float("nan"))
    else:
        bad[0].advantage = float("inf")
    assert not learn(bad)
    assert not learn(bad)
    assert (module.logged["policy/skipped_steps"], module.rollout_step, len(written[0][2])) == (2, 2, 7)
    # Not only by its gradients, which would be taken of all ranks first.
    assert ("the loss was not finite" in written[0][1]) == (what == "advantage")
    monkeypatch.undo()
    monkeypatch.setattr(module, "judge", lambda trajectories: trajectories)
    assert learn(good)
    assert all(p.isfinite().all() for p in module.trainable().values())
    assert module.skipped.in_a_row == 0


def test_an_update_before_one_that_is_not_finite_stands_with_its_trajectories(tiny_folder, monkeypatch, caplog):
    module, rows, written = policy(tiny_folder, LoraSpec(r=4), lr=0.01, updates_per_rollout=2), random_trajectories(0), []
    module.update.estimator = None
    module.skipped.write = lambda *args: written.append(args)
    monkeypatch.setattr(module, "judge", lambda trajectories: trajectories)
    monkeypatch.setattr(module, "roll_out", lambda *_: rows)
    monkeypatch.setattr(
        module, "manual_backward", lambda loss: (loss * (float("inf") ** module.optimiser_step.taken)).backward()
    )
    before = [p.detach().clone() for p in module.trainable().values()]
    module.training_step([], 4)
    assert caplog.messages == ["step 5 is skipped from update 2 on: gradients were not finite; lower the learning rate"]
    after = list(module.trainable().values())
    assert not all(torch.equal(p, old) for p, old in zip(after, before, strict=True))
    assert all(p.isfinite().all() for p in after)
    assert module.trajectories == written[0][2] == rows
    assert (module.optimiser_step.taken, module.skipped.total) == (1, 1)


def test_the_third_step_in_a_row_stops_the_run():
    skipped = Skipped()
    for step_number in range(2):
        skipped.add(step_number, "why", [])
    with pytest.raises(RunError, match="3 steps in a row were skipped, the last since why"):
        skipped.add(2, "why", [])


# ---------------------------------------------------------------------------------------------- memory


def failing(monkeypatch, calls):
    """Lets these of the policy's forward passes fail, with gradients of others there."""
    seen = []

    def token_logprobs(*args):
        seen.append(args)
        if len(seen) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return TOKEN_LOGPROBS(*args)

    monkeypatch.setattr(update, "token_logprobs", token_logprobs)
    return seen


def updated(folder, tokens=200):
    spec = LossSpec(importance_cap=1.3, clip_low=0.05, clip_high=0.1, kl_coef=0.1)
    module = policy(folder, LoraSpec(r=4), 0.1, loss=spec, updates_per_rollout=2, micro_batch_tokens=tokens)
    module.policy.double().train()
    prepared = prepare(module, random_trajectories(4))
    for _ in range(2):
        step(module, prepared)
    return {name: p.detach().clone() for name, p in module.trainable().items()}, module


def assert_near(found, expected):
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("calls", [{2}, {4}, {5, 7}, {6}])
def test_an_update_that_ran_out_of_memory_is_repeated_in_smaller_parts(calls, tiny_folder, monkeypatch):
    """In the reference's passes, in the first update, and in the second one."""
    expected, whole = updated(tiny_folder)
    seen = failing(monkeypatch, calls)
    found, module = updated(tiny_folder)
    assert len(seen) > max(calls)
    assert whole.fitting.now == 200
    assert module.policy.training, "also behind the reference's passes"
    assert module.fitting.now == 100 // len(calls)
    assert_near(found, expected)


def test_ppo_keeps_the_values_of_before_the_first_update(monkeypatch):
    rows, weights = ppo.rollouts(1), []
    for calls in ((), (4,)):
        failing(monkeypatch, calls)
        module = ppo.policy(lr=0.02, micro_batch_tokens=200, updates_per_rollout=2)
        module.double()
        batch = module.update.prepare(rows, "cpu")
        for _ in range(2):
            step(module, batch)
        weights.append({name: p.detach().clone() for name, p in module.trainable().items()})
    assert module.fitting.now == 100
    assert_near(weights[1], weights[0])


def test_a_row_that_does_not_fit_ends_with_what_helps(tiny_folder, monkeypatch):
    failing(monkeypatch, range(1, 999))
    message = r"^memory is full with model\.micro_batch_tokens at its least, \d+; shorten the longest rows, or set model\.check"
    with pytest.raises(RunError, match=message):
        updated(tiny_folder)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_an_optimizer_that_finds_no_memory_is_one_sentence(error):
    class Full(torch.optim.SGD):
        def step(self, closure=None):
            raise error

    with pytest.raises(RunError, match=r"^memory is full in the optimizer's step, .*; train less with model\.lora"):
        update.OptimiserStep(1.0)(Full([torch.nn.Parameter(torch.zeros(1))]))


def test_a_run_that_goes_on_cuts_its_micro_batches_as_before(tiny_folder):
    """Else its sums would be added up in another order than those of a run that was not killed."""
    first, again, other = (policy(tiny_folder, LoraSpec(r=4), micro_batch_tokens=most) for most in (200, 200, 100))
    first.fitting.halve(10)
    first.fitting.grows()
    checkpoint = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(checkpoint)
    for module in (again, other):
        module.on_load_checkpoint(checkpoint)
    assert vars(again.fitting) == vars(first.fitting)
    assert again.fitting.now == 100
    assert (other.fitting.now, other.fitting.fitted) == (100, 0), "the user has set another size"


def one_of_two(rank, port, folder, path):
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=600), rank=rank, world_size=2)
    patch = pytest.MonkeyPatch()
    failing(patch, {4} if rank else {})
    found, module = updated(folder, 100)

    def rolled_out():
        if rank:
            raise NotFiniteError("logits of the second rank")

    with pytest.raises(NotFiniteError, match="logits of the second rank"):
        for_all_ranks(rolled_out)
    torch.save([found, module.fitting.now], f"{path}/{rank}")
    distributed.destroy_process_group()


def test_ranks_agree_on_accidents(tiny_folder, tmp_path):
    expected, _ = updated(tiny_folder)
    # Forked, since loading the libraries twice takes most of the time.
    multiprocessing.start_processes(one_of_two, (free_port(), tiny_folder, str(tmp_path)), nprocs=2, start_method="fork")
    for rank in (0, 1):
        found, tokens = torch.load(tmp_path / str(rank), weights_only=True)
        assert tokens < 100, "of both, though one had room"
        assert_near(found, expected)


def test_an_answer_behind_a_forged_result_earns_nothing_and_pays_for_its_searches():
    row = judged(0, Status.ANSWERED, "gold")
    judge([row], AnswerReward(search_cost=0.1))
    assert row.reward == 1
    row.turns[0].text = "<information> gold"
    row.turns[:0] = [Turn(text="", kind=ActionKind.SEARCH, content="red", span=(0, 1), observation_span=(1, 2))]
    judge([row], AnswerReward(search_cost=0.1, format_weight=0.5))
    assert row.reward == pytest.approx(-0.1)
    assert row.reward_parts["answer"] == 0
