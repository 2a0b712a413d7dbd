"""How many rows fit: K/V memory is planned before it is taken."""

from __future__ import annotations

import os
from typing import Any

import torch

FRACTION = 0.6
"""Of the memory that is free when the engine is made; the rest is for prefill, logits and what else runs on the card."""


def slot_bytes(config: Any, max_length: int, dtype: torch.dtype) -> int:
    """Keys and values of one row of `max_length` tokens."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * max_length * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken, torch's own unused blocks included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def plan_slots(wanted: int, slot: int, free: int) -> int:
    """At most `wanted` rows of `slot` bytes in FRACTION of the free bytes.

    Raises:
        ValueError: not even one row fits.
    """
    fitting = int(free * FRACTION) // slot
    if fitting < 1:
        raise ValueError(
            f"rollout.max_length: one rollout needs {slot / 1e9:.2f} GB of keys and values, and {FRACTION:.0%} of the free "
            f"memory are {free * FRACTION / 1e9:.2f} GB; lower max_length, or quantise the models (quantization: nf4)"
        )
    return min(wanted, fitting)
