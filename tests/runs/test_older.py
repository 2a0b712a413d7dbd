"""Configurations of earlier versions: where their options are now."""

import json

import pytest
import yaml

from support.commandline import POLICY, SMALL_RL, failure
from zs_lightning.cli import main
from zs_lightning.runs.older import MOVED, modernised

pytestmark = pytest.mark.usefixtures("environment")

OLD = {"clip_low": 0.1, "kl_coef": 0.3, "loss": {"mean": "sequence"}, "answer_score": "em", "search_cost": 0.2, "seed": 1}


def policy(options):
    return {"seed_everything": 0, "model": {"class_path": "zs_lightning.modules.PolicyRL", "init_args": options}}


def test_options_move_to_their_groups():
    moved = modernised(policy(OLD))["model"]["init_args"]
    assert moved == {
        "loss": {"mean": "sequence", "clip_low": 0.1, "kl_coef": 0.3},
        "reward": {"class_path": "zs_lightning.rl.rewards.AnswerReward", "init_args": {"score": "em", "search_cost": 0.2}},
        "seed": 1,
    }
    # Whatever the order, and beside what a class in its long form holds.
    assert modernised(policy(dict(reversed(OLD.items()))))["model"]["init_args"] == moved
    long = {"reward": {"class_path": "mine.Reward", "init_args": {"x": 1}}, "repeat_cost": 0.5}
    inner = modernised(policy(long))["model"]["init_args"]["reward"]
    assert inner == {"class_path": "mine.Reward", "init_args": {"x": 1, "repeat_cost": 0.5}}


def test_what_has_nothing_to_move_stays_as_it_is():
    for config in ({}, None, [], {"model": None}, {"model": {"init_args": None}}, policy({"loss": {"kl_coef": 1}})):
        assert modernised(config) == config


def test_a_run_of_an_earlier_version_goes_on_and_is_tested(tmp_path, capsys):
    """Its config.yaml is as that version wrote it."""
    run = tmp_path / "run"
    own = ["--model.search=BM25Search", *SMALL_RL, "--trainer.limit_val_batches=0", "--model.loss.kl_coef=0.25"]
    main(["fit", POLICY, *own, "--data.steps=1", f"--run.folder={run}"])
    config = yaml.safe_load((run / "config.yaml").read_text())
    options = config["model"]["init_args"]
    loss, reward = options.pop("loss"), options.pop("reward")["init_args"]
    for name, place in MOVED.items():
        group, _, option = place.partition(".")
        options[name] = {"loss": loss, "reward": reward}[group].pop(option)
    assert (options["kl_coef"], options["format_weight"], options["answer_score"]) == (0.25, 0.5, "f1")
    (run / "config.yaml").write_text(
        yaml.safe_dump({**config, "model": {**config["model"], "init_args": {**options, "loss": loss}}})
    )
    old = f"--config={run / 'config.yaml'}"
    main(["fit", old, f"--ckpt_path={run / 'last.ckpt'}", "--data.steps=2"])
    assert {json.loads(line)["step"] for line in (run / "trajectories" / "train.jsonl").read_text().splitlines()} == {1, 2}
    main(["test", old, f"--ckpt_path={run / 'last.ckpt'}", f"--run.folder={tmp_path / 'test'}", "--data.test_rows=2"])
    assert (tmp_path / "test" / "results.json").is_file()
    code, said = failure(capsys, "fit", old, f"--ckpt_path={run / 'last.ckpt'}", "--data.steps=3", "--model.loss.kl_coef=0.5")
    assert code == 2
    assert "model.loss.kl_coef was 0.25, got 0.5" in said


def test_an_old_name_on_the_command_line_gets_a_sentence(capsys):
    code, said = failure(capsys, "fit", POLICY, "--model.kl_coef=0.1")
    assert (code, said) == (
        2,
        "error: unknown option model.kl_coef (PolicyRL has no such option); it is model.loss.kl_coef now",
    )
