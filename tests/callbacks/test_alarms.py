"""Runs of the real miniature that are bound to die: each is named within ten steps, once, and a healthy one is left alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.commandline import POLICY, SMALL_RL
from support.runfolders import trajectory
from zs_lightning.callbacks import Alarms, RunFiles
from zs_lightning.callbacks import alarms as module_of_alarms
from zs_lightning.cli import main
from zs_lightning.modules.health import Health
from zs_lightning.rl import alarms as rules
from zs_lightning.rl.alarms import Finding, Rule

pytestmark = pytest.mark.usefixtures("environment")

RUN = ["fit", POLICY, "--model.search=BM25Search", "--run.folder=run", "--trainer.enable_progress_bar=false"]
RUN += ["--trainer.log_every_n_steps=1"]
STOP = "--trainer.callbacks=[{class_path: Alarms, init_args: {stop: true}}]"


def lines(folder="run"):
    path = Path(folder) / "alarms.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == module_of_alarms.__name__]


def curve(folder="run"):
    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars("health/alarms")]


# ---------------------------------------------------------------------------------------------- real runs


def test_an_engine_that_returns_nothing_is_named_and_ends_the_run_if_asked(caplog):
    sizes = ["--data.batch_size=4", "--model.group_size=4", "--data.steps=10", "--model.rollout.max_new_tokens=24"]
    main([*RUN, "--model.search=support.silent.Silent", *sizes, "--model.lora.r=2", STOP])
    (line,) = lines()
    assert (line["name"], line["is"]) == ("empty results", "on")
    assert line["step"] <= 5
    began, ends, total = said(caplog)
    assert began == f"alarm at step {line['step']}, empty results: {line['reason']}; {line['hint']}"
    assert line["reason"].startswith("the engine found nothing in ")
    assert ends.startswith("the run ends here, as Alarms.stop says; run/last.ckpt is its last checkpoint; none was validated")
    assert total == "alarms of this run: empty results (on); see run/alarms.jsonl"
    assert not [r for r in caplog.records if r.getMessage().startswith("search: ")]
    assert torch.load("run/last.ckpt", weights_only=True)["step"] == line["step"]
    assert Path("run/model").is_dir()
    assert curve() == [0.0] * (line["step"] - 1) + [1.0]


def test_golden_answers_that_are_nonsense_are_named(caplog):
    rows = [{"id": str(i), "question": f"Who wrote The Book {i}?", "golden_answers": [f"zzq{i}"]} for i in range(16)]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data.source=FileSource", "--data.source.path=q.jsonl", "--data.batch_size=4", "--data.steps=5"]
    main([*RUN, *data, "--model.group_size=4", "--model.rollout.max_new_tokens=20"])
    assert {line["name"] for line in lines()} >= {"score", "learning"}
    assert all(line["step"] <= 10 for line in lines())
    (line,) = (line for line in said(caplog) if ", score: " in line)
    assert line.startswith("alarm at step 5, score: only 0 of 80 rollouts of the last 5 steps earned ")
    assert "golden ones" in line


def test_a_learning_rate_a_hundred_times_too_high_is_named(caplog):
    sizes = ["--data.batch_size=2", "--model.group_size=4", "--data.steps=10", "--model.rollout.max_new_tokens=24"]
    main([*RUN, *sizes, "--model.optimizer.init_args.lr=0.05", STOP])
    (line, *_) = lines()
    assert line["name"] == "learning rate"
    assert line["step"] < 10
    assert "lower model.optimizer.init_args.lr" in line["hint"]


def test_without_kl_too_it_is_named_by_what_the_policy_writes(full):
    if not full:
        pytest.skip("one like it is in the usual run")
    sizes = ["--data.batch_size=4", "--model.group_size=4", "--data.steps=5", "--model.rollout.max_new_tokens=24"]
    main([*RUN, *sizes, "--model.optimizer.init_args.lr=0.05", "--model.loss.kl_coef=0", "--model.warmup_steps=0"])
    hints = {line["name"]: line["hint"] for line in lines()}
    assert "lower model.optimizer.init_args.lr" in hints["actions"]


def test_weights_that_do_not_change_are_named(full):
    if not full:
        pytest.skip("the usual run asks the rule and the callback one by one")
    sizes = ["--data.batch_size=4", "--model.group_size=4", "--data.steps=5", "--model.rollout.max_new_tokens=24"]
    main([*RUN, *sizes, "--model.optimizer.init_args.lr=0", "--model.estimator=reinforce_baseline", "--model.lora.r=2"])
    (line,) = (line for line in lines() if line["name"] == "learning")
    assert line["reason"].startswith("the weights have not changed in 5 steps, with gradients of ")


# ---------------------------------------------------------------------------------------------- state


def rising(history):
    """On in step 2, and again in step 5."""
    steps = len(history.recent)
    return Finding(f"{steps} steps", "none") if steps in (2, 5) else None


def test_a_run_that_stops_and_goes_on_says_the_same_and_drops_later_lines(monkeypatch, caplog):
    monkeypatch.setattr(module_of_alarms, "RULES", (Rule("rising", rising), Rule("always", lambda h: Finding("a", "b"))))
    monkeypatch.setattr(module_of_alarms, "FEW", 2)
    small = [*RUN, *SMALL_RL, "--data.steps=5", "--model.rollout.max_new_tokens=4"]
    main([*small, "--run.folder=whole"])
    whole = said(caplog)
    expected = [(1, "always", "on"), (2, "rising", "on"), (4, "rising", "over"), (5, "rising", "on")]
    assert [(line["step"], line["name"], line["is"]) for line in lines("whole")] == expected
    assert curve("whole") == [1, 2, 2, 1, 2]
    caplog.clear()
    for _ in range(2):
        main([*small, '--trainer.max_time={"milliseconds": 1}'])
    with open("run/alarms.jsonl", "a") as file:
        file.write('{"schema": 1, "step": 3, "name": "later"}\n{"schema": 1, "st')
    main(small)
    assert Path("run/alarms.jsonl").read_bytes() == Path("whole/alarms.jsonl").read_bytes()
    states = [torch.load(f"{folder}/last.ckpt", weights_only=True)["callbacks"]["Alarms"] for folder in ("run", "whole")]
    assert states[0] == states[1]
    assert len(states[0]["history"]["recent"]) == 5
    assert whole[:-1] == [line for line in said(caplog) if line.startswith("alarm ")]
    assert whole[-1] == "alarms of this run: always (on), rising (on); see whole/alarms.jsonl"


# ---------------------------------------------------------------------------------------------- one rank of several


class Module:
    learns_from_rollouts = True
    estimator, group_size, updates_per_rollout, noise_prob = "grpo", 4, 1, 0.0
    rollout = SimpleNamespace(max_turns=4)

    def __init__(self):
        self.trajectories, self.skipped = [], SimpleNamespace(in_a_row=0)
        self.health, self.logged = Health("bm25"), []

    def log(self, name, value, **options):
        self.logged.append(value)


def attached(callback, folder, zero=True, **metrics):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    metrics = {name: torch.tensor(0.1) for name in module_of_alarms.CURVES} | metrics
    trainer = SimpleNamespace(
        callbacks=[callback, RunFiles(str(folder))], is_global_zero=zero, optimizers=[optimizer], should_stop=False,
        callback_metrics=metrics,
    )  # fmt: skip
    module = Module()
    callback.setup(trainer, module, "fit")
    return trainer, module


def act(callback, trainer, module, steps):
    for step in steps:
        callback.on_train_batch_start(trainer, module, None, step)
        callback.on_train_batch_end(trainer, module, None, None, step)


def test_other_ranks_come_to_the_same_end_and_are_silent(tmp_path, caplog):
    for zero in (True, False):
        callback = Alarms(stop=True)
        trainer, module = attached(callback, tmp_path, zero, kl=torch.tensor(2.0))
        act(callback, trainer, module, range(1))
        assert trainer.should_stop
        assert module.logged == [1.0]
        callback.on_fit_end(trainer, module)
    assert len(lines(tmp_path)) == 1
    assert len(said(caplog)) == 3


def test_it_ends_when_an_alarm_begins_and_not_while_it_is_on(tmp_path):
    """So that a run that goes on after its end is not ended again at once."""
    callback = Alarms(stop=True)
    trainer, module = attached(callback, tmp_path, kl=torch.tensor(2.0))
    act(callback, trainer, module, range(1))
    again = Alarms(stop=True)
    trainer, module = attached(again, tmp_path, kl=torch.tensor(2.0))
    again.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    act(again, trainer, module, range(1, 5))
    assert not trainer.should_stop
    assert module.logged == [1.0] * 4
    assert len(lines(tmp_path)) == 1


def test_an_alarm_that_is_not_fatal_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module_of_alarms, "RULES", [rule for rule in rules.RULES if not rule.is_fatal])
    callback = Alarms(stop=True)
    trainer, module = attached(callback, tmp_path, **{"policy/sampling_gap": torch.tensor(1.0)})
    module.trajectories = [trajectory(0, "yes", 2)] * 16
    act(callback, trainer, module, range(5))
    assert [line["name"] for line in lines(tmp_path)] == ["sampling gap"]
    assert not trainer.should_stop


def test_the_best_model_is_named(tmp_path, caplog):
    (tmp_path / "best.json").write_text('{"step": 7, "metric": "val/em", "value": 0.41}')
    callback = Alarms(stop=True)
    act(callback, *attached(callback, tmp_path, kl=torch.tensor(2.0)), range(1))
    assert said(caplog)[-1].endswith(f"; {tmp_path}/best is its best model, with val/em 0.41 after step 7")


def test_a_skipped_step_does_not_count_with_the_numbers_of_the_one_before(tmp_path):
    callback = Alarms()
    trainer, module = attached(callback, tmp_path)
    module.skipped.in_a_row = 1
    act(callback, trainer, module, range(1))
    assert callback.history.recent == [{"skipped": 1.0}]
    assert [line["name"] for line in lines(tmp_path)] == ["skipped steps"]


def test_what_means_nothing_in_a_run_is_not_watched(tmp_path):
    callback = Alarms()
    trainer, module = attached(callback, tmp_path)
    module.rollout, module.estimator, module.updates_per_rollout = SimpleNamespace(max_turns=0), "reinforce", 2
    act(callback, trainer, module, range(1))
    watched = callback.history.first
    assert not {"queries", "frac_reward_zero_std", "policy/sampling_gap"} & set(watched)
    assert set(watched) >= {"reward", "searches", "moved"}


def test_whether_weights_moved_is_seen(tmp_path):
    callback = Alarms()
    trainer, module = attached(callback, tmp_path)
    callback.on_train_batch_start(trainer, module, None, 0)
    trainer.optimizers[0].param_groups[0]["params"][0].data[2] += 1e-6
    callback.on_train_batch_end(trainer, module, None, None, 0)
    act(callback, trainer, module, range(1, 2))
    assert [step["moved"] for step in callback.history.recent] == [1.0, 0.0]


def test_health_leaves_empty_results_to_it_in_a_fit_only(tmp_path):
    callback = Alarms()
    trainer, module = attached(callback, tmp_path)
    assert not module.health.speaks
    callback.on_fit_end(trainer, module)
    assert module.health.speaks
