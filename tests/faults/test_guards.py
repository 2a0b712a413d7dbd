"""Every guard is taken away in turn, and a test must miss it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GUARDS = yaml.safe_load((Path(__file__).parent / "guards.yaml").read_text())
NAMES = [guard["guard"] for guard in GUARDS]


def without(guard, text):
    """The text of the guard's file without the guard, which must stand in it once."""
    assert text.count(guard["line"]) == 1, f"{guard['file']} holds {guard['line']!r} {text.count(guard['line'])} times"
    return text.replace(guard["line"], guard["without"])


def test_every_guard_stands_where_the_list_says_and_has_its_test():
    assert len(set(NAMES)) == len(NAMES) >= 25
    for guard in GUARDS:
        path, _, name = guard["test"].partition("::")
        compile(without(guard, (ROOT / guard["file"]).read_text()), guard["file"], "exec")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), guard["test"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project: what a test starts in a process of its own is to lack the guard as well."""
    tree = tmp_path_factory.mktemp("guards") / "tree"
    tree.mkdir()
    for name in ("zs_lightning", "tests", "scripts", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    return tree


def pytest_generate_tests(metafunc):
    if "guard" in metafunc.fixturenames:
        # Ten minutes of two cores.
        guards = GUARDS if metafunc.config.getoption("--full") else []
        metafunc.parametrize("guard", guards, ids=[guard["guard"] for guard in guards])


def test_without_the_guard_a_test_fails(guard, tree, figure):
    file = tree / guard["file"]
    before = file.read_text()
    file.write_text(without(guard, before))
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", guard["test"]]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600, check=False)
    finally:
        file.write_text(before)
    # 1 is a test that failed; the others are trouble of pytest itself.
    failed = done.returncode == 1 and "failed" in done.stdout
    test = guard["test"].removeprefix("tests/").replace("::", " ")
    figure(23, f"without: {guard['guard']}", f"`{test}` {'fails' if failed else 'does not fail'}")
    assert failed, done.stdout[-3000:] + done.stderr[-1000:]
