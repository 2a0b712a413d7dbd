"""Adapters of one base in one batch, against peft with one adapter at a time."""

import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import KasaConfig, LoraConfig, get_peft_model
from peft.tuners.lora import bnb

from support.mixed import LAYERS, with_adapters
from support.tiny import make_model, make_tokenizer
from zs_lightning.data.sources import MiniatureSource
from zs_lightning.errors import NotFiniteError
from zs_lightning.generation import Generator, MixedAdapters, Request, Sampling, own_adapter
from zs_lightning.models.loading import load_model
from zs_lightning.models.lora import add_lora
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules import PolicyRL
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search import BM25Search, SimulatorSearch


class Never:
    def hit(self, sampled):
        return False


@torch.no_grad()
def one_at_a_time(model, ids, names):
    rows = []
    for row, name in zip(ids, names, strict=True):
        if name:
            model.set_adapter(name)
            rows.append(model(input_ids=row[None]).logits)
        else:
            with model.disable_adapter():
                rows.append(model(input_ids=row[None]).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral", "gemma"])
def test_each_row_is_as_with_its_adapter_alone(kind):
    model = with_adapters(make_model(kind), a=4, b=7, c=2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(384, (8, 11), generator=generator)
    names = ["a", "b", "", "c", "a", "", "b", "c"]
    expected = one_at_a_time(model, ids, names)
    with MixedAdapters(model, ["a", "b", "c"]) as adapters, torch.no_grad():
        adapters.select(names)
        mixed = model(input_ids=ids).logits
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)
    assert (expected[0] - one_at_a_time(model, ids[:1], [""])[0]).abs().max() > 0.1, "the adapters do something"
    torch.testing.assert_close(one_at_a_time(model, ids, names), expected, atol=0, rtol=0)


def test_one_adapter_alone_is_mixed_too_unless_it_is_more_than_two_matrices():
    """peft's own forward makes a decoding step of a card a tenth longer."""
    model, prompts = with_adapters(make_model("qwen3"), default=4), [[1, 2, 3], [4, 5]]
    written = []
    for adapters in (None, own_adapter(model, "default")):
        generator = Generator(model, 2, 32, adapters)
        with adapters or nullcontext():
            for i, ids in enumerate(prompts):
                asked = Request(key=str(i), ids=ids, max_new_tokens=20, seed=i, sampling=Sampling(), stop=Never())
                generator.submit(replace(asked, adapter="default" if adapters else ""))
            written.append(sorted(generator.run(), key=lambda row: row.key))
    for one, other in zip(*written, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert own_adapter(make_model("qwen3"), "default") is None
    assert own_adapter(add_lora(make_model("qwen3"), LoraSpec(r=2, dora=True), 0), "default") is None


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2), LoraSpec(r=2, dora=True)], ids=["full", "lora", "dora"])
def test_the_policys_generator_has_its_adapter(lora):
    module = PolicyRL(BM25Search(), ModelSpec(device="cpu"), "miniature", lora=lora, rollout=RolloutSpec(max_length=640))
    module.setup("fit")
    with module.actor.generating() as generator:
        assert (generator.adapters is not None) == (lora is not None and not lora.dora)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_in_low_precision_and_on_quantised_bases(dtype, quantization, tmp_path):
    make_model("qwen3", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    base = load_model(ModelSpec(path=str(tmp_path), dtype=dtype, quantization=quantization, device="cpu"))
    model = with_adapters(base, policy=8, simulator=4)
    ids = torch.randint(384, (6, 9), generator=torch.Generator().manual_seed(1))
    names = ["policy", "simulator"] * 3
    expected = one_at_a_time(model, ids, names)
    with MixedAdapters(model, ["policy", "simulator"]) as adapters, torch.no_grad():
        adapters.select(names)
        mixed = model(input_ids=ids).logits
    scale = expected.float().abs().max()
    error = (mixed.float() - expected.float()).abs().max() / scale
    # int8 quantises activations row by row of the batch, and bf16 rounds sums of another order.
    assert error < (1e-5 if dtype == "float32" and quantization != "int8" else 0.03)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_under_autocast_nothing_is_cast_again_at_each_step(quantization, tmp_path):
    """As in a training step with precision bf16-mixed, where peft's own layers compute in bf16 too."""
    make_model("qwen3", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    base = load_model(ModelSpec(path=str(tmp_path), dtype="bfloat16", quantization=quantization, device="cpu"))
    model = with_adapters(base, policy=8, simulator=4)
    ids = torch.randint(384, (6, 9), generator=torch.Generator().manual_seed(1))
    names = ["policy", "simulator"] * 3
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = one_at_a_time(model, ids, names)
        with MixedAdapters(model, ["policy", "simulator"]) as adapters:
            adapters.select(names)
            assert {adapters.mask.dtype} | {layer.forward.args[2].dtype for layer in adapters.layers} == {torch.bfloat16}
            mixed = model(input_ids=ids).logits
    assert (mixed.float() - expected.float()).abs().max() < 0.03 * expected.float().abs().max()


def test_weights_are_those_at_the_time_of_entry():
    model = with_adapters(make_model("qwen3"), a=4)
    mixed = MixedAdapters(model, ["a"])
    ids = torch.arange(10)[None]
    with mixed:
        pass
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(3)
    with mixed, torch.no_grad():
        mixed.select(["a"])
        torch.testing.assert_close(model(input_ids=ids).logits, one_at_a_time_outside(model, ids), atol=1e-4, rtol=1e-4)


def one_at_a_time_outside(model, ids):
    """With peft's own forward, while another one is installed."""
    layers = [module for module in model.modules() if "forward" in vars(module)]
    held = [layer.__dict__.pop("forward") for layer in layers]
    logits = one_at_a_time(model, ids, ["a"])
    for layer, forward in zip(layers, held, strict=True):
        layer.forward = forward
    return logits


def test_rows_of_a_generator_sample_as_with_their_adapter_alone(monkeypatch):
    model = with_adapters(make_model("llama"), policy=4, simulator=3)
    rng = random.Random(2)
    prompts = [[rng.randrange(384) for _ in range(rng.randint(1, 20))] for _ in range(12)]
    prompts[5] = prompts[4]  # Equal prompts of different adapters have different keys and values.
    names = [("policy", "simulator", "")[i % 3] for i in range(12)]

    def requests():
        for i, (ids, name) in enumerate(zip(prompts, names, strict=True)):
            yield Request(key=str(i), ids=ids, max_new_tokens=10, seed=i, sampling=Sampling(), stop=Never(), adapter=name)

    alone = {}
    for request in requests():
        if request.adapter:
            model.set_adapter(request.adapter)
        generator = Generator(model if request.adapter else model.get_base_model(), 1, 64)
        context = model.disable_adapter() if not request.adapter else torch.no_grad()
        with context:
            generator.submit(replace(request, adapter=""))
            alone[request.key] = generator.run()[0].token_ids
    for slots in (5, 6):  # With six, rows 4 and 5 are admitted together.
        with MixedAdapters(model, ["policy", "simulator"]) as adapters:
            generator = Generator(model, slots, 64, adapters)
            for request in requests():
                generator.submit(request)
            together = {generated.key: generated.token_ids for generated in generator.run()}
        assert together == alone
    assert alone["4"] != alone["5"]


def test_what_cannot_share_a_batch_is_refused_by_name():
    model = with_adapters(make_model("qwen3"), a=4)
    with pytest.raises(ValueError, match="no adapter called 'b'; it has a"):
        MixedAdapters(model, ["a", "b"])
    for option in ({"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}, {"kasa_config": KasaConfig()}):
        other = get_peft_model(make_model("qwen2"), LoraConfig(r=2, target_modules=LAYERS, **option))
        with pytest.raises(ValueError, match="'default' is not plain LoRA"):
            MixedAdapters(other, ["default"])
        assert own_adapter(other, "default") is None, "written with as peft has it"
    generator = Generator(make_model("qwen3"), 1, 32)
    with pytest.raises(ValueError, match="has no adapter called 'a'"):
        generator.submit(Request(key="k", ids=[1], max_new_tokens=1, seed=0, sampling=Sampling(), stop=Never(), adapter="a"))


# ---------------------------------------------------------------------------------------------- one base, two roles


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A simulator's adapter for the shipped base."""
    folder = tmp_path_factory.mktemp("simulator")
    model = add_lora(load_model(ModelSpec(device="cpu")), LoraSpec(r=4), seed=1)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    model.save_pretrained(folder)
    return str(folder)


def module_with(simulator, slots=6, dtype="float32"):
    limits = RolloutSpec(max_turns=3, max_new_tokens=48, max_observation_tokens=64, max_length=400, slots=slots)
    base = ModelSpec(dtype=dtype, device="cpu")
    module = PolicyRL(simulator, base, "miniature", lora=LoraSpec(r=4), rollout=limits, group_size=2, seed=0)
    module.setup("fit")
    generator = torch.Generator().manual_seed(7)
    for name, parameter in module.trainable().items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    return module


def simulator(path, adapter, slots=4, dtype="float32"):
    own = {} if path == "policy" else {"dtype": dtype, "device": "cpu"}  # The policy's base is loaded as the policy says.
    model = ModelSpec(path=path, adapter=adapter, **own)
    return SimulatorSearch(model, "miniature", count=3, max_new_tokens=48, sampling=Sampling(), slots=slots, max_length=160)


def read(trajectories):
    return [(t.token_ids, t.status, [(turn.content, turn.documents, turn.label) for turn in t.turns]) for t in trajectories]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trained", [True, False], ids=["its adapter", "the bare base"])
def test_a_shared_base_gives_the_rollouts_of_two_models(trained, dtype, adapter):
    folder = adapter if trained else None
    examples = MiniatureSource().questions("validation")[:10]
    apart = module_with(simulator("miniature", folder, dtype=dtype), dtype=dtype)
    apart.noise_prob = 0.5
    expected = apart.roll_out(examples, 2, 11, apart.noise_prob)
    assert sum(len(t.searches) for t in expected) > 5
    # In bfloat16 a row's sums depend on how many rows are multiplied with it, so there not with few slots.
    for slots in (2, 30) if dtype == "float32" else (30,):
        shared = module_with(simulator("policy", folder, slots=2), slots, dtype)
        shared.noise_prob = 0.5
        assert set(shared.trainable()) == set(apart.trainable()), "the simulator's adapter is frozen"
        assert read(shared.roll_out(examples, 2, 11, shared.noise_prob)) == read(expected)
    assert read(shared.roll_out(examples, 2, 11, shared.noise_prob)) == read(expected), "and again, with the same generator"


def test_a_rollout_that_was_given_up_is_followed_by_others(adapter):
    """The simulator had left the policy's generator, and the next step could not search."""
    examples = MiniatureSource().questions("validation")[:6]
    shared = module_with(simulator("policy", adapter, slots=2))
    expected = read(shared.roll_out(examples, 2, 11, 0.5))
    with pytest.raises(NotFiniteError), shared.actor.generating():
        raise NotFiniteError("logits")
    assert read(shared.roll_out(examples, 2, 11, 0.5)) == expected


def test_only_the_trained_adapter_is_saved(adapter, tmp_path):
    module = module_with(simulator("policy", adapter))
    module.save_model(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []
    assert (tmp_path / "adapter_config.json").is_file()


def test_a_base_that_is_trained_cannot_be_shared(adapter):
    with pytest.raises(ValueError, match="`lora: null` would train"):
        PolicyRL(simulator("policy", adapter), prompts="miniature", lora=None).setup("fit")


def test_an_adapter_of_another_base_is_refused_at_start(tmp_path):
    get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "other")
    make_model("qwen3", hidden_size=64).save_pretrained(tmp_path / "base")
    make_tokenizer("raw").save_pretrained(tmp_path / "base")
    module = PolicyRL(simulator("policy", str(tmp_path / "other")), model=ModelSpec(path=str(tmp_path / "base"), device="cpu"))
    with pytest.raises(ValueError, match=r"adapter: .*other does not fit the model"):
        module.setup("fit")


def test_on_a_quantised_layer_sums_are_rounded_where_peft_rounds_them(tiny_folder):
    """In bfloat16 one rounding more or less changes tokens, and then the log-probabilities of update and rollout differ."""
    model = load_model(ModelSpec(path=tiny_folder, dtype="bfloat16", quantization="nf4", device="cpu"))
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["up_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = get_peft_model(model, config, adapter_name="one").eval()
        layer = next(module for module in model.modules() if isinstance(module, bnb.Linear4bit))
        states = torch.randn(40, 1, layer.in_features).bfloat16()
    adapters = MixedAdapters(model, ["one"])
    with torch.no_grad():
        expected = layer(states)
        with adapters:
            adapters.select(["one"] * len(states))
            assert torch.equal(layer(states), expected)
        # The other rounding would be seen.
        delta = layer.lora_B["one"](layer.lora_A["one"](states.float()))
        once = (layer.base_layer(states).float() + delta).bfloat16()
    assert not torch.equal(once, expected)
