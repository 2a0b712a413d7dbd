"""What the benches work on: random models, a tokenizer, and rollouts whose lengths are fixed beforehand."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from zs_lightning.generation import Generated, Generator, MixedAdapters, Request, Sampling, StopTags
from zs_lightning.models import attention

GREEDY = Sampling(temperature=0.0)
SHAPES = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 4, "head_dim": 32, "intermediate_size": 768, "vocab_size": 8192},
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 16384},
}
"""5 and 33 million parameters."""
WORDS = (300, 4000)
"""Prompts and documents are drawn from these ids: no control tokens, few single bytes."""
SYLLABLES = ("ka", "lo", "mi", "tra", "ven", "dos", "qui", "ster", "on", "al", "pre", "sha", "ble", "rin", "go", "ut")


def make_model(shape: str, ours: bool, seed: int = 0) -> Any:
    """A random Qwen3 in eval mode; equal seeds give equal weights.

    Args:
        ours: attention as this package loads a model on a CPU; False as transformers does.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **SHAPES[shape],
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        initializer_range=0.08,  # The default makes logits so flat that rounding decides between tokens.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config._attn_implementation = attention.register() if ours else "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()


@cache
def make_tokenizer(size: int = 8192) -> Any:
    """Byte-level BPE over made-up words. It has no end token: only a stop text or a limit ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    texts = [" ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(200)) for _ in range(300)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A rollout: ids of the prompt, tokens to sample in each turn, ids that follow each turn but the last.

    `queries` are prompts of the simulator; it writes as many tokens as the document in the same place has.
    """

    prompt: list[int]
    sampled: list[int]
    documents: list[list[int]]
    queries: list[list[int]]


def plan(rows: int, turns: int = 4, prompt: int = 64, sampled: int = 24, document: int = 48, seed: int = 0) -> list[Planned]:
    """Rollouts whose lengths spread evenly over 0.4 to 1.6 times the given means."""
    rng = random.Random(seed)

    def length(mean: int) -> int:
        return max(2, round(mean * rng.uniform(0.4, 1.6)))

    def ids(mean: int) -> list[int]:
        return [rng.randrange(*WORDS) for _ in range(length(mean))]

    return [
        Planned(
            prompt=ids(prompt),
            sampled=[length(sampled) for _ in range(turns)],
            documents=[ids(document) for _ in range(turns - 1)],
            queries=[ids(document // 2) for _ in range(turns - 1)],
        )
        for _ in range(rows)
    ]


def longest(work: list[Planned]) -> int:
    """Tokens of the longest context."""
    return max(len(w.prompt) + sum(w.sampled) + sum(map(len, w.documents)) for w in work)


def request(key: str, ids: list[int], new: int, stop: StopTags, **options: Any) -> Request:
    """A greedy turn of exactly `new` tokens, unless `stop` comes first."""
    return Request(key=key, ids=ids, max_new_tokens=new, seed=0, sampling=GREEDY, stop=stop, **options)


def in_order(finished: list[Generated]) -> list[list[int]]:
    """Token ids of turns whose keys are numbers."""
    return [generated.token_ids for generated in sorted(finished, key=lambda g: int(g.key))]


def generate(
    model: Any,
    prompts: list[list[int]],
    new: list[int],
    stops: list[StopTags],
    slots: int,
    adapters: MixedAdapters | None = None,
) -> list[list[int]]:
    """One turn of each prompt through our generator, `slots` of them at the same time, with the first of the adapters."""
    room = max(len(ids) + n for ids, n in zip(prompts, new, strict=True))
    generator = Generator(model, slots, room, adapters)
    for i, (ids, n, stop) in enumerate(zip(prompts, new, stops, strict=True)):
        generator.submit(request(str(i), ids, n, stop, adapter=adapters.names[0] if adapters else ""))
    return in_order(generator.run())
