"""What a model cannot do is refused before its weights are loaded, with the key to change."""

import pytest
import torch
from peft import KasaConfig, LoraConfig, get_peft_model

from support.detached import NoEngine
from support.tiny import make_model, make_tokenizer
from zs_lightning.generation import MixedAdapters, Sampling
from zs_lightning.models.checks import longest
from zs_lightning.models.loading import load_model
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules import PolicyRL
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search import SimulatorSearch

LAYERS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def weightless(tmp_path_factory):
    """Configuration and tokenizer: to load a model from here fails otherwise than any test expects."""
    folder = tmp_path_factory.mktemp("weightless")
    make_model("qwen3", max_position_embeddings=512).config.save_pretrained(folder)
    make_tokenizer("raw").save_pretrained(folder)
    return str(folder)


def said(weightless, search=None, **options):
    options = {"rollout": RolloutSpec(max_length=512), **options}
    with pytest.raises(ValueError, match=r".") as error:
        PolicyRL(search or NoEngine(), model=ModelSpec(weightless, device="cpu"), **options).setup("fit")
    return str(error.value)


def simulator(path, adapter=None, length=512):
    spec = ModelSpec(path, adapter=adapter, device="auto" if path == "policy" else "cpu")
    return SimulatorSearch(spec, "zerosearch", max_new_tokens=50, sampling=Sampling(), max_length=length)


def test_contexts_longer_than_the_model_reads(weightless):
    sentence = (
        f"model.rollout.max_length: {weightless} reads at most 512 tokens; got 513; set model.rollout.max_length: 512 or less"
    )
    assert said(weightless, rollout=RolloutSpec(max_length=513)) == sentence
    for path in ("policy", weightless):
        assert said(weightless, simulator(path, length=513)).startswith("model.search.max_length: ")
    assert "no model could be loaded" in said(weightless), "512 is not too long"


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 128}, 128),
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
        ({"rope_type": "longrope", "original_max_position_embeddings": 256}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "linear", "factor": 2.0}, 1024),
    ],
)
def test_frequencies_that_depend_on_the_batch_end_at_the_window_of_training(rope, expected):
    config = make_model("qwen3", max_position_embeddings=512).config
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    assert longest(config) == expected


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_rollouts_that_would_not_be_sampled_as_they_are_trained(options):
    with pytest.raises(ValueError, match=r"rollout: expected temperature > 0, .* and 0 < top_p <= 1; got"):
        RolloutSpec(**options)


OTHERS = {
    "use_dora": {"use_dora": True},
    "kasa_config": {"kasa_config": KasaConfig()},
    "target_parameters": {"target_parameters": ["mlp.up_proj.weight"]},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "lm_head": {"target_modules": [*LAYERS, "lm_head"]},
    "model.embed_tokens": {"target_modules": [*LAYERS, "embed_tokens"]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_that_cannot_share_a_base(name, weightless, tmp_path):
    config = LoraConfig(**{"r": 2, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **OTHERS[name]})
    model = get_peft_model(make_model("qwen3"), config)
    model.save_pretrained(tmp_path)
    sentence = said(weightless, simulator("policy", str(tmp_path)))
    assert sentence.startswith(f"model.search.model.adapter: {tmp_path} is more than two matrices a layer of the decoder (")
    assert name in sentence
    with pytest.raises(ValueError, match="adapters: "):
        MixedAdapters(model, ["default"])


def test_dora_beside_a_simulator_on_the_same_base(weightless):
    assert said(weightless, simulator("policy"), lora=LoraSpec(dora=True)).startswith(
        "model.lora.dora: with `model.path: policy`"
    )
    assert "`lora: null` would train" in said(weightless, simulator("policy"), lora=None)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_dropout_of_a_base_is_off_in_every_mode(kind, tmp_path):
    make_model(kind, attention_dropout=0.5).save_pretrained(tmp_path)
    model, ids = load_model(ModelSpec(str(tmp_path), device="cpu")), torch.arange(30)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model.train()(ids).logits, expected)
    assert model.config.attention_dropout == 0.5, "what is saved is as it was"


def test_dropout_layers_are_off_too(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=384, n_positions=64)).save_pretrained(tmp_path)
    model = load_model(ModelSpec(str(tmp_path), device="cpu"))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits, atol=0, rtol=0)
