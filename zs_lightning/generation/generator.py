"""Generates for many rows at once, over the unmodified forward pass of transformers.

A row is a context that grows: a prompt, a turn that is sampled, documents, another turn. Its keys
and values stay in one slot of the K/V memory from turn to turn, and only what is new is read.
"""

# How it hangs together. `submit` queues a turn; each `step` does three things:
#   1. _admit: rows of the queue that find a slot are prefilled (prefill.py), which also draws the
#      first token of their turns.
#   2. _launch: one more token for each live row (decoding.py), those of this step included.
#   3. _take: tokens are read and appended to their rows; turns that they end are given back.
# Where memory does not suffice for that, the K/V memory is made anew with half the slots, and rows
# read their contexts again (`_start_over`): draws are functions of seeds and places, so that
# nothing is lost but time.
#
# Live rows fill the slots 0..live-1, with no gap: a decoding step then reads the K/V memory as a
# view, where any other choice of rows would have to be gathered into a copy at every token. So a
# row that comes or goes is exchanged with the one at the border (`_exchange`). Behind the border
# lie parked rows, which wait for documents with their K/V, and empty slots.
#
# On a card the host would wait for each token, and then the card for the host. So there step 2 is
# launched before step 3 has read the tokens of the launch before (`pending`). Whether a row has met
# a stop text is thus known one launch too late: a token may have been drawn in vain, which
# `_drop_unread` takes back. Whether it has all its tokens is known by counting, without reading.

from collections import deque
from typing import Any

import torch

from zs_lightning.errors import UserError
from zs_lightning.generation.decoding import Decoding
from zs_lightning.generation.kv_cache import FRACTION, SlotCache, free_bytes, plan_slots, say_fewer, slot_bytes
from zs_lightning.generation.memory import Fitting, completes
from zs_lightning.generation.mixed_adapters import MixedAdapters
from zs_lightning.generation.packing import Packing
from zs_lightning.generation.prefill import Prefill
from zs_lightning.generation.rows import Generated, Launched, Request, Row


