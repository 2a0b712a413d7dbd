"""What the README tells a reader to type is understood."""

import re
import shlex
from pathlib import Path

import pytest

from zs_lightning import cli, serve
from zs_lightning.cli import main
from zs_lightning.commands.ask import command as ask
from zs_lightning.commands.compare import command as compare
from zs_lightning.commands.export import command as export
from zs_lightning.configuration.lightning_cli import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for line in re.findall(r"^python -m zs_lightning (.+)$", README, re.MULTILINE) if line[0] != "-"]


def test_the_readme_shows_each_stage():
    assert [line.split()[0] for line in COMMANDS][:5] == ["fit", "fit", "test", "test", "compare"]
    assert {line.split()[0] for line in COMMANDS} == set(cli.COMMANDS) - {"validate"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme_parses(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if words[0] == "compare":
        assert str(compare.parse(words[1:]).out).startswith("runs/")
        return
    if words[0] == "estimate":
        assert (ROOT / words[words.index("--config") + 1]).is_file()
        return
    if words[0] in ("ask", "serve", "export"):
        parsed = {"ask": ask, "serve": serve, "export": export}[words[0]].parse(words[1:])
        assert parsed, "an unknown option would have raised"
        return
    with pytest.raises(SystemExit) as end:
        run([*words, "--print_config"])  # Not by main, which looks for the checkpoint first.
    assert end.value.code == 0
    assert "class_path: zs_lightning" in capsys.readouterr().out


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"(?:configs|scripts|\.github)/[\w./]+\.(?:yaml|sh|png)", README):
        assert (ROOT / path).is_file(), path


def test_an_overridden_key_of_the_readme_is_an_option(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    overrides = re.search(r"`(--model\.group_size 16 [^`]+)`", README)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config=configs/miniature/policy.yaml", *overrides[1].split(), "--print_config"])
    assert end.value.code == 0
    assert "group_size: 16" in capsys.readouterr().out
