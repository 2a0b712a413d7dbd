"""The decoding step: one token for each of n live rows. Shapes: q new tokens, H hidden size."""

# What a step reads lies in buffers that stay where they are: `ids`, `places`, `mask`. They are
# filled from the host only when other rows are launched than before (`_set_up`). While the same
# rows go on, each step puts its tokens into `ids` and moves `places` by one, all on the device, so
# that the host can launch it before it has seen the tokens of the step before.
# The forward pass (`hidden`) is then a function of buffers at fixed addresses, which is what a CUDA
# graph can replay. Vocabulary head and sampling are launched after it, outside of the graph: they
# are few kernels, and logits as wide as a vocabulary would need a place of their own in each graph.

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zs_lightning.generation.graphs import CudaRecorder, Graphs
from zs_lightning.generation.kv_cache import SlotCache
from zs_lightning.generation.mixed_adapters import MixedAdapters
from zs_lightning.generation.rows import Launched, Row
from zs_lightning.generation.sampler import Settings, sample, upload


@dataclass(frozen=True)
class Manner:
    """How a kind of device is used."""

    read: int
    """K/V lengths are rounded up to a multiple of this, so that few shapes occur."""
    rows: int = 0
    """Steps are filled up to this many rows, its doubles, or all slots; 0: none are in vain."""
    late: bool = False
    """Whether a step is launched before the tokens of the one before it are read."""
    recorder: Callable[[torch.device], Any] | None = None
    """What makes graphs of steps."""


# A card computes a step faster than the host launches it, and then stands still until its tokens
# are read and the next step is launched. Hence graphs, few shapes, and reading late. On a CPU
# there is nothing to overlap, and a row in vain costs as much as another.
MANNERS = {"cpu": Manner(read=32), "cuda": Manner(read=256, rows=8, late=True, recorder=CudaRecorder)}


class Decoding:
    """Launches the forward passes of one transformers model, LoRA included, with one K/V memory."""

    def __init__(self, base: Any, cache: SlotCache, adapters: MixedAdapters | None) -> None:
        self.decoder = base.get_decoder()
        self.head = base.get_output_embeddings()
        self.cache = cache
        self.adapters = adapters
        self.device = cache.device
        self.manner = MANNERS[self.device.type]
        # Layers in int8 look for outliers, for which the host waits: no graph can hold them.
        waiting = any(hasattr(getattr(m, "weight", None), "CB") for m in base.modules())
        recorder = None if waiting else self.manner.recorder
        self.graphs = Graphs(recorder(self.device), self.device) if recorder else None
        self.lora = next((m for m in base.modules() if hasattr(m, "lora_A")), None)
        self.ids = torch.zeros(cache.slots, 1, dtype=torch.long, device=self.device)
        # For each row the position of its new token, [0], and where its K/V are written, [-1].
        # They differ in rows that are computed in vain, which are parked or empty slots: these
        # write into the last position, where no row has anything: its last token is never read.
        kinds = 2 if self.manner.rows else 1
        self.places = torch.zeros(kinds, cache.slots, 1, dtype=torch.long, device=self.device)
        self.mask = torch.empty(0)
        self.stale = True
        """Whether other rows than before are to be launched, or in another order."""
        # Of the rows that were launched last, [n], and the longest of their contexts.
        self.tokens: Tensor
        self.seeds: Tensor
        self.settings: Settings
        self.longest: int

    def hidden(self, rows: int | Tensor, ids: Tensor, positions: Tensor, targets: Tensor, read: int) -> Tensor:
        """Hidden states [n, q, H] of the new tokens `ids` [n, q], none of them beyond `read`.

        Args:
            rows: n or [n], as in SlotCache.aim.
            positions: [n, q] of the tokens, which attend to all up to their own.
            targets: [n, q], where keys and values are written.
        """
        mask = (torch.arange(read, device=self.device) <= positions[:, :, None])[:, None]
        self.cache.aim(rows, targets, read)
        options = {"attention_mask": mask, "past_key_values": self.cache, "use_cache": True}
        return self.decoder(input_ids=ids, position_ids=positions, **options).last_hidden_state

    def rounded(self, length: int) -> int:
        """How much of the K/V memory is read for contexts of at most `length` tokens."""
        return min(-(-length // self.manner.read) * self.manner.read, self.cache.max_length)

    def launch(self, rows: list[Row], before: Launched | None) -> Launched:
        """Draws a token for each row of the slots 0..n-1; `before` is a step that was not read."""
        live = len(rows)
        if self.stale:
            self._set_up(rows, before)
        else:
            self.ids[:live, 0] = self.tokens
            self.places[:, :live] += 1
            self.longest += 1
        self.stale = False
        count = self._padded(live)
        read = self.rounded(self.longest)
        if self.adapters is not None:
            self.adapters.mask = self.mask[:count]
        # The views are made here, not inside: a graph keeps the addresses that it was made with.
        ids, positions, targets = self.ids[:count], self.places[0, :count], self.places[-1, :count]
        compute = partial(self.hidden, count, ids, positions, targets, read)
        states = self.graphs.run((count, read), self._state(), live, compute) if self.graphs else compute()
        logits = self.head(states[:live, -1])
        self.tokens, logprobs = sample(logits, self.settings, self.seeds, positions[:live, 0] + 1)
        for row in rows:
            row.length += 1
            row.drawn += 1
        return Launched(rows, self.tokens, logprobs)

    def _set_up(self, rows: list[Row], before: Launched | None) -> None:
        """Fills the buffers for other rows than before, or for rows in another order."""
        # A row's last token is known to the host or, not read yet, a token of the step before.
        live = len(rows)
        unread = {} if before is None else {row: i for i, row in enumerate(before.rows)}
        sources = [unread.get(row, -1) for row in rows]
        lengths = [row.length for row in rows]
        seeds = [row.request.seed for row in rows]
        columns = upload([sources, [row.context[-1] for row in rows], lengths, seeds], self.device)
        ids = columns[1]
        if before is not None:
            ids = torch.where(columns[0] < 0, ids, before.tokens[columns[0].clamp(min=0)])
        if self.manner.rows:
            self.places[1] = self.cache.max_length - 1
        self.ids[:live, 0] = ids
        self.places[:, :live, 0] = columns[2]
        self.seeds = columns[3]
        self.longest = max(lengths) + 1
        self.settings = Settings.of([row.request.sampling for row in rows], self.device)
        if self.adapters is not None:
            masks = self.adapters.masks([row.request.adapter for row in rows])
            # One buffer for all steps, but for when autocast changes their precision.
            if self.mask.dtype != masks.dtype or not len(self.mask):
                self.mask = masks.new_zeros(self.cache.slots, *masks.shape[1:])
            self.mask[:live] = masks

    def _padded(self, live: int) -> int:
        """Rows to compute for `live` ones, so that few shapes occur."""
        if not self.manner.rows:
            return live
        return min(max(self.manner.rows, 1 << (live - 1).bit_length()), self.cache.slots)

    def _state(self) -> tuple[Any, ...]:
        """What the kernels of a step depend on besides its shape: adapters, and where they lie."""
        lora = self.lora
        peft = () if lora is None else (lora.merged, lora.disable_adapters, tuple(lora.active_adapters))
        return (*peft, self.adapters and self.adapters.entries, self.mask.data_ptr())
