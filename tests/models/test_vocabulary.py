"""Ends of turns and padded vocabularies: what the tokenizer's own end token does not tell."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from support.families import FAMILIES, GEMMA, family_tokenizer
from support.tiny import CHATML, make_model, make_tokenizer
from zs_lightning.generation import Generator, Request, Sampling, StopTags
from zs_lightning.models.loading import load_model
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.models.specs import ModelSpec
from zs_lightning.models.vocabulary import end_ids
from zs_lightning.search import SimulatorSearch
from zs_lightning.types import QAExample, SearchRequest


@pytest.mark.parametrize(
    ("settings", "expected"), [(None, {0}), (7, {0, 7}), ([1, 99], {0, 1, 99}), ([], {0})], ids=["none", "one", "list", "empty"]
)
def test_a_turn_ends_at_what_the_settings_of_the_model_say(settings, expected, tokenizers):
    model = make_model("qwen3")
    model.generation_config = GenerationConfig(eos_token_id=settings)
    assert end_ids(tokenizers["raw"], model) == expected
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert end_ids(tokenizers["raw"], adapted) == expected


@pytest.mark.parametrize(("family", "end"), [("qwen2.5", "<|im_end|>"), ("gemma", "<end_of_turn>"), ("mistral", "</s>")])
def test_a_turn_ends_as_in_the_chat_template(family, end):
    tokenizer = family_tokenizer(FAMILIES[family])
    expected = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    assert end_ids(tokenizer, make_model("qwen3")) == expected
    assert len(expected) == (2 if family == "gemma" else 1)


def test_a_template_that_refuses_an_assistant_has_no_end(tokenizers):
    tokenizer = make_tokenizer("chat")
    for template in (
        "{{ raise_exception('no') }}",
        "{{ messages[-1]['content'] }} and so on",
        CHATML.replace("<|im_end|>", ""),
    ):
        tokenizer.chat_template = template
        assert end_ids(tokenizer, make_model("qwen3")) == {tokenizer.eos_token_id}
    tokenizer.chat_template = GEMMA.replace("{{ bos_token }}", "").replace("<end_of_turn>", "<|endoftext|>")
    assert len(end_ids(tokenizer, make_model("qwen3"))) == 2


def test_a_simulator_stops_at_such_a_token_which_is_no_part_of_its_documents(tmp_path):
    """Its settings say that 9 ends a text; it always says 9."""
    model = make_model("llama", bos_token_id=None)
    model.generation_config = GenerationConfig(eos_token_id=[9])
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path)
    make_tokenizer("raw").save_pretrained(tmp_path)
    search = SimulatorSearch(ModelSpec(str(tmp_path), device="cpu"), "zerosearch", max_new_tokens=20, sampling=Sampling(0.0))
    search.setup()
    search.model.lm_head.register_forward_hook(lambda _module, _states, logits: logits.index_fill(-1, torch.tensor(9), 5.0))
    example = QAExample(id="1", question="Who?", golden_answers=("Foo",), source="test")
    search.submit([SearchRequest(key="1", query="red harbor", example=example, turn=0, seed=0)])
    (result,) = search.poll()
    assert search.generator.sampled_tokens == 1
    assert result.documents == ()
    assert result.failure is None


@pytest.mark.parametrize("sampling", [Sampling(1.5), Sampling(1.5, top_p=0.9), Sampling(1.5, top_k=50), Sampling(0.0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ids_that_pad_a_vocabulary_are_never_drawn_and_carry_no_probability(sampling, dtype, tmp_path):
    make_model("qwen3", vocabulary=600, initializer_range=0.05).save_pretrained(tmp_path)
    tokenizer = make_tokenizer("raw")
    known, temperature = len(tokenizer), sampling.temperature or 1.0
    model = load_model(ModelSpec(str(tmp_path), dtype=dtype, device="cpu"), tokenizer=tokenizer)
    prompt = list(range(5, 15))
    generator = Generator(model, 32, 64)
    for i in range(32):
        stop = StopTags(tokenizer, ())
        generator.submit(Request(key=str(i), ids=prompt, max_new_tokens=10, seed=i, sampling=sampling, stop=stop))
    rows = {row.key: row for row in generator.run()}
    assert max(max(row.token_ids) for row in rows.values()) < known
    row = max(rows.values(), key=lambda row: len(row.token_ids))
    ids = torch.tensor([prompt + row.token_ids])
    mask = torch.arange(ids.shape[1])[None] >= len(prompt)
    trained, entropy = token_logprobs(model, ids, mask, temperature)
    plain = load_model(ModelSpec(str(tmp_path), dtype=dtype, device="cpu"))(ids).logits[0, len(prompt) - 1 : -1, :known].float()
    expected = (plain / temperature).log_softmax(-1)
    torch.testing.assert_close(trained, expected.gather(1, ids[0, len(prompt) :, None])[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(row.logprobs), trained.detach(), atol=0.05 if dtype == "bfloat16" else 1e-4, rtol=0)


def test_a_vocabulary_without_padding_stays_as_it_is(miniature):
    tokenizer = miniature[1]
    assert load_model(ModelSpec(device="cpu"), tokenizer=tokenizer)(torch.arange(9)[None]).logits.shape[-1] == len(tokenizer)
