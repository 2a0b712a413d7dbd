"""Fixtures of every room: tokenizers made in memory, tiny random models, the shipped miniature, servers that fail."""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

from support.faultserver import FaultServer, searching
from support.tiny import make_model, make_tokenizer
from zs_lightning.models.loading import load_model, load_tokenizer
from zs_lightning.models.specs import ModelSpec
from zs_lightning.search import RetrieveSearch, remote
from zs_lightning.search.http import HttpSpec

torch.set_num_threads(1)
# Torch makes its pool anew after a fork, when it is first asked: by several threads at once it fails ("Invalid thread pool").
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
# The same cases every time, and however slow the machine is: a test fails by what it tests alone.
settings.register_profile("here", max_examples=200, deadline=None, derandomize=True)
settings.load_profile("here")
# Behind nohup they would not hear it, nor would what they start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest_plugins = ["support.exports", "support.familyruns", "support.faultplan", "support.warm"]


@pytest.fixture(scope="session")
def tokenizers():
    """The tokenizers made in memory, by kind."""
    return {kind: make_tokenizer(kind) for kind in ("raw", "chat", "bos")}


@pytest.fixture(scope="session", params=["qwen2", "qwen3", "llama", "mistral", "gemma"])
def tiny_model(request):
    """A random model of each type. Do not change its weights."""
    return make_model(request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Folder of a random model and its tokenizer."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_model("qwen3", initializer_range=0.1).save_pretrained(path)
    make_tokenizer("raw").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def miniature():
    """The shipped base model and its tokenizer. Do not change its weights."""
    return load_model(ModelSpec(device="cpu")), load_tokenizer("miniature")


@pytest.fixture
def serve():
    """Starts servers on loopback from their answers; they end with the test."""
    servers = []

    def start(answer):
        servers.append(FaultServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def engines(monkeypatch):
    """Makes clients of a retrieval server that wait little between repetitions; they end with the test."""
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    made, before = [], searching()

    def make(url, **options):
        made.append(RetrieveSearch(url, http=HttpSpec(**{"timeout": 20.0, "concurrency": 4, **options})))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
    assert not searching() - before


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A folder of the test's own, and 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(autouse=True)
def interruptible():
    """Lightning ignores Ctrl-C once it has seen one, and who runs the tests in the background has switched it off: every
    process that a test starts would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
