"""Two processes of PPO against one: values, advantages, statistics and weights are those of the whole batch."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zs_lightning.cli import main
from zs_lightning.models.value_head import of_critic

ROOT = Path(__file__).parents[2]
OPTIONS = [
    f"--config={ROOT}/configs/miniature/policy.yaml",
    "--model.search=BM25Search",
    "--model.estimator=ppo",
    "--model.lora.r=4",
    "--model.critic.lr=1e-3",
    "--model.reward.format_weight=0.5",
    "--model.group_size=2",
    "--model.updates_per_rollout=2",
    "--model.micro_batch_tokens=400",
    "--data.batch_size=3",
    "--data.steps=2",
    "--run.keep_trajectories=99",
    "--trainer.enable_progress_bar=false",
]


def left(folder):
    """State and trajectories of a run of two steps, and what the board shows of the critic."""
    board = EventAccumulator(str(folder)).Reload()
    names = [name for name in board.Tags()["scalars"] if name.startswith("critic/")]
    rows = [json.loads(line) for line in (folder / "trajectories" / "train.jsonl").read_text().splitlines()]
    shown = {name: [event.value for event in board.Scalars(name)] for name in names}
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"], rows, shown


def test_two_processes_do_the_work_of_one(tmp_path, monkeypatch, warm):
    """Three questions do not divide by two: one rank has more of them, and more backward passes."""
    monkeypatch.chdir(ROOT)
    main(["fit", *OPTIONS, f"--run.folder={tmp_path / '1'}", "--trainer.devices=1", "--trainer.accelerator=cpu"])
    warm.two_ranks(["fit", *OPTIONS, f"--run.folder={tmp_path / '2'}", "--trainer.devices=2"], tmp_path)
    (weights, rows, shown), (other_weights, other_rows, other_shown) = (left(tmp_path / str(n)) for n in (1, 2))
    assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in other_rows]
    advantages, others = ([row["advantage"] for row in found] for found in (rows, other_rows))
    assert len(advantages) == 12
    assert others == pytest.approx(advantages, abs=1e-4)
    assert max(map(abs, advantages)) > 0.1
    assert len(shown) == 6
    for name, values in shown.items():
        assert other_shown[name] == pytest.approx(values, abs=1e-4), name
    assert weights.keys() == other_weights.keys()
    assert sum(map(of_critic, weights)) == 57
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, atol=1e-5, rtol=1e-4)
