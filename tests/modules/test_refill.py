"""Steps whose groups without signal are replaced: what is trained on, what is logged, and runs that go on."""

import json
from collections import defaultdict
from pathlib import Path

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.commandline import POLICY, ByQuestion, failure, is_dead
from support.detached import example, judged, policy
from zs_lightning.cli import main
from zs_lightning.data.datamodule import QADataModule
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules import PolicyRL
from zs_lightning.modules.update import Update
from zs_lightning.rl.pool import RefillSpec
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search import BM25Search
from zs_lightning.types import Status

ROOT = Path(__file__).parents[2]
EACH = 2
OPTIONS = ["fit", POLICY, "--model.search=BM25Search", "--model.reward=support.commandline.ByQuestion", "--data.batch_size=4"]
OPTIONS += [f"--model.group_size={EACH}", "--model.loss.kl_coef=0", "--model.lora.r=2", "--model.lora.dropout=0.1"]
OPTIONS += ["--model.rollout.max_turns=1", "--model.rollout.max_new_tokens=16", "--model.refill.share=0.75"]
OPTIONS += ["--data.steps=4", "--run.save_every=1", "--run.keep_trajectories=99", "--trainer.log_every_n_steps=1"]
OPTIONS += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def trained(monkeypatch, refill, reward, steps=3):
    """The module after some steps, what each trained on, and what it logged."""
    L.seed_everything(0, verbose=False)
    lists, logged, prepare = [], [], Update.prepare
    monkeypatch.setattr(Update, "prepare", lambda self, rows, device: lists.append(list(rows)) or prepare(self, rows, device))
    module = PolicyRL(
        BM25Search(count=1),
        model=ModelSpec(device="cpu"),
        prompts="miniature",
        lora=LoraSpec(r=2),
        rollout=RolloutSpec(max_turns=1, max_new_tokens=16, max_observation_tokens=30, max_length=200, slots=6),
        estimator="grpo",
        group_size=EACH,
        refill=refill,
        reward=reward,
        warmup_steps=0,
    )
    end = L.Callback()
    end.on_train_batch_end = lambda trainer, module, *_: logged.append(
        (list(module.trajectories), list(module.refilled), {n: float(v) for n, v in trainer.callback_metrics.items()})
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, limit_val_batches=0, callbacks=[end], **quiet)
    trainer.fit(module, QADataModule(batch_size=4, steps=steps))
    return module, lists, logged


def test_groups_without_signal_are_replaced_and_curves_are_of_the_datas_questions(monkeypatch):
    module, lists, logged = trained(monkeypatch, RefillSpec(share=0.75), ByQuestion())
    known, refills = set(), 0
    for rows, (own, refilled, metrics) in zip(lists, logged, strict=True):
        keys = list(dict.fromkeys(row.group_id for row in own))
        dead = [key for key in keys if is_dead(key)]
        # Three of four at most, and no more than are known of other questions.
        count = min(len(dead), 3, len(known - set(keys)))
        taken = {row.group_id for row in refilled}
        assert len(taken) == count
        assert len(refilled) == EACH * count
        assert taken <= known - set(keys)
        assert rows == [row for row in own if row.group_id not in dead[:count]] + refilled
        assert sum(row.refilled for row in rows) == len(refilled)
        assert all(row.advantage for row in refilled)
        # A half is earned where every second rollout is right.
        assert metrics["reward"] == pytest.approx(1 - 0.5 * (4 - len(dead)) / 4)
        assert metrics["frac_reward_zero_std"] == len(dead) / 4
        assert [metrics[f"groups/{name}"] for name in ("pool", "drawn", "refilled")] == [len(known), count, count]
        known |= {key for key in keys if not is_dead(key)}
        refills += count
    assert refills >= 2
    assert set(module.pool.questions) == known


def test_without_the_option_nothing_is_asked_again(monkeypatch):
    _, lists, logged = trained(monkeypatch, None, ByQuestion(), steps=2)
    assert [rows for rows, _, _ in logged] == lists
    assert not any(refilled for _, refilled, _ in logged)
    assert not any(name.startswith("groups/") for name in logged[-1][2])


