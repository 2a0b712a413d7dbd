"""The generator against transformers' own generate, and against a slow generator that runs each row alone, without a memory."""

import random

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from support.slow_generator import MAX_LENGTH, MODELS, SlowGenerator, StopAt, random_ids, request, slow_turn
from support.tiny import make_model
from zs_lightning.errors import RunError
from zs_lightning.generation import Generator, Sampling, StopTags
from zs_lightning.generation.decoding import Decoding
from zs_lightning.generation.kv_cache import plan_slots, slot_bytes
from zs_lightning.generation.prefill import PREFILL_TOKENS


def by_key(finished):
    return {generated.key: generated for generated in finished}


# ---------------------------------------------------------------------------------------------- against transformers


def test_greedy_tokens_are_those_of_generate(tiny_model):
    rng = random.Random(1)
    prompts = [random_ids(rng, 1, 40) for _ in range(9)]
    generator = Generator(tiny_model, slots=9, max_length=MAX_LENGTH)
    for i, prompt in enumerate(prompts):
        generator.submit(request(str(i), prompt, new=16))
    finished = by_key(generator.run())
    assert len(finished) == 9
    for i, prompt in enumerate(prompts):
        expected = tiny_model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=16, do_sample=False
        )[0, len(prompt) :]
        assert finished[str(i)].token_ids == expected.tolist()
        assert not finished[str(i)].stopped


def test_kept_rows_go_on_as_if_computed_from_scratch(tiny_model):
    rng = random.Random(2)
    generator = Generator(tiny_model, slots=4, max_length=200)
    contexts = {str(i): random_ids(rng, 2, 30) for i in range(4)}
    appended = dict(contexts)
    for _ in range(4):
        for key, ids in appended.items():
            generator.submit(request(key, ids, new=9, keep=True))
        for generated in generator.run():
            context = contexts[generated.key]
            expected = tiny_model.generate(
                torch.tensor([context]), attention_mask=torch.ones(1, len(context)), max_new_tokens=9, do_sample=False
            )[0, len(context) :]
            assert generated.token_ids == expected.tolist()
            contexts[generated.key] = context + generated.token_ids
        # An empty extension is allowed: the row goes on from its last token.
        appended = {key: random_ids(rng, 0, 20) for key in contexts}
        contexts = {key: contexts[key] + appended[key] for key in contexts}


def test_logprobs_are_those_of_a_full_forward(tiny_model):
    rng = random.Random(3)
    generator = Generator(tiny_model, slots=3, max_length=MAX_LENGTH)
    prompts = {str(i): random_ids(rng, 3, 30) for i in range(7)}
    temperatures = {key: 0.5 + 0.3 * int(key) for key in prompts}
    for key, ids in prompts.items():
        generator.submit(request(key, ids, new=20, seed=int(key), sampling=Sampling(temperature=temperatures[key], top_k=50)))
    for generated in generator.run():
        prompt = prompts[generated.key]
        with torch.no_grad():
            logits = tiny_model(torch.tensor([prompt + generated.token_ids])).logits[0, len(prompt) - 1 : -1]
        table = (logits / temperatures[generated.key]).log_softmax(-1)
        expected = table[torch.arange(20), torch.tensor(generated.token_ids)]
        torch.testing.assert_close(torch.tensor(generated.logprobs), expected, atol=1e-4, rtol=0)


def test_the_model_may_run_under_autocast():
    """As in a training step with precision bf16-mixed: states are bf16, the memory is float32."""
    model, prompt = make_model("qwen3"), list(range(20))
    generator = Generator(model, slots=2, max_length=64)
    with torch.autocast("cpu", torch.bfloat16):
        generator.submit(request("a", prompt, new=8))
        generated = generator.run()[0]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + generated.token_ids])).logits[0, 19:-1].float()
    expected = logits.log_softmax(-1)[torch.arange(8), torch.tensor(generated.token_ids)]
    # bf16 has 8 bits: states differ by a percent between the two orders of computation.
    torch.testing.assert_close(torch.tensor(generated.logprobs), expected, atol=0.3, rtol=0)


# ---------------------------------------------------------------------------------------------- slots, waves and order


def sampled(model, slots, order, prompts, new=14):
    generator = Generator(model, slots=slots, max_length=MAX_LENGTH)
    for key in order:
        sampling = Sampling(temperature=1.0 if int(key) % 3 else 0.7, top_p=1.0 if int(key) % 2 else 0.9)
        generator.submit(
            request(key, prompts[key], new=new + int(key) % 5, seed=100 + int(key), sampling=sampling, stop=StopAt(5, 9))
        )
    return {key: (g.token_ids, g.stopped) for key, g in by_key(generator.run()).items()}


