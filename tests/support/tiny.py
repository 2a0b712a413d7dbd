"""Small real things to test with: tokenizers made in memory, tiny random models, and a model that plays written turns."""

from types import SimpleNamespace

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TRAINING_TEXT = [
    "<think> I need to know the author of The Red Harbor. </think>\n<search> author of The Red Harbor </search>\n",
    "\n\n<information>Doc 1: The Red Harbor author Foo Bar. </information>\n\n<answer> Foo Bar </answer>\n",
    "Question: What is the birthplace of the author of The Red Harbor? search answer information",
] * 4
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(special: list[str], size: int = 360) -> Tokenizer:
    """Byte-level BPE that splits punctuation from words, so that a tag is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def make_tokenizer(kind: str):
    """raw: padding is the end token, no chat template. chat: ChatML, and an added token that is not "special". bos: begins
    every text with <s>, as Llama's does."""
    if kind == "raw":
        end = "<|endoftext|>"
        return PreTrainedTokenizerFast(tokenizer_object=byte_level([end]), eos_token=end, pad_token=end)
    if kind == "bos":
        inner = byte_level(["<s>", "</s>"])
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    inner = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    inner.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def make_model(kind: str, vocabulary: int = 384, seed: int = 0, **options):
    """A random causal model in eval mode; weights are large enough for distributions that are far from flat."""
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "gemma": (GemmaConfig, GemmaForCausalLM),
    }[kind]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.25,
        "tie_word_embeddings": kind not in ("llama", "mistral"),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **{"mistral": {"sliding_window": None}, "gemma": {"head_dim": 8}}.get(kind, {}),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(vocab_size=vocabulary, **{**sizes, **options}))
    return model.eval()


class _Keys(torch.nn.Module):
    """A head that passes logits through; it has a weight because every head has one."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, states):
        return states


def piano_logit(offset):
    """How strongly the piano wants the token at this place of a turn; all other logits are 0."""
    return 3.0 + offset % 5


class PlayerPiano(torch.nn.Module):
    """A causal model that plays written turns under greedy decoding: `scripts` maps a prompt to its turns' token ids.

    Its keys are the token ids themselves and its values say how a token came in (2: first of a prefill, 0: later in it,
    1: decoded), so all it knows about the past is what the engine's memory gives back through the mask.
    """

    def __init__(self, vocabulary, scripts):
        super().__init__()
        self.vocabulary, self.scripts, self.head = vocabulary, scripts, _Keys()
        self.config = SimpleNamespace(
            model_type="piano",
            num_hidden_layers=1,
            hidden_size=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            _attn_implementation="sdpa",
        )
        self.eval()

    def get_decoder(self):
        return self

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, past_key_values, **_):
        rows, new = input_ids.shape
        marks = torch.zeros(rows, 1, new, 1)
        marks[:, :, 0] = 2 if new > 1 else 1
        ids, marks = (t[:, 0, :, 0].tolist() for t in past_key_values.update(input_ids[:, None, :, None].float(), marks, 0))
        lengths = attention_mask[:, 0].sum(-1).tolist()
        states = torch.zeros(rows, new, self.vocabulary)
        for row in range(rows):
            for i, length in enumerate(lengths[row]):
                token, offset = self._next(ids[row][:length], marks[row][:length])
                if token is not None:
                    states[row, i, token] = piano_logit(offset)
        return SimpleNamespace(last_hidden_state=states)

    def _next(self, ids, marks):
        end = next((i for i in range(1, len(marks)) if marks[i]), len(marks))
        turns = self.scripts.get(tuple(ids[:end]))
        if turns is None:  # A padded place, or one before the prompt's end: nobody looks at it.
            return None, 0
        offset = next(i for i in range(len(marks)) if marks[-1 - i] != 1)
        return turns[marks.count(2) - 1][offset], offset
