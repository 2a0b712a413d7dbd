"""Weights in oneDNN's layout while the generator runs: the same tokens, always of the present weights, nothing left behind."""

import math

import pytest
import torch

from support.mixed import mix, with_adapters
from support.slow_generator import MODELS, request, same, slow_turn, write
from support.tiny import make_model
from zs_lightning.errors import RunError
from zs_lightning.generation import Generator, MixedAdapters, kv_cache, packing
from zs_lightning.generation.kv_cache import FRACTION, slot_bytes
from zs_lightning.generation.packing import Packing

CPU = torch.device("cpu")


@pytest.fixture
def pack_all(monkeypatch):
    """Every linear layer is worth packing."""
    monkeypatch.setattr(packing, "LEAST", 1)


@pytest.fixture(params=["all that is here", "no bfloat16", "no oneDNN"])
def machine(request, monkeypatch):
    """This machine; as if with a processor without AVX-512; as if with a torch without oneDNN."""
    supported = packing.supported
    if request.param == "no bfloat16":
        monkeypatch.setattr(packing, "supported", lambda dtype: dtype != torch.bfloat16 and supported(dtype))
    with torch.backends.mkldnn.flags(enabled=request.param != "no oneDNN"):
        yield


def packable(model):
    """The linear layers that this machine can pack."""
    linear = [module for module in model.modules() if type(module) is torch.nn.Linear]
    return [layer for layer in linear if packing.supported(layer.weight.dtype)]


