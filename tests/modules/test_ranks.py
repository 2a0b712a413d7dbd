"""Two processes against one: the same weights, the same results."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zs_lightning.cli import main
from zs_lightning.modules import ranks

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "fit",
    f"--config={ROOT}/configs/miniature/simulator.yaml",
    "--model.max_new_tokens=40",
    "--data.batch_size=3",
    "--data.steps=2",
    "--data.validation_rows=3",
    "--trainer.val_check_interval=2",
    "--trainer.enable_progress_bar=false",
]


def test_two_processes_do_the_work_of_one(tmp_path, monkeypatch, warm):
    """Three records do not divide by two: one rank has more of them, and more backward passes."""
    monkeypatch.chdir(ROOT)
    main([*OPTIONS, f"--run.folder={tmp_path / '1'}", "--trainer.accelerator=cpu"])
    warm.two_ranks([*OPTIONS, f"--run.folder={tmp_path / '2'}", "--trainer.devices=2"], tmp_path)
    weights, recall = [], []
    for folder in (tmp_path / "1", tmp_path / "2"):
        weights.append(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])
        events = EventAccumulator(str(folder)).Reload()
        names = [f"simulator/{name}_recall" for name in ("useful", "noisy")]
        recall.append([[event.value for event in events.Scalars(name)] for name in names])
    assert recall[0] == recall[1]
    assert all(len(values) == 1 for values in recall[0])
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-4)


def test_shares_come_back_in_order(monkeypatch):
    rows = list("abcdefg")
    shares = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank_and_size", lambda rank=rank: (rank, 3))
        shares.append([f"{row}{n}" for row in ranks.own_share(rows) for n in range(2)])
    monkeypatch.setattr(ranks, "gather", lambda _: shares)
    assert ranks.together([], 2) == [f"{row}{n}" for row in rows for n in range(2)]
    monkeypatch.setattr(ranks, "gather", lambda _: [[{"x": 1.0, "gap_max": 3.0}], [{"x": 2.0, "gap_max": 5.0, "y": 1.0}]])
    assert ranks.add_up({}) == {"x": 3.0, "gap_max": 5.0, "y": 1.0}


def test_other_strategies_are_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    options = ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=fsdp"]
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--config={ROOT}/configs/miniature/policy.yaml", *options, f"--run.folder={tmp_path / 'run'}"])
    assert end.value.code == 2
    assert "trainer.strategy: fsdp is not possible here" in capsys.readouterr().err
