"""Tiny random models in the style of five families: their architectures, control tokens and chat templates."""

from dataclasses import dataclass

import torch
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from support.tiny import CHATML, byte_level, make_model

TAGS = ("<search>", "</search>", "<answer>", "</answer>")
"""One token each, so that they are soon learned."""
READ = 12
"""Tokens before a turn in training."""

THINKING = CHATML.replace(
    "<|im_start|>assistant\n",
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """A family's architecture and how its tokenizer frames a conversation."""

    kind: str
    """Of conftest.make_model."""
    special: tuple[str, ...]
    """Control tokens; the first one pads."""
    end: str
    begin: str | None = None
    """What its tokenizer puts before any text."""
    template: str | None = None
    """None: a base model without one."""


_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    "qwen2.5": Family("qwen2", _CHATML_TOKENS, "<|im_end|>", template=CHATML),
    "qwen3": Family("qwen3", _CHATML_TOKENS, "<|im_end|>", template=THINKING),
    "llama3": Family("llama", ("<|end_of_text|>", "<|begin_of_text|>"), "<|end_of_text|>", "<|begin_of_text|>"),
    "gemma": Family("gemma", ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>", GEMMA),
    "mistral": Family("mistral", ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>", MISTRAL),
}


def family_tokenizer(family):
    inner = byte_level(list(family.special), size=340)
    inner.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    if family.begin:
        begin = (family.begin, inner.token_to_id(family.begin))
        inner.post_processor = processors.TemplateProcessing(single=f"{family.begin} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=family.begin,
        eos_token=family.end,
        pad_token=family.special[0],
        chat_template=family.template,
    )


TURNS = ("<search> author of The Red Harbor</search>", "<search> birthplace</search>", "<answer> Foo Bar</answer>")


def family_model(family, tokenizer, steps=60, **options):
    """A model that learned one thing: to write one of TURNS after whatever it reads."""
    sizes = {"max_position_embeddings": 2048, "initializer_range": 0.1, "head_dim": 8, **options}
    model = make_model(family.kind, vocabulary=len(tokenizer), **sizes)
    turns = [tokenizer(turn, add_special_tokens=False)["input_ids"] for turn in TURNS]
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.AdamW(model.parameters(), lr=1e-2)
    width = READ + max(map(len, turns))
    for _ in range(steps):
        ids = torch.randint(len(tokenizer), (len(turns) * 3, width), generator=generator)
        labels = torch.full_like(ids, -100)
        for row in range(len(ids)):
            turn = torch.tensor(turns[row % len(turns)])
            ids[row, READ : READ + len(turn)] = labels[row, READ : READ + len(turn)] = turn
        places = torch.arange(width) + torch.randint(1000, (len(ids), 1), generator=generator)
        model(input_ids=ids, position_ids=places, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def save_family(name, folder):
    """The folder of the family's model and tokenizer, as from a hub."""
    tokenizer = family_tokenizer(FAMILIES[name])
    family_model(FAMILIES[name], tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
