"""What the README tells a reader to type is understood."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from zs_lightning import cli
from zs_lightning.cli import main
from zs_lightning.commands.ask import command as ask
from zs_lightning.commands.build_simulator_data.builder import Builder
from zs_lightning.commands.compare import command as compare
from zs_lightning.commands.export import command as export
from zs_lightning.commands.make_questions.maker import Maker
from zs_lightning.commands.measure_simulator import command as measure
from zs_lightning.configuration.arguments import given, search_options, split
from zs_lightning.configuration.lightning_cli import run
from zs_lightning.models.specs import ModelSpec
from zs_lightning.search import SimulatorSearch
from zs_lightning.types import QAExample, SearchRequest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINES = README.replace("\\\n", " ")
COMMANDS = [line for line in re.findall(r"^python -m zs_lightning (.+)$", LINES, re.MULTILINE) if line[0] != "-"]


def test_the_readme_shows_each_stage():
    assert [line.split()[0] for line in COMMANDS][:5] == ["fit", "fit", "test", "test", "compare"]
    assert {line.split()[0] for line in COMMANDS} == set(cli.COMMANDS) - {"validate"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme_parses(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if words[0] == "compare":
        assert str(compare.parse(words[1:]).out).startswith("runs/")
        return
    if words[0] == "estimate":
        assert (ROOT / words[words.index("--config") + 1]).is_file()
        return
    if words[0] in ("make-questions", "build-simulator-data"):
        monkeypatch.chdir(tmp_path)
        Path("configs").symlink_to(ROOT / "configs")
        Path("my_questions.csv").write_text("")  # What a person brings to configs/own.
        made, _ = given(words[0], "", {"make-questions": Maker, "build-simulator-data": Builder}[words[0]], words[1:])
        assert str(made.place).startswith("runs/")
        return
    if words[0] == "measure-simulator":
        own, _, real = measure.parse(words[1:])
        assert str(own.out).startswith("runs/")
        assert search_options(real, [], "real")["class_path"].endswith("BM25Search")
        return
    if words[0] == "serve":
        own, search = split(words[1:])
        assert own == []
        assert search_options(search, [])["class_path"].endswith("BM25Search")
        return
    if words[0] in ("ask", "export"):
        parsed = {"ask": ask, "export": export}[words[0]].parse(words[1:])
        assert parsed, "an unknown option would have raised"
        return
    with pytest.raises(SystemExit) as end:
        run([*words, "--print_config"])  # Not by main, which looks for the checkpoint first.
    assert end.value.code == 0
    assert "class_path: zs_lightning" in capsys.readouterr().out


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"(?:configs|scripts|\.github)/[\w./]+\.(?:yaml|sh|png)", README):
        assert (ROOT / path).is_file(), path


def test_the_tree_of_the_readme_names_files_and_rooms_that_are_there():
    tree = README[README.index("## The tree") : README.index("## Licence")]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    assert len(named) > 40
    assert named <= {path.name for path in (ROOT / "zs_lightning").rglob("*.py")}
    rooms = {path.parent.relative_to(ROOT / "zs_lightning").parts[0] for path in (ROOT / "zs_lightning").glob("*/*.py")}
    assert rooms <= set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))


def test_an_overridden_key_of_the_readme_is_an_option(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    overrides = re.search(r"`(--model\.group_size 16 [^`]+)`", README)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config=configs/miniature/policy.yaml", *overrides[1].split(), "--print_config"])
    assert end.value.code == 0
    assert "group_size: 16" in capsys.readouterr().out


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """The files of "Add your own", each under the name in its first line, and notes to search in."""
    section = README[README.index("## Add your own") : README.index("## Where we follow")]
    for name, text in re.findall(r"^```\w+\n# (\w+\.\w+)\n(.+?)^```", section, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(text)
    (tmp_path / "notes.txt").write_text("The Red Harbor author Foo Bar .\nFoo Bar birthplace Mabel .\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield sorted(path.name for path in tmp_path.iterdir())
    for module in ("my_rewards", "my_estimators", "my_engine"):
        sys.modules.pop(module, None)


SMALL = ["--data.steps=1", "--data.batch_size=2", "--model.group_size=2", "--trainer.limit_val_batches=0"]


def test_ones_own_reward_estimator_and_engine_are_files_outside_of_the_package(own_files):
    assert own_files == ["my_engine.py", "my_estimators.py", "my_noise.yaml", "my_rewards.py", "notes.txt"]
    own = ["--model.reward=my_rewards.BriefAnswer", "--model.reward.words=0", "--model.reward.word_cost=0.5"]
    own += ["--model.estimator=my_estimators.max_baseline", "--model.search=my_engine.NotesSearch"]
    own += ["--model.search.path=notes.txt", "--model.rollout.retrieve_first=true"]
    main(["fit", f"--config={ROOT / 'configs/miniature/policy.yaml'}", *own, *SMALL, "--run.folder=run"])
    lines = Path("run/trajectories/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rewards = [row["reward"] for row in rows]
    assert [row["advantage"] for row in rows] == pytest.approx([reward - max(rewards) for reward in rewards])
    assert any(row["reward_parts"]["length"] == -0.5 * len(row["answer"].split()) for row in rows if row["answer"])
    found = {turn["documents"][0]["text"] for row in rows for turn in row["turns"] if turn["documents"]}
    assert found <= {"The Red Harbor author Foo Bar .", "Foo Bar birthplace Mabel ."}
    assert found


def test_ones_own_kind_of_noise_is_a_file_outside_of_the_package(own_files):
    options = {"prompts": "my_noise.yaml", "max_length": 400, "max_new_tokens": 60, "model": ModelSpec(device="cpu")}
    simulator = SimulatorSearch(noise={"gossip": 3, "noisy": 1}, **options)
    simulator.setup()
    example = QAExample(id="1", question="?", golden_answers=("x",), source="t")
    requests = []
    for i in range(8):
        requests.append(SearchRequest(key=str(i), query="red harbor", example=example, turn=0, seed=i, noise_prob=1.0))
    simulator.submit(requests)
    assert {result.label for result in simulator.poll()} == {"gossip", "noisy"}
    assert "What people say about it" in simulator.encoder.decode(simulator.prompt_ids(requests[0], "gossip"))
    assert "people say" not in simulator.encoder.decode(simulator.prompt_ids(requests[0], "noisy"))
