"""The decoding step: one token for each live row.

What a step reads lies in buffers that stay where they are, so that a CUDA graph can replay it; while the same rows go on,
a step needs nothing from the host. Head and sampling are launched after it: they are few kernels, and the vocabulary-wide
logits need no place of their own in each graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zs_lightning.generation.graphs import CudaRecorder, Graphs
from zs_lightning.generation.kv_cache import SlotCache
from zs_lightning.generation.mixed_adapters import MixedAdapters
from zs_lightning.generation.rows import Row
from zs_lightning.generation.sampler import Settings, sample
from zs_lightning.generation.transfer import Drawn, upload


@dataclass(frozen=True)
class Manner:
    """How a kind of device is used."""

    read: int
    """K/V lengths are rounded up to a multiple of this, so that few shapes occur."""
    rows: int = 0
    """Rows of a step are filled up to this number, or its doubles, or all slots; 0: no row is computed in vain."""
    late: bool = False
    """Whether a step is launched before the tokens of the one before it are read, so that the device never waits."""
    recorder: Callable[[torch.device], Any] | None = None
    """What makes graphs of steps."""


MANNERS = {"cpu": Manner(read=32), "cuda": Manner(read=256, rows=8, late=True, recorder=CudaRecorder)}


@dataclass
class Launched:
    """A step that may not have been read yet."""

    rows: list[Row | None]
    """In the order of what was drawn; None for one that turned out to have ended before."""
    drawn: Drawn


class Decoding:
    """Launches the forward passes of one model with one K/V memory.

    Args:
        base: the transformers model, LoRA layers included.
        adapters: entered while steps are launched.
    """

    def __init__(
        self, base: Any, cache: SlotCache, slots: int, max_length: int, adapters: MixedAdapters | None, device: torch.device
    ) -> None:
        self.decoder, self.head = base.get_decoder(), base.get_output_embeddings()
        self.cache, self.slots, self.max_length, self.adapters, self.device = cache, slots, max_length, adapters, device
        self.manner = MANNERS[device.type]
        # Layers in int8 look for outliers, for which the host waits: no graph can hold them.
        waiting = any(hasattr(getattr(module, "weight", None), "CB") for module in base.modules())
        self.graphs = Graphs(self.manner.recorder(device), device) if self.manner.recorder and not waiting else None
        self.lora = next((module for module in base.modules() if hasattr(module, "lora_A")), None)
        self.ids = torch.zeros(slots, 1, dtype=torch.long, device=device)
        # Of each row the position of its new token, and where its K/V are written: they differ in rows that are computed
        # in vain. Those write into a parked row's last position, which no row can fill: its last token is never read.
        self.places = torch.zeros(2 if self.manner.rows else 1, slots, 1, dtype=torch.long, device=device)
        self.mask = torch.empty(0)
        self.stale = True
        """Whether other rows than before are to be launched, or the same ones in another order or with new tokens."""
        # Of the rows that are launched, from the first launch on; the longest context with its new token.
        self.tokens: Tensor
        self.seeds: Tensor
        self.settings: Settings
        self.longest: int

    def hidden(self, rows: int | Tensor, ids: Tensor, positions: Tensor, targets: Tensor, read: int) -> Tensor:
        """Hidden states [n, q, d] of the new tokens `ids` [n, q] of the rows (as in SlotCache.aim), none beyond `read`.

        Args:
            positions: [n, q] of the tokens, which attend to all up to their own.
            targets: [n, q], where keys and values are written.
        """
        mask = (torch.arange(read, device=self.device) <= positions[:, :, None])[:, None]
        self.cache.aim(rows, targets, read)
        return self.decoder(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True
        ).last_hidden_state

    def rounded(self, length: int) -> int:
        """How much of the K/V memory is read for contexts of at most `length` tokens."""
        return min(-(-length // self.manner.read) * self.manner.read, self.max_length)

    def launch(self, rows: list[Row], before: Launched | None) -> Launched:
        """Draws a token for each of the rows, which are those in the slots 0..n-1.

        Args:
            before: the last step, if it has not been read: its tokens are on the device alone.
        """
        live = len(rows)
        if self.stale:
            self._set_up(rows, before)
        else:
            self.ids[:live, 0] = self.tokens
            self.places[:, :live] += 1
            self.longest += 1
        self.stale = False
        count, read = self._padded(live), self.rounded(self.longest)
        if self.adapters is not None:
            self.adapters.mask = self.mask[:count]
        # Views that are made here, not inside: a graph has the addresses of the buffers as they are now.
        compute = partial(self.hidden, count, self.ids[:count], self.places[0, :count], self.places[-1, :count], read)
        states = self.graphs.run((count, read), self._state(), live, compute) if self.graphs else compute()
        self.tokens, logprobs = sample(self.head(states[:live, -1]), self.settings, self.seeds, self.places[0, :live, 0] + 1)
        for row in rows:
            row.length += 1
            row.drawn += 1
        return Launched(list(rows), Drawn(self.tokens, logprobs))

    def _set_up(self, rows: list[Row], before: Launched | None) -> None:
        """Fills the buffers for rows other than before; a token that has not been read comes from the step before."""
        live = len(rows)
        unread = {} if before is None else {row: i for i, row in enumerate(before.rows)}
        sources = [unread.get(row, -1) for row in rows]
        lengths = [row.length for row in rows]
        requests = [row.request for row in rows]
        columns = upload([sources, [row.last or 0 for row in rows], lengths, [r.seed for r in requests]], self.device)
        ids = columns[1]
        if before is not None:
            ids = torch.where(columns[0] < 0, ids, before.drawn.tokens[columns[0].clamp(min=0)])
        if self.manner.rows:
            self.places[1] = self.max_length - 1
        self.ids[:live, 0] = ids
        self.places[:, :live, 0] = columns[2]
        self.seeds, self.longest = columns[3], max(lengths) + 1
        self.settings = Settings.of([request.sampling for request in requests], self.device)
        if self.adapters is not None:
            masks = self.adapters.masks([request.adapter for request in requests])
            if self.mask.dtype != masks.dtype or not len(self.mask):
                self.mask = masks.new_zeros(self.slots, *masks.shape[1:])
            self.mask[:live] = masks

    def _padded(self, live: int) -> int:
        """Rows to compute for `live` ones."""
        if not self.manner.rows:
            return live
        return min(max(self.manner.rows, 1 << (live - 1).bit_length()), self.slots)

    def _state(self) -> tuple[Any, ...]:
        """What the kernels of a step depend on besides its shape: which adapters are at work, and where their weights are."""
        lora = self.lora
        peft = () if lora is None else (lora.merged, lora.disable_adapters, tuple(lora.active_adapters))
        return (*peft, self.adapters and self.adapters.entries, self.mask.data_ptr())
