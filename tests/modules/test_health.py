"""What a run says of itself: engines that find nothing, rollouts that failed, and trainings that change nothing."""

import json
import warnings

import pytest

from support.commandline import POLICY, SIMULATOR, SMALL_SFT, TEST
from support.detached import judged
from support.runfolders import trajectory
from zs_lightning.cli import main
from zs_lightning.modules.health import Health
from zs_lightning.modules.step_metrics import step_metrics
from zs_lightning.runs.outcomes import Outcome, summarise
from zs_lightning.types import Status

pytestmark = pytest.mark.usefixtures("environment")

SHORT = ["--data.batch_size=2", "--model.group_size=2", "--data.validation_rows=2", "--model.rollout.max_new_tokens=24"]
NOTHING = "fit: nothing was learnt, the weights are "


def said(caplog, start):
    return [r.getMessage() for r in caplog.records if r.name.startswith("zs_lightning") and r.getMessage().startswith(start)]


def searches(empty, full):
    """Rollouts of one search each."""
    rows = [trajectory(i, "yes") for i in range(empty + full)]
    for row in rows[:empty]:
        row.turns[0].documents = ()
    return rows


# ---------------------------------------------------------------------------------------------- counted


def test_empty_results_are_counted_by_hand():
    rows = searches(3, 5)
    assert step_metrics(rows, rows, {}, 0.0, {})["search/empty"] == 3 / 8
    assert [Outcome.of(row).empty_searches for row in rows] == [1] * 3 + [0] * 5
    assert summarise([Outcome.of(row) for row in rows])["empty_searches"] == 3 / 8
    assert step_metrics([trajectory(0, "yes", 0)], [trajectory(0, "yes", 0)], {}, 0.0, {})["search/empty"] == 0


def test_failed_rollouts_do_not_count_in_what_was_earned():
    """Group 0: rewards 1, 1 and a failure, so nothing to learn. Group 1: 1 and 0, with a standard deviation of sqrt(1/2).
    Group 2: a failure alone."""
    rows = [judged(0, Status.ANSWERED, "gold"), judged(0, Status.ANSWERED, "gold"), judged(0, Status.FAILED)]
    rows += [judged(1, Status.ANSWERED, "gold"), judged(1, Status.TURN_LIMIT), judged(2, Status.FAILED)]
    for row, reward in zip(rows, [1, 1, 0, 1, 0, 0], strict=True):
        row.reward = float(reward)
    usable = [row for row in rows if row.status is not Status.FAILED]
    metrics = step_metrics(rows, usable, {}, 0.0, {})
    assert metrics["reward"] == metrics["reward/em"] == metrics["reward/answered"] == 0.75
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["reward_std"] == pytest.approx(0.5**0.5 / 2)
    # A group of one has no spread.
    assert step_metrics(rows[:1], rows[:1], {}, 0.0, {})["reward_std"] == 0
    assert metrics["search/failed"] == pytest.approx(2 / 6)


# ---------------------------------------------------------------------------------------------- warned of


@pytest.mark.parametrize(
    ("rounds", "warned"),
    [
        ([(9, 11)] * 8, ""),
        ([(19, 0)], ""),
        ([(10, 10)], "10 of 20"),
        ([(5, 4), (10, 4)], "15 of 23"),
        ([(0, 400), (15, 5), (20, 0)], "15 of 20"),
    ],
)
def test_an_engine_that_finds_nothing_is_said_once(rounds, warned, caplog):
    health = Health("bm25")
    for empty, full in rounds:
        health.searched(searches(empty, full))
    lines = said(caplog, "search: ")
    assert [line.partition(";")[0] for line in lines] == (
        [f"search: bm25 found nothing in {warned} searches"] if warned else []
    )


def test_the_reasons_for_learning_nothing_are_those_that_hold():
    rows = [judged(group, Status.ANSWERED, "red") for group in (0, 0, 1, 1)]
    health = Health("bm25")
    health.judged(rows)
    assert health.reasons() == ["none of 4 rollouts earned a reward", "all 2 groups of rollouts had equal rewards"]
    rows[0].reward = 1.0
    health.judged(rows)
    health.searched(searches(9, 1))
    assert health.reasons() == ["bm25 found nothing in 90% of 10 searches"]


def test_fit_and_test_with_an_engine_that_finds_nothing(caplog):
    silent = "--model.search=support.silent.Silent"
    main(["fit", POLICY, silent, *SHORT, "--data.batch_size=12", "--model.group_size=4", "--data.steps=1"])
    assert len(said(caplog, "alarm at step 1, empty results: the engine found nothing in ")) == 1
    assert said(caplog, "search: ") == []
    caplog.clear()
    main(["test", TEST, silent, "--run.folder=t", "--data.test_rows=48", *SHORT, "--model.decodings=[sampled]"])
    assert len(said(caplog, "search: silent found nothing in ")) == 1
    with open("t/results.json") as file:
        summary = json.load(file)["decodings"]["sampled"]
    assert summary["empty_searches"] == 1.0


# ---------------------------------------------------------------------------------------------- nothing learnt


def impossible(path):
    rows = [{"id": str(i), "question": f"What is thing {i}?", "golden_answers": [f"zzzqqq{i}"]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data.source=FileSource", f"--data.source.path={path}"]


@pytest.mark.parametrize("lora", ["{r: 4}", "null"])
def test_a_policy_that_learnt_nothing_says_so_and_why_and_so_does_its_export(lora, tmp_path, caplog, capsys):
    options = ["--model.search=BM25Search", "--model.loss.kl_coef=0", "--data.steps=2", f"--model.lora={lora}"]
    with warnings.catch_warnings(record=True) as caught:
        main(["fit", POLICY, *options, *SHORT, *impossible(tmp_path / "q.jsonl"), "--run.folder=run"])
    assert not [str(warning.message) for warning in caught if "lr_scheduler" in str(warning.message)]
    equal = "what they were before" if lora == "null" else "equal to their base"
    assert said(caplog, "fit: ") == [
        f"{NOTHING}{equal}: all gradients were 0, none of 8 rollouts earned a reward, all 4 groups of rollouts had equal "
        "rewards, model.loss.kl_coef is 0"
    ]
    capsys.readouterr()
    main(["export", "--ckpt=run", "--out=exported"])
    note = "its weights are what training began with: nothing was learnt"
    assert f"Note: {note}\n" in capsys.readouterr().out
    assert f"\n\n**Note: {note}.**\n" in (tmp_path / "exported" / "README.md").read_text()


@pytest.mark.parametrize("lr", [0, 0.01])
def test_a_simulator_that_learnt_nothing_says_so_and_no_other(lr, caplog):
    small = [*SMALL_SFT, "--data.steps=1", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=1"]
    main(["fit", SIMULATOR, *small, f"--model.optimizer.init_args.lr={lr}", "--model.lora.r=4"])
    assert said(caplog, "fit: ") == (
        [] if lr else [f"{NOTHING}equal to their base: there were gradients, so see the learning rate"]
    )


def test_an_export_of_what_was_learnt_says_nothing(runs, tmp_path, capsys):
    main(["export", f"--ckpt={runs / 'simulator'}", "--out=exported"])
    assert "Note:" not in capsys.readouterr().out + (tmp_path / "exported" / "README.md").read_text()
