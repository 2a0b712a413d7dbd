"""Static K/V memory with one slot a row, behind the transformers cache interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from zs_lightning.errors import UserError


def check_attention(config: Any, max_length: int) -> None:
    """Raises UserError for models that a plain memory of keys and values would silently get wrong."""
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    window = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    if kinds or (window or max_length) < max_length:
        raise UserError(
            f"model: {config.model_type} has layers of kind {', '.join(sorted(kinds)) or 'sliding_attention'}, which need "
            "other state than keys and values; choose a model with full attention"
        )
    if config._attn_implementation not in ("sdpa", "sdpa_grouped"):
        raise UserError(f"model: generation needs sdpa attention; {config.model_type} came with {config._attn_implementation}")


class SlotCache(Cache):
    """Keys and values [layers, slots, kv_heads, max_length, head_dim]; every row writes at its own position.

    A forward pass is aimed first: at the live prefix of slots (read as a view) or at a list of slots (gathered).
    """

    def __init__(self, config: Any, slots: int, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, max_length, head_dim)
        # Zeros, not empty: masked positions are multiplied by 0, and 0 · NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def aim(self, rows: int | Tensor, positions: Tensor, read: int) -> None:
        """The next forward writes at `positions` [n, q] of the rows and attends to the first `read` positions.

        Args:
            rows: n for the slots 0..n-1, or the slot numbers [n].
        """
        self.read = read
        self.rows: slice | Tensor = slice(0, rows) if isinstance(rows, int) else rows
        slots = torch.arange(rows, device=positions.device) if isinstance(rows, int) else rows
        self.target = (slots[:, None].expand_as(positions), slice(None), positions)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes the new states [n, kv_heads, q, head_dim]; returns what to attend to, [n, kv_heads, read, head_dim]."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        # Under autocast states come in a lower precision than the weights.
        keys[self.target] = key_states.transpose(1, 2).to(keys.dtype)
        values[self.target] = value_states.transpose(1, 2).to(values.dtype)
        return keys[self.rows, :, : self.read], values[self.rows, :, : self.read]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one slot into another."""
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
