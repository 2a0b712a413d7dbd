"""Two nodes with a process each, on loopback: the work of one process, who writes, and what ends the one that waits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from support.ports import free_port
from zs_lightning.cli import main
from zs_lightning.configuration.lightning_cli import several_devices

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "fit",
    f"--config={ROOT}/configs/miniature/policy.yaml",
    "--model.search=BM25Search",
    "--model.group_size=3",
    "--model.micro_batch_tokens=400",
    "--data.batch_size=5",
    "--data.steps=2",
    "--run.keep_trajectories=99",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


def start(folder, *options, nodes=2, **environment):
    """A process for each node, which leaves what it has in a folder of its own; {node} in an option is its number."""
    options = [f"--run.folder={folder}/{{node}}", *options]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "zs_lightning", *OPTIONS, *(option.format(node=node) for option in options)],
            cwd=ROOT,
            env=os.environ | place | {"NODE_RANK": str(node)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(nodes)
    ]


def ended(processes):
    """Of each process its exit code and its stderr, in the order of the nodes; none outlives the test."""
    try:
        said = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def trajectories(folder):
    lines = map(json.loads, (folder / "trajectories" / "train.jsonl").read_text().splitlines())
    return [{**line, "advantage": 0, "old_logprobs": 0} for line in lines]


def test_two_nodes_do_the_work_of_one_process_and_the_first_writes(tmp_path, monkeypatch, warm):
    """Five questions do not divide by two, nor do their micro-batches."""
    nodes = [tmp_path / "0", tmp_path / "1"]
    for node in nodes:
        node.mkdir()
    warm.two_ranks([*OPTIONS, "--run.folder=run", "--trainer.num_nodes=2"], *nodes)
    monkeypatch.chdir(ROOT)
    main([*OPTIONS, f"--run.folder={tmp_path / 'alone'}"])
    runs = {"0": nodes[0] / "run", "1": nodes[1] / "run", "alone": tmp_path / "alone"}
    assert len(trajectories(runs["0"])) == 30
    assert trajectories(runs["0"]) == trajectories(runs["alone"])
    weights, other = (torch.load(runs[name] / "last.ckpt", weights_only=True)["state_dict"] for name in ("alone", "0"))
    for name, weight in weights.items():
        torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=1e-4)
    names = [sorted(path.name.split(".")[0] for path in runs[name].iterdir()) for name in ("0", "alone", "1")]
    assert names[0] == names[1]
    assert names[2] == []


def test_a_node_that_ends_ends_the_other(tmp_path):
    """The first is asked to end while it waits for the second, which then finds itself alone."""
    nodes = start(tmp_path, "--trainer.num_nodes=2", "--data.steps=10000")
    try:
        while not (tmp_path / "0" / "trajectories").is_dir() and all(node.poll() is None for node in nodes):
            time.sleep(0.1)
        nodes[1].send_signal(signal.SIGSTOP)
        time.sleep(2)
        nodes[0].send_signal(signal.SIGTERM)
        assert nodes[0].wait(20) == 128 + signal.SIGTERM
    finally:
        nodes[1].send_signal(signal.SIGCONT)
        _, (code, said) = ended(nodes)
    assert code == 1
    assert said.splitlines()[-1].startswith("error: another process of this run has ended, or was not heard of for 2 hours; ")


def test_a_node_without_the_model_says_so_and_ends_the_other(full, tmp_path):
    if not full:
        pytest.skip("a quarter of a minute: the full run has it")
    (tmp_path / "model-0").symlink_to(ROOT / "zs_lightning" / "miniature" / "base")
    first, second = ended(start(tmp_path, "--trainer.num_nodes=2", f"--model.model.path={tmp_path}/model-{{node}}"))
    assert (first[0], second[0]) == (1, 2)
    assert first[1].splitlines()[-1].startswith("error: another process of this run has ended")
    assert f"error: model.model.path: there is no folder {tmp_path}/model-1; " in second[1]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_processes_that_others_started_are_ranks(name, monkeypatch):
    """As torchrun and srun start them, whatever the configuration says of devices."""
    trainer = {"accelerator": "cpu", "devices": 1}
    for number, several in ((None, False), ("1", False), ("2", True)):
        monkeypatch.setenv(name, number) if number else monkeypatch.delenv(name, raising=False)
        assert several_devices(trainer) is several
    monkeypatch.delenv(name)
    assert several_devices(trainer | {"num_nodes": 2})


def test_what_started_the_processes_counts_them_too(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main(OPTIONS)
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: trainer: WORLD_SIZE says 2 processes, trainer.devices times trainer.num_nodes 1; set devices to the processes "
        "of a machine and num_nodes to the number of machines\n"
    )