def test_what_is_supported_is_what_torch_and_the_processor_can_do(monkeypatch):
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and torch.backends.mkl.is_available()
    assert packing.supported(torch.float32) == onednn
    assert not packing.supported(torch.float16)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert packing.supported(torch.bfloat16) == onednn
    with torch.backends.mkldnn.flags(enabled=False):
        assert not packing.supported(torch.float32)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not packing.supported(torch.float32)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_layer(dtype, bias, autocast, machine, pack_all):
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(70, 50, bias=bias).to(dtype)
    inputs = [torch.randn(*shape, 70, generator=generator).to(dtype) for shape in [(3,), (1, 1), (5, 7), (2, 300), (4, 2, 3)]]
    inputs += [inputs[2][:, -1], inputs[3][:, ::3], inputs[4].transpose(0, 1)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for states in inputs:
            expected = layer(states)
            with Packing(layer, CPU):
                assert ("forward" in vars(layer)) == packing.supported(torch.bfloat16 if autocast else dtype)
                product = layer(states)
            assert (product.dtype, product.shape) == (expected.dtype, expected.shape)
            torch.testing.assert_close(product, expected, atol=1e-5 if product.dtype == torch.float32 else 0.02, rtol=0.01)
    assert "forward" not in vars(layer)


def test_a_generator_writes_the_same_with_packed_weights(pack_all):
    for model in MODELS:
        generator = Generator(model, 5, 96)
        assert generator.packing.layers == packable(model)
        assert generator.packing.bytes == sum(layer.weight.nbytes for layer in packable(model))
    for seed in range(4000, 4040):
        mix(seed)


def test_adapters_of_one_base_do_too(pack_all, monkeypatch):
    model = with_adapters(make_model("qwen3"), a=4, b=7)
    with MixedAdapters(model, ["a", "b"]) as adapters:
        packed, generator = write(model, adapters=adapters, names=("a", "b", ""))
        assert generator.packing.layers == packable(model), "those under the adapters too"
        monkeypatch.setattr(packing, "LEAST", 1 << 40)
        plain, generator = write(model, adapters=adapters, names=("a", "b", ""))
        assert generator.packing.layers == []
    same(packed, plain)


@pytest.mark.parametrize("how", ["in place", "assigned", "data"])
def test_weights_that_changed_are_packed_anew(how, pack_all):
    """As after an optimizer's step, a checkpoint that was loaded, and a write past torch's notice before a new rollout."""
    model = make_model("llama")
    generator, turn = Generator(model, 1, 96), request("a", [5, 6, 7], new=8)
    generator.submit(turn)
    before = generator.run()[0].token_ids
    head = model.get_output_embeddings()
    with torch.no_grad():
        if how == "in place":
            head.weight.neg_()
        elif how == "assigned":
            version, head.weight = head.weight._version, torch.nn.Parameter(-head.weight)
            while head.weight._version < version:
                head.weight += 0
        else:
            head.weight.data.neg_()
            generator.clear()
    generator.submit(turn)
    after = generator.run()[0].token_ids
    assert after == slow_turn(model, turn.ids, turn)[0] != before


def test_precision_that_changed_is_packed_anew(pack_all):
    layer = torch.nn.Linear(8, 8)
    packed = Packing(layer, CPU)
    for enabled, dtype in ((False, torch.float32), (True, torch.bfloat16), (False, torch.float32)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled), packed:
            assert layer(torch.ones(1, 8)).dtype == dtype


def test_copies_are_made_once_for_weights_that_stay(pack_all, monkeypatch):
    made, make = [], packing._packed
    monkeypatch.setattr(packing, "_packed", lambda *arguments: made.append(1) or make(*arguments))
    model = MODELS[0]
    generator = Generator(model, 2, 96)
    for i in range(3):
        generator.submit(request(str(i), [1, 2, 3], new=8))
        generator.run()
    assert len(made) == len(packable(model))


def test_nothing_is_left_on_the_model_even_after_an_error(pack_all):
    model = make_model("qwen2")
    generator = Generator(model, 2, 96)
    generator.submit(request("a", [1, 2, 3]))
    generator.step()
    assert not any("forward" in vars(module) for module in model.modules())
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    generator.clear()
    generator.submit(request("a", [1, 2, 3]))
    with pytest.raises(RunError):
        generator.step()
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_small_on_a_card_or_too_much_stays_as_it_is(monkeypatch):
    wide, narrow = torch.nn.Linear(256, 768), torch.nn.Linear(256, 767)
    both = torch.nn.ModuleList([narrow, wide])
    assert Packing(both, CPU).layers == packable(torch.nn.ModuleList([wide]))
    assert Packing(both, torch.device("cuda")).layers == []
    monkeypatch.setattr(packing, "SHARE", 0.0)
    packed = Packing(both, CPU)
    assert (packed.layers, packed.bytes) == ([], 0)


def test_quantised_layers_stay_as_they_are(pack_all):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    quantised = [Linear4bit(64, 64), Linear8bitLt(64, 64, has_fp16_weights=False)]
    assert Packing(torch.nn.ModuleList(quantised), CPU).layers == []


def test_copies_are_part_of_the_plan_for_memory(pack_all, monkeypatch):
    model = MODELS[0]
    slot, copies = slot_bytes(model.config, 96, torch.float32), Packing(model, CPU).bytes
    assert copies == sum(layer.weight.nbytes for layer in packable(model))
    monkeypatch.setattr("zs_lightning.generation.generator.free_bytes", lambda _: copies + 10 * slot)
    assert len(Generator(model, 50, 96).slots) == int(10 * FRACTION)


@pytest.mark.parametrize("reserved", [0, 2])
def test_copies_that_leave_no_room_for_rows_are_not_made(reserved, pack_all, monkeypatch):
    model = MODELS[0]
    slot, copies = slot_bytes(model.config, 96, torch.float32), Packing(model, CPU).bytes
    free = [math.ceil((reserved + 1) * slot / FRACTION)]
    monkeypatch.setattr("zs_lightning.generation.generator.free_bytes", lambda _: free[0])
    generator = Generator(model, 50, 96, reserved=reserved)
    assert (len(generator.slots), generator.packing.bytes) == (reserved + 1, 0)
    generator.submit(request("a", [5, 6, 7], new=4))
    assert generator.run()[0].token_ids == slow_turn(model, [5, 6, 7], request("a", [5, 6, 7], new=4))[0]
    free[0] += copies
    assert Generator(model, 50, 96, reserved=reserved).packing.bytes == copies
    free[0] = 0
    with pytest.raises(ValueError, match=r"60% of the free memory are 0\.00 GB"):
        Generator(model, 50, 96)


def test_of_a_container_its_own_memory_counts(tmp_path, monkeypatch):
    layer = torch.nn.Linear(256, 768)
    (tmp_path / "memory.max").write_text(f"{8 * layer.weight.nbytes}\n")
    monkeypatch.setattr(kv_cache, "CGROUP", tmp_path)
    assert Packing(layer, CPU).layers == packable(layer)
    (tmp_path / "memory.max").write_text(f"{8 * layer.weight.nbytes - 8}\n")
    assert Packing(layer, CPU).layers == []
