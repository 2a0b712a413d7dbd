"""Sizes and habits of the package's code."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "zs_lightning").rglob("*.py"))
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_there_is_something_to_look_at():
    assert len(FILES) > 30
    assert sum(len(functions(path)) for path in FILES) > 150


@EACH_FILE
def test_files_have_at_most_310_lines(path):
    assert len(path.read_text().splitlines()) <= 310


@EACH_FILE
def test_functions_have_at_most_60_lines(path):
    assert [f"{f.name}: {f.end_lineno - f.lineno + 1}" for f in functions(path) if f.end_lineno - f.lineno + 1 > 60] == []


@EACH_FILE
def test_every_argument_and_result_is_annotated(path):
    missing = []
    for function in functions(path):
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        missing += [f"{function.name}({a.arg})" for a in every if a and a.annotation is None and a.arg not in ("self", "cls")]
        if function.returns is None and function.name != "__init__":
            missing.append(f"{function.name} ->")
    assert missing == []


@EACH_FILE
def test_no_errors_are_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            assert ast.unparse(node.type) != "BaseException", node.lineno
            assert not all(isinstance(line, ast.Pass) for line in node.body), f"swallowed in line {node.lineno}"


@EACH_FILE
def test_files_begin_with_what_they_are_for(path):
    if path.name != "__main__.py":
        assert ast.get_docstring(ast.parse(path.read_text()))


def test_a_users_own_files_are_not_linted(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("zs_lightning/a.py", "tests/b.py", "scripts/benches/c.py", "mine.py", "runs/d.py", "data/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    names = sorted(str(Path(line).relative_to(tmp_path)) for line in said)
    assert names == ["pyproject.toml", "scripts/benches/c.py", "tests/b.py", "zs_lightning/a.py"]


@EACH_FILE
def test_nothing_is_left_to_do(path):
    assert re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b|breakpoint\(|pdb", path.read_text()) == []


def test_no_room_for_odds_and_ends():
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}
