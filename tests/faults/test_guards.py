"""Every guard is taken away in turn, and a test must miss it."""

import functools
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
    assert len(set(NAMES)) == len({(guard["file"], guard["line"]) for guard in GUARDS}) == len(GUARDS) >= 25
    for guard in GUARDS:
        path, _, name = guard["test"].partition("::")
        compile(without(guard, (ROOT / guard["file"]).read_text()), guard["file"], "exec")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), guard["test"]


def outcome(tree, test):
    """How a test ends in the tree: "passed", "failed", or all that was said, of trouble with the test itself."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", test]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode == 0:
        return "passed"
    failed = done.returncode == 1 and any(line.startswith(f"FAILED {test}") for line in done.stdout.splitlines())
    return "failed" if failed else done.stdout[-3000:] + done.stderr[-1000:]


@pytest.fixture(scope="module")
def passes(tree):
    """Whether a test passes while all guards are there."""
    return functools.cache(lambda test: outcome(tree, test))


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


def test_without_the_guard_a_test_fails(guard, tree, passes, figure):
    assert passes(guard["test"]) == "passed"
    file = tree / guard["file"]
    before = file.read_text()
    file.write_text(without(guard, before))
    try:
        found = outcome(tree, guard["test"])
    finally:
        file.write_text(before)
    test = guard["test"].removeprefix("tests/").replace("::", " ")
    figure(23, f"without: {guard['guard']}", f"`{test}` {'fails' if found == 'failed' else 'does not fail'}")
    assert found == "failed"
