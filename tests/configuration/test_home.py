"""A path may begin with ~ wherever one is given: behind `=`, and in a file, no shell replaces it."""

import shutil
from pathlib import Path

import pytest

from support.commandline import BuildOnly
from zs_lightning.commands.build_simulator_data.builder import Builder
from zs_lightning.commands.make_questions.maker import Maker
from zs_lightning.commands.measure_simulator.command import named_places
from zs_lightning.configuration.paths import check_paths
from zs_lightning.data import FileSource
from zs_lightning.errors import UserError
from zs_lightning.models.specs import ModelSpec
from zs_lightning.modules.demonstrations import FileDemonstrations
from zs_lightning.search import BM25Search
from zs_lightning.text.prompts import get_prompts

MINIATURE = Path(__file__).parents[2] / "configs" / "miniature"


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "q.csv").write_text("question,answer\nWho made it?,Kell\n")
    monkeypatch.setenv("HOME", str(folder))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_configuration_run_folder_and_checkpoint(home):
    shutil.copy(MINIATURE / "policy.yaml", home / "mine.yaml")
    args = ["--config=~/mine.yaml", "--run.folder=~/run"]
    check_paths("fit", args)
    cli = BuildOnly(["fit", *args])
    assert cli.trainer.default_root_dir == cli.trainer.logger.save_dir == str(home / "run")
    assert {c.folder for c in cli.trainer.callbacks if hasattr(c, "folder")} == {home / "run"}
    for look in (check_paths, lambda *words: BuildOnly([words[0], *words[1]])):
        with pytest.raises(UserError, match=rf"^--ckpt_path: there is no file {home}/none"):
            look("test", [*args, "--ckpt_path=~/none"])


def test_folders_of_the_commands(home):
    shared = {"search": BM25Search(corpus="c"), "model": ModelSpec(device="cpu")}
    assert Builder(source=FileSource("~/q.csv"), folder="~/built", **shared).place == home / "built"
    assert Maker(corpus="c", out="~/made", model=shared["model"]).place == home / "made"
    (home / "run").mkdir()
    assert named_places(["mine=~/run"]) == {"mine": home / "run"}


def test_files(home):
    assert FileDemonstrations("~/a.jsonl").path == home / "a.jsonl"
    with pytest.raises(UserError, match=str(home / "mine.yaml")):
        get_prompts("~/mine.yaml")
    assert [question.question for question in FileSource("~/q.csv").questions("train")] == ["Who made it?"]


def test_an_unknown_home_is_a_folder_that_is_not_there(home):
    path = "~nobody-is-called-so/a"
    assert Maker(corpus="c", out=path, model=ModelSpec(device="cpu")).place == Path(path)
    with pytest.raises(UserError, match=rf"there is no file {path}"):
        FileDemonstrations(path).setup()
