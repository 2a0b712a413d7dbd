"""The engine on a CUDA card against the CPU. Skipped on machines without one."""

import warnings

import pytest
import torch
from conftest import make_model
from slowengine import request, same, write
from test_adapters import with_adapters

from zs_lightning.engine import Engine, MixedAdapters
from zs_lightning.models.loading import ModelSpec, load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]


@pytest.fixture(autouse=True)
def strict():
    """Sums as exact as the CPU's, and no warning: steps are replayed."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without CUDA graphs")
        yield


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral", "gemma"])
def test_rows_are_those_of_the_cpu(kind):
    expected, _ = write(make_model(kind))
    written, engine = write(make_model(kind).to("cuda"))
    same(written, expected)
    assert engine.decoding.graphs.recorded


def test_mixed_adapters_are_those_of_the_cpu():
    written, names = [], ("policy", "simulator", "")
    for device in ("cpu", "cuda"):
        model = with_adapters(make_model("llama"), policy=4, simulator=3).to(device)
        with MixedAdapters(model, ["policy", "simulator"]) as mixed:
            written.append(write(model, adapters=mixed, names=names)[0])
    same(*written)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_graphs_in_low_precision_and_under_autocast(quantization, tmp_path):
    make_model("qwen3", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = load_model(ModelSpec(path=str(tmp_path), dtype="bfloat16", quantization=quantization, device="cuda"))
    engine = Engine(model, 2, 64)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            engine.submit(request("a", list(range(20)), new=8))
            engine.run()
    assert list(engine.decoding.graphs.recorded) == [(2, 64)]


def test_the_host_never_waits_to_launch_a_step():
    engine = Engine(make_model("llama").to("cuda"), 16, 96)
    for i in range(12):
        engine.submit(request(str(i), [i], new=20))
    for _ in range(3):
        engine.step()
    for _ in range(9):
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                launched = engine._launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        engine.pending, before = launched, engine.pending
        engine._take(before)


def test_memory_goes_with_the_engine():
    model = make_model("llama").to("cuda")
    held = []
    for _ in range(4):
        engine = Engine(model, 256, 256)
        engine.submit(request("a", [1, 2, 3], new=30))
        engine.run()
        del engine
        held.append(torch.cuda.memory_allocated())
    assert held[1:] == [held[1]] * 3
