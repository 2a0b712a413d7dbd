"""Reads what rows have to read before they write: new prompts, documents, the last token drawn."""

# A turn begins here: the logits behind its last new token give its first token.
# Several rows are read in one forward pass, padded on the right. They are sorted by their number of
# new tokens and cut into chunks where padding would cost more than another pass. A group's rollouts
# begin with the same prompt: it is read once, and its keys and values are copied.

import torch
from torch import Tensor

from zs_lightning.generation.decoding import Decoding
from zs_lightning.generation.rows import Launched, Row
from zs_lightning.generation.sampler import Settings, sample, upload

PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Most tokens of one pass, padding included: what a CPU's caches hold, what keeps a card busy."""
PADDING = {"cpu": 96, "cuda": 1536}
"""Most padding of one pass in tokens: about what another pass costs."""
Work = list[tuple[Row, list[int]]]  # Rows with the ids that they have not read.


class Prefill:
    """Reads the new tokens of rows that have a slot."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.device = decoding.device

    def launch(self, rows: list[Row]) -> Launched:
        """Fills the rows' K/V and draws the first token of each row's turn."""
        logits = self._logits(rows)
        settings = Settings.of([row.request.sampling for row in rows], self.device)
        seeds = upload([row.request.seed for row in rows], self.device)
        lengths = upload([row.length for row in rows], self.device)
        for row in rows:
            row.drawn += 1
        return Launched(rows, *sample(logits, settings, seeds, lengths))

    def _logits(self, rows: list[Row]) -> Tensor:
        """Each row's next-token logits, [n, V]."""
        leaders: dict[tuple[str, tuple[int, ...]], Row] = {}
        followers: list[tuple[Row, Row]] = []
        work: Work = []
        for row in rows:
            # Of a later turn also the last token of the one before: drawn, but read by no pass.
            ids = row.context[row.length :]
            # The adapter is part of the key: keys and values are computed with it.
            leader = leaders.setdefault((row.request.adapter, tuple(ids)), row) if not row.length else row
            if leader is row:
                work.append((row, ids))
            else:
                followers.append((row, leader))
        logits: dict[Row, Tensor] = {}
        for chunk in self._chunks(work):
            self._run(chunk, logits)
        for row, leader in followers:
            self.decoding.cache.copy(leader.slot, row.slot, leader.length)
            row.length = leader.length
            logits[row] = logits[leader]
        return torch.stack([logits[row] for row in rows])

    def _chunks(self, work: Work) -> list[Work]:
        """The rows of each forward pass, shortest first."""
        chunks: list[Work] = []
        tokens = 0
        for row, ids in sorted(work, key=lambda item: len(item[1])):
            padded = (len(chunks[-1]) + 1) * len(ids) if chunks else 0
            padding = padded - tokens - len(ids)
            kind = self.device.type
            if not chunks or padded > PREFILL_TOKENS[kind] or padding > PADDING[kind]:
                chunks.append([])
                tokens = 0
            chunks[-1].append((row, ids))
            tokens += len(ids)
        return chunks

    def _run(self, chunk: Work, logits: dict[Row, Tensor]) -> None:
        """One forward pass over the new tokens of some rows, which adds their logits [V]."""
        decoding = self.decoding
        rows = [row for row, _ in chunk]
        counts = torch.tensor([len(ids) for _, ids in chunk])
        width = int(counts.max())
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for _, ids in chunk])
        start = torch.tensor([row.length for row in rows])
        # What a padded position writes lies beyond the row's length and is overwritten before it
        # is read; at the end of the memory padding piles up on the last position.
        positions = (start[:, None] + torch.arange(width)).clamp(max=decoding.cache.max_length - 1)
        read = decoding.rounded(int(positions.max()) + 1)
        slots = torch.tensor([row.slot for row in rows], device=self.device)
        positions = positions.to(self.device)
        if decoding.adapters is not None:
            decoding.adapters.select([row.request.adapter for row in rows])
        states = decoding.hidden(slots, input_ids.to(self.device), positions, positions, read)
        states = states[torch.arange(len(chunk), device=self.device), (counts - 1).to(self.device)]
        for (row, ids), row_logits in zip(chunk, decoding.head(states), strict=True):
            row.length += len(ids)
            logits[row] = row_logits
