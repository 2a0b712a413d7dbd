"""A slot generator over the unmodified transformers forward (continuous batching).

Live rows fill the slots 0..live-1, so that a decoding step reads the K/V memory as a view. A row that ends its turn is
parked behind them with its K/V; `extend` prefills only what is new. Rows wait in a queue while no slot is free.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from zs_lightning.generation.decoding import Decoding, Launched
from zs_lightning.generation.kv_cache import SlotCache, check_attention
from zs_lightning.generation.mixed_adapters import MixedAdapters
from zs_lightning.generation.packing import Packing
from zs_lightning.generation.prefill import Prefill
from zs_lightning.generation.rows import Generated, Request, Row
from zs_lightning.generation.slots import FRACTION, free_bytes, plan_slots, say_fewer, slot_bytes


class Generator:
    """Generates for many rows at once.

    Args:
        model: a causal language model of transformers in eval mode; PEFT adapters inside it are used as they are.
        slots: most rows that can be alive or parked at the same time; fewer if the memory does not allow them.
        max_length: most tokens a row's context can have.
        adapters: for rows with different LoRA adapters; installed by the caller while the generator steps.
        reserved: slots that only rows which are not kept may take. Such rows end by themselves, so rows that are parked
            until another row's turn has ended (a policy's that wait for documents) never block each other.

    Raises:
        UserError: no slots, no memory for any, a model without full attention, or a request that does not fit into max_length.
    """

    def __init__(
        self, model: Any, slots: int, max_length: int, adapters: MixedAdapters | None = None, reserved: int = 0
    ) -> None:
        if slots - reserved < 1:
            raise ValueError(f"slots: expected at least 1, got {slots - reserved}")
        self.adapters, self.reserved = adapters, reserved
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model = model
        check_attention(base.config, max_length)
        self.device, self.max_length = base.get_output_embeddings().weight.device, max_length
        dtype = next(p.dtype for p in base.parameters() if p.dtype.is_floating_point)
        self.packing = Packing(base, self.device)
        free, slot = free_bytes(self.device), slot_bytes(base.config, max_length, dtype)
        if (free - self.packing.bytes) * FRACTION < (reserved + 1) * slot:  # Slowly is better than not at all.
            self.packing.give_up()
        fitting = plan_slots(slots, slot, free - self.packing.bytes)
        if fitting < slots:
            say_fewer(fitting, slots, max_length)
        if fitting <= reserved:
            raise ValueError(f"search.slots: {reserved} slots are for the simulator alone, but only {fitting} fit; lower it")
        slots = fitting
        self.cache = SlotCache(base.config, slots, max_length, dtype, self.device)
        self.slots: list[Row | None] = [None] * slots
        self.rows: dict[str, Row] = {}
        self.queue: deque[Row] = deque()
        self.live = 0
        self.pending: Launched | None = None
        """A step that has been launched and not read; its rows are alive."""
        self.decoding = Decoding(base, self.cache, slots, max_length, adapters, self.device)
        self.prefill = Prefill(self.decoding)
        self.sampled_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.live or self.queue)

    @property
    def stalled(self) -> bool:
        """Whether parked rows hold every slot that the waiting rows need: `step` would raise until one is released."""
        if self.live or not self.queue or any(row.slot >= 0 for row in self.queue):
            return False
        return None not in self.slots or (self._room() < 1 and all(row.request.keep for row in self.queue))

    def _room(self) -> int:
        """Slots that rows which are kept may still take."""
        return len(self.slots) - self.reserved - sum(row is not None and row.request.keep for row in self.slots)

    def submit(self, request: Request) -> None:
        """Queues a new row, or the next turn of a parked one with the ids to append."""
        row = self.rows.get(request.key)
        if row is not None and not row.ended:
            raise ValueError(f"row {request.key} has not ended its turn yet")
        if request.max_new_tokens < 1 or not (row or request.ids):
            raise ValueError(f"row {request.key}: expected at least one token to start from and max_new_tokens >= 1")
        if request.adapter and request.adapter not in (self.adapters.names if self.adapters else []):
            raise ValueError(f"row {request.key}: the generator was not given an adapter called {request.adapter!r}")
        used = row.length + 1 if row else 0
        if used + len(request.ids) + request.max_new_tokens > self.max_length:
            raise ValueError(
                f"a row of {used} tokens cannot take {len(request.ids)} more and {request.max_new_tokens} new ones: "
                f"max_length is {self.max_length}"
            )
        if row is None:
            row = self.rows[request.key] = Row(request)
        row.request, row.token_ids, row.logprobs, row.drawn, row.ended = request, [], [], 0, False
        self.queue.append(row)

    def release(self, key: str) -> None:
        """Forgets a parked row. Raises UserError if its turn has not ended."""
        row = self.rows.get(key)
        if row is None:
            return
        if not row.ended:
            raise ValueError(f"row {key} has not ended its turn yet")
        del self.rows[key]
        if row.slot >= 0:
            self.slots[row.slot] = None

    def clear(self) -> None:
        """Forgets every row: what an error in the middle of a turn left behind."""
        self.slots = [None] * len(self.slots)
        self.rows.clear()
        self.queue.clear()
        self.live, self.pending = 0, None
        self.packing.forget()

    @torch.no_grad()
    def step(self) -> list[Generated]:
        """Admits waiting rows if there is room, launches one token for each live row, returns the turns that ended.

        On a card what is read are the tokens launched in the step before.
        """
        if self.model.training:
            raise RuntimeError("the generator needs a model in eval mode: dropout or checkpointing would change the samples")
        with self.packing:
            finished = self._admit()
            launched = self._launch()
        if self.decoding.manner.late:
            self.pending, launched = launched, self.pending
        return finished + (self._take(launched) if launched else [])

    def run(self) -> list[Generated]:
        """Steps until every queued row has ended its turn."""
        finished: list[Generated] = []
        while self.busy:
            finished += self.step()
        return finished

    # ------------------------------------------------------------------ admission

    def _admit(self) -> list[Generated]:
        """Prefills waiting rows. A few newcomers wait for more while enough others are alive."""
        if len(self.queue) < self.live // 8:
            return []
        free = [slot for slot in range(len(self.slots) - 1, self.live - 1, -1) if self.slots[slot] is None]
        room = self._room()
        admitted: list[Row] = []
        waiting: deque[Row] = deque()
        while self.queue:
            row = self.queue.popleft()
            if row.slot < 0:
                if not free or (row.request.keep and room < 1):
                    waiting.append(row)
                    continue
                row.slot = free.pop(0)
                room -= row.request.keep
                self.slots[row.slot] = row
            admitted.append(row)
        self.queue = waiting
        if not admitted:
            if not self.live and waiting:
                raise RuntimeError("every slot is held by a parked row; release rows or raise the number of slots")
            return []
        finished = self._take(self.prefill.launch(admitted))
        self.decoding.stale = True
        for row in admitted:
            if not row.ended:
                self._exchange(row.slot, self.live)
                self.live += 1
        return finished

    # ------------------------------------------------------------------ decoding

    def _launch(self) -> Launched | None:
        """Starts a token for each live row, whether or not the tokens before it have been read."""
        # What is known without reading: these rows have all their tokens.
        for row in sorted(self._unread(), key=lambda row: -row.slot):
            if row.drawn >= row.request.max_new_tokens:
                self._leave(row)
        if not self.live:
            return None
        return self.decoding.launch([row for row in self.slots[: self.live] if row is not None], self.pending)

    def _unread(self) -> list[Row]:
        """Rows whose last token has not been read."""
        return [] if self.pending is None else [row for row in self.pending.rows if row is not None]

    def _take(self, launched: Launched) -> list[Generated]:
        """Reads what was drawn and appends it to the rows; returns the turns that it ended."""
        rows = []
        for row, token, logprob in zip(launched.rows, *launched.drawn.read(), strict=True):
            if row is None:
                continue
            rows.append(row)
            row.last = token
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.stopped = row.request.stop.hit(row.token_ids)
            row.ended = row.stopped or len(row.token_ids) >= row.request.max_new_tokens
        self.sampled_tokens += len(rows)
        ended = [row for row in rows if row.ended]
        # From the last slot down, so that no gap is filled with a row that leaves next.
        for row in sorted(ended, key=lambda row: -row.slot):
            self._take_back(row)
            self._leave(row)
            if not row.request.keep:
                del self.rows[row.request.key]
        finished = []
        for row in ended:
            generated = Generated(row.request.key, row.token_ids, row.logprobs, row.stopped)
            if row.request.deliver:
                row.request.deliver(generated)
            else:
                finished.append(generated)
        return finished

    def _take_back(self, row: Row) -> None:
        """Drops what was launched for the row before it was known to have ended."""
        if self.pending is None or row.drawn == len(row.token_ids):
            return
        row.length, row.drawn = row.length - 1, row.drawn - 1
        self.pending.rows[self.pending.rows.index(row)] = None

    def _leave(self, row: Row) -> None:
        """Takes a row that has all its tokens out of the live ones, and out of the memory unless it is kept."""
        slot = row.slot
        if not row.request.keep and slot >= 0:
            self.slots[slot], row.slot = None, -1
        if 0 <= slot < self.live:
            self.live -= 1
            self._exchange(slot, self.live)
            self.decoding.stale = True

    def _exchange(self, one: int, other: int) -> None:
        """Exchanges the rows of two slots, either of which may be empty."""
        first, second = self.slots[one], self.slots[other]
        if first and second:
            self.cache.swap(one, other, max(first.length, second.length))
        elif first:
            self.cache.copy(one, other, first.length)
        elif second:
            self.cache.copy(other, one, second.length)
        self.slots[one], self.slots[other] = second, first
        if first:
            first.slot = other
        if second:
            second.slot = one
