"""What a fit says at its end."""

import json

import pytest

from support.commandline import POLICY, SIMULATOR, SMALL_RL, SMALL_SFT, StopAfterOneStep
from zs_lightning.callbacks.ending import Ending
from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.cli import main
from zs_lightning.modules import PolicyRL

FIT = ["fit", POLICY, *SMALL_RL, "--model.search=BM25Search"]


def ending(folder, values):
    found = Ending(RunFiles(str(folder)))
    for value in values:
        found.note(value)
    return found


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], None),
        ([0.5], None),
        ([0.25, 0.75], "reward: 0.25 in the first step, 0.75 in the last"),
        ([0.0, 1.0, 0.5, 0.5, 1.0], "reward: 0.5 in the first 3 steps, 0.667 in the last"),
        ([0.0] * 10 + [9.0] * 7 + [1.0] * 10, "reward: 0 in the first 10 steps, 1 in the last"),
    ],
)
def test_beginning_and_end_are_means_of_as_many_steps(tmp_path, values, said):
    whole, half = ending(tmp_path, values), ending(tmp_path, values[: len(values) // 2])
    others = ending(tmp_path, [])
    others.load_state_dict(json.loads(json.dumps(half.state_dict())))
    for value in values[len(values) // 2 :]:
        others.note(value)
    assert whole.lines(PolicyRL) == others.lines(PolicyRL)
    assert [line for line in whole.lines(PolicyRL) if line.startswith("reward")] == ([said] if said else [])


def test_a_finished_fit_says_where_everything_is_and_what_comes_next(tmp_path, capsys):
    run = tmp_path / "run"
    main([*FIT, "--data.steps=2", f"--run.folder={run}"])
    reward, *others = capsys.readouterr().out.splitlines()[-4:]
    assert reward.startswith("reward: ")
    assert others == [
        f"trained: {run / 'model'}; curves: tensorboard --logdir {run}",
        f"to read what it did: python -m zs_lightning compare --training {run} --out {run / 'report'}",
        f"next: python -m zs_lightning test --config TEST.yaml --ckpt_path {run}",
    ]


def test_a_simulators_names_its_best_and_its_measurement(tmp_path, capsys):
    run = tmp_path / "run"
    main(["fit", SIMULATOR, *SMALL_SFT, "--data.steps=1", "--trainer.val_check_interval=1", f"--run.folder={run}"])
    said = capsys.readouterr().out
    best = json.loads((run / "best.json").read_text())["value"]
    assert f"best: simulator/gap {best:.3g} after step 1, in {run / 'best'}\n" in said
    assert said.endswith(f"next: python -m zs_lightning measure-simulator trained={run}\n")


def test_an_interrupted_one_claims_nothing(tmp_path, capsys):
    stop = f"--trainer.callbacks+={StopAfterOneStep.__module__}.StopAfterOneStep"
    with pytest.raises(SystemExit):
        main([*FIT, "--data.steps=2", stop, f"--run.folder={tmp_path / 'run'}"])
    assert "next:" not in capsys.readouterr().out
