"""Loading, quantisation and adapters, against transformers used by hand."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.tiny import make_model, make_tokenizer
from zs_lightning.generation import Generator, Request, Sampling, StopTags
from zs_lightning.models.loading import load_model, load_tokenizer
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.models.lora import add_lora
from zs_lightning.models.specs import LoraSpec, ModelSpec

# ---------------------------------------------------------------------------------------------- loading


@pytest.fixture
def folder(tmp_path):
    make_model("qwen3", num_hidden_layers=2).save_pretrained(tmp_path / "base")
    make_tokenizer("raw").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_saved_model_comes_back_in_eval_mode(folder):
    model, ids = load_model(ModelSpec(path=str(folder), device="cpu")), torch.arange(20)[None]
    assert not model.training
    torch.testing.assert_close(model(ids).logits, make_model("qwen3")(ids).logits, atol=1e-5, rtol=1e-5)
    assert load_model(ModelSpec(path=str(folder), dtype="bfloat16", device="cpu")).lm_head.weight.dtype == torch.bfloat16
    text = "<think> The Red Harbor </think>\n"
    assert load_tokenizer(str(folder))(text)["input_ids"] == make_tokenizer("raw")(text)["input_ids"]


def test_places_without_a_model_are_named(folder, tmp_path):
    for load in (lambda path: load_model(ModelSpec(path=path)), load_tokenizer):
        with pytest.raises(ValueError, match=r"there is no folder \./nowhere"):
            load("./nowhere")
        with pytest.raises(ValueError, match="there is no folder a/b/c"):
            load("a/b/c")
        with pytest.raises(ValueError, match=r"has no config\.json"):
            load(str(tmp_path))
        with pytest.raises(ValueError, match="could be loaded from nobody/no-such-model"):
            load("nobody/no-such-model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model could be loaded"):
        load_model(ModelSpec(path=str(folder)))


def test_a_folder_without_tokenizer_is_named(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer \(tokenizer.json\)"):
        load_tokenizer(str(folder))


def test_a_tokenizer_without_end_token_is_refused(folder):
    tokenizer = make_tokenizer("raw")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="no end-of-text token"):
        load_tokenizer(str(folder))


def adapter_of(model, folder, seed=3):
    """A saved adapter that does something: lora_B is 0 in a fresh one."""
    wrapped = add_lora(model, LoraSpec(r=4), seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def test_an_adapter_is_merged_into_its_base(folder, tmp_path):
    wrapped, ids = adapter_of(make_model("qwen3"), tmp_path / "adapter"), torch.arange(30)[None]
    merged = load_model(ModelSpec(path=str(folder), adapter=str(tmp_path / "adapter"), device="cpu"))
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(merged(ids).logits, wrapped(ids).logits, atol=1e-4, rtol=1e-4)
    assert (merged(ids).logits - make_model("qwen3")(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    "other", [{"kind": "qwen2"}, {"kind": "qwen3", "num_hidden_layers": 4}, {"kind": "qwen3", "hidden_size": 64}]
)
def test_an_adapter_of_another_base_is_refused(other, folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter_of(make_model(**other), tmp_path / "adapter")
        with pytest.raises(ValueError, match="does not fit the model"):
            load_model(ModelSpec(path=str(folder), adapter=str(tmp_path / "adapter")))
    with pytest.raises(ValueError, match="there is no adapter in"):
        load_model(ModelSpec(path=str(folder), adapter=str(tmp_path / "nothing")))


# ---------------------------------------------------------------------------------------------- quantisation and LoRA


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_models_generate(quantization, miniature):
    """Greedy tokens through the generator are those of the quantised model run without a memory."""
    _, tokenizer = miniature
    model = load_model(ModelSpec(quantization=quantization, device="cpu"))
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization] in kinds
    prompt = tokenizer("<question> What is the author of The Red Harbor?</question>")["input_ids"]
    generator = Generator(model, slots=2, max_length=64)
    stop = StopTags(tokenizer, ("</search>", "</answer>"))
    for key in ("a", "b"):
        generator.submit(Request(key=key, ids=prompt, max_new_tokens=20, seed=0, sampling=Sampling(temperature=0.0), stop=stop))
    one, other = generator.run()
    assert one.token_ids == other.token_ids
    ids = list(prompt)
    with torch.no_grad():
        for token in one.token_ids:
            logits = model(torch.tensor([ids])).logits[0, -1]
            # int8 quantises activations by batch, so near ties may fall either way.
            assert float(logits.max() - logits[token]) < (0.3 if quantization == "int8" else 1e-3)
            ids.append(token)
    assert len(one.token_ids) > 5


def gradients(model, ids):
    trained = torch.ones_like(ids, dtype=torch.bool)
    trained[:, 0] = False
    values, _ = token_logprobs(model, ids, trained)
    model.zero_grad()
    values.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_quantised_gradients_survive_a_forward_without_gradient(kind, tmp_path):
    """Rollout, then update. On CPUs with AVX512-BF16 a 4-bit layer that has sampled would have a wrong backward."""
    make_model(kind, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = load_model(ModelSpec(path=str(tmp_path), quantization="nf4", device="cpu"))
    model = add_lora(model, LoraSpec(r=4), 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    ids = torch.randint(384, (2, 40), generator=torch.Generator().manual_seed(0))
    before = gradients(model, ids)
    model.eval()
    with torch.no_grad():
        model(ids)
        model(ids[:, :1])
    model.train()
    after = gradients(model, ids)
    assert before.keys() == after.keys()
    assert all("lora_" in name for name in before)
    assert sum(float(g.abs().sum()) for g in before.values()) > 0
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, atol=0, rtol=0)


def test_adapter_is_fp32_on_any_base_and_alone_trainable(tmp_path):
    make_model("qwen3").save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        model = load_model(ModelSpec(path=str(tmp_path), dtype=dtype, device="cpu"))
        wrapped = add_lora(model, LoraSpec(r=4), 0)
        trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trainable.values()} == {torch.float32}
        assert {p.dtype for name, p in wrapped.named_parameters() if name not in trainable} == {getattr(torch, dtype)}
        layers = 2 * 7
        assert len(trainable) == 2 * layers, "A and B of every linear layer but the head"
        found = gradients(wrapped, torch.arange(30)[None])
        assert found.keys() == trainable.keys()


def test_adapter_switched_off_is_the_base(tmp_path):
    base, ids = make_model("llama"), torch.arange(30)[None]
    with torch.no_grad():
        expected = base(ids).logits.clone()
        fresh = add_lora(base, LoraSpec(r=4), 0).eval()
        assert torch.equal(fresh(ids).logits, expected)
        for name, parameter in fresh.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
        assert not torch.allclose(fresh(ids).logits, expected, atol=0.1)
        with fresh.disable_adapter():
            assert torch.equal(fresh(ids).logits, expected)


def test_a_fresh_adapter_is_a_function_of_the_seed_and_disturbs_no_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    states = [add_lora(make_model("qwen3"), LoraSpec(r=4), seed).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    names = [name for name in states[0] if "lora_A" in name]
    assert all(torch.equal(states[0][name], states[1][name]) for name in names)
    assert not any(torch.equal(states[0][name], states[2][name]) for name in names)


def test_4_bit_weights_survive_moving_saving_and_loading(tmp_path):
    """On CPUs with AVX512-BF16 a layer that has computed would hold its weights in another order."""
    make_model("qwen2", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = load_model(ModelSpec(path=str(tmp_path), dtype="bfloat16", quantization="nf4", device="cpu"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model.to("cpu")(ids).logits, expected)
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(model(ids).logits, expected)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation=model.config._attn_implementation)
        assert again.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
        assert torch.equal(again(ids).logits, expected)
