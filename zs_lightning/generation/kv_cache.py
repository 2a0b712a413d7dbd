"""The K/V memory, one slot a row. Shapes: n rows of a forward pass with q new tokens each."""

# All of it is taken at once and stays where it is: rows come and go without an allocation, and a
# CUDA graph can hold its addresses. How much fits is planned before: Linux hands out more memory
# than there is, and ends the process that fills it. Rows that do not fit wait.
# The cache interface of transformers calls `update` with the new states alone, so which slots are
# read, and where is written, is said by `aim` before each forward pass.

import functools
import logging
import os
import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from zs_lightning.errors import UserError

FRACTION = 0.6
"""Share of the free memory that rows may take; prefill, logits and other programs need the rest."""
# What Linux says of the machine's memory, and of the container's, if it has a limit of its own.
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
_log = logging.getLogger(__name__)


def _shape(config: Any, slots: int, max_length: int) -> tuple[int, ...]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (config.num_hidden_layers, slots, config.num_key_value_heads, max_length, head_dim)


def slot_bytes(config: Any, max_length: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one row of `max_length` tokens."""
    return 2 * prod(_shape(config, 1, max_length)) * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be taken, torch's own unused blocks included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found = re.search(r"^MemAvailable: *(\d+) kB", _text(MEMINFO), re.MULTILINE)
    free = int(found[1]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = _text(CGROUP / "memory.max").strip()
    used = _text(CGROUP / "memory.current").strip()
    if most.isdigit() and used.isdigit():
        # Files that are kept in memory count as used until somebody else wants it.
        stat = _text(CGROUP / "memory.stat")
        files = re.findall(r"^(?:in)?active_file (\d+)", stat, re.MULTILINE)
        free = min(free, int(most) - int(used) + sum(map(int, files)))
    return max(0, free)


def host_bytes() -> int:
    """Bytes of all memory of this machine, or of the container if that has less."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = _text(CGROUP / "memory.max").strip()
    return min(whole, int(most)) if most.isdigit() else whole


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def plan_slots(wanted: int, slot: int, free: int) -> int:
    """At most `wanted` rows of `slot` bytes in FRACTION of the free ones. UserError if none."""
    fitting = int(free * FRACTION) // slot
    if fitting < 1:
        needed = f"one rollout needs {slot / 1e9:.2f} GB of keys and values"
        there = f"{FRACTION:.0%} of the free memory are {free * FRACTION / 1e9:.2f} GB"
        raise UserError(f"rollout.max_length: {needed}, and {there}; lower max_length, or set quantization: nf4")
    return min(wanted, fitting)


@functools.cache
def say_fewer(fitting: int, wanted: int, max_length: int) -> None:
    """Says that a generator has fewer slots than asked for."""
    # Once, though on a card a generator is made for every rollout.
    _log.warning(
        "slots: memory holds %d of the %d rows of %d tokens asked for; fewer at a time take longer, "
        "and how many they are depends on what else runs here: for runs that repeat bit for bit "
        "set slots (of rollout or search) to no more",
        *(fitting, wanted, max_length),
    )


class SlotCache(Cache):
    """Keys and values [layers, slots, kv_heads, max_length, head_dim] of full attention."""

    def __init__(self, config: Any, slots: int, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.max_length = max_length
        self.device = device
        shape = _shape(config, slots, max_length)
        # Zeros, not empty: masked positions are multiplied by 0, and 0 · NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def aim(self, rows: int | Tensor, positions: Tensor, read: int) -> None:
        """Says where the next forward pass writes, and that it attends to `read` positions.

        Args:
            rows: n for the slots 0..n-1, read as a view, or slot numbers [n], gathered in a copy.
            positions: [n, q] int64, where the new tokens of each row are written.
        """
        self.read = read
        self.rows: slice | Tensor = slice(0, rows) if isinstance(rows, int) else rows
        slots = torch.arange(rows, device=positions.device) if isinstance(rows, int) else rows
        self.target = (slots[:, None].expand_as(positions), slice(None), positions)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes states [n, kv_heads, q, head_dim] and returns [n, kv_heads, read, head_dim]."""
        keys = self.keys[layer_idx]
        values = self.values[layer_idx]
        # Under autocast states come in a lower precision than the weights.
        keys[self.target] = key_states.transpose(1, 2).to(keys.dtype)
        values[self.target] = value_states.transpose(1, 2).to(values.dtype)
        return keys[self.rows, :, : self.read], values[self.rows, :, : self.read]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Nothing: positions and masks are given to each forward pass."""
        return 0

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot into another."""
        if source != target:
            for memory in (self.keys, self.values):
                memory[:, target, :, :length] = memory[:, source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchanges the first `length` positions of two slots."""
        if one != other:
            for memory in (self.keys, self.values):
                held = memory[:, one, :, :length].clone()
                memory[:, one, :, :length] = memory[:, other, :, :length]
                memory[:, other, :, :length] = held
