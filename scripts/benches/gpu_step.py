"""On a CUDA card: generation and training pass of a model of real size, against what the card's arithmetic allows at best.

As in a run: under autocast, with the adapter as a rollout has it, and as many tokens a pass as the 80 GB presets give it.
The floor is arithmetic, from two rates that are measured first on the same card: how fast it copies memory and how fast it
multiplies large matrices. Decoding reads all weights once a step; the training pass of LoRA multiplies each token with the
weights twice forwards and twice backwards. Memory of keys and values, attention and the host's time are not in the floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benches.harness import Row, Unavailable
from benches.train_pass import length, make_trajectories
from benches.train_pass import ours as train
from benches.work import WORDS, generate, make_tokenizer
from zs_lightning.generation import MixedAdapters, StopTags
from zs_lightning.models.lora import TRAINED, add_lora
from zs_lightning.models.specs import LoraSpec

QWEN_3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Scale:
    """How much is measured, and where.

    Args:
        rows: that decode together.
        prompt: tokens of a prompt.
        new: tokens sampled.
        copied: bytes that are copied to measure the memory.
        square: rows of the matrices that are multiplied to measure the arithmetic.
        pass_tokens: of a micro-batch.
    """

    device: str
    shape: dict[str, Any]
    rows: int
    prompt: int
    new: int
    copied: int
    square: int
    pass_tokens: int


CARD = Scale("cuda", QWEN_3B, rows=320, prompt=256, new=128, copied=2**30, square=8192, pass_tokens=8192)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 128, "vocab_size": 8192}
DRY = Scale("cpu", SMALL | {"tie_word_embeddings": True}, rows=4, prompt=8, new=4, copied=2**16, square=64, pass_tokens=512)
"""Goes through the same code where there is no card; its figures say nothing."""


def seconds(work: Callable[[], Any]) -> float:
    """Median wall time of three runs, the card waited for; a first run is left out."""
    times = []
    for _ in range(4):
        start = now()
        work()
        times.append(now() - start)
    return sorted(times[1:])[1]


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rates(scale: Scale) -> tuple[float, float]:
    """Bytes a second (read and write of a copy) and floating-point operations a second (bfloat16 product)."""
    source = torch.empty(scale.copied, dtype=torch.uint8, device=scale.device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds(lambda: target.copy_(source))
    square = torch.randn(scale.square, scale.square, dtype=torch.bfloat16, device=scale.device)
    return copied, 2 * scale.square**3 / seconds(lambda: square @ square)


def make_policy(scale: Scale) -> Any:
    """A Qwen2.5 of this shape with random weights and a fresh adapter."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**scale.shape, bos_token_id=None, eos_token_id=None)
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(), torch.device(scale.device):
        torch.manual_seed(0)
        return add_lora(Qwen2ForCausalLM(config).to(torch.bfloat16), LoraSpec(), seed=0).eval()


def run(scale: Scale = CARD) -> Iterator[Row]:
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("needs a CUDA card; there is none here, so nothing was measured")
    copied, multiplied = rates(scale)
    model, stop, rows, new = make_policy(scale), StopTags(make_tokenizer(), ()), scale.rows, scale.new
    weights = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(*WORDS, (rows, scale.prompt), generator=generator).tolist()
    floor = new * max(2 * weights / copied, 2 * weights * rows / multiplied) + 2 * weights * rows * scale.prompt / multiplied
    about = {"required": None, "peer": "arithmetic floor of this card", "equal": "not compared"}
    autocast = torch.autocast(scale.device, torch.bfloat16)
    with autocast, MixedAdapters(model, [TRAINED]) as adapters:
        spent = seconds(lambda: generate(model, prompts, [new] * rows, [stop] * rows, rows, adapters))
    case = f"{rows} rows, {new} tokens after {scale.prompt}, {weights / 1e9:.1f} B bfloat16, wall time"
    yield Row(case=case, ours=spent, theirs=floor, **about)
    trajectories = make_trajectories(rows)
    with autocast:
        spent = seconds(lambda: train(model, trajectories, scale.device, scale.pass_tokens))
    floor = 4 * weights * sum(map(length, trajectories)) / multiplied
    case = f"training pass of {rows} trajectories, {weights / 1e9:.1f} B bfloat16, LoRA, wall time"
    yield Row(case=case, ours=spent, theirs=floor, **about)
