"""One decoding step in which half the rows are the policy's and half the simulator's, two LoRA adapters on one base.

Ours runs as in the generator: large products by oneDNN on a CPU. The peers run as transformers and PEFT do; `no adapter, our
products` is the base alone with the generator's products, so that it can be seen what the adapters cost by themselves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benches.harness import Row, UnequalResultsError, compare
from benches.rollout_search import with_adapters
from benches.work import WORDS, make_model
from zs_lightning.generation import MixedAdapters
from zs_lightning.generation.kv_cache import SlotCache
from zs_lightning.generation.packing import Packing
from zs_lightning.models.loading import load_model
from zs_lightning.models.specs import ModelSpec

ROWS = (16, 64, 256)
SPECS = {
    "float32": ModelSpec(device="cpu"),
    "bf16-mixed": ModelSpec(device="cpu", dtype="bfloat16"),
    "nf4": ModelSpec(device="cpu", quantization="nf4"),
}
SHAPE = "small"
CONTEXT = 128
"""Positions of K/V that the step reads."""
REPEATS = 31
"""Timed rounds: one step is short, so many more of them than elsewhere."""
REQUIRED = 1 / 1.15
"""Of the base's time / ours: two adapters may cost at most 15 % on top of none."""
TOLERANCE = 1e-4
"""Largest difference of a logit from PEFT's own mixed batch."""
ROUNDED = 0.05
"""The same in bf16-mixed, the precision of the presets, relative to the largest logit: layers multiply roundings."""


@torch.no_grad()
def step(model: Any, memory: SlotCache, ids: Tensor, **options: Any) -> Tensor:
    """Logits [n, 1, V] of one new token a row, at the last position of the context."""
    rows = len(ids)
    positions = torch.full((rows, 1), CONTEXT - 1)
    memory.aim(rows, positions, CONTEXT)
    mask = torch.ones(rows, 1, 1, CONTEXT, dtype=torch.bool)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "past_key_values": memory}
    return model(**inputs, use_cache=True, **options).logits


def packed_step(model: Any, packing: Packing, memory: SlotCache, ids: Tensor) -> Tensor:
    with packing:
        return step(model, memory, ids)


def mixed(model: Any, adapters: MixedAdapters, packing: Packing, memory: SlotCache, ids: Tensor, names: list[str]) -> Tensor:
    adapters.select(names)
    return packed_step(model, packing, memory, ids)


def time_only(work: Callable[[], Tensor]) -> Callable[[], None]:
    """For sides whose weights are others, and so are their logits."""

    def run_it() -> None:
        work()

    return run_it


def same_logits(kind: str, ours: Tensor, theirs: Tensor | None) -> str:
    """Raises UnequalResultsError if logits differ by more than rounding."""
    if theirs is None:
        return "other weights"
    limit = ROUNDED * float(theirs.abs().max()) if kind == "bf16-mixed" else TOLERANCE
    error = float((ours - theirs).abs().max())
    if not error <= limit:
        raise UnequalResultsError(f"logits differ by {error:.1e} from PEFT's in {kind}, expected at most {limit:.1e}")
    return f"logits within {error:.0e}"


def memory_of(base: Any, rows: int) -> SlotCache:
    """K/V that are full of noise."""
    memory = SlotCache(base.config, rows, CONTEXT, base.dtype, torch.device("cpu"))
    for part in (memory.keys, memory.values):
        part.normal_(generator=torch.Generator().manual_seed(0))
    return memory


def cases(kind: str, folder: str) -> Iterator[Row]:
    spec = replace(SPECS[kind], path=folder)
    base, peft, ours = load_model(spec), with_adapters(load_model(spec)), with_adapters(load_model(spec))
    base_packing, our_packing = Packing(base, base.device), Packing(ours.get_base_model(), base.device)
    peft.set_adapter("policy")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16-mixed")
    with autocast, MixedAdapters(ours, ["policy", "simulator"]) as adapters:
        for rows in ROWS:
            memory, names = memory_of(base, rows), ["policy", "simulator"] * (rows // 2)
            ids = torch.randint(*WORDS, (rows, 1), generator=torch.Generator().manual_seed(1))
            sides = {
                "ours": partial(mixed, ours, adapters, our_packing, memory, ids, names),
                "no adapter": partial(step, base, memory, ids),
                "no adapter, our products": partial(packed_step, base, base_packing, memory, ids),
                "one adapter": partial(step, peft, memory, ids),
                "PEFT adapter_names": partial(step, peft, memory, ids, adapter_names=names),
            }
            same = partial(same_logits, kind)
            same(sides["ours"](), sides["PEFT adapter_names"]())
            alone = {
                name: (side if name in ("ours", "PEFT adapter_names") else time_only(side)) for name, side in sides.items()
            }
            seconds, equal = compare(alone, same, REPEATS)
            for peer in list(sides)[1:]:
                yield Row(
                    case=f"{rows} rows, {kind}",
                    peer=peer,
                    ours=seconds["ours"],
                    theirs=seconds[peer],
                    required=REQUIRED if peer == "no adapter" else None,
                    equal=equal[peer],
                )


def run() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        make_model(SHAPE, ours=True).save_pretrained(folder)
        for kind in SPECS:
            yield from cases(kind, folder)
