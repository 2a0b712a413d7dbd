"""Decoding steps as on a card, run on the CPU: rows are filled up, steps are recorded and replayed."""

import gc
import weakref

import pytest
import torch

from support.mixed import mix, with_adapters
from support.recorder import Operations, Recorder, tensors
from support.slow_generator import GREEDY, MAX_LENGTH, MODELS, request, same, slow_turn, write
from support.tiny import make_model
from zs_lightning.generation import Generator, MixedAdapters, Sampling
from zs_lightning.generation.decoding import MANNERS, Decoding, Manner
from zs_lightning.generation.kv_cache import SlotCache
from zs_lightning.models.loading import load_model
from zs_lightning.models.specs import ModelSpec

CARD = Manner(read=32, rows=2, late=True, recorder=Recorder)


@pytest.fixture
def card(monkeypatch):
    """Generators made from now on decode so; returns their recorders, in their order."""

    def start(manner=CARD):
        monkeypatch.setitem(MANNERS, "cpu", manner)
        monkeypatch.setattr(Recorder, "made", [])
        return Recorder.made

    return start


def test_cards_decode_late_and_with_graphs_and_the_cpu_does_not():
    assert MANNERS["cpu"] == Manner(read=32)
    manner = MANNERS["cuda"]
    assert (manner.read, manner.rows, manner.late, manner.recorder.__name__) == (256, 8, True, "CudaRecorder")


# ---------------------------------------------------------------------------------------------- same results


def test_random_mixes_of_calls_equal_rows_run_alone(card):
    card()
    for seed in range(3000, 3040):
        mix(seed)


def test_tokens_logprobs_and_counts_are_those_of_the_cpu(tiny_model, card):
    expected, plain = write(tiny_model)
    recorders = card()
    written, generator = write(tiny_model)
    same(written, expected)
    assert generator.sampled_tokens == plain.sampled_tokens
    assert len(generator.decoding.graphs.recorded) > 3
    assert recorders[0].warmed == len(generator.decoding.graphs.recorded), "one recording for each shape"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_in_low_precision_and_under_autocast(quantization, tmp_path, card):
    """What autocast casts and keeps must not be in a graph: the weights change before the next rollout."""
    make_model("qwen3", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    dtype = "float32" if quantization == "none" else "bfloat16"
    model, written = load_model(ModelSpec(path=str(tmp_path), dtype=dtype, quantization=quantization, device="cpu")), []
    for manner in (MANNERS["cpu"], CARD):
        card(manner)
        generator = Generator(model, 2, 64)
        for factor in (2, 0.5):
            with torch.autocast("cpu", torch.bfloat16):
                generator.submit(request("a", list(range(20)), new=8))
                written.append(generator.run()[0].token_ids)
            for parameter in filter(torch.is_floating_point, model.parameters()):
                parameter.data.mul_(factor)
    assert written[:2] == written[2:]
    assert written[0] != written[1]
    assert list(generator.decoding.graphs.recorded) == [(2, 32)]


def test_another_precision_is_another_graph(card):
    """As when a test in one precision follows a fit in another: what was recorded computes in the precision of then."""
    written = []
    for manner in (MANNERS["cpu"], CARD):
        card(manner)
        generator = Generator(make_model("qwen3"), 1, 64)
        for mixed in (False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                generator.submit(request("a", list(range(20)), new=6))
                written.append(generator.run()[0].logprobs)
    assert written[3:] == [pytest.approx(logprobs, abs=1e-4) for logprobs in written[:3]]
    assert written[0] != pytest.approx(written[1], abs=1e-3)


# ---------------------------------------------------------------------------------------------- rows computed in vain


def test_parked_rows_keep_their_memory(card):
    card()
    generator = Generator(MODELS[2], 7, 40)
    for i in range(4):
        # The third fills its memory as far as a row can.
        generator.submit(request(str(i), list(range(20)), new=20 if i == 2 else 3, keep=True))
    generator.run()
    held = {}
    for row in generator.rows.values():
        held[row] = [memory[:, row.slot, :, : row.length].clone() for memory in (generator.cache.keys, generator.cache.values)]
    assert max(row.length for row in held) == 39
    for i in range(3):
        generator.submit(request(f"new {i}", [i], new=30 + i))
    counts = set()
    while generator.busy:
        generator.step()
        counts |= {shape[0] for shape in generator.decoding.graphs.recorded}
        for row, memories in held.items():
            for memory, before in zip((generator.cache.keys, generator.cache.values), memories, strict=True):
                assert torch.equal(memory[:, row.slot, :, : row.length], before)
    assert counts == {2, 4}, "three rows were decoded as four: the fourth was a parked one"


# ---------------------------------------------------------------------------------------------- nothing waits


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(temperature=0.6), Sampling(top_p=0.8, top_k=3)])
def test_a_launch_reads_nothing(sampling, card):
    card(Manner(read=32, rows=2, late=True))
    model = with_adapters(make_model("llama"), policy=4)
    with MixedAdapters(model, ["policy"]) as adapters, torch.no_grad():
        generator = Generator(model, 4, MAX_LENGTH, adapters)
        for i in range(3):
            generator.submit(request(str(i), [i], 2 + 2 * i, i, sampling, keep=i == 1, adapter="policy"))
        generator.step()
        for live in (2, 2, 1):
            with Operations() as operations:
                launched = generator._launch()
            assert len(launched.rows) == live
            assert len(operations.calls) > 50
            generator.pending, before = launched, generator.pending
            generator._take(before)