def test_what_is_sampled_does_not_depend_on_slots_or_order(tiny_model):
    rng = random.Random(4)
    prompts = {str(i): random_ids(rng, 1, 30) for i in range(16)}
    order = list(prompts)
    reference = sampled(tiny_model, 16, order, prompts)
    assert len(reference) == 16
    assert len({tuple(tokens) for tokens, _ in reference.values()}) == 16
    for slots in (1, 3, 7, 64):
        rng.shuffle(order)
        assert sampled(tiny_model, slots, order, prompts) == reference


def test_equal_prompts_are_prefilled_once_and_sample_as_alone(tiny_model, monkeypatch):
    rng = random.Random(5)
    one, other = random_ids(rng, 20, 20), random_ids(rng, 20, 20)
    prompts = {str(i): other if i % 4 == 3 else one for i in range(12)}
    alone = {key: sampled(tiny_model, 1, [key], prompts)[key] for key in prompts}
    widths = []
    hidden = Decoding.hidden

    def recorded(decoding, rows, ids, *places):
        widths.append(tuple(ids.shape))
        return hidden(decoding, rows, ids, *places)

    monkeypatch.setattr(Decoding, "hidden", recorded)
    assert sampled(tiny_model, 12, list(prompts), prompts) == alone
    assert widths[0] == (2, 20), "one prefill row for each different prompt"
    assert sampled(tiny_model, 5, list(prompts), prompts) == alone


def test_prefill_in_chunks_changes_nothing(tiny_model, monkeypatch):
    rng = random.Random(6)
    prompts = {str(i): random_ids(rng, 1, 40) for i in range(10)}
    reference = sampled(tiny_model, 10, list(prompts), prompts)
    monkeypatch.setitem(PREFILL_TOKENS, "cpu", 50)
    assert sampled(tiny_model, 10, list(prompts), prompts) == reference


# ---------------------------------------------------------------------------------------------- limits and errors


def test_a_turn_ends_at_max_new_tokens_or_at_the_stop():
    model, prompt = MODELS[1], [1, 2, 3]
    generator = Generator(model, slots=2, max_length=30)
    generator.submit(request("free", prompt, new=27))
    free = generator.run()[0]
    assert len(free.token_ids) == 27
    stop = free.token_ids[10]
    first = free.token_ids.index(stop)
    generator.submit(request("stops", prompt, new=27, stop=StopAt(stop)))
    generator.submit(request("one", prompt, new=1))
    finished = by_key(generator.run())
    assert finished["stops"].token_ids == free.token_ids[: first + 1]
    assert finished["stops"].stopped
    assert finished["one"].token_ids == free.token_ids[:1]
    assert not finished["one"].stopped


def test_requests_that_cannot_be_served_are_refused():
    generator = Generator(MODELS[0], slots=1, max_length=30)
    with pytest.raises(ValueError, match="max_length is 30"):
        generator.submit(request("long", [1] * 20, new=11))
    for wrong in (request("none", [], new=3), request("zero", [1], new=0)):
        with pytest.raises(ValueError, match="at least one token"):
            generator.submit(wrong)
    generator.submit(request("kept", [1] * 10, new=5, keep=True))
    with pytest.raises(ValueError, match="has not ended"):
        generator.submit(request("kept", [1], new=5))
    with pytest.raises(ValueError, match="has not ended"):
        generator.release("kept")
    generator.run()
    with pytest.raises(ValueError, match="max_length is 30"):
        generator.submit(request("kept", [1] * 11, new=5))
    generator.submit(request("kept", [1] * 10, new=5))
    assert len(generator.run()[0].token_ids) == 5


def test_a_long_newcomer_beside_a_row_that_is_almost_full():
    """Both are prefilled in one padded batch; the padding of the full row lies beyond the memory."""
    model = MODELS[1]
    generator, slow = Generator(model, slots=2, max_length=30), SlowGenerator(model)
    first = request("full", list(range(20)), new=3, keep=True)
    generator.submit(first)
    assert generator.run()[0].token_ids == slow.turn(first)[0]
    for turn in (request("full", [1, 2], new=5), request("new", list(range(40, 65)), new=5)):
        generator.submit(turn)
    finished = by_key(generator.run())
    assert finished["full"].token_ids == slow.turn(request("full", [1, 2], new=5))[0]
    assert finished["new"].token_ids == slow.turn(request("new", list(range(40, 65)), new=5))[0]


