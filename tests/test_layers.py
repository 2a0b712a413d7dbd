"""The house: which room may know which. An edge that is not in the table is an error, and so is one in it that is not used."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "zs_lightning"

LEVELS = [
    {"types", "streams", "errors"},
    {"text", "rl"},
    {"models", "generation", "miniature"},
    {"data", "search"},
    {"rollout", "runs"},
    {"modules", "callbacks"},
    {"configuration"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}

ROOMS_OF = {
    "types": set(),
    "streams": set(),
    "errors": set(),
    "text": {"types"},
    "rl": set(),
    "models": set(),
    "generation": set(),
    "miniature": {"types", "streams"},
    "data": {"types", "streams", "text", "miniature"},
    "search": {"types", "streams", "text", "models", "generation", "miniature"},
    "rollout": {"types", "streams", "text", "models", "generation", "search"},
    "runs": {"types", "streams", "text", "models"},
    "modules": {"types", "streams", "text", "rl", "models", "generation", "search", "rollout", "runs"},
    "callbacks": {"types", "rl", "runs"},
    "configuration": {"models", "data", "search", "modules", "callbacks", "runs"},
    "commands": {
        "types",
        "streams",
        "text",
        "models",
        "generation",
        "miniature",
        "search",
        "runs",
        "rollout",
        "modules",
        "configuration",
    },
    "cli": {"configuration", "commands"},
    "__main__": {"cli"},
}

SLOW_TO_IMPORT = {"peft", "bitsandbytes", "datasets", "transformers", "httpx2", "tenacity"}
AT_THE_TOP = {("generation/kv_cache.py", "transformers.cache_utils")}
"""The class of the K/V cache is a base class. It is light: no model is imported with it."""


def files():
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(tree):
    """Full names of what is imported, with whether it is inside of a function (or for the type checker only)."""
    found = []

    def visit(node, late):
        if isinstance(node, ast.Import):
            found.extend((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            found.extend((f"{node.module}.{alias.name}", late) for alias in node.names)
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        late = late or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            visit(child, late)

    visit(tree, False)
    return found


SOURCES = [(path, ast.parse(path.read_text())) for path in files()]
EACH_FILE = pytest.mark.parametrize(("path", "tree"), SOURCES, ids=[str(path.relative_to(PACKAGE)) for path, _ in SOURCES])


def edges():
    return {
        (room_of(path), name.split(".")[1])
        for path, tree in SOURCES
        for name, _ in imports(tree)
        if name.startswith("zs_lightning.")
        and name.split(".")[1] in LEVEL.keys() - {"errors", room_of(path)}  # whoever may raise
    }


def test_every_file_is_in_a_room_of_the_table():
    rooms = {room_of(path) for path in files()} - {"__init__"}
    assert rooms == set(LEVEL) == set(ROOMS_OF)


def test_the_table_goes_downwards_only():
    assert [(room, below) for room, rooms in ROOMS_OF.items() for below in rooms if LEVEL[below] >= LEVEL[room]] == []


def test_rooms_import_what_the_table_says_and_nothing_else():
    assert sorted(edges()) == sorted((room, below) for room, rooms in ROOMS_OF.items() for below in rooms)


@EACH_FILE
def test_slow_packages_are_imported_on_use(path, tree):
    early = {
        (str(path.relative_to(PACKAGE)), name.rpartition(".")[0] or name)
        for name, late in imports(tree)
        if not late and name.split(".")[0] in SLOW_TO_IMPORT
    }
    assert early <= AT_THE_TOP


@EACH_FILE
def test_rooms_know_only_their_own_libraries(path, tree):
    room, libraries = room_of(path), {name.split(".")[0] for name, _ in imports(tree)}
    if room in ("text", "streams"):
        assert not libraries & {"torch", "numpy", "transformers", "lightning"}
    if LEVEL.get(room, 0) < LEVEL["modules"] and room != "data":
        assert not libraries & {"lightning", "pytorch_lightning", "jsonargparse"}
    if room == "data":
        assert not libraries & {"transformers", "tokenizers"}
    if room == "types":
        assert "torch" not in {name.split(".")[0] for name, late in imports(tree) if not late}


def calls(tree, under=""):
    """Called names with the heads of the with-statements around them."""
    for node in ast.iter_child_nodes(tree):
        inside = under + (ast.unparse(node).split("\n")[0] if isinstance(node, ast.With) else "")
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), ast.unparse(node), inside
        yield from calls(node, inside)


GLOBAL_DRAWS = {f"random.{name}" for name in ("random", "seed", "choice", "choices", "shuffle", "sample", "randint", "uniform")}


@EACH_FILE
def test_no_global_generator_is_seeded_or_drawn_from(path, tree):
    for function, call, around in calls(tree):
        assert function not in GLOBAL_DRAWS | {"seed_everything", "L.seed_everything"}, call
        assert not function.startswith(("np.random", "numpy.random", "torch.cuda.manual_seed")), call
        assert function != "torch.manual_seed" or "fork_rng" in around, call


@EACH_FILE
def test_nothing_is_unpickled(path, tree):
    assert not {name.split(".")[0] for name, _ in imports(tree)} & {"pickle", "dill", "joblib", "shelve"}
    for function, call, _ in calls(tree):
        assert "weights_only=False" not in call
        assert function != "torch.load" or "weights_only=True" in call, call


# The checks above are worth what they can find.

OFFENDER = """
import zs_lightning.modules
from transformers import AutoModel
def late():
    from peft import LoraConfig
with torch.random.fork_rng():
    torch.manual_seed(1)
torch.manual_seed(2)
"""


def test_the_readers_see_what_they_look_for():
    tree = ast.parse(OFFENDER)
    assert imports(tree) == [("zs_lightning.modules", False), ("transformers.AutoModel", False), ("peft.LoraConfig", True)]
    seeds = [around for function, _, around in calls(tree) if function == "torch.manual_seed"]
    assert ["fork_rng" in around for around in seeds] == [True, False]
