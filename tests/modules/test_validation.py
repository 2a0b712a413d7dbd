"""Validations of a fit, with the simulator and with a real engine beside it."""

import json
import shutil

import pytest
import torch

from support.commandline import POLICY, SMALL_RL, TEST, failure
from support.runfolders import policy
from zs_lightning.cli import main
from zs_lightning.commands.compare.reader import read_trajectories
from zs_lightning.modules.validation import real_metrics, simulated_metrics
from zs_lightning.types import Status

STEPS = 2
FIT = ["fit", POLICY, *SMALL_RL, "--model.search.model.adapter=null", f"--data.steps={STEPS}"]
REAL = ["--model.validation_search=BM25Search", "--trainer.limit_val_batches=1.0", "--trainer.val_check_interval=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    places = f"save_dir: {folder}, name: csv, version: ''"
    curves = f"--trainer.logger={{class_path: CSVLogger, init_args: {{{places}}}}}"
    main([*FIT, f"--run.folder={folder / 'alone'}"])
    main([*FIT, *REAL, "--data.validation_rows=4", curves, f"--run.folder={folder / 'real'}"])
    return folder


def test_a_validation_changes_nothing_that_is_trained(runs):
    lines = [(runs / name / "trajectories" / "train.jsonl").read_text() for name in ("alone", "real")]
    assert lines[0] == lines[1]
    states = [torch.load(runs / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("alone", "real")]
    assert all(torch.equal(one, other) for one, other in zip(*map(dict.values, states), strict=True))


def test_its_curves_are_those_of_both_engines_and_the_best_is_by_the_real_one(runs):
    head, *rows = [line.split(",") for line in (runs / "csv" / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(head, row, strict=True)) for row in rows]
    found = [{name: float(row[name]) for name in head if row[name] and "/" in name} for row in rows if row["real/em"]]
    assert len(found) == STEPS
    for row in found:
        assert row["real/gap"] == pytest.approx(row["val/em"] - row["real/em"])
        assert (row["real/failed"], row["real/em"] * 4 % 1) == (0.0, pytest.approx(0.0))
        assert row["seconds/validation"] > 0
    best = json.loads((runs / "real" / "best.json").read_text())
    values = [row["real/em"] for row in found]
    assert best == {"step": values.index(max(values)) + 1, "metric": "real/em", "value": pytest.approx(max(values))}
    assert not list((runs / "alone").glob("best*"))


def test_its_rollouts_are_there_to_read(runs, tmp_path):
    answered = {}
    for split in ("validation", "real"):
        lines = (runs / "real" / "trajectories" / f"{split}.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert [line["step"] for line in found] == [1] * 4 + [2] * 4
        answered[split] = [line["id"] for line in found]
    assert answered["validation"] == answered["real"] == answered["real"][:4] * 2
    main(["compare", f"--training={runs / 'real'}", f"--out={tmp_path / 'report'}"])
    page = read_trajectories([], runs / "real")
    assert [name for name, shown, count in page.counts if shown == count > 0] == [
        "training",
        "validation",
        "validation, real engine",
    ]


def test_lines_of_validations_after_the_checkpoint_are_written_anew(runs, tmp_path):
    """As after a kill between a validation and the save of its step."""
    shutil.copytree(runs / "real", tmp_path / "real")
    lines = {path.name: path.read_text() for path in (tmp_path / "real" / "trajectories").iterdir()}
    for path in (tmp_path / "real" / "trajectories").iterdir():
        with path.open("a") as file:
            file.write(f'{{"schema": 1, "step": {STEPS + 1}, "half')
    main([*FIT, *REAL, "--data.validation_rows=4", f"--data.steps={STEPS + 1}", f"--run.folder={tmp_path / 'real'}"])
    for name, former in lines.items():
        now = (tmp_path / "real" / "trajectories" / name).read_text()
        assert now.startswith(former)
        assert {json.loads(line)["step"] for line in now[len(former) :].splitlines()} == {STEPS + 1}


def test_the_best_is_tested_and_no_fit_goes_on_from_it(runs, capsys, tmp_path):
    best = runs / "real" / "best.ckpt"
    step = json.loads((runs / "real" / "best.json").read_text())["step"]
    state = torch.load(best, weights_only=True)
    assert (state["step"], "optimizer_states" in state) == (step, False)
    small = ["--data.test_rows=2", "--model.lora={r: 2}", "--model.decodings=[greedy]"]
    main(["test", TEST, *small, f"--ckpt_path={best}", f"--run.folder={tmp_path / 'tested'}"])
    assert (tmp_path / "tested" / "results.json").is_file()
    code, said = failure(capsys, *FIT, f"--ckpt_path={best}", f"--run.folder={tmp_path / 'on'}")
    assert (code, f"{best} has no optimiser's state; a fit goes on from last.ckpt" in said) == (2, True), said


NEVER = "trainer.limit_val_batches: 0 leaves model.validation_search nothing to answer"
NOT_REAL = "expected a real engine, such as BM25Search; got the simulator"


@pytest.mark.parametrize(
    ("options", "said"),
    [(REAL[:1], NEVER), (["--model.validation_search=SimulatorSearch", *REAL[1:]], NOT_REAL)],
    ids=["never", "simulator"],
)
def test_an_engine_that_is_never_asked_or_not_real_is_refused(capsys, tmp_path, options, said):
    code, text = failure(capsys, *FIT, *options, f"--run.folder={tmp_path / 'run'}")
    assert (code, said in text) == (2, True), text


def test_shares_and_gap_by_hand():
    simulated, real = policy("yes", "yes", "no", "yes"), policy("yes", "no", "no", "no", searches=2)
    assert simulated_metrics(simulated)["val/em"] == 0.75
    found = real_metrics(simulated, real)
    assert (found["real/em"], found["real/gap"], found["real/searches"], found["real/failed"]) == (0.25, 0.5, 2.0, 0.0)


def test_failed_questions_are_left_out_of_both_sides_and_many_leave_no_point(caplog):
    simulated, real = policy(*["yes"] * 10), policy(*["yes"] * 6, *["no"] * 4)
    for trajectory in real[8:]:
        trajectory.status, trajectory.failure = Status.FAILED, "503"
    found = real_metrics(simulated, real)
    assert (found["real/failed"], found["real/em"], found["real/gap"]) == (0.2, 0.75, 0.25)
    assert not caplog.text
    real[0].status, real[0].failure = Status.FAILED, "502"
    assert real_metrics(simulated, real) == {"real/failed": pytest.approx(0.3)}
    assert "failed for 3 of 10 questions, for example: 502; training goes on" in caplog.text
