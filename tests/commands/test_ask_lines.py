"""Many questions in one go: at the terminal, where a question may be taken back, and from a pipe."""

import io
import re
import subprocess
import sys

import pytest
import yaml

from support.commandline import CONFIGS, ROOT
from zs_lightning.cli import main
from zs_lightning.commands.ask.command import SEARCH_HELP
from zs_lightning.commands.ask.session import Session, policy_config
from zs_lightning.data.sources import MiniatureSource

CONFIG = CONFIGS / "policy.yaml"
QUESTION = "What is the country of the birthplace of Zino Tipin?"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def typed(monkeypatch):
    """Types lines at a terminal, then Ctrl-D."""

    def type_in(*lines):
        left = iter(lines)

        def line(prompt):
            text = next(left, None)
            if text is None:
                raise EOFError
            return text

        monkeypatch.setattr("builtins.input", line)
        monkeypatch.setattr(sys, "stdin", Terminal())

    return type_in


def test_it_goes_on_asking_and_ctrl_c_ends_an_answer_only(capsys, monkeypatch, tmp_path, typed):
    real = Session.ask

    def ask(self, question, watch):
        def interrupted(trajectory, sampled):
            if question == "interrupt me" and len(sampled) == 3:
                raise KeyboardInterrupt
            watch(trajectory, sampled)

        return real(self, question, interrupted)

    typed("", QUESTION, "interrupt me", "Name the mayor of Mabel")
    monkeypatch.setattr(Session, "ask", ask)
    monkeypatch.setitem(sys.modules, "readline", None)  # As on a system that has none.
    main(["ask", f"--config={CONFIG}", f"--html={tmp_path / 'p.html'}"])
    said = capsys.readouterr().out
    assert said.index("the question is empty") < said.index("answers") < said.index("interrupted") < said.rindex("answers")
    assert re.findall("<h1>(.*)</h1>", (tmp_path / "p.html").read_text()) == [QUESTION, "Name the mayor of Mabel"]


def test_the_question_of_the_help_has_an_answer():
    (question,) = re.findall('"(.*)"', SEARCH_HELP)
    splits = [MiniatureSource(0).questions(split) for split in ("train", "validation", "test")]
    assert question in {row.question for rows in splits for row in rows}


def test_a_pipe_asks_line_by_line(tmp_path):
    """In a process of its own, with a line that is no text."""
    page = tmp_path / "page.html"
    options = [sys.executable, "-m", "zs_lightning", "ask", "--config", str(CONFIG), "--html", str(page)]
    text = f"{QUESTION}\n\nhalf \udcff\nName the mayor of Mabel".encode(errors="surrogateescape")
    ended = subprocess.run(options, input=text, capture_output=True, cwd=ROOT, check=False)
    shown = ended.stdout.decode()
    asked = [QUESTION, "half \N{REPLACEMENT CHARACTER}", "Name the mayor of Mabel"]
    assert re.findall("^question> (.*)", shown, re.MULTILINE) == asked
    assert "error: the question is not UTF-8" in shown
    assert "for example" not in shown
    assert (ended.returncode, ended.stderr) == (1, b"")
    assert re.findall("<h1>(.*)</h1>", page.read_text()) == [QUESTION, "Name the mayor of Mabel"]


def test_a_failed_search_of_a_pipe_ends_with_code_1_once_all_is_asked(monkeypatch, tmp_path, capsys):
    config = policy_config(CONFIG)
    config["model"]["init_args"]["rollout"]["retrieve_first"] = True
    (tmp_path / "searching.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n" * 2))
    search = ["--search=SimulatorSearch", "--search.prompts=miniature", "--search.max_length=60", "--search.max_new_tokens=45"]
    with pytest.raises(SystemExit) as end:
        main(["ask", f"--config={tmp_path / 'searching.yaml'}", *search])
    assert end.value.code == 1
    found = re.findall("^(question> .*|failed)", capsys.readouterr().out, re.MULTILINE)
    assert found == [f"question> {QUESTION}", "failed"] * 2


def test_an_empty_pipe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \n"))
    with pytest.raises(SystemExit) as end:
        main(["ask", f"--config={CONFIG}"])
    assert (end.value.code, capsys.readouterr().err) == (2, "error: ask: no question is given\n")


def test_a_question_needs_no_quotes(capsys, tmp_path):
    page = tmp_path / "p.html"
    main(["ask", *QUESTION.split()[:3], f"--config={CONFIG}", "--html", str(page), *QUESTION.split()[3:]])
    assert re.findall("<h1>(.*)</h1>", page.read_text()) == [QUESTION]
