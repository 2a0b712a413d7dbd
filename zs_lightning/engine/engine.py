"""A slot engine over the unmodified transformers forward (continuous batching).

Live rows fill the slots 0..live-1, so that a decoding step reads the K/V memory as a view. A row that ends its turn is
parked behind them with its K/V; `extend` prefills only what is new. Rows wait in a queue while no slot is free.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from zs_lightning.engine.adapters import MixedAdapters
from zs_lightning.engine.cache import SlotCache, check_attention
from zs_lightning.engine.memory import free_bytes, plan_slots, slot_bytes
from zs_lightning.engine.rows import Generated, Request, Row
from zs_lightning.engine.sampler import sample

READ_BUCKET = 32
"""K/V lengths are rounded up to this, so that few shapes occur."""
PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Most tokens of one prefill forward, padding included: what a CPU's caches hold, what keeps a card busy."""
PADDING = {"cpu": 96, "cuda": 1536}
"""Most padding of one prefill forward in tokens: about what another forward costs."""


class Engine:
    """Generates for many rows at once.

    Args:
        model: a causal language model of transformers in eval mode; PEFT adapters inside it are used as they are.
        slots: most rows that can be alive or parked at the same time; fewer if the memory does not allow them.
        max_length: most tokens a row's context can have.
        adapters: for rows with different LoRA adapters; installed by the caller while the engine steps.
        reserved: slots that only rows which are not kept may take. Such rows end by themselves, so rows that are parked
            until another row's turn has ended (a policy's that wait for documents) never block each other.

    Raises:
        ValueError: no slots, no memory for any, a model without full attention, or a request that does not fit into max_length.
    """

    def __init__(
        self, model: Any, slots: int, max_length: int, adapters: MixedAdapters | None = None, reserved: int = 0
    ) -> None:
        if slots - reserved < 1:
            raise ValueError(f"slots: expected at least 1, got {slots - reserved}")
        self.adapters, self.reserved = adapters, reserved
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model, self.decoder, self.head = model, base.get_decoder(), base.get_output_embeddings()
        check_attention(base.config, max_length)
        self.device, self.max_length = self.head.weight.device, max_length
        dtype = next(p.dtype for p in base.parameters() if p.dtype.is_floating_point)
        fitting = plan_slots(slots, slot_bytes(base.config, max_length, dtype), free_bytes(self.device))
        if fitting <= reserved:
            raise ValueError(f"search.slots: {reserved} slots are for the simulator alone, but only {fitting} fit; lower it")
        slots = fitting
        self.cache = SlotCache(base.config, slots, max_length, dtype, self.device)
        self.slots: list[Row | None] = [None] * slots
        self.rows: dict[str, Row] = {}
        self.queue: deque[Row] = deque()
        self.live = 0
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
            raise ValueError(f"row {request.key}: the engine was not given an adapter called {request.adapter!r}")
        used = row.length + 1 if row else 0
        if used + len(request.ids) + request.max_new_tokens > self.max_length:
            raise ValueError(
                f"a row of {used} tokens cannot take {len(request.ids)} more and {request.max_new_tokens} new ones: "
                f"max_length is {self.max_length}"
            )
        if row is None:
            row = self.rows[request.key] = Row(request)
        row.request, row.token_ids, row.logprobs, row.ended = request, [], [], False
        self.queue.append(row)

    def release(self, key: str) -> None:
        """Forgets a parked row. Raises ValueError if its turn has not ended."""
        row = self.rows.get(key)
        if row is None:
            return
        if not row.ended:
            raise ValueError(f"row {key} has not ended its turn yet")
        del self.rows[key]
        self.slots[row.slot] = None

    def clear(self) -> None:
        """Forgets every row: what an error in the middle of a turn left behind."""
        self.slots = [None] * len(self.slots)
        self.rows.clear()
        self.queue.clear()
        self.live = 0

    @torch.no_grad()
    def step(self) -> list[Generated]:
        """Admits waiting rows if there is room, samples one token for each live row, returns the turns that ended."""
        if self.model.training:
            raise RuntimeError("the engine needs a model in eval mode: dropout or checkpointing would change what is sampled")
        finished = self._admit()
        if self.live:
            finished += self._decode()
        return finished

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
        logits = self._prefill(admitted)
        finished = self._sample(admitted, logits)
        for row in admitted:
            if not row.ended:
                self._exchange(row.slot, self.live)
                self.live += 1
        return finished

    def _prefill(self, rows: list[Row]) -> Tensor:
        """K/V of the rows' new tokens; returns each row's next-token logits [n, V]. Equal new prompts are run once."""
        leaders: dict[tuple[str, tuple[int, ...]], Row] = {}
        followers: list[tuple[Row, Row]] = []
        work: list[tuple[Row, list[int]]] = []
        for row in rows:
            ids = row.request.ids if row.last is None else [row.last, *row.request.ids]
            leader = leaders.setdefault((row.request.adapter, tuple(ids)), row) if row.last is None else row
            if leader is row:
                work.append((row, ids))
            else:
                followers.append((row, leader))
        work.sort(key=lambda item: len(item[1]))
        logits: dict[int, Tensor] = {}
        chunk: list[tuple[Row, list[int]]] = []
        tokens, most_tokens, most_padding = 0, PREFILL_TOKENS[self.device.type], PADDING[self.device.type]
        for item in work:
            padded = (len(chunk) + 1) * len(item[1])
            if chunk and (padded > most_tokens or padded - tokens - len(item[1]) > most_padding):
                self._prefill_chunk(chunk, logits)
                chunk, tokens = [], 0
            chunk.append(item)
            tokens += len(item[1])
        self._prefill_chunk(chunk, logits)
        for row, leader in followers:
            self.cache.copy(leader.slot, row.slot, leader.length)
            row.length, logits[id(row)] = leader.length, logits[id(leader)]
        return torch.stack([logits[id(row)] for row in rows])

    def _prefill_chunk(self, chunk: list[tuple[Row, list[int]]], logits: dict[int, Tensor]) -> None:
        counts = torch.tensor([len(ids) for _, ids in chunk])
        width = int(counts.max())
        input_ids = torch.zeros(len(chunk), width, dtype=torch.long)
        for i, (_, ids) in enumerate(chunk):
            input_ids[i, : len(ids)] = torch.tensor(ids)
        start = torch.tensor([row.length for row, _ in chunk])
        # Right padding: what a padded position writes lies beyond the row's length and is overwritten before it is read.
        positions = (start[:, None] + torch.arange(width)).clamp(max=self.max_length - 1)
        slots = torch.tensor([row.slot for row, _ in chunk], device=self.device)
        states = self._forward([row for row, _ in chunk], slots, input_ids, positions)
        last = states[torch.arange(len(chunk), device=self.device), (counts - 1).to(self.device)]
        for (row, ids), row_logits in zip(chunk, self.head(last), strict=True):
            row.length += len(ids)
            logits[id(row)] = row_logits

    # ------------------------------------------------------------------ decoding

    def _decode(self) -> list[Generated]:
        rows = [row for row in self.slots[: self.live] if row is not None]
        input_ids = torch.tensor([[row.last] for row in rows])
        positions = torch.tensor([[row.length] for row in rows])
        logits = self.head(self._forward(rows, self.live, input_ids, positions)[:, -1])
        for row in rows:
            row.length += 1
        return self._sample(rows, logits)

    def _forward(self, rows: list[Row], slots: int | Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [n, q, d] of the rows' new tokens."""
        if self.adapters is not None:
            self.adapters.select([row.request.adapter for row in rows])
        read = min(-(-(int(positions.max()) + 1) // READ_BUCKET) * READ_BUCKET, self.max_length)
        mask = (torch.arange(read) <= positions[:, :, None])[:, None].to(self.device)
        positions = positions.to(self.device)
        self.cache.aim(slots, positions, read)
        return self.decoder(
            input_ids=input_ids.to(self.device),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _sample(self, rows: list[Row], logits: Tensor) -> list[Generated]:
        """Appends one token to each row; returns the turns that it ended."""
        device, settings = self.device, [row.request.sampling for row in rows]
        tokens, logprobs = sample(
            logits,
            torch.tensor([s.temperature for s in settings], device=device),
            torch.tensor([s.top_p for s in settings], device=device),
            torch.tensor([s.top_k for s in settings], device=device),
            torch.tensor([row.request.seed for row in rows], device=device),
            torch.tensor([row.length for row in rows], device=device),
        )
        self.sampled_tokens += len(rows)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.last = token
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.stopped = row.request.stop.hit(row.token_ids)
            row.ended = row.stopped or len(row.token_ids) >= row.request.max_new_tokens
        ended = [row for row in rows if row.ended]
        # From the last slot down, so that no gap is filled with a row that leaves next.
        for row in sorted(ended, key=lambda row: -row.slot):
            self._leave(row)
        finished = []
        for row in ended:
            generated = Generated(row.request.key, row.token_ids, row.logprobs, row.stopped)
            if row.request.deliver:
                row.request.deliver(generated)
            else:
                finished.append(generated)
        return finished

    def _leave(self, row: Row) -> None:
        """Takes a row whose turn ended out of the live ones, and out of the memory unless it is kept."""
        slot = row.slot
        if not row.request.keep:
            self.release(row.request.key)
        if slot < self.live:
            self.live -= 1
            self._exchange(slot, self.live)

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
