"""The generator on a CUDA card against the CPU. Skipped on machines without one."""

import warnings

import pytest
import torch

from support.mixed import with_adapters
from support.slow_generator import request, same, write
from support.tiny import make_model
from zs_lightning.generation import Generator, MixedAdapters
from zs_lightning.models.loading import load_model
from zs_lightning.models.specs import ModelSpec

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
    written, generator = write(make_model(kind).to("cuda"))
    same(written, expected)
    assert generator.decoding.graphs.recorded


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
    generator = Generator(model, 2, 64)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            generator.submit(request("a", list(range(20)), new=8))
            generator.run()
    assert list(generator.decoding.graphs.recorded) == [(2, 64)]


def test_the_host_never_waits_to_launch_a_step():
    generator = Generator(make_model("llama").to("cuda"), 16, 96)
    for i in range(12):
        generator.submit(request(str(i), [i], new=20))
    for _ in range(3):
        generator.step()
    for _ in range(9):
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                launched = generator._launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        generator.pending, before = launched, generator.pending
        generator._take(before)


def test_memory_goes_with_the_generator():
    model = make_model("llama").to("cuda")
    held = []
    for _ in range(4):
        generator = Generator(model, 256, 256)
        generator.submit(request("a", [1, 2, 3], new=30))
        generator.run()
        del generator
        held.append(torch.cuda.memory_allocated())
    assert held[1:] == [held[1]] * 3
