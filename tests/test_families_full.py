"""Policies of five families of which all weights are trained, and what of it is refused."""

import pytest
from transformers import Gemma2Config, Gemma3Config, Gemma3TextConfig, MistralConfig, Qwen2Config

from support.commandline import POLICY, SIMULATOR, failure
from support.families import FAMILIES, family_tokenizer
from support.familyruns import PLAIN, Case, check_family, policy_of, search_of, write
from support.tiny import make_model

pytestmark = pytest.mark.usefixtures("environment")

CASES = [
    Case("qwen2.5", "float32", False, "llama3/nf4"),
    Case("qwen3", "mixed", False, "mistral/int8", "thinking.yaml"),
    Case("llama3", "mixed", False, "gemma/bfloat16"),
    Case("mistral", "float32", False, "qwen2.5/bfloat16"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_family_is_trained_and_tested(case, folders, simulators):
    check_family(case, folders, search_of(case, folders, simulators))


@pytest.mark.parametrize("simulator", ["adapter", "prompted"])
def test_a_base_that_is_trained_is_not_shared(simulator, folders, simulators, capsys):
    case = Case("qwen3", "float32", False, simulator)
    there = write("policy.yaml", **policy_of(case, folders), search=search_of(case, folders, simulators))
    sentence = "error: search: `model.path: policy` shares the policy's base model, which `lora: null` would train"
    assert failure(capsys, "fit", POLICY, there, *PLAIN) == (2, sentence)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantised_weights_are_not_trained(format, folders, simulators, capsys):
    case = Case("gemma", format, False, "gemma/bfloat16")
    there = write("policy.yaml", **policy_of(case, folders), search=search_of(case, folders, simulators))
    sentence = f"error: model: `lora: null` trains all weights, which {format} does not allow; set model.quantization: none, "
    assert failure(capsys, "fit", POLICY, there, *PLAIN) == (2, f"{sentence}or lora, such as lora: {{r: 16}}")


# ---------------------------------------------------------------------- other attention

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "sliding_window": 16, "vocab_size": 344}
SLIDING = "layers of kind sliding_attention"
REFUSED = {
    "gemma2": (Gemma2Config(**SIZES), SLIDING),
    "gemma3_text": (Gemma3TextConfig(**SIZES), SLIDING),
    "gemma3": (Gemma3Config(text_config=SIZES), "more than text"),
    "qwen2": (Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1), SLIDING),
}


@pytest.mark.parametrize("stage", [SIMULATOR, POLICY], ids=["simulator", "policy"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_of_another_kind_is_refused_before_its_weights_are_loaded(kind, stage, capsys):
    """There are none."""
    config, reason = REFUSED[kind]
    config.save_pretrained("other")
    family_tokenizer(FAMILIES["gemma"]).save_pretrained("other")
    options = ["--model.search.model.adapter=null"] if stage == POLICY else []
    sentence = f"error: model.model.path: ./other is a {kind} with {reason}; choose a model of text with full attention"
    assert failure(capsys, "fit", stage, "--model.model.path=./other", *options, *PLAIN) == (2, sentence)


def test_a_window_that_is_shorter_than_the_context_is_refused(capsys):
    """A first Mistral has one of 4096 tokens, within which its attention is full."""
    make_model("mistral", vocabulary=344, sliding_window=16).save_pretrained("other")
    family_tokenizer(FAMILIES["mistral"]).save_pretrained("other")
    code, said = failure(capsys, "fit", POLICY, "--model.model.path=./other", "--model.search.model.adapter=null", *PLAIN)
    assert code == 2
    assert said.startswith("error: model.rollout.max_length: ./other reads at most 16 tokens; got 640; ")
    assert MistralConfig().sliding_window == 4096
