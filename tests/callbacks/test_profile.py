"""Where the seconds of real small fits went."""

import json

import pytest

from support.commandline import POLICY, SIMULATOR, SMALL_RL, SMALL_SFT, TEST, StopAfterOneStep, failure
from zs_lightning.cli import main

FIT = ["fit", POLICY, *SMALL_RL, "--model.search=BM25Search"]


def profiled(folder):
    found = json.loads((folder / "profile.json").read_text())
    whole = json.loads((folder / "fit.json").read_text())["seconds"] if (folder / "fit.json").is_file() else 1e9
    assert 0 < found["steps"] * sum(found["seconds"].values()) < whole
    assert found["seconds"]["callbacks"] == pytest.approx(sum(found["callbacks"].values()))
    return found


def test_a_policys_steps_with_their_validation_and_saves(tmp_path, capsys):
    run = tmp_path / "run"
    validation = ["--trainer.limit_val_batches=1.0", "--trainer.val_check_interval=1", "--data.validation_rows=2"]
    main([*FIT, "--data.steps=3", "--profile", *validation, f"--run.folder={run}"])
    found = profiled(run)
    rows = {"generate", "search", "score", "reference", "update", "validation", "saves", "callbacks", "other"}
    assert set(found["seconds"]) == rows
    assert {"Board", "Alarms", "RunFiles", "StepProgress"} <= set(found["callbacks"])
    lines = [json.loads(line) for line in (run / "trajectories" / "train.jsonl").read_text().splitlines()]
    counted = [line for line in lines if line["step"] > 1]
    counts = found["counts"]
    assert found["steps"] == 2
    assert counts["rollouts"] == 4
    assert counts["sampled"] == sum(sum(line["loss_mask"]) for line in counted) / 2
    assert (
        counts["searches"]
        == sum(bool(t["observation_span"]) and t["kind"] == "search" for c in counted for t in c["turns"]) / 2
    )
    assert counts["read"] == sum(len(line["prompt_ids"]) + len(line["token_ids"]) for line in counted) / 2
    assert counts["trained"] == counts["sampled"]
    assert counts["padded"] >= counts["read"]
    assert found["setup"]["engine"] == "local"
    said = capsys.readouterr().out
    assert "where the seconds of a step went (mean of 2 after the first):" in said
    assert all(sentence.split()[0] in said for sentence in found["advice"])
    assert said.splitlines()[-1].startswith("next: ")


def test_a_simulators_steps_are_updates(tmp_path):
    run = tmp_path / "run"
    main(["fit", SIMULATOR, *SMALL_SFT, "--data.steps=3", "--profile", "--trainer.limit_val_batches=0", f"--run.folder={run}"])
    found = profiled(run)
    assert set(found["seconds"]) == {"update", "saves", "callbacks", "other"}
    assert found["counts"]["trained"] > 0
    assert found["counts"]["passes"] == 1


def test_an_interrupted_fit_tells_of_the_steps_it_has_done(tmp_path, capsys):
    run = tmp_path / "run"
    stop = f"--trainer.callbacks+={StopAfterOneStep.__module__}.StopAfterOneStep"
    with pytest.raises(SystemExit):
        main([*FIT, "--data.steps=2", "--profile", stop, f"--run.folder={run}"])
    assert "where the seconds of a step went (the first one, which warms up):" in capsys.readouterr().out
    assert profiled(run)["warming"] is True


def test_an_error_in_a_steps_work_leaves_the_step_out(tmp_path, monkeypatch, capsys):
    from zs_lightning.modules import PolicyRL

    def fails(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(PolicyRL, "judge", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        main([*FIT, "--data.steps=2", "--profile", f"--run.folder={tmp_path / 'run'}"])
    assert "where the seconds" not in capsys.readouterr().out


def test_without_the_option_nothing_is_timed(tmp_path):
    main([*FIT, "--data.steps=1", f"--run.folder={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "profile.json").exists()


def test_where_it_cannot_be(tmp_path, capsys):
    said = "error: --profile: it times the steps of a fit; leave it out of test"
    assert failure(capsys, "test", TEST, "--profile", f"--run.folder={tmp_path / 'test'}") == (2, said)
    said = "error: --profile: it takes the place of trainer.profiler; leave one of them out"
    options = ["--trainer.profiler=simple", f"--run.folder={tmp_path / 'run'}"]
    assert failure(capsys, *FIT, "--profile", *options) == (2, said)