def test_all_slots_parked_is_an_error_until_one_is_released():
    generator = Generator(MODELS[0], slots=2, max_length=30)
    for key in ("a", "b"):
        generator.submit(request(key, [1, 2], new=3, keep=True))
    generator.run()
    generator.submit(request("c", [1, 2], new=3))
    assert generator.stalled
    with pytest.raises(RuntimeError, match="every slot is held by a parked row"):
        generator.step()
    generator.release("a")
    assert not generator.stalled
    assert [generated.key for generated in generator.run()] == ["c"]


def test_clear_forgets_what_an_error_left():
    generator = Generator(MODELS[0], slots=1, max_length=30)
    for key in ("a", "b"):
        generator.submit(request(key, [1, 2], new=9, keep=True))
    generator.step()
    generator.clear()
    assert not generator.busy
    generator.submit(request("a", [1, 2], new=9))
    assert generator.run()[0].token_ids == slow_turn(MODELS[0], [1, 2], request("a", [], new=9))[0]


def test_no_slots_is_refused():
    with pytest.raises(ValueError, match="slots"):
        Generator(MODELS[0], slots=0, max_length=30)


def test_nan_logits_stop_the_run():
    model = make_model("qwen3")
    model.model.norm.weight.data.fill_(float("nan"))
    generator = Generator(model, slots=1, max_length=30)
    generator.submit(request("a", [1, 2]))
    with pytest.raises(RunError, match="NaN"):
        generator.run()


def test_train_mode_is_refused_and_checkpointing_in_eval_mode_is_harmless():
    """In train mode with gradient checkpointing, transformers drops the memory without an error."""
    model = make_model("qwen2")
    generator = Generator(model, slots=1, max_length=30)
    generator.submit(request("a", [1, 2, 3], new=10))
    expected = generator.run()[0].token_ids
    model.gradient_checkpointing_enable()
    model.train()
    generator.submit(request("a", [1, 2, 3], new=10))
    with pytest.raises(RuntimeError, match="eval mode"):
        generator.step()
    model.eval()
    assert generator.run()[0].token_ids == expected


def test_a_model_with_another_attention_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=50, pad_token_id=None)
    eager = Qwen2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    with pytest.raises(ValueError, match="expected sdpa attention; got eager"):
        Generator(eager, slots=1, max_length=30)


def test_rows_stop_at_tags_of_a_real_tokenizer(miniature):
    model, tokenizer = miniature
    generator = Generator(model, slots=4, max_length=120)
    stop = StopTags(tokenizer, ("</search>", "</answer>"))
    prompt = tokenizer("<question> What is the author of The Red Harbor?</question>")["input_ids"]
    for i in range(12):
        generator.submit(request(str(i), prompt, new=60, seed=i, sampling=Sampling(), stop=stop))
    for generated in generator.run():
        text = tokenizer.decode(generated.token_ids)
        ended = text.endswith(("</search>", "</answer>", tokenizer.eos_token))
        assert ended == generated.stopped
        assert sum(text.count(tag) for tag in ("</search>", "</answer>")) <= 1


def test_slots_are_planned_from_the_free_memory(monkeypatch):
    model = make_model("llama")
    # Two layers, two key/value heads of 8 numbers, 96 tokens, 4 bytes, keys and values.
    assert slot_bytes(model.config, MAX_LENGTH, torch.float32) == 2 * 2 * 2 * 8 * 96 * 4
    assert slot_bytes(model.config, MAX_LENGTH, torch.bfloat16) * 2 == slot_bytes(model.config, MAX_LENGTH, torch.float32)
    assert [plan_slots(8, 100, free) for free in (167, 500, 1334, 10**6)] == [1, 3, 8, 8]
    ten = 10 * slot_bytes(model.config, MAX_LENGTH, torch.float32)
    monkeypatch.setattr("zs_lightning.generation.generator.free_bytes", lambda _: ten)
    generator = Generator(model, 50, MAX_LENGTH)
    assert len(generator.slots) == 6
    prompts = {str(i): [i + 1] for i in range(20)}
    for key, ids in prompts.items():
        generator.submit(request(key, ids))
    assert len(generator.run()) == 20
    with pytest.raises(ValueError, match=r"search\.slots: 8 slots are for the simulator alone, but only 6 fit"):
        Generator(model, 50, MAX_LENGTH, reserved=8)
    monkeypatch.setattr("zs_lightning.generation.generator.free_bytes", lambda _: 1000)
    with pytest.raises(ValueError, match=r"lower max_length"):
        Generator(model, 50, MAX_LENGTH)
