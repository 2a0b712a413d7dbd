"""K/V of what rows have to read before they write: new prompts, documents, and the first token of each turn."""

from __future__ import annotations

import torch
from torch import Tensor

from zs_lightning.generation.decoding import Decoding, Launched
from zs_lightning.generation.rows import Row
from zs_lightning.generation.sampler import Settings, sample
from zs_lightning.generation.transfer import Drawn, upload

PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Most tokens of one prefill forward, padding included: what a CPU's caches hold, what keeps a card busy."""
PADDING = {"cpu": 96, "cuda": 1536}
"""Most padding of one prefill forward in tokens: about what another forward costs."""


class Prefill:
    """Reads the new tokens of rows that have a slot."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding, self.cache, self.device = decoding, decoding.cache, decoding.device

    def launch(self, rows: list[Row]) -> Launched:
        """Fills the rows' K/V and draws the first token of each row's turn."""
        logits = self._logits(rows)
        settings = Settings.of([row.request.sampling for row in rows], self.device)
        seeds, lengths = upload([[row.request.seed for row in rows], [row.length for row in rows]], self.device)
        for row in rows:
            row.drawn += 1
        return Launched(list(rows), Drawn(*sample(logits, settings, seeds, lengths)))

    def _logits(self, rows: list[Row]) -> Tensor:
        """Each row's next-token logits [n, V]. Equal new prompts are run once."""
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
        logits: dict[Row, Tensor] = {}
        chunk: list[tuple[Row, list[int]]] = []
        tokens, most_tokens, most_padding = 0, PREFILL_TOKENS[self.device.type], PADDING[self.device.type]
        for item in work:
            padded = (len(chunk) + 1) * len(item[1])
            if chunk and (padded > most_tokens or padded - tokens - len(item[1]) > most_padding):
                self._run(chunk, logits)
                chunk, tokens = [], 0
            chunk.append(item)
            tokens += len(item[1])
        self._run(chunk, logits)
        for row, leader in followers:
            self.cache.copy(leader.slot, row.slot, leader.length)
            row.length, logits[row] = leader.length, logits[leader]
        return torch.stack([logits[row] for row in rows])

    def _run(self, chunk: list[tuple[Row, list[int]]], logits: dict[Row, Tensor]) -> None:
        """One forward pass over the new tokens of some rows."""
        rows, device, decoding = [row for row, _ in chunk], self.device, self.decoding
        counts = torch.tensor([len(ids) for _, ids in chunk])
        width = int(counts.max())
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for _, ids in chunk])
        start = torch.tensor([row.length for row in rows])
        # Right padding: what a padded position writes lies beyond the row's length and is overwritten before it is read.
        positions = (start[:, None] + torch.arange(width)).clamp(max=decoding.max_length - 1)
        read = decoding.rounded(int(positions.max()) + 1)
        slots, positions = torch.tensor([row.slot for row in rows], device=device), positions.to(device)
        if decoding.adapters is not None:
            decoding.adapters.select([row.request.adapter for row in rows])
        states = decoding.hidden(slots, input_ids.to(device), positions, positions, read)
        last = states[torch.arange(len(chunk), device=device), (counts - 1).to(device)]
        for (row, ids), row_logits in zip(chunk, decoding.head(last), strict=True):
            row.length += len(ids)
            logits[row] = row_logits
