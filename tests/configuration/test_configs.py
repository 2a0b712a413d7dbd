"""Every shipped configuration is complete, short, explained, and builds."""

import re
from pathlib import Path

import pytest
import yaml

from support.commandline import BuildOnly
from zs_lightning.commands.build_simulator_data.builder import Builder
from zs_lightning.configuration.arguments import given
from zs_lightning.configuration.paths import SCHEMA

ROOT = Path(__file__).parents[2]
BUILD = "build_simulator_data.yaml"
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.name not in (BUILD, "make_questions.yaml"))


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_config(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_questions.csv").write_text("")  # What a person brings to configs/own.
    for folder in ("simulator_data", "own/simulator_data"):  # What a build made.
        records = tmp_path / "runs" / folder / "records.jsonl"
        records.parent.mkdir(parents=True)
        records.write_text("")
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= 60
    head = [line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]
    name = str(path.relative_to(ROOT))
    command = re.search(rf"python -m zs_lightning (fit|test|validate) --config {re.escape(name)}", "\n".join(head))
    assert command, "the head of a config shows the command that runs it"
    content = yaml.safe_load(text)
    assert content["schema"] == SCHEMA
    assert content["run"]["folder"].startswith("runs/")
    assert content.get("resume") == ("auto" if command[1] == "fit" else None), "README: give the same command again"
    cli = BuildOnly([command[1], "--config", str(path), f"--run.folder={tmp_path / 'run'}", "--trainer.accelerator=cpu"])
    assert type(cli.model).__name__ == content["model"]["class_path"].rsplit(".", 1)[-1]
    assert cli.datamodule.batch_size == content["data"].get("batch_size", 16)
    wanted = [item["class_path"] for item in content["trainer"].get("callbacks", [])]
    built = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert set(wanted) <= set(built)
    assert "RunFiles" in built


@pytest.mark.parametrize("name", ["miniature", "own"])
def test_config_of_a_build(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_questions.csv").write_text("")
    path = ROOT / "configs" / name / BUILD
    assert f"python -m zs_lightning build-simulator-data --config configs/{name}/{BUILD}" in path.read_text()
    builder, settings = given("build-simulator-data", "", Builder, ["--config", str(path)])
    assert settings["schema"] == SCHEMA
    assert builder.folder.startswith("runs/")
    policy = yaml.safe_load((path.parent / "policy.yaml").read_text())
    assert builder.model.path == policy["model"]["init_args"]["model"]["path"]