def test_of_a_step_that_is_skipped_nothing_is_remembered(monkeypatch):
    """The third step replaces groups, whose rewards are no numbers."""
    written, add = [], PolicyRL.forget_step
    monkeypatch.setattr(PolicyRL, "forget_step", lambda *args: written.append(add(*args)) or written[-1])
    module, lists, logged = trained(monkeypatch, RefillSpec(), ByQuestion(bad=float("nan")))
    assert (module.skipped.total, len(lists)) == (1, 2)
    *before, (own, refilled, _) = logged
    assert own == refilled == []
    assert sum(row.refilled for row in written[0]) == len(written[0]) - 4 * EACH > 0
    assert set(module.pool.questions) == {row.group_id for rows, _, _ in before for row in rows if not is_dead(row.group_id)}


def test_a_refill_whose_searches_fail_stops_no_run(tiny_folder, monkeypatch):
    module = policy(tiny_folder, estimator="grpo", group_size=2, refill=RefillSpec())
    mixed = [judged(7, Status.ANSWERED, "gold"), judged(7, Status.ANSWERED, "red")]
    module.judge(mixed)
    module.pool.remember(mixed)
    usable = module.judge([judged(0, Status.ANSWERED, "red") for _ in range(2)])
    for fresh in ([judged(7, Status.FAILED) for _ in range(2)], [judged(7, Status.ANSWERED, "gold"), judged(7, Status.FAILED)]):
        monkeypatch.setattr(module, "roll_out", lambda *_, fresh=fresh: fresh)
        assert module.refill([example(0)], usable) == usable
        module.pool.remember(module.refilled)
        assert list(module.pool.questions) == ["test/7"]


def test_an_estimator_that_learns_from_equal_rewards_is_refused_by_its_key(capsys, tmp_path):
    code, said = failure(capsys, *OPTIONS, "--model.estimator=reinforce", f"--run.folder={tmp_path / 'run'}")
    assert code == 2
    assert "model.refill: expected an estimator that compares the rollouts of a group (rloo, grpo, grpo_no_std" in said


# ---------------------------------------------------------------------------------------------- runs


def left(folder):
    """Checkpoint, rollouts and curves of a run."""
    state = torch.load(folder / "last.ckpt", weights_only=True)
    rows = [json.loads(line) for line in (folder / "trajectories" / "train.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(folder)).Reload()
    names = [name for name in board.Tags()["scalars"] if name.startswith(("groups/", "reward", "frac"))]
    return state, rows, {name: [(event.step, event.value) for event in board.Scalars(name)] for name in names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    main([*OPTIONS, f"--run.folder={folder}"])
    return left(folder)


def test_rollouts_in_place_of_others_are_written_down_as_such(whole):
    _, rows, curves = whole
    steps = defaultdict(set)
    for row in rows:
        steps[row["step"], row["refilled"]].add(row["id"])
    assert [len(steps[step, False]) for step in (1, 2, 3, 4)] == [4] * 4
    assert [len(steps[step, True]) for step in (1, 2, 3, 4)] == [value for _, value in curves["groups/drawn"]]
    assert sum(row["refilled"] for row in rows) > EACH


def test_a_run_that_stops_goes_on_with_its_pool(whole, tmp_path, capsys):
    args = [*OPTIONS, f"--run.folder={tmp_path / 'run'}"]
    stop = ["--trainer.callbacks+=support.commandline.StopAfterOneStep", "--trainer.callbacks.step=2"]
    assert "goes on with" in failure(capsys, *args, *stop)[1]
    main(args)
    (state, rows, curves), (other, other_rows, other_curves) = left(tmp_path / "run"), whole
    assert state["pool"] == other["pool"] != []
    assert rows == other_rows
    assert curves == other_curves
    assert all(torch.equal(weight, other["state_dict"][name]) for name, weight in state["state_dict"].items())


def test_two_processes_have_the_pool_of_one(whole, tmp_path, warm):
    warm.two_ranks([*OPTIONS, "--trainer.devices=2", f"--run.folder={tmp_path / 'run'}"], tmp_path)
    (state, rows, curves), (other, other_rows, other_curves) = left(tmp_path / "run"), whole
    assert state["pool"] == other["pool"]
    assert [(row["id"], row["refilled"], row["reward"]) for row in rows] == [
        (row["id"], row["refilled"], row["reward"]) for row in other_rows
    ]
    assert curves["groups/drawn"] == other_curves["groups/drawn"]