class Generator:
    """Generates for many rows at once; rows that find no slot wait in a queue.

    Args:
        model: one in eval mode, as load_model gives it, with PEFT adapters as they are.
        slots: most rows that are alive or parked at the same time; fewer if memory is short. One
            Fitting for several generators lets them know what fitted before.
        max_length: most tokens of a row's context.
        adapters: for rows with different LoRA adapters; entered by the caller around the steps.
        reserved: slots that only rows which are not kept may take.

    Raises UserError if there is memory for no slot, or for none but the reserved ones.
    """

    def __init__(
        self,
        model: Any,
        slots: int | Fitting,
        max_length: int,
        adapters: MixedAdapters | None = None,
        reserved: int = 0,
    ) -> None:
        self.fitting = slots if isinstance(slots, Fitting) else Fitting("slots", slots, "lower max_length")
        if (free := self.fitting.most - reserved) < 1:
            raise ValueError(f"slots: expected at least 1, got {free}")
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self.base.config._attn_implementation not in ("sdpa", "sdpa_grouped"):
            # Others would take our masks of true and false for numbers to add.
            raise ValueError(f"expected sdpa attention; got {self.base.config._attn_implementation}")
        self.model = model
        self.adapters = adapters
        self.asked, self.reserved = reserved, reserved
        self.max_length = max_length
        self.device = self.base.get_output_embeddings().weight.device
        self.dtype = next(p.dtype for p in self.base.parameters() if p.dtype.is_floating_point)
        self.packing = Packing(self.base, self.device)
        self.rows: dict[str, Row] = {}
        self.queue: deque[Row] = deque()
        self.ended: list[Row] = []
        """Rows whose turns have ended and were not given back."""
        self.live = 0
        self.pending: Launched | None = None
        """A step that has been launched and not read; its rows are alive."""
        self.sampled_tokens = 0
        self._take_memory(self.packing.bytes)

    def _take_memory(self, kept: int = 0) -> None:
        """Makes the K/V memory, with no row in it; `kept` bytes are for others."""
        if self.asked:
            self.reserved = max(1, self.asked * self.fitting.now // self.fitting.most)
        free = free_bytes(self.device)
        slot = slot_bytes(self.base.config, self.max_length, self.dtype)
        # Packed copies make a step faster, but without memory for a row there is no step at all.
        if (free - kept) * FRACTION < (self.reserved + 1) * slot:
            self.packing.give_up()
            kept = 0
        slots = plan_slots(self.fitting.now, slot, free - kept)
        if slots < self.fitting.now:
            say_fewer(slots, self.fitting.now, self.max_length)
        if slots <= self.reserved:
            only = f"{self.reserved} slots are for the simulator alone, but only {slots} fit"
            raise UserError(f"search.slots: {only}; lower it")
        self.slots: list[Row | None] = [None] * slots
        self.cache = SlotCache(self.base.config, slots, self.max_length, self.dtype, self.device)
        self.decoding = Decoding(self.base, self.cache, self.adapters)
        self.prefill = Prefill(self.decoding)

    def _start_over(self) -> None:
        """Halves the slots; every row reads its context again when it finds one of them."""
        self.fitting.halve(least=2 if self.asked else 1)
        for row in self.rows.values():
            row.slot, row.length, row.drawn = -1, 0, len(row.token_ids)
        self.queue = deque(row for row in self.rows.values() if not row.ended)
        self.live, self.pending = 0, None
        self._remake()

    def _remake(self) -> None:
        """Makes the K/V memory anew, when the old one is gone."""
        del self.cache, self.decoding, self.prefill
        self._take_memory()

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.live or self.queue)

    @property
    def stalled(self) -> bool:
        """Whether parked rows hold all slots that the queue needs: `step` would raise."""
        if self.live or not self.queue or any(row.slot >= 0 for row in self.queue):
            return False
        keeping = self._room() < 1 and all(row.request.keep for row in self.queue)
        return keeping or None not in self.slots

    def _room(self) -> int:
        """Slots that rows which are kept may still take."""
        # Rows that are kept wait, parked, for others: the policy's for documents of a simulator in
        # the same generator. Could they take every slot, there would be none to write documents
        # in, for ever. Rows that are not kept end by themselves, and give their slots back.
        kept = sum(row is not None and row.request.keep for row in self.slots)
        return len(self.slots) - self.reserved - kept

    def submit(self, request: Request) -> None:
        """Queues a new row, or the next turn of a parked one. Raises ValueError for others."""
        key = request.key
        row = self.rows.get(key)
        if row is not None and not row.ended:
            raise ValueError(f"row {key} has not ended its turn yet")
        if request.max_new_tokens < 1 or not (row or request.ids):
            raise ValueError(f"row {key}: expected at least one token and max_new_tokens >= 1")
        if request.adapter and request.adapter not in (self.adapters.names if self.adapters else []):
            raise ValueError(f"row {key}: the generator has no adapter called {request.adapter!r}")
        used = len(row.context) if row else 0
        if used + len(request.ids) + request.max_new_tokens > self.max_length:
            more = f"{len(request.ids)} more and {request.max_new_tokens} new ones"
            raise ValueError(f"row {key}: {used} tokens and {more}, but max_length is {self.max_length}")
        if not self.rows and self.fitting.grows():
            self._remake()
        if row is None:
            row = self.rows[key] = Row(request)
        row.request = request
        row.context += request.ids
        row.token_ids, row.logprobs, row.drawn, row.ended = [], [], 0, False
        self.queue.append(row)

    def release(self, key: str) -> None:
        """Forgets a parked row. Raises ValueError if its turn has not ended."""
        row = self.rows.get(key)
        if row is not None:
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
        self.live, self.pending, self.ended = 0, None, []
        self.packing.forget()

    @torch.no_grad()
    def step(self) -> list[Generated]:
        """Admits waiting rows, gives each live row a token, and returns the turns that ended."""
        if self.model.training:
            # Dropout or checkpointing would change the samples.
            raise RuntimeError("the generator needs a model in eval mode")
        if not completes(self._advance):
            self._start_over()
        return self._finished()

    def _advance(self) -> None:
        with self.packing:
            self._admit()
            launched = self._launch()
        if self.decoding.manner.late:
            self.pending, launched = launched, self.pending
        if launched:
            self._take(launched)

    def run(self) -> list[Generated]:
        """Steps until every queued row has ended its turn."""
        finished: list[Generated] = []
        while self.busy:
            finished += self.step()
        return finished

    def _admit(self) -> None:
        """Prefills rows of the queue that find a slot, some of whose turns end with one token."""
        # A few newcomers wait for more while others are alive: a prefill stops them all.
        if len(self.queue) < self.live // 8:
            return
        # The last slots first, away from the border: a newcomer is exchanged there soon enough.
        free = [i for i in reversed(range(self.live, len(self.slots))) if self.slots[i] is None]
        room = self._room()
        admitted: list[Row] = []
        waiting: deque[Row] = deque()
        for row in self.queue:
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
                raise RuntimeError("every slot is held by a parked row; release some")
            return
        self._take(self.prefill.launch(admitted))
        self.decoding.stale = True
        for row in admitted:
            if not row.ended:
                self._exchange(row.slot, self.live)
                self.live += 1

    def _launch(self) -> Launched | None:
        """Starts a token for each live row, whether or not the tokens before have been read."""
        unread = [] if self.pending is None else self.pending.rows
        full = [row for row in unread if row and row.drawn >= row.request.max_new_tokens]
        for row in sorted(full, key=lambda row: -row.slot):
            self._leave(row)
        if not self.live:
            return None
        rows = [row for row in self.slots[: self.live] if row is not None]
        return self.decoding.launch(rows, self.pending)

    def _take(self, launched: Launched) -> None:
        """Reads what was drawn, appends it to its rows, and notes the turns that it ended."""
        ended = []
        for row, token, logprob in zip(launched.rows, *launched.read(), strict=True):
            if row is None:
                continue
            self.sampled_tokens += 1
            row.context.append(token)
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.stopped = row.request.stop.hit(row.token_ids)
            row.ended = row.stopped or len(row.token_ids) >= row.request.max_new_tokens
            if row.ended:
                ended.append(row)
        self.ended += ended
        # From the last slot down, so that no gap is filled with a row that leaves next.
        for row in sorted(ended, key=lambda row: -row.slot):
            self._drop_unread(row)
            self._leave(row)

    def _finished(self) -> list[Generated]:
        """Gives back the turns that have ended."""
        ended, self.ended = self.ended, []
        for row in ended:
            if not row.request.keep:
                del self.rows[row.request.key]
        # Only now is everything in order: who is called may submit rows.
        finished: list[Generated] = []
        for row in ended:
            generated = Generated(row.request.key, row.token_ids, row.logprobs, row.stopped)
            (row.request.deliver or finished.append)(generated)
        return finished

    def _drop_unread(self, row: Row) -> None:
        """Drops what was launched for the row before it was known to have ended."""
        # Its K/V is written already, one position too far, and will be overwritten.
        if self.pending is not None and row.drawn > len(row.token_ids):
            row.length, row.drawn = row.length - 1, row.drawn - 1
            self.pending.rows[self.pending.rows.index(row)] = None

    def _leave(self, row: Row) -> None:
        """Takes a row out of the live ones, and out of the memory unless it is kept."""
        slot = row.slot
        if not row.request.keep and slot >= 0:
            self.slots[slot] = None
            row.slot = -1
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
