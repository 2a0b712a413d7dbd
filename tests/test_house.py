"""The house: which room may know which, the size and the looks of its code, and that ruff watches the rest."""

import ast
import re
import shutil
import subprocess
import sys
import tokenize
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "zs_lightning"
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
LINES = {path: path.read_text().splitlines() for path in TREES}
TOTAL = sum(map(len, LINES.values()))

MOST_LINES = 22_837
MOST_OF_A_FILE = 400
MOST_OF_A_FUNCTION = 60
MOST_NAMES = 18
"""At the top level of the package."""
WIDE = 0.02
"""Share of lines over 100 columns, at most."""
COMMENTS = {"": 0.04, "generation": 0.08, "rollout": 0.08}
"""Share of lines that are comments, at least, of the package and of rooms."""
COMPREHENSIONS = 0.035
"""A line, at most."""

ROOMS = {
    "types": "",
    "streams": "",
    "text": "types",
    "rl": "types text",
    "models": "",
    "generation": "",
    "miniature": "types streams",
    "data": "types streams text miniature",
    "search": "types streams text models generation miniature",
    "rollout": "types streams text models generation search",
    "runs": "types streams text models",
    "modules": "types streams text rl models generation search rollout runs",
    "callbacks": "types text rl runs",
    "configuration": "models data search rl modules callbacks runs",
    "commands": "types streams text models generation miniature data search runs rollout modules configuration",
    "cli": "text runs configuration",
    "__main__": "cli",
}
"""Rooms that a room knows, all of them earlier in the table. Every room may raise the errors."""

SHELL = ("modules", "callbacks", "configuration", "commands", "cli", "__main__")
"""Rooms that know Lightning. The others can be used without it, but for the data module."""

SLOW = {"peft", "bitsandbytes", "datasets", "transformers", "httpx2", "tenacity"}
"""Libraries that are imported on use, also where ruff's TID253 does not look (in a class, below a try)."""


def name_of(path):
    return path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree, late=False):
    """Full names of what is imported, with whether it is inside of a function (or for the type checker only)."""
    for node in ast.iter_child_nodes(tree):
        inner = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        inner = inner or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", late) for alias in node.names)
        yield from imports(node, inner)


def test_imports_are_seen_with_their_place():
    text = "import a.b\nfrom c import D\ntry:\n    import e\nfinally:\n    pass\ndef f():\n    from g import H\n"
    tree = ast.parse(text + "if TYPE_CHECKING:\n    import i\n")
    assert list(imports(tree)) == [("a.b", False), ("c.D", False), ("e", False), ("g.H", True), ("i", True)]


# ---------------------------------------------------------------------------------------------------------- rooms


def test_rooms_know_those_of_the_table_and_no_others():
    """An arrow that is not in the table is an error, and so is one in it that is not used."""
    known = {room: set() for room in ROOMS}
    for path, tree in TREES.items():
        if path.parent == PACKAGE and path.stem in ("__init__", "errors"):
            continue
        rooms = {name.split(".")[1] for name, _ in imports(tree) if name.startswith("zs_lightning.")}
        known[room_of(path)] |= rooms - {room_of(path), "errors", "__version__"}
    assert known == {room: set(rooms.split()) for room, rooms in ROOMS.items()}
    order = list(ROOMS)
    assert [(room, below) for room in ROOMS for below in known[room] if order.index(below) >= order.index(room)] == []


def test_modules_do_not_import_each_other_in_a_circle():
    names = {name_of(path) for path in TREES}
    known = {name_of(path): set() for path in TREES}
    for path, tree in TREES.items():
        for name, late in imports(tree):
            module = name if name in names else name.rpartition(".")[0]
            if module in names and not late:
                known[name_of(path)].add(module)
    TopologicalSorter(known).prepare()


def test_rooms_know_only_their_own_libraries():
    for path, tree in TREES.items():
        room = room_of(path)
        libraries = {name.split(".")[0] for name, _ in imports(tree)}
        early = {name.split(".")[0] for name, late in imports(tree) if not late}
        # The class of the K/V cache is a base class. It is light: no model is imported with it.
        assert early & SLOW <= ({"transformers"} if path.name == "kv_cache.py" else set()), path
        if room in ("text", "streams"):
            assert not libraries & {"torch", "numpy", "transformers", "lightning"}, path
        if room not in (*SHELL, "data"):
            assert not libraries & {"lightning", "pytorch_lightning", "jsonargparse"}, path
        if room == "data":
            assert not libraries & {"transformers", "tokenizers"}, path
        if room == "types":
            assert "torch" not in early


# ---------------------------------------------------------------------------------------------------------- sizes


def comments(path):
    with path.open() as file:
        found = [token for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT]
    return sum(token.line.lstrip().startswith("#") for token in found)


def test_the_package_is_small_enough_to_be_read():
    assert 5_000 < TOTAL <= MOST_LINES
    names = {room_of(path) for path in TREES} - {"__init__"}
    assert len(names) <= MOST_NAMES, sorted(names)
    assert {path.name: len(lines) for path, lines in LINES.items() if len(lines) > MOST_OF_A_FILE} == {}


