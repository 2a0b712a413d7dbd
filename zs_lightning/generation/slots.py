"""How many rows fit: K/V memory is planned before it is taken."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from zs_lightning.errors import UserError

FRACTION = 0.6
"""Of the memory that is free when the generator is made; the rest is for prefill, logits and what else runs on the card."""
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
"""What Linux says of the machine's memory, and of the container's, if it has a limit of its own."""
_log = logging.getLogger(__name__)
_said: set[tuple[int, int]] = set()


def slot_bytes(config: Any, max_length: int, dtype: torch.dtype) -> int:
    """Keys and values of one row of `max_length` tokens."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * max_length * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken, torch's own unused blocks included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found = re.search(r"^MemAvailable: *(\d+) kB", _text(MEMINFO), re.MULTILINE)
    free = int(found[1]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most, used = _text(CGROUP / "memory.max").strip(), _text(CGROUP / "memory.current").strip()
    if most.isdigit() and used.isdigit():
        # Files that are kept in memory count as used until somebody else wants it.
        files = re.findall(r"^(?:in)?active_file (\d+)", _text(CGROUP / "memory.stat"), re.MULTILINE)
        free = min(free, int(most) - int(used) + sum(map(int, files)))
    return max(0, free)


def host_bytes() -> int:
    """All memory of this machine, or of the container if that has less."""
    whole, most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _text(CGROUP / "memory.max").strip()
    return min(whole, int(most)) if most.isdigit() else whole


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def plan_slots(wanted: int, slot: int, free: int) -> int:
    """At most `wanted` rows of `slot` bytes in FRACTION of the free bytes.

    Raises:
        UserError: not even one row fits.
    """
    fitting = int(free * FRACTION) // slot
    if fitting < 1:
        raise UserError(
            f"rollout.max_length: one rollout needs {slot / 1e9:.2f} GB of keys and values, and {FRACTION:.0%} of the free "
            f"memory are {free * FRACTION / 1e9:.2f} GB; lower max_length, or quantise the models (quantization: nf4)"
        )
    return min(wanted, fitting)


def say_fewer(fitting: int, wanted: int, max_length: int) -> None:
    """Says that a generator has fewer slots than asked for; once, though a card's generator is made for every rollout."""
    if (wanted, max_length) not in _said:
        _said.add((wanted, max_length))
        _log.warning(
            "slots: memory holds %d of the %d rows of %d tokens asked for; fewer at a time take longer, and how many they are "
            "depends on what else runs here: for runs that repeat bit for bit set slots (of rollout or search) to no more",
            *(fitting, wanted, max_length),
        )