@pytest.mark.parametrize("way", ["bare", "peft", "mixed"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral", "gemma"])
def test_a_step_takes_nothing_from_the_host(kind, way, monkeypatch):
    """The meta device in the place of a card: what stays on the host, masks and rotations too, would be copied to it."""
    meta = torch.device("meta")
    monkeypatch.setitem(MANNERS, "meta", Manner(read=32, rows=2))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # It does not know this device.
    model = make_model(kind)
    model = (model if way == "bare" else with_adapters(model, policy=4)).to(meta)
    base = model if way == "bare" else model.get_base_model()
    adapters = MixedAdapters(model, ["policy"]) if way == "mixed" else None
    decoding = Decoding(base, SlotCache(base.config, 4, 64, torch.float32, meta), adapters)
    if adapters:
        adapters.__enter__()
        adapters.select(["policy", ""])
    with torch.no_grad(), Operations() as operations:
        states = decoding.hidden(2, decoding.ids[:2], decoding.places[0, :2], decoding.places[-1, :2], 32)
    assert states.shape == (2, 1, 32)
    seen = [tensor.device for _, *values in operations.calls for tensor in tensors(values)]
    assert len(seen) > 500
    assert set(seen) == {meta}


# ---------------------------------------------------------------------------------------------- graphs


def test_shapes_are_few_and_buffers_stay(card):
    recorders = card()
    generator = Generator(MODELS[0], 6, MAX_LENGTH)
    decoding = generator.decoding
    addresses = [t.data_ptr() for t in (decoding.ids, decoding.places)]
    for i in range(6):
        generator.submit(request(str(i), [i] * 30, new=10 * i + 6))
    generator.run()
    # 31 to 35 positions with six rows, then with five (of six); 3 and 4 rows as 4, up to 66 positions and more.
    assert list(decoding.graphs.recorded) == [(6, 32), (6, 64), (4, 64), (4, 96), (2, 96)]
    assert recorders[0].warmed == 5
    assert [t.data_ptr() for t in (decoding.ids, decoding.places)] == addresses
    assert [decoding._padded(n) for n in range(1, 7)] == [2, 2, 4, 4, 6, 6]


def test_a_replay_that_differs_is_noticed_and_does_no_harm(card, monkeypatch):
    expected, _ = write(MODELS[0])
    card()
    record = Recorder.record

    def wrong(recorder, compute):
        replay, result = record(recorder, compute)
        cache = compute.func.__self__.cache

        def worse():
            replay()
            result[-1:].fill_(0)
            result[:1].mul_(1.5)
            for keys in cache.keys:
                keys[cache.target] = 7.0

        return worse, result

    monkeypatch.setattr(Recorder, "record", wrong)
    with pytest.warns(RuntimeWarning, match=r"without CUDA graphs.*a replayed step differs") as told:
        written, generator = write(MODELS[0])
    assert len(told) == 1
    assert not generator.decoding.graphs.recorded
    same(written, expected)


def test_a_step_that_cannot_be_recorded_runs_as_it_is(card):
    model = make_model("qwen2")
    norm = model.model.norm
    forward = type(norm).forward
    norm.forward = lambda states: forward(norm, states * (1.0 if states.sum().item() else 0.5))
    expected, _ = write(model)
    recorders = card()
    with pytest.warns(RuntimeWarning, match=r"without CUDA graphs.*RuntimeError: operation not permitted") as told:
        written, _ = write(model)
    assert len(told) == 1
    assert recorders[0].warmed == 1
    same(written, expected)


def test_adapters_of_each_entry(card):
    """Graphs hold the addresses of the adapters' copies, which are made anew at each entry."""
    model = with_adapters(make_model("llama"), policy=4, simulator=3)
    mixed, names = MixedAdapters(model, ["policy", "simulator"]), ("policy", "simulator", "")
    with mixed:
        expected, _ = write(model, adapters=mixed, names=names)
    card()
    with mixed:
        same(write(model, adapters=mixed, names=names)[0], expected)
    generator, written = Generator(model, 2, 64, mixed), []
    for scale in (1, 3):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(scale)
        with mixed:
            generator.submit(request("a", [1, 2, 3], adapter="policy"))
            written.append(generator.run()[0].token_ids)
        model.set_adapter("policy")
        assert written[-1] == slow_turn(model, [1, 2, 3], request("a", []))[0]
    assert written[0] != written[1]


def test_another_active_adapter_is_another_graph(card):
    card()
    model = with_adapters(make_model("qwen3"), one=4, other=4)
    generator, written = Generator(model, 1, 64), []
    for name in ("one", "other", "one", ""):
        if name:
            model.set_adapter(name)
        else:
            model.base_model.disable_adapter_layers()
        generator.submit(request("a", [1, 2, 3]))
        written.append(generator.run()[0].token_ids)
        assert written[-1] == slow_turn(model, [1, 2, 3], request("a", []))[0]
    assert len({tuple(tokens) for tokens in written}) == 3


def test_layers_in_8_bits_are_not_recorded(tmp_path, card):
    make_model("qwen3", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    recorders = card()
    model = load_model(ModelSpec(path=str(tmp_path), dtype="bfloat16", quantization="int8", device="cpu"))
    generator = Generator(with_adapters(model, policy=4), 2, 64)
    assert (generator.decoding.graphs, recorders) == (None, [])
    generator.submit(request("a", [1, 2, 3]))
    assert len(generator.run()[0].token_ids) == 12


def test_graphs_and_memory_go_with_the_generator(card):
    """On a card each rollout has its own generator, whose memory the update needs: nothing may hold it, cycles neither."""
    recorders = card()
    model = with_adapters(make_model("llama"), policy=4)
    gc.disable()
    try:
        with MixedAdapters(model, ["policy"]) as adapters:
            generator = Generator(model, 2, 64, adapters)
            generator.submit(request("a", [1, 2, 3], adapter="policy"))
            generator.run()
            assert len(generator.decoding.graphs.recorded) == 1
            held = [weakref.ref(thing) for thing in (generator.cache.keys, generator.decoding.graphs, recorders.pop())]
            del generator
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()