def test_functions_are_small_enough_to_be_read():
    nodes = [(path.name, node) for path, tree in TREES.items() for node in ast.walk(tree)]
    functions = [(name, f) for name, f in nodes if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert len(functions) > 150
    assert [(name, f.name) for name, f in functions if f.end_lineno - f.lineno >= MOST_OF_A_FUNCTION] == []


def test_few_lines_are_wide():
    wide = Counter({path: sum(len(line) > 100 for line in lines) for path, lines in LINES.items()})
    assert wide.total() <= WIDE * TOTAL, wide.most_common(10)


def test_comments_say_why():
    said, lines = Counter(), Counter()
    for path in TREES:
        for room in ("", room_of(path)):
            said[room] += comments(path)
            lines[room] += len(LINES[path])
    for room, share in COMMENTS.items():
        assert said[room] >= share * lines[room], (room, said)


def test_loops_are_not_all_comprehensions():
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    found = Counter({path: sum(isinstance(node, kinds) for node in ast.walk(tree)) for path, tree in TREES.items()})
    assert found.total() <= COMPREHENSIONS * TOTAL, found.most_common(10)


# ---------------------------------------------------------------------------------------------------------- habits


def test_nothing_is_unpickled():
    for path, tree in TREES.items():
        calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        loads = [call for call in calls if call.startswith("torch.load(")]
        assert all("weights_only=True" in call for call in loads), path
        assert not any("weights_only=False" in call for call in calls), path


def test_no_model_brings_its_own_code():
    """What reads models goes through the one door of models/specs.py, which runs no code of theirs."""
    for path, tree in TREES.items():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
        doors = [call.args[0] for call in calls if ast.unparse(call.func) in ("read", "without_code")]
        # peft reads an adapter's numbers, and refuses to import what its configuration names.
        doors += [call.func for call in calls if ast.unparse(call.func) == "PeftModel.from_pretrained"]
        named = [node for node in ast.walk(tree) if getattr(node, "attr", "") in ("from_pretrained", "from_config")]
        assert [ast.unparse(node) for node in named if node not in doors] == [], path
        assert "trust_remote_code=True" not in path.read_text()


def test_words_that_no_file_has():
    for path in TREES:
        found = re.findall(r"\b(?:TODO|FIXME|XXX|HACK|pdb)\b|except:", path.read_text())
        assert found == [], path


def test_no_room_for_odds_and_ends():
    names = {path.stem for path in TREES} | {path.parent.name for path in TREES}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


def test_what_a_run_leaves_is_not_kept():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tops = {".ci", ".github", ".gitignore", "LICENSE", "README.md", "configs", "pyproject.toml", "scripts"}
    tops |= {"tests", "zs_lightning"}
    assert {name.split("/")[0] for name in listed} == tops


# ---------------------------------------------------------------------------------------------------------- ruff


def ruff(folder, *options):
    if folder != ROOT:
        shutil.copy(ROOT / "pyproject.toml", folder)
    command = [sys.executable, "-m", "ruff", "check", *options, "."]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.splitlines()


def test_a_users_own_files_are_not_linted(tmp_path):
    for name in ("zs_lightning/a.py", "tests/b.py", "scripts/benches/c.py", "mine.py", "runs/d.py", "data/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    names = sorted(str(Path(line).relative_to(tmp_path)) for line in ruff(tmp_path, "--show-files"))
    assert names == ["pyproject.toml", "scripts/benches/c.py", "tests/b.py", "zs_lightning/a.py"]


OFFENDERS = {
    "ANN001": "def f(x) -> None: ...",
    "ANN201": "def f(): ...",
    "ANN204": "class A:\n    def __init__(self): ...",
    "BLE001": ["try:\n    f()\nexcept BaseException:\n    x = 1", "try:\n    f()\nexcept Exception:\n    x = 1"],
    "D100": "x = 1",
    "E722": "try:\n    f()\nexcept:\n    x = 1",
    "FIX002": "# TODO",
    "PLR0912": "def f(x: int) -> None:\n" + "    if x:\n        f(x)\n" * 20,
    "PLR0915": "def f(x: int) -> None:\n" + "    f(x)\n" * 60,
    "S110": "try:\n    f()\nexcept KeyError:\n    pass",
    "T100": "breakpoint()",
    "TID251": [
        "import random\nrandom.choice([1])",
        "from random import shuffle",
        "import numpy as np\nnp.random.rand()",
        "import torch\ntorch.manual_seed(1)",
        "import torch\ntorch.cuda.manual_seed_all(1)",
        "import lightning as L\nL.seed_everything(1)",
        "import pickle",
        "from joblib import load",
    ],
    "TID252": "from .sibling import x",
}


def test_ruff_finds_what_is_left_to_it(tmp_path):
    (tmp_path / "zs_lightning").mkdir()
    expected = {}
    for code, texts in OFFENDERS.items():
        for number, text in enumerate([texts] if isinstance(texts, str) else texts):
            expected[f"{code.lower()}_{number}.py"] = code
            (tmp_path / "zs_lightning" / f"{code.lower()}_{number}.py").write_text(text + "\n")
    said = "\n".join(ruff(tmp_path, "--output-format=concise"))
    missed = [name for name, code in expected.items() if not re.search(rf"{name}:\S+ {code}\b", said)]
    assert missed == []


def test_files_are_read_and_written_alike_on_every_system():
    """Not in the locale's encoding, but for what Linux tells of itself in ASCII."""
    found = "\n".join(ruff(ROOT, "--preview", "--select=PLW1514", "--extend-exclude=tests,scripts", "--output-format=concise"))
    files = re.findall(r"^(\S+\.py):", found, re.MULTILINE)
    assert sorted(files) == ["zs_lightning/generation/kv_cache.py", "zs_lightning/modules/step_metrics.py"]
