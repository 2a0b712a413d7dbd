"""On a CUDA card: generation and training pass of a model of real size, against what the card's arithmetic allows at best.

The floor is arithmetic, from two rates that are measured first on the same card: how fast it copies memory and how fast it
multiplies large matrices. Decoding reads all weights once a step; the training pass of LoRA multiplies each token with the
weights twice forwards and twice backwards. Memory of keys and values, attention and the host's time are not in the floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benches.harness import Row, Unavailable
from benches.train_pass import length, make_trajectories
from benches.train_pass import ours as train
from benches.work import WORDS, generate, make_tokenizer
from zs_lightning.engine import StopTags
from zs_lightning.models.adapters import add_lora
from zs_lightning.models.loading import LoraSpec

ROWS, PROMPT, NEW = 320, 256, 128
"""Rows that decode together, tokens of a prompt, tokens sampled."""
QWEN_3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def seconds(work: Callable[[], Any]) -> float:
    """Median wall time of three runs, the card waited for; a first run is left out."""
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[1]


def rates() -> tuple[float, float]:
    """Bytes a second (read and write of a copy) and floating-point operations a second (bfloat16 product) of this card."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds(lambda: target.copy_(source))
    size = 8192
    square = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    return copied, 2 * size**3 / seconds(lambda: square @ square)


def make_policy() -> Any:
    """Qwen2.5-3B's shape with random weights and a fresh adapter."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**QWEN_3B, bos_token_id=None, eos_token_id=None)
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(), torch.device("cuda"):
        torch.manual_seed(0)
        return add_lora(Qwen2ForCausalLM(config).to(torch.bfloat16).eval(), LoraSpec(), seed=0)


def run() -> Iterator[Row]:
    if not torch.cuda.is_available():
        raise Unavailable("needs a CUDA card; there is none here, so nothing was measured")
    copied, multiplied = rates()
    model, stop = make_policy(), StopTags(make_tokenizer(), ())
    weights = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(*WORDS, (ROWS, PROMPT), generator=generator).tolist()
    floor = NEW * max(2 * weights / copied, 2 * weights * ROWS / multiplied) + 2 * weights * ROWS * PROMPT / multiplied
    about = {"required": None, "peer": "arithmetic floor of this card", "equal": "not compared"}
    spent = seconds(lambda: generate(model, prompts, [NEW] * ROWS, [stop] * ROWS, ROWS))
    yield Row(case=f"{ROWS} rows, {NEW} tokens after {PROMPT}, 3B bfloat16, wall time", ours=spent, theirs=floor, **about)
    trajectories = make_trajectories(ROWS)
    spent = seconds(lambda: train(model, trajectories, "cuda"))
    floor = 4 * weights * sum(map(length, trajectories)) / multiplied
    yield Row(case=f"training pass of {ROWS} trajectories, 3B bfloat16, LoRA, wall time", ours=spent, theirs=floor, **about)
